"""Routing attention as ``densezoo bench-kernels`` times it: inputs, definition and peers.

Every token of a region attends to all tokens of the regions that its own routes to (Zhu et al.,
arXiv 2303.08810), padded ones included, with the scale of the published models: (h x D)^(-1/2).
Biases are the key and value of padded tokens, which the legacy form takes from its projection's
bias and the later one leaves at zero. Routes are those of `route_regions` for the inputs; choosing
them is no part of what is timed.

Legend: as in `operator_cases`; R regions, T tokens of a region, k kept regions, P = R x T padded
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import route_regions, routing_attention
from ..kernels.routing_attention.dispatch import attend_known_routes
from ..kernels.runtime import use_backend, which_backend
from .biformer_transcription import GatheredAttention, to_image, to_regions
from .kernel_shapes import RoutingShape
from .operator_cases import (
    FLEX_BLOCK,
    AttentionCase,
    Forward,
    attend,
    compile_flex,
    count_pairs,
    make_block_mask,
    to_heads_first,
    to_map,
)


@dataclass(frozen=True)
class RoutingCase(AttentionCase):
    """A shape of routing attention with its inputs."""

    def make_biases(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Make the key and the value of padded tokens, each (h, D), where there are such tokens."""
        if self.shape.padded_size == self.shape.size:
            return ()
        heads = self.shape.num_heads, self.shape.head_dim
        return tuple(torch.randn(2, *heads, generator=generator).unbind())

    @property
    def scale(self) -> float:
        return (self.shape.num_heads * self.shape.head_dim) ** -0.5

    @cached_property
    def routes(self) -> Tensor:
        """Regions that each region attends to, (B, R, k)."""
        query, key, *_ = self.inputs
        shape = self.shape
        return route_regions(
            query, key, shape.num_regions, shape.topk, region_size=shape.region_size
        )

    def count_index_bytes(self) -> int:
        """Count the bytes of the routes."""
        return self.routes.nbytes

    def attend_exactly(self, queries: Tensor, *inputs: Tensor) -> Tensor:
        """Attend to the tokens of the regions that each query's own routes to."""
        shape = self.shape
        biases = inputs[3:] or (None, None)
        query = inputs[0][0].flatten(0, 1)[queries]
        keys, values = (
            pad(x, bias, shape)[0].flatten(0, 1)
            for x, bias in zip(inputs[1:3], biases, strict=True)
        )
        members = torch.arange(len(keys), device=queries.device).view(1, *shape.padded_size, 1)
        members = to_regions(members, *shape.num_regions).reshape(-1, shape.region_area)  # (R, T)
        regions = number_regions(shape).to(queries.device).flatten()[queries]
        seen = members[self.routes[-1, regions]].flatten(1)  # (S, k x T)
        return attend(query, keys[seen], values[seen], self.scale)


def pad(tokens: Tensor, bias: Tensor | None, shape: RoutingShape) -> Tensor:
    """Pad a map (B, H, W, h, D) to whole regions with tokens that are a bias (h, D), or zero."""
    (height, width), (rows, columns) = shape.size, shape.padded_size
    if (height, width) == (rows, columns):
        return tokens
    if bias is None:
        return F.pad(tokens, (0, 0, 0, 0, 0, columns - width, 0, rows - height))
    batch = tokens.shape[0]
    right = bias.expand(batch, height, columns - width, -1, -1)
    below = bias.expand(batch, rows - height, columns, -1, -1)
    return torch.cat([torch.cat([tokens, right], 2), below], 1)


def number_regions(shape: RoutingShape) -> Tensor:
    """Give the number of every token's region, (H, W)."""
    rows, columns = (
        torch.arange(length) // size
        for length, size in zip(shape.size, shape.region_size, strict=True)
    )
    return rows[:, None] * shape.num_regions[1] + columns


def make_ours(case: RoutingCase, is_training: bool) -> Forward:
    """Our operator on the backend of the case, without a check of the routes, as in our layer."""
    arguments = _list_arguments(case)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        return attend_known_routes(
            query, key, value, pad_key=pad_key, pad_value=pad_value, **arguments
        )

    return forward if case.backend is None else use_backend(case.backend)(forward)


def _list_arguments(case: RoutingCase) -> dict[str, object]:
    shape = case.shape
    return dict(
        routes=case.routes,
        num_regions=shape.num_regions,
        region_size=shape.region_size,
        scale=case.scale,
    )


def describe_ours(case: RoutingCase) -> str:
    """Name the backend that our operator takes."""
    query, key, value, *biases = case.inputs
    pads = dict(zip(("pad_key", "pad_value"), biases, strict=False))
    return which_backend(
        routing_attention, query, key, value, **_list_arguments(case), **pads, backend=case.backend
    ).backend


