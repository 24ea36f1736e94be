"""What tests of routing attention share: cases, their inputs, a slow oracle.

The oracle is loops over tokens in NumPy, written from the definition: it shares no code with the
package.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from operator_cases import rounded_normal

from densezoo.kernels import routing_attention

TENSORS = ("query", "key", "value", "routes", "pad_key", "pad_value")
PADS = ("pad_key", "pad_value")


@dataclass(frozen=True)
class Case:
    """A call: the map, its regions, and what goes along.

    Attributes:
        grid: height and width, tokens.
        num_regions: as the operator takes it, a pair.
        topk: kept regions.
        region_size: as the operator takes it, a pair or None.
        pads: which of pad_key and pad_value are given.
        repeats: whether the routes of a region may hold one twice.
        value_dim: channels of a value, by default those of a key.
    """

    grid: tuple
    num_regions: tuple
    topk: int
    region_size: tuple = None
    pads: tuple = ()
    repeats: bool = False
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
        return dict(num_regions=self.num_regions, region_size=self.region_size, scale=self.scale)

    @property
    def size(self):
        """Tokens of a region along each axis."""
        return self.region_size or tuple(
            -(-length // count) for length, count in zip(self.grid, self.num_regions, strict=True)
        )

    @property
    def rows_and_columns(self):
        """Regions along each axis."""
        return tuple(
            max(count, -(-length // size))
            for length, count, size in zip(self.grid, self.num_regions, self.size, strict=True)
        )

    @property
    def id(self):
        parts = ["x".join(map(str, self.grid)), "s" + "x".join(map(str, self.num_regions))]
        parts.append(f"k{self.topk}")
        if self.region_size:
            parts.append("of" + "x".join(map(str, self.region_size)))
        parts.extend(self.pads)
        if self.repeats:
            parts.append("repeats")
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        parts.append(f"b{self.batch}h{self.heads}c{self.head_dim}")
        if self.value_dim != self.head_dim:
            parts.append(f"v{self.value_dim}")
        return "_".join(parts)


# Maps that regions divide and do not, not square, smaller than the number of regions; one region,
# one token a region, all regions kept; regions kept twice; both published semantics of padding.
ODD_CASES = [
    Case((6, 6), (1, 1), 1, heads=3),
    Case((8, 8), (4, 4), 2, batch=2),
    Case((14, 14), (7, 7), 16, head_dim=32),
    Case((14, 21), (7, 7), 4, scale=0.2, heads=1),
    Case((12, 20), (4, 4), 16, heads=1, head_dim=16),
    Case((8, 8), (8, 8), 5, heads=1),
    Case((8, 12), (2, 3), 1, batch=2, head_dim=4, value_dim=8),
    Case((9, 6), (3, 2), 3, head_dim=16, value_dim=5, heads=3),
    Case((7, 9), (3, 4), 5, pads=PADS, batch=2),
    Case((7, 9), (3, 4), 5),
    Case((7, 9), (3, 4), 4, pads=("pad_key",), heads=1),
    Case((7, 9), (3, 4), 4, pads=("pad_value",), head_dim=4, value_dim=6),
    Case((8, 8), (4, 4), 3, pads=PADS),  # no token is padded
    Case((5, 6), (8, 8), 16, pads=PADS, batch=2),  # as many tokens as regions that have any
    Case((5, 9), (4, 4), 16, pads=PADS),  # rows and columns of regions wholly outside
    Case((3, 20), (4, 4), 7, scale=0.4),
    Case((1, 1), (3, 3), 9, pads=PADS),
    Case((1, 17), (1, 5), 2, pads=PADS, batch=2),
    Case((13, 12), (7, 7), 10, region_size=(1, 1), heads=1),
    Case((10, 14), (3, 3), 4, region_size=(3, 4)),
    Case((10, 14), (1, 1), 4, region_size=(3, 4), pads=PADS, batch=2),
    Case((4, 5), (7, 7), 12, region_size=(1, 1), heads=1),
    Case((9, 10), (2, 2), 3, region_size=(8, 6), pads=PADS),
    Case((8, 6), (4, 3), 5, repeats=True),
    Case((7, 8), (3, 3), 12, pads=PADS, repeats=True, batch=2),
    Case((10, 10), (4, 4), 3, pads=PADS, head_dim=20, value_dim=33),
    Case((10, 10), (2, 4), 3, pads=PADS, head_dim=49, heads=1),
]


def random_cases(number, seed, most_tokens=130):
    """Draw cases of every kind; the same for the same arguments."""
    draw = random.Random(seed)
    cases = []
    while len(cases) < number:
        grid = tuple(draw.choice([1, 2, 3, 5, 7, 8, 11, 12, 16]) for _ in range(2))
        num_regions = tuple(draw.choice([1, 2, 3, 4, 5, 7]) for _ in range(2))
        region_size = tuple(draw.choice([1, 2, 3, 4, 5]) for _ in range(2))
        case = Case(grid, num_regions, 1, region_size if draw.random() < 0.4 else None)
        repeats = draw.random() < 0.3
        rows, columns = case.rows_and_columns
        topk = draw.choice([1, 2, 3, 5, 8, 16])
        if grid[0] * grid[1] > most_tokens or (topk > rows * columns and not repeats):
            continue
        cases.append(
            Case(
                grid,
                num_regions,
                topk,
                case.region_size,
                draw.choice([(), PADS, PADS, ("pad_key",), ("pad_value",)]),
                repeats,
                scale=draw.choice([None, None, 0.4]),
                batch=draw.choice([1, 2]),
                heads=draw.choice([1, 2, 3]),
                head_dim=draw.choice([1, 4, 6, 8]),
                value_dim=draw.choice([None, None, 3, 8]),
            )
        )
    return cases


def make_inputs(case, dtype=torch.float64, seed=0, device="cpu"):
    """Make {name: tensor or None} of a case, with the cotangent grad_out.

    Query, key and value are views of one (B, H, W, heads, channels) tensor, as in models. The
    numbers are those of float16 and bfloat16 alike, so that every dtype computes on the same.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = rounded_normal(generator, dtype, device)
    dims = (case.head_dim, case.head_dim, case.value_dim)
    maps = normal(case.batch, *case.grid, case.heads * sum(dims))
    query, key, value = (
        part.unflatten(-1, (case.heads, -1))
        for part in maps.split([case.heads * dim for dim in dims], dim=-1)
    )
    inputs = dict(query=query, key=key, value=value, pad_key=None, pad_value=None)
    for name, dim in zip(PADS, dims[1:], strict=True):
        if name in case.pads:
            inputs[name] = normal(case.heads, dim)
    rows, columns = case.rows_and_columns
    count = rows * columns
    if case.repeats:
        routes = torch.randint(count, (case.batch, count, case.topk), generator=generator)
    else:
        order = torch.rand(case.batch, count, count, generator=generator)
        routes = order.argsort(-1)[..., : case.topk]
    grad_out = normal(*query.shape[:-1], case.value_dim)
    return dict(inputs, routes=routes.to(device), grad_out=grad_out)


