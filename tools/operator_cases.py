"""What ``densezoo bench-kernels`` times an attention operator on: inputs, costs, the definition.

All peers of an operator compute the same function from queries, keys and values that lie as a
model offers them: views of one qkv product (B, H, W, 3, heads, head_dim), tokens in raster order.
Whether a peer does is measured against the operator's definition, which its case writes out for a
sample of the queries, in float64.

Legend: B images, (H, W) the map, N = H x W tokens, h heads, D channels of a head, S sampled
queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

SAMPLES = 256  # queries that outputs and gradients are checked at
FLEX_BLOCK = 128  # tokens a side of the blocks that FlexAttention computes or skips
CPU_FLEX_PAIRS = 10**8  # of query and key; a core takes some 25 ns for one

Forward = Callable[..., Tensor]


class DeclinedError(Exception):
    """A peer cannot compute a case; the message says why."""


@dataclass(frozen=True)
class AttentionCase:
    """A shape of an attention operator with its inputs; a subclass an operator.

    Attributes:
        shape: of the operator: `size` (height, width), `num_heads`, `head_dim`, `num_tokens` and
            `count_macs(batch)`.
        batch: images.
        dtype: of all inputs.
        device: of all inputs.
        has_bias: whether the operator's biases are among the inputs.
        memory_limit: bytes that a peer may need by its estimate.
        backend: what computes our own, by name; None leaves the choice to the operator.
    """

    shape: Any
    batch: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    memory_limit: int
    backend: str | None = None

    def make_maps(self) -> tuple[Tensor, ...]:
        """Make what else the operator takes of every token, (B, H, W, ...), on the CPU."""
        return ()

    def make_biases(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Make the operator's biases, shared by all images, in float32 on the CPU."""
        return ()

    def attend_exactly(self, queries: Tensor, *inputs: Tensor) -> Tensor:
        """Compute the definition for the last image's queries.

        Args:
            queries: numbers of tokens, (S,).
            inputs: as `inputs` has them, in float64, of the last image alone.

        Returns:
            (S, h, D).
        """
        raise NotImplementedError

    def count_index_bytes(self) -> int:
        """Count the bytes of what says how a query sees keys, where that has no gradient."""
        return 0

    @property
    def num_softmaxes(self) -> int:
        """Softmaxes of a query and head."""
        return 1

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, W, h, D), further maps, then the biases if there are."""
        shape = self.shape
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(
            self.batch, *shape.size, 3, shape.num_heads, shape.head_dim, generator=generator
        )
        inputs = qkv.to(self.device, self.dtype).unbind(3)
        inputs += self.further_maps
        if not self.has_bias:
            return inputs
        return *inputs, *(x.to(self.device, self.dtype) for x in self.make_biases(generator))

    @cached_property
    def further_maps(self) -> tuple[Tensor, ...]:
        """What `make_maps` makes, in at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return tuple(x.to(self.device, dtype) for x in self.make_maps())

    @property
    def num_maps(self) -> int:
        """How many of the inputs, the first ones, each image has for itself."""
        return 3 + len(self.further_maps)

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

        Forward, that is q, k, v, all other inputs, the output and what says which keys are seen.
        Backward reads them and the output's gradient, and writes the gradients; the logarithms of
        the softmaxes' denominators, in float32, are written and read once.
        """
        tokens, index = self.inputs[0].nbytes, self.count_index_bytes()
        others = sum(x.nbytes for x in self.inputs[3:])
        forward = 4 * tokens + others + index
        if not is_training:
            return forward
        denominators = 4 * self.num_softmaxes * self.inputs[0].numel() // self.shape.head_dim
        return forward + 8 * tokens + 2 * others + 2 * denominators + index

    def measure_error(self, forward: Forward, is_training: bool) -> float:
        """Measure how far a peer is from the definition, at sampled queries of the last image.

        Args:
            forward: takes the inputs, returns (B, H, W, h, D).
            is_training: measure the gradients of all inputs too, with an output gradient that is
                zero but for the sampled queries.

        Returns:
            The largest difference, as a share of the largest magnitude, of output and gradients;
            the difference itself where all is zero, as the gradient of what no query sees; NaN
            where the peer gives one.
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
            maps = (grad[-1:] for grad in grads[: self.num_maps])
            found = [out.detach(), *maps, *grads[self.num_maps :]]
        found[0] = found[0][-1].flatten(0, 1)[queries]
        errors = [
            (a.double() - b).abs().max() / (b.abs().max().item() or 1.0)
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
        leaves = [*(x[-1:] for x in self.inputs[: self.num_maps]), *self.inputs[self.num_maps :]]
        leaves = [x.double().detach().requires_grad_() for x in leaves]
        out = self.attend_exactly(queries, *leaves)
        grad_out = self.grad_out[-1].flatten(0, 1)[queries].double()
        return queries, out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    def check_memory(self, needed: int, what: str) -> None:
        """Decline where a peer is estimated to need more than the limit."""
        if needed > self.memory_limit:
            raise DeclinedError(
                f"{what} would take {needed / 2**30:.1f} GiB, the limit is "
                f"{self.memory_limit / 2**30:g}"
            )

    def check_flex(self, is_training: bool) -> None:
        """Decline what FlexAttention cannot do at all."""
        if is_training and self.device.type == "cpu":
            raise DeclinedError("FlexAttention has no backward pass on the CPU")


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attend with queries (S, h, D) to own keys and values (S, K, h, D): (S, h, D).

    Args:
        queries: queries.
        keys: keys of each query.
        values: values of each query.
        scale: of the logits.
        bias: added to the logits, (h, S, K).
    """
    logits = torch.einsum("shd,skhd->hsk", queries * scale, keys)
    logits = logits if bias is None else logits + bias
    return torch.einsum("hsk,skhd->shd", logits.softmax(-1), values)


def to_heads_first(tokens: Tensor) -> Tensor:
    """View (B, H, W, h, D) as (B, h, N, D)."""
    return tokens.flatten(1, 2).transpose(1, 2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """View (B, h, N, D) as (B, H, W, h, D)."""
    return tokens.transpose(1, 2).unflatten(1, size)


def make_block_mask(
    seen: Tensor, mask_mod: Callable[..., Tensor], lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    """Make FlexAttention's block mask from what blocks see, not from all pairs of tokens.

    Args:
        seen: pairs of a query and a key that are seen, for each block of queries and of keys:
            (images or 1, query blocks, key blocks).
        mask_mod: whether a query sees a key, as FlexAttention takes it.
        lengths: numbers of queries and of keys.
        device: of the mask.
    """
    is_full = seen == FLEX_BLOCK**2
    counts_and_indices = []
    for is_listed in ((seen > 0) & ~is_full, is_full):
        order = is_listed.int().argsort(dim=-1, descending=True, stable=True)
        for x in (is_listed.sum(-1), order):
            counts_and_indices.append(x[:, None].int().contiguous().to(device))
    return BlockMask.from_kv_blocks(
        *counts_and_indices, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=lengths
    )


def count_pairs(case: AttentionCase, block_mask: BlockMask) -> int:
    """Count the pairs of query and key that FlexAttention scores under a block mask."""
    num_blocks = int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())
    num_images = case.batch // block_mask.kv_num_blocks.shape[0]
    return num_images * case.shape.num_heads * num_blocks * FLEX_BLOCK**2


def compile_flex(case: AttentionCase, num_pairs: int) -> Forward:
    """Compile FlexAttention for a case's shape; decline what takes too long on the CPU."""
    if case.device.type == "cpu" and num_pairs > CPU_FLEX_PAIRS:
        raise DeclinedError(
            f"it would score {num_pairs:.0e} pairs, over {CPU_FLEX_PAIRS:.0e} takes too long"
        )
    torch.compiler.reset()  # the compiler serves a function a limited number of times
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