def make_gather(case: RoutingCase, is_training: bool) -> Forward:
    """Gather the tokens of the kept regions, then multiply: what the official code does."""
    shape = case.shape
    tokens = shape.num_heads * shape.head_dim * case.dtype.itemsize * case.batch
    tokens *= shape.num_regions[0] * shape.num_regions[1] * shape.region_area
    pairs = tokens // shape.head_dim * shape.topk * shape.region_area
    # Kept keys and values, both twice, and logits and weights.
    needed = 4 * shape.topk * tokens + 2 * pairs
    if is_training:
        # The gradient of keys and values as they are expanded to all pairs of regions.
        needed += 2 * shape.num_regions[0] * shape.num_regions[1] * tokens
    case.check_memory(needed, "copies of the kept regions")
    gathered = GatheredAttention(shape.num_heads, case.scale)
    rows, columns = shape.num_regions
    height, width = shape.size

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        maps = (query, None), (key, pad_key), (value, pad_value)
        query, key, value = (
            to_regions(pad(x, bias, shape).flatten(3), rows, columns) for x, bias in maps
        )
        query, key_value = query.contiguous(), torch.cat([key, value], dim=-1)
        out = gathered(*(x.flatten(3, 4).flatten(1, 2) for x in (query, key_value)), case.routes)
        out = to_image(out.unflatten(1, (rows, columns)).unflatten(3, shape.region_size))
        return out[:, :height, :width].contiguous().unflatten(-1, (shape.num_heads, -1))

    return forward


def list_kept(case: RoutingCase) -> Tensor:
    """List whether a region of queries attends to a region of keys: (B, R, R)."""
    num_regions = case.routes.shape[1]
    kept = torch.zeros(case.batch, num_regions, num_regions, dtype=torch.bool, device=case.device)
    return kept.scatter_(2, case.routes, True)


def make_sdpa(case: RoutingCase, is_training: bool) -> Forward:
    """PyTorch's attention over all tokens, padded ones too, under a mask made before the clock."""
    shape = case.shape
    rows, columns = shape.padded_size
    pairs = case.batch * shape.num_tokens * rows * columns
    # The mask, as truths and as numbers.
    case.check_memory((1 + case.dtype.itemsize) * pairs, "masks over all pairs")
    regions = number_regions(shape).flatten().to(case.device)
    members = torch.arange(rows * columns, device=case.device)
    padded = members // columns // shape.region_size[0] * shape.num_regions[1]
    padded = padded + members % columns // shape.region_size[1]
    mask = list_kept(case)[:, None, regions][..., padded]  # (B, 1, N, P)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        maps = query, pad(key, pad_key, shape), pad(value, pad_value, shape)
        q, k, v = (to_heads_first(x) for x in maps)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=case.scale)
        return to_map(out, shape.size)

    return forward


def make_mask_mod(case: RoutingCase) -> Callable[..., Tensor]:
    """Make FlexAttention's mask: whether a query sees a key, tokens numbered region by region."""
    kept, area = list_kept(case), case.shape.region_area

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[batch, query // area, key // area]

    return mask_mod


def make_region_blocks(case: RoutingCase) -> BlockMask:
    """Make FlexAttention's block mask of tokens that lie region by region."""
    kept = list_kept(case).double()
    num_regions, area = kept.shape[1], case.shape.region_area
    num_tokens = num_regions * area
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    tokens = torch.arange(num_tokens, device=case.device)
    places = tokens // FLEX_BLOCK * num_regions + tokens // area
    shares = torch.bincount(places, minlength=num_blocks * num_regions).double()
    shares = shares.view(num_blocks, num_regions)  # tokens of each region in each block
    seen = (shares @ kept @ shares.T).long()
    return make_block_mask(seen, make_mask_mod(case), (num_tokens, num_tokens), case.device)


def make_flex(case: RoutingCase, is_training: bool) -> Forward:
    """FlexAttention, compiled for the shape, on tokens copied into the order of their regions."""
    case.check_flex(is_training)
    shape = case.shape
    block_mask = make_region_blocks(case)
    compiled = compile_flex(case, count_pairs(case, block_mask))
    height, width = shape.size

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        maps = (query, None), (key, pad_key), (value, pad_value)
        q, k, v = (
            to_regions(pad(x, bias, shape).flatten(3), *shape.num_regions)
            .flatten(1, 4)
            .unflatten(-1, (shape.num_heads, -1))
            .transpose(1, 2)
            for x, bias in maps
        )  # (B, h, P, D)
        out = compiled(q, k, v, block_mask=block_mask, scale=case.scale)
        out = out.transpose(1, 2).flatten(2)
        out = out.unflatten(1, (*shape.num_regions, *shape.region_size))
        out = to_image(out)[:, :height, :width]
        return out.contiguous().unflatten(-1, (shape.num_heads, -1))

    return forward