def run_case(case, inputs, backend=None):
    """Run the operator forward and backward: {"out", "grad_query", ...}."""
    tensors = {name: inputs[name] for name in TENSORS}
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point()
    }
    out = routing_attention(**{**tensors, **leaves}, **case.arguments, backend=backend)
    # Where no token is padded, what padded ones carry may be out of the graph.
    grads = torch.autograd.grad(
        out, list(leaves.values()), inputs["grad_out"], materialize_grads=True
    )
    results = dict(out=out.detach())
    results.update((f"grad_{name}", grad) for name, grad in zip(leaves, grads, strict=True))
    return results


def region_tokens(case, region):
    """List the tokens (row, column) of a region, those that are not on the map as None."""
    columns = case.rows_and_columns[1]
    height, width = case.size
    top, left = region // columns * height, region % columns * width
    return [
        (y, x) if y < case.grid[0] and x < case.grid[1] else None
        for y in range(top, top + height)
        for x in range(left, left + width)
    ]


def run_oracle(case, inputs):
    """Compute what :func:`run_case` gives by loops in float64, as NumPy arrays."""
    arrays = {
        name: tensor.double().numpy()
        for name, tensor in inputs.items()
        if tensor is not None and name != "routes"
    }
    routes = inputs["routes"].tolist()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = np.zeros(arrays["grad_out"].shape)
    grads = {f"grad_{name}": np.zeros(arrays[name].shape) for name in TENSORS if name in arrays}
    no_token = dict(
        pad_key=np.zeros((case.heads, case.head_dim)),
        pad_value=np.zeros((case.heads, case.value_dim)),
    )
    for image in range(case.batch):
        for region, kept in enumerate(routes[image]):
            seen = [token for other in kept for token in region_tokens(case, other)]
            own = [token for token in region_tokens(case, region) if token is not None]
            for head in range(case.heads):
                # Where each key and value is, and so where its gradient goes.
                key_at = [
                    ("pad_key", head) if token is None else ("key", (image, *token, head))
                    for token in seen
                ]
                value_at = [
                    ("pad_value", head) if token is None else ("value", (image, *token, head))
                    for token in seen
                ]
                keys = np.stack([{**no_token, **arrays}[name][at] for name, at in key_at])
                values = np.stack([{**no_token, **arrays}[name][at] for name, at in value_at])
                for token in own:
                    place = (image, *token, head)
                    q, grad_out = arrays["query"][place], arrays["grad_out"][place]
                    logits = scale * (keys @ q)
                    weights = np.exp(logits - logits.max())
                    weights /= weights.sum()
                    out[place] = weights @ values
                    grad_logits = weights * (values @ grad_out - out[place] @ grad_out)
                    grads["grad_query"][place] += scale * (grad_logits @ keys)
                    for i, ((key, k), (value, v)) in enumerate(zip(key_at, value_at, strict=True)):
                        if f"grad_{key}" in grads:
                            grads[f"grad_{key}"][k] += scale * grad_logits[i] * q
                        if f"grad_{value}" in grads:
                            grads[f"grad_{value}"][v] += weights[i] * grad_out
    return dict(out=out, **grads)
