"""What tests of polyline attention share: cases, their inputs, a slow oracle.

The oracle is loops over tokens in NumPy that walk each path step by step, written from the
definition: it shares no code with the package.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from operator_cases import rounded_normal

from densezoo.kernels import polyline_attention

TENSORS = ("query", "key", "value", "log_alpha", "log_beta")
DECAYS = ("log_alpha", "log_beta")


@dataclass(frozen=True)
class Case:
    """A call: the map, the form, and how much steps decay.

    Attributes:
        grid: height and width, tokens.
        form: as the operator takes it.
        paths: as the operator takes it.
        decay: log decays are this times numbers of a half-normal distribution.
        value_dim: channels of a value, by default those of a key.
    """

    grid: tuple
    form: str = "full"
    paths: str = "both"
    decay: float = 0.5
    scale: float = None
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    value_dim: int = None

    def __post_init__(self):
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)

    @property
    def arguments(self):
        """What the operator takes beside tensors."""
        return dict(form=self.form, paths=self.paths, scale=self.scale)

    @property
    def id(self):
        parts = ["x".join(map(str, self.grid)), self.form, self.paths, f"decay{self.decay}"]
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        parts.append(f"b{self.batch}h{self.heads}c{self.head_dim}")
        if self.value_dim != self.head_dim:
            parts.append(f"v{self.value_dim}")
        return "_".join(parts)


# Maps that are square and not, of one row, one column, one token; no decay, one that leaves little
# of a step and one that underflows float32 within a line; channels that are no power of two.
ODD_CASES = [
    Case((1, 1)),
    Case((1, 1), "axial", heads=1),
    Case((1, 9), batch=2),
    Case((1, 9), "axial", batch=2),
    Case((9, 1), paths="row_first"),
    Case((9, 1), "axial", "row_first"),
    Case((4, 4), decay=0.0),
    Case((4, 4), "axial", decay=0.0),
    Case((3, 5), paths="row_first", decay=0.0, heads=1),
    Case((5, 7), batch=2, scale=1.0),
    Case((5, 7), "axial", batch=2, scale=1.0),
    Case((7, 5), paths="row_first", heads=3, head_dim=4),
    Case((7, 5), "axial", "row_first", heads=3, head_dim=4),
    Case((6, 9), decay=4.0, head_dim=16, value_dim=5),
    Case((6, 9), "axial", decay=4.0, head_dim=16, value_dim=5),
    Case((8, 6), decay=40.0),
    Case((8, 6), "axial", decay=40.0),
    Case((8, 6), "full", "row_first", decay=40.0, heads=1),
    Case((4, 11), decay=0.03, head_dim=20, value_dim=33, heads=1),
    Case((4, 11), "axial", "row_first", decay=0.03, head_dim=49, heads=1),
    Case((3, 3), head_dim=1, scale=0.0),
    Case((2, 17), "axial", value_dim=1),
]


def random_cases(number, seed, most_tokens=60):
    """Draw cases of every kind; the same for the same arguments."""
    draw = random.Random(seed)
    cases = []
    while len(cases) < number:
        grid = tuple(draw.choice([1, 2, 3, 5, 7, 8, 11, 16]) for _ in range(2))
        if grid[0] * grid[1] > most_tokens:
            continue
        cases.append(
            Case(
                grid,
                draw.choice(["full", "axial"]),
                draw.choice(["both", "both", "row_first"]),
                draw.choice([0.0, 0.01, 0.3, 0.3, 3.0, 30.0]),
                scale=draw.choice([None, None, 0.4]),
                batch=draw.choice([1, 2]),
                heads=draw.choice([1, 2, 3]),
                head_dim=draw.choice([1, 4, 6, 8]),
                value_dim=draw.choice([None, None, 3, 8]),
            )
        )
    return cases


def make_inputs(case, dtype=torch.float64, seed=0, device="cpu"):
    """Make {name: tensor} of a case, with the cotangent grad_out.

    Query, key and value are views of one (B, H, W, heads, channels) tensor and the decays of
    another one, as in models. The numbers are those of float16 and bfloat16 alike, so that every
    dtype computes on the same.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = rounded_normal(generator, dtype, device)
    dims = (case.head_dim, case.head_dim, case.value_dim)
    maps = normal(case.batch, *case.grid, case.heads * sum(dims))
    query, key, value = (
        part.unflatten(-1, (case.heads, -1))
        for part in maps.split([case.heads * dim for dim in dims], dim=-1)
    )
    decays = rounded_normal(generator)(case.batch, *case.grid, case.heads, 2).abs() * case.decay
    decays = (-decays).to(torch.bfloat16).to(torch.float16).to(device=device, dtype=dtype)
    log_alpha, log_beta = decays.unbind(-1)
    grad_out = normal(*query.shape[:-1], case.value_dim)
    return dict(
        query=query, key=key, value=value, log_alpha=log_alpha, log_beta=log_beta, grad_out=grad_out
    )


