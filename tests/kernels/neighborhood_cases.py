"""What tests of neighborhood attention share: cases, their inputs, a slow oracle.

The oracle is loops over queries and keys in NumPy, written from the definition: it shares no code
with the package.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
from operator_cases import rounded_normal

from densezoo.kernels import neighborhood_attention

TENSORS = ("query", "key", "value", "bias", "extra_key", "extra_value")


@dataclass(frozen=True)
class Case:
    """A call: the grid, its windows, and what goes along."""

    grid: tuple
    kernel_size: tuple
    dilation: tuple = None
    stride: tuple = None
    is_causal: tuple = None
    has_bias: bool = False
    num_extra: int = 0
    scale: float = None
    batch: int = 1
    heads: int = 2
    head_dim: int = 8

    def __post_init__(self):
        defaults = dict(dilation=1, stride=1, is_causal=False)
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, (default,) * len(self.grid))

    @property
    def arguments(self):
        """What the operator takes beside tensors."""
        return dict(
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            stride=self.stride,
            is_causal=self.is_causal,
            scale=self.scale,
        )

    @property
    def id(self):
        parts = ["x".join(map(str, self.grid)), "k" + "x".join(map(str, self.kernel_size))]
        if max(self.dilation) > 1:
            parts.append("d" + "x".join(map(str, self.dilation)))
        if max(self.stride) > 1:
            parts.append("s" + "x".join(map(str, self.stride)))
        if any(self.is_causal):
            parts.append("causal" + "".join(str(int(flag)) for flag in self.is_causal))
        if self.has_bias:
            parts.append("bias")
        if self.num_extra:
            parts.append(f"extra{self.num_extra}")
        parts.append(f"b{self.batch}h{self.heads}c{self.head_dim}")
        return "_".join(parts)


# Grids that tiles do not divide, not square, as small as the window; groups of unequal sizes;
# every kernel of the published models and even ones; what can go along with each.
ODD_CASES = [
    Case((7, 7), (7, 7), has_bias=True, head_dim=32),
    Case((9, 12), (7, 7), has_bias=True, head_dim=32),
    Case((5, 6), (3, 3), has_bias=True, heads=1, head_dim=2),
    Case((17, 19), (3, 3), has_bias=True, batch=2),
    Case((3, 40), (3, 5), has_bias=True),
    Case((23, 8), (5, 7), has_bias=True, batch=2, heads=3),
    Case((13, 21), (13, 13), has_bias=True),
    Case((11, 14), (11, 11), has_bias=True, heads=1),
    Case((33, 18), (7, 7), batch=2),
    Case((14, 14), (7, 7), (2, 2), has_bias=True, head_dim=32),
    Case((15, 17), (7, 7), (2, 2), has_bias=True),
    Case((10, 11), (3, 3), (3, 3), has_bias=True, batch=2),
    Case((28, 31), (7, 7), (4, 4), has_bias=True, heads=1),
    Case((12, 20), (3, 5), (2, 1), has_bias=True),
    Case((9, 9), (4, 4)),
    Case((9, 13), (4, 6), (2, 1)),
    Case((16, 11), (2, 2)),
    Case((11, 11), (5, 5), stride=(2, 2)),
    Case((12, 14), (4, 4), stride=(4, 4)),
    Case((13, 14), (6, 6), (2, 2), (3, 3)),
    Case((8, 9), (3, 3), is_causal=(True, False)),
    Case((9, 8), (3, 3), (2, 2), is_causal=(True, True)),
    Case((11, 12), (4, 4), stride=(3, 2), is_causal=(True, False)),
    Case((8, 9), (3, 3), has_bias=True, num_extra=3, batch=2),
    Case((9, 10), (4, 3), (2, 1), (1, 2), (False, True), num_extra=1),
    Case((12, 9), (5, 3), has_bias=True, scale=0.3),
    Case((8, 10), (5, 5), has_bias=True, head_dim=49),
    Case((8, 10), (5, 5), has_bias=True, head_dim=20),
    Case((17,), (5,), has_bias=True, batch=2),
    Case((20,), (5,), (3,), has_bias=True, num_extra=2),
    Case((15,), (4,), (2,), is_causal=(True,)),
    Case((5,), (3,), stride=(2,), is_causal=(True,)),
    Case((45,), (13,), stride=(5,), num_extra=1),
]

CASES_3D = [
    Case((4, 5, 6), (3, 3, 3), has_bias=True),
    Case((6, 7, 8), (3, 4, 5), (2, 1, 1), (1, 2, 1), (True, False, False)),
    Case((4, 3, 5), (2, 3, 2), (2, 1, 2), batch=2, num_extra=2),
]


def random_cases(number, seed, num_axes=(1, 2, 3), most_positions=150):
    """Draw cases of every kind; the same for the same arguments."""
    draw = random.Random(seed)
    cases = []
    while len(cases) < number:
        axes = draw.choice(num_axes)
        kernel_size, dilation, grid = [], [], []
        for _ in range(axes):
            kernel_size.append(draw.choice([2, 3, 3, 4, 5, 6, 7] if axes < 3 else [2, 3, 4]))
            dilation.append(draw.choice([1, 1, 2, 3]))
            grid.append(kernel_size[-1] * dilation[-1] + draw.choice([0, 1, 2, 3, 5, 8]))
        if np.prod(grid) > most_positions:
            continue
        has_bias = all(size % 2 for size in kernel_size) and draw.random() < 0.7
        cases.append(
            Case(
                tuple(grid),
                tuple(kernel_size),
                tuple(dilation),
                None if has_bias else tuple(draw.randint(1, size) for size in kernel_size),
                None if has_bias else tuple(draw.random() < 0.4 for _ in kernel_size),
                has_bias,
                num_extra=draw.choice([0, 0, 1, 3]),
                scale=draw.choice([None, None, 0.4]),
                batch=draw.choice([1, 2]),
                heads=draw.choice([1, 2, 3]),
                head_dim=draw.choice([1, 4, 6, 8]),
            )
        )
    return cases


def make_inputs(case, dtype=torch.float64, seed=0, device="cpu"):
    """Make {name: tensor or None} of a case, with cotangents grad_out and grad_lse.

    Query, key and value are views of one (B, *grid, 3, heads, head_dim) tensor, as in models. The
    numbers are those of float16 and bfloat16 alike, so that every dtype computes on the same.
    """
    normal = rounded_normal(torch.Generator().manual_seed(seed), dtype, device)
    token = (case.heads, case.head_dim)
    query, key, value = normal(case.batch, *case.grid, 3, *token).unbind(-3)
    inputs = dict.fromkeys(TENSORS)
    inputs.update(query=query, key=key, value=value)
    if case.has_bias:
        inputs["bias"] = normal(case.heads, *(2 * size - 1 for size in case.kernel_size))
    if case.num_extra:
        inputs["extra_key"] = normal(case.batch, case.num_extra, *token)
        inputs["extra_value"] = normal(case.batch, case.num_extra, *token)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    return dict(
        inputs,
        grad_out=normal(*query.shape),
        grad_lse=normal(*query.shape[:-1]).to(lse_dtype),
    )


def run_case(case, inputs, backend=None, with_lse=True):
    """Run the operator forward and backward: {"out", "lse", "grad_query", ...}.

    Args:
        case: the case.
        inputs: of :func:`make_inputs`.
        backend: the path to take.
        with_lse: whether the cotangent of the lse takes part.
    """
    tensors = {
        name: None if inputs[name] is None else inputs[name].detach().requires_grad_()
        for name in TENSORS
    }
    out, lse = neighborhood_attention(**tensors, **case.arguments, return_lse=True, backend=backend)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    outputs, cotangents = (out,), (inputs["grad_out"],)
    if with_lse:
        outputs, cotangents = (out, lse), (*cotangents, inputs["grad_lse"])
    grads = torch.autograd.grad(outputs, list(given.values()), cotangents)
    results = dict(out=out.detach(), lse=lse.detach())
    results.update((f"grad_{name}", grad) for name, grad in zip(given, grads, strict=True))
    return results


def oracle_windows(length, kernel_size, dilation=1, stride=1, is_causal=False):
    """List for every position of an axis the positions of its keys, ascending."""
    windows = []
    for position in range(length):
        group, member = position % dilation, position // dilation
        members = len(range(group, length, dilation))
        stride_group = range(
            member // stride * stride, min(members, (member // stride + 1) * stride)
        )
        if is_causal:
            first = max(0, stride_group[-1] - kernel_size + 1)
            seen = range(first, member + 1)
        else:
            leader = min(stride_group[0] + stride // 2, members - 1)
            first = leader - kernel_size // 2
            while first + kernel_size > members:
                first -= 1
            first = max(first, 0)
            seen = range(first, first + kernel_size)
        windows.append([group + dilation * number for number in seen])
    return windows


def run_oracle(case, inputs):
    """Compute what :func:`run_case` gives by loops in float64, as NumPy arrays."""
    arrays = {
        name: None if tensor is None else tensor.double().numpy() for name, tensor in inputs.items()
    }
    query, key = arrays["query"], arrays["key"]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out, lse = np.zeros(query.shape), np.zeros(query.shape[:-1])
    grads = {
        f"grad_{name}": np.zeros(arrays[name].shape) for name in TENSORS if arrays[name] is not None
    }
    axes = [
        oracle_windows(*settings)
        for settings in zip(
            case.grid, case.kernel_size, case.dilation, case.stride, case.is_causal, strict=True
        )
    ]
    places = itertools.product(
        range(case.batch), itertools.product(*map(range, case.grid)), range(case.heads)
    )
    for image, x, head in places:
        q = query[(image, *x, head)]
        rows = []  # logit, value, and where the gradients of key, value and bias go
        for y in itertools.product(*(axis[place] for axis, place in zip(axes, x, strict=True))):
            at = (image, *y, head)
            logit, entry = scale * (q @ key[at]), None
            if case.has_bias:
                steps = (
                    (to - own) // distance + size - 1
                    for to, own, distance, size in zip(
                        y, x, case.dilation, case.kernel_size, strict=True
                    )
                )
                entry = (head, *steps)
                logit += arrays["bias"][entry]
            rows.append((logit, "key", "value", at, entry))
        for number in range(case.num_extra):
            at = (image, number, head)
            rows.append(
                (scale * (q @ arrays["extra_key"][at]), "extra_key", "extra_value", at, None)
            )
        logits = np.array([row[0] for row in rows])
        place = (image, *x, head)
        lse[place] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        weights = np.exp(logits - lse[place])
        values = np.stack([arrays[row[2]][row[3]] for row in rows])
        out[place] = weights @ values
        grad_out, grad_lse = arrays["grad_out"][place], arrays["grad_lse"][place]
        grad_logits = weights * (values @ grad_out - out[place] @ grad_out + grad_lse)
        for weight, grad_logit, row in zip(weights, grad_logits, rows, strict=True):
            _, key_name, value_name, at, entry = row
            grads["grad_query"][place] += scale * grad_logit * arrays[key_name][at]
            grads[f"grad_{key_name}"][at] += scale * grad_logit * q
            grads[f"grad_{value_name}"][at] += weight * grad_out
            if entry is not None:
                grads["grad_bias"][entry] += grad_logit
    return dict(out=out, lse=lse, **grads)
