"""Neighborhood attention as ``densezoo bench-kernels`` times it: shapes' inputs, peers and costs.

Every peer computes the same function, bias included, from queries, keys and values that lie as a
model offers them: views of one qkv product (B, H, W, 3, heads, head_dim), tokens in raster order.
Whether it does is measured against the definition, which is written out here for a sample of the
queries, in float64: windows of exactly kernel_size keys along an axis, shifted inside at borders,
in the query's own dilation group (Hassani et al., arXiv 2204.07143 and 2209.15001).

Legend: B images, (H, W) the map, N = H x W tokens, h heads, D channels of a head, K kernel size,
S sampled queries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..kernels import neighborhood_attention
from ..kernels.runtime import which_backend
from .kernel_shapes import NeighborhoodShape

SAMPLES = 256  # queries that outputs and gradients are checked at
FLEX_BLOCK = 128  # tokens a side of the blocks that FlexAttention computes or skips
CPU_FLEX_PAIRS = 10**8  # of query and key; a core takes some 25 ns for one

Forward = Callable[..., Tensor]


class DeclinedError(Exception):
    """A peer cannot compute a case; the message says why."""


@dataclass(frozen=True)
class NeighborhoodCase:
    """A shape with its inputs.

    Attributes:
        shape: the map, heads and windows.
        batch: images.
        dtype: of all inputs.
        device: of all inputs.
        has_bias: whether a table of relative position biases is added.
        memory_limit: bytes that a peer may need by its estimate.
        backend: what computes our own, by name; None leaves the choice to the operator.
    """

    shape: NeighborhoodShape
    batch: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    memory_limit: int
    backend: str | None = None

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, W, h, D), and the table (h, 2K-1, 2K-1) where it has one."""
        shape = self.shape
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(
            self.batch, *shape.size, 3, shape.num_heads, shape.head_dim, generator=generator
        )
        inputs = qkv.to(self.device, self.dtype).unbind(3)
        if not self.has_bias:
            return inputs
        side = 2 * shape.kernel_size - 1
        table = torch.randn(shape.num_heads, side, side, generator=generator)
        return *inputs, table.to(self.device, self.dtype)

    @cached_property
    def grad_out(self) -> Tensor:
        """The gradient that backward passes start from, like the query."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.inputs[0].shape, generator=generator)
        return noise.to(self.device, self.dtype)

    def count_flops(self, is_training: bool) -> int:
        """Count FLOPs: two products forward, four backward, nothing computed twice."""
        return self.shape.count_macs(self.batch) * (6 if is_training else 2)

    def count_bytes(self, is_training: bool) -> int:
        """Count the bytes that have to be moved: each input once, each result once.

        Forward, that is q, k, v, the table and the output. Backward reads them and the output's
        gradient, and writes four gradients; the logarithms of the softmax's denominators, in
        float32, are written and read once.
        """
        tokens = self.inputs[0].nbytes
        table = self.inputs[3].nbytes if self.has_bias else 0
        forward = 4 * tokens + table
        if not is_training:
            return forward
        denominators = 4 * self.inputs[0].numel() // self.shape.head_dim
        return forward + 8 * tokens + 2 * table + 2 * denominators

    def measure_error(self, forward: Forward, is_training: bool) -> float:
        """Measure how far a peer is from the definition, at sampled queries of the last image.

        Args:
            forward: takes the inputs, returns (B, H, W, h, D).
            is_training: measure the gradients of all inputs too, with an output gradient that is
                zero but for the sampled queries.

        Returns:
            The largest difference, as a share of the largest magnitude, of output and gradients;
            NaN where the peer gives one.
        """
        queries, *exact = self._exact
        if not is_training:
            with torch.inference_mode():
                found = [forward(*self.inputs)]
        else:
            leaves = [x.detach().requires_grad_() for x in self.inputs]
            out = forward(*leaves)
            grad_out = torch.zeros_like(self.grad_out)
            grad_out[-1].flatten(0, 1)[queries] = self.grad_out[-1].flatten(0, 1)[queries]
            grads = torch.autograd.grad(out, leaves, grad_out)
            found = [out.detach(), *(grad[-1:] for grad in grads[:3]), *grads[3:]]
        found[0] = found[0][-1].flatten(0, 1)[queries]
        errors = [
            (a.double() - b).abs().max() / b.abs().max()
            for a, b in zip(found, exact, strict=False)  # without gradients in inference
        ]
        return torch.stack(errors).max().item()  # torch's max hands a NaN on

    @cached_property
    def _exact(self) -> tuple[Tensor, ...]:
        """Sampled queries (S,), their outputs (S, h, D) and the gradients of all inputs."""
        shape = self.shape
        num_tokens = shape.num_tokens
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(2))
        corners = torch.tensor([0, shape.size[1] - 1, num_tokens - shape.size[1], num_tokens - 1])
        queries = torch.cat([corners, order])[:SAMPLES].unique().to(self.device)
        keys_at, offsets = (x.to(self.device)[queries] for x in _tabulate(shape))
        leaves = [x.double() for x in self.inputs]
        leaves = [x[-1:] for x in leaves[:3]] + leaves[3:]
        leaves = [x.detach().requires_grad_() for x in leaves]
        q, k, v = (x[0].flatten(0, 1) for x in leaves[:3])  # (N, h, D)
        logits = torch.einsum("shd,skhd->hsk", q[queries] * shape.head_dim**-0.5, k[keys_at])
        if self.has_bias:
            logits = logits + leaves[3].flatten(1)[:, offsets]
        out = torch.einsum("hsk,skhd->shd", logits.softmax(-1), v[keys_at])
        grad_out = self.grad_out[-1].flatten(0, 1)[queries].double()
        return queries, out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    def check_memory(self, needed: int, what: str) -> None:
        """Decline where a peer is estimated to need more than the limit."""
        if needed > self.memory_limit:
            raise DeclinedError(
                f"{what} would take {needed / 2**30:.1f} GiB, the limit is "
                f"{self.memory_limit / 2**30:g}"
            )


def window_keys(length: int, kernel_size: int, dilation: int) -> Tensor:
    """List the keys of every query along an axis, ascending: (length, kernel_size) positions."""
    rows = []
    for position in range(length):
        group, member = position % dilation, position // dilation
        group_size = len(range(group, length, dilation))
        start = min(max(member - kernel_size // 2, 0), group_size - kernel_size)
        rows.append([group + dilation * (start + i) for i in range(kernel_size)])
    return torch.tensor(rows)


def _tabulate(shape: NeighborhoodShape) -> tuple[Tensor, Tensor]:
    """List the tokens that every token sees, and their places in the flattened table: (N, K*K)."""
    (height, width), kernel_size, dilation = shape.size, shape.kernel_size, shape.dilation
    rows, columns = (window_keys(n, kernel_size, dilation) for n in (height, width))
    # Queries by row and column, then keys by row and column.
    keys_at = rows[:, None, :, None] * width + columns[None, :, None, :]
    down, right = (
        (keys - torch.arange(len(keys))[:, None]) // dilation + kernel_size - 1
        for keys in (rows, columns)
    )
    offsets = down[:, None, :, None] * (2 * kernel_size - 1) + right[None, :, None, :]
    return keys_at.reshape(shape.num_tokens, -1), offsets.reshape(shape.num_tokens, -1)


def _to_heads_first(tokens: Tensor) -> Tensor:
    """View (B, H, W, h, D) as (B, h, N, D)."""
    return tokens.flatten(1, 2).transpose(1, 2)


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """View (B, h, N, D) as (B, H, W, h, D)."""
    return tokens.transpose(1, 2).unflatten(1, size)


def make_ours(case: NeighborhoodCase, is_training: bool) -> Forward:
    """Our operator on the backend of the case."""
    return _call_operator(case, case.backend)


def describe_ours(case: NeighborhoodCase) -> str:
    """Name the backend that our operator takes."""
    query, key, value, *bias = case.inputs
    return which_backend(
        neighborhood_attention,
        query,
        key,
        value,
        case.shape.kernel_size,
        dilation=case.shape.dilation,
        bias=bias[0] if bias else None,
        backend=case.backend,
    ).backend


def make_gather(case: NeighborhoodCase, is_training: bool) -> Forward:
    """Gather the keys and values of every window, then multiply: our reference backend."""
    copies = case.inputs[0].nbytes * case.shape.kernel_size**2
    # Copies of keys and values, and of their gradients.
    case.check_memory(copies * (4 if is_training else 2), "copies of every window")
    return _call_operator(case, "reference")


def _call_operator(case: NeighborhoodCase, backend: str | None) -> Forward:
    shape = case.shape

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(
            query,
            key,
            value,
            shape.kernel_size,
            dilation=shape.dilation,
            bias=bias,
            backend=backend,
        )

    return forward


def make_mask_mod(shape: NeighborhoodShape) -> Callable[..., Tensor]:
    """Make FlexAttention's mask: whether a query sees a key, tokens numbered in raster order."""
    (height, width), kernel_size, dilation = shape.size, shape.kernel_size, shape.dilation

    def is_in_window(query: Tensor, key: Tensor, length: int) -> Tensor:
        group_size = (length - query % dilation + dilation - 1) // dilation
        first = query // dilation - kernel_size // 2
        start = torch.minimum(first.clamp(min=0), group_size - kernel_size)
        member = key // dilation
        is_in_group = key % dilation == query % dilation
        return is_in_group & (member >= start) & (member < start + kernel_size)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = is_in_window(query // width, key // width, height)
        return rows & is_in_window(query % width, key % width, width)

    return mask_mod


def make_score_mod(shape: NeighborhoodShape, table: Tensor) -> Callable[..., Tensor]:
    """Make FlexAttention's change of scores: the bias by the offset of key minus query.

    Args:
        shape: the map and windows.
        table: (h, 2K-1, 2K-1).
    """
    width, dilation, last = shape.size[1], shape.dilation, 2 * shape.kernel_size - 2

    def offset(query: Tensor, key: Tensor) -> Tensor:
        # Scores are changed before they are masked: pairs outside the window have to read the
        # table somewhere.
        return (key // dilation - query // dilation + last // 2).clamp(0, last)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = offset(query // width, key // width)
        return score + table[head, down, offset(query % width, key % width)]

    return score_mod


def make_block_mask(shape: NeighborhoodShape, device: torch.device) -> BlockMask:
    """Make FlexAttention's block mask from lists of keys, not from all N x N pairs."""
    num_tokens = shape.num_tokens
    keys_at = _tabulate(shape)[0]
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    query_blocks = torch.arange(num_tokens)[:, None] // FLEX_BLOCK
    pairs = query_blocks * num_blocks + keys_at // FLEX_BLOCK
    seen = torch.bincount(pairs.flatten(), minlength=num_blocks**2).view(num_blocks, num_blocks)
    is_full = seen == FLEX_BLOCK**2
    counts_and_indices = []
    for is_listed in ((seen > 0) & ~is_full, is_full):
        order = is_listed.int().argsort(dim=1, descending=True, stable=True)
        for x in (is_listed.sum(1), order):
            counts_and_indices.append(x[None, None].int().contiguous().to(device))
    return BlockMask.from_kv_blocks(
        *counts_and_indices,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=make_mask_mod(shape),
        seq_lengths=(num_tokens, num_tokens),
    )


def make_flex(case: NeighborhoodCase, is_training: bool) -> Forward:
    """FlexAttention, compiled for the shape."""
    if is_training and case.device.type == "cpu":
        raise DeclinedError("FlexAttention has no backward pass on the CPU")
    shape = case.shape
    block_mask = make_block_mask(shape, case.device)
    num_blocks = int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())
    num_pairs = case.batch * shape.num_heads * num_blocks * FLEX_BLOCK**2
    if case.device.type == "cpu" and num_pairs > CPU_FLEX_PAIRS:
        raise DeclinedError(
            f"it would score {num_pairs:.0e} pairs, over {CPU_FLEX_PAIRS:.0e} takes too long"
        )
    torch.compiler.reset()  # the compiler serves a function a limited number of times
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        # In float32, as scores are: the table's gradient is a long sum.
        score_mod = None if bias is None else make_score_mod(shape, bias.float())
        q, k, v = (_to_heads_first(x) for x in (query, key, value))
        out = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)
        return _to_map(out, shape.size)

    return forward