def run_case(case, inputs, backend=None):
    """Run the operator forward and backward: {"out", "grad_query", ...}."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in TENSORS}
    out = polyline_attention(**leaves, **case.arguments, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"])
    results = dict(out=out.detach())
    results.update((f"grad_{name}", grad) for name, grad in zip(leaves, grads, strict=True))
    return results


def steps_along(line, start, end):
    """List the tokens of a line whose decays count on the way from `start` to `end`.

    The endpoint with the lower index is the one whose decay does not.
    """
    step = 1 if end > start else -1
    counted = []
    at = start
    while at != end:
        counted.append(max(at, at + step))
        at += step
    return [line(at) for at in counted]


def row_steps(row, start, end):
    """Entries of log_alpha that count between two tokens of a row: [("log_alpha", (y, x))]."""
    return [("log_alpha", place) for place in steps_along(lambda x: (row, x), start, end)]


def column_steps(column, start, end):
    """Entries of log_beta that count between two tokens of a column."""
    return [("log_beta", place) for place in steps_along(lambda y: (y, column), start, end)]


def row_first(query, key):
    """Steps along the query's row and then along the key's column; tokens are (row, column)."""
    return row_steps(query[0], query[1], key[1]) + column_steps(key[1], query[0], key[0])


def column_first(query, key):
    """Steps along the query's column and then along the key's row."""
    return column_steps(query[1], query[0], key[0]) + row_steps(key[0], query[1], key[1])


def tokens_of(grid):
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


class Softmax:
    """Softmaxes over the tokens that `sees` gives for each, with the decays of `path`, of one head.

    Args:
        arrays: {name: array} of one image and head, tokens on the first two axes.
        sees: gives the tokens that a token attends to.
        path: gives the entries of the decays that add to the logit of two tokens.
    """

    def __init__(self, arrays, grid, scale, sees, path):
        self.arrays, self.grid, self.scale, self.path = arrays, grid, scale, path
        self.numbers = {token: number for number, token in enumerate(tokens_of(grid))}
        self.weights = np.zeros((len(self.numbers), len(self.numbers)))
        for query, number in self.numbers.items():
            seen = sees(query)
            logits = np.array(
                [
                    scale * (arrays["query"][query] @ arrays["key"][key])
                    + sum(arrays[name][place] for name, place in path(query, key))
                    for key in seen
                ]
            )
            weights = np.exp(logits - logits.max())
            self.weights[number, [self.numbers[key] for key in seen]] = weights / weights.sum()

    def backward(self, grad_weights, grads):
        """Add what a gradient of the weights gives for query, key and the decays."""
        grad_logits = self.weights * (
            grad_weights - (self.weights * grad_weights).sum(1, keepdims=True)
        )
        for query, i in self.numbers.items():
            for key, j in self.numbers.items():
                grad = grad_logits[i, j]
                if grad == 0:
                    continue
                grads["query"][query] += self.scale * grad * self.arrays["key"][key]
                grads["key"][key] += self.scale * grad * self.arrays["query"][query]
                for name, place in self.path(query, key):
                    grads[name][place] += grad


def _attend(case, arrays, grads, grad_out):
    """Compute out of one image and head, (tokens, value_dim), and add to its gradients."""
    grid = case.grid
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    value = arrays["value"].reshape(-1, case.value_dim)
    if case.form == "full":
        paths = [row_first, column_first] if case.paths == "both" else [row_first]
        softmaxes = [
            Softmax(arrays, grid, scale, lambda query: tokens_of(grid), path) for path in paths
        ]
        mean = sum(softmax.weights for softmax in softmaxes) / len(softmaxes)
        for softmax in softmaxes:
            softmax.backward(grad_out @ value.T / len(softmaxes), grads)
        grads["value"] += (mean.T @ grad_out).reshape(grads["value"].shape)
        return mean @ value
    row = Softmax(
        arrays, grid, scale,
        lambda query: [(query[0], column) for column in range(grid[1])],
        lambda query, key: row_steps(query[0], query[1], key[1]) if query[0] == key[0] else [],
    )  # fmt: skip
    column = Softmax(
        arrays, grid, scale,
        lambda query: [(line, query[1]) for line in range(grid[0])],
        lambda query, key: column_steps(query[1], query[0], key[0]) if query[1] == key[1] else [],
    )  # fmt: skip
    orders = [(column, row), (row, column)] if case.paths == "both" else [(column, row)]
    out = 0
    grad_of = {row: 0, column: 0}
    grad_value = 0
    for second, first in orders:
        share = grad_out / len(orders)
        out = out + second.weights @ (first.weights @ value) / len(orders)
        grad_of[second] = grad_of[second] + share @ (first.weights @ value).T
        grad_of[first] = grad_of[first] + (second.weights.T @ share) @ value.T
        grad_value = grad_value + first.weights.T @ (second.weights.T @ share)
    for softmax, grad in grad_of.items():
        softmax.backward(grad, grads)
    grads["value"] += grad_value.reshape(grads["value"].shape)
    return out


def run_oracle(case, inputs):
    """Compute what :func:`run_case` gives by loops in float64, as NumPy arrays."""
    arrays = {name: tensor.double().numpy() for name, tensor in inputs.items()}
    out = np.zeros(arrays["grad_out"].shape)
    grads = {name: np.zeros(arrays[name].shape) for name in TENSORS}
    for image in range(case.batch):
        for head in range(case.heads):
            at = (image, slice(None), slice(None), head)
            grad_out = arrays["grad_out"][at].reshape(-1, case.value_dim)
            result = _attend(
                case,
                {name: arrays[name][at] for name in TENSORS},
                {name: grads[name][at] for name in TENSORS},  # views: added to in place
                grad_out,
            )
            out[at] = result.reshape(out[at].shape)
    return dict(out=out, **{f"grad_{name}": grad for name, grad in grads.items()})