def make_sdpa(case: NeighborhoodCase, is_training: bool) -> Forward:
    """PyTorch's attention over the whole map, with windows and bias in an additive mask.

    Forward, the mask is there before the clock starts; where the table learns, every step makes
    it from the table.
    """
    shape = case.shape
    pairs = shape.num_tokens**2
    maps = case.dtype.itemsize * shape.num_heads * pairs
    # Training holds the mask, and logits and weights of every image, and their gradients.
    maps *= 2 * (1 + 2 * case.batch) if is_training else 2
    case.check_memory(8 * pairs + maps, "masks over all pairs")
    keys_at, offsets = (x.to(case.device) for x in _tabulate(shape))
    outside = (2 * shape.kernel_size - 1) ** 2  # the place of minus infinity, after the table
    places = torch.full((shape.num_tokens,) * 2, outside, device=case.device)
    places.scatter_(1, keys_at, offsets)

    def make_mask(bias: Tensor) -> Tensor:
        values = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
        return values.index_select(1, places.flatten()).unflatten(1, places.shape)  # (h, N, N)

    if case.has_bias:
        table = case.inputs[3]
    else:
        table = torch.zeros(1, outside, dtype=case.dtype, device=case.device)
    ready = None if is_training and case.has_bias else make_mask(table)

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (_to_heads_first(x) for x in (query, key, value))
        mask = make_mask(bias) if ready is None else ready
        return _to_map(F.scaled_dot_product_attention(q, k, v, mask), shape.size)

    return forward


def make_natten(case: NeighborhoodCase, is_training: bool) -> Forward:
    """NATTEN as installed: up to 0.17 it takes a bias on all devices, from 0.20 on none."""
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise DeclinedError("not installed") from error
    functional, shape = importlib.import_module("natten.functional"), case.shape
    windows = dict(kernel_size=shape.kernel_size, dilation=shape.dilation)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.na2d(query, key, value, **windows)

    def forward_by_logits(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (query, key, value))  # (B, h, H, W, D)
        logits = functional.na2d_qk(q * shape.head_dim**-0.5, k, **windows, rpb=bias)
        return functional.na2d_av(logits.softmax(-1), v, **windows).permute(0, 2, 3, 1, 4)

    if hasattr(functional, "na2d_qk"):
        return forward_by_logits
    if case.has_bias:
        raise DeclinedError(f"NATTEN {natten.__version__} takes no bias")
    return forward
