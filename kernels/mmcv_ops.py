"""What mmcv's compiled operators do, on torchvision's and PyTorch's operators.

mmcv's Python wrappers (``mmcv.ops``) call a compiled extension, ``mmcv._ext``. Where mmcv was
installed without it, :func:`install` offers a module of that name, so that mmdet and mmseg train
and test without a compiler, on the CPU and on CUDA. A real extension always wins.

The functions below have the extension's names and arguments: results go into the buffers that a
wrapper hands over, which are overwritten; the wrappers, not these functions, know autograd. float16
and bfloat16 are computed in float32 and rounded once at the end. Arguments that only tune the
compiled kernels (``im2col_step``, scratch buffers) change nothing here.

Three cases that mmcv's kernels leave undefined have a value here: a focal loss with class weights
gives rows without a class (background, ignored) the weight 1; a softmax focal loss ignores every
label outside ``0 .. num_classes - 1``; a bin without samples is 0 and has no gradient.
Source of each formula: the paper named beside it and the docstrings of ``mmcv.ops``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import itemgetter
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXTENSION = "mmcv._ext"

# The position that marks "no sample": further than one pixel outside, where every weight is 0.
_NOWHERE = -2.0

_OPERATORS: dict[str, Callable] = {}


def install() -> None:
    """Offer ``mmcv._ext`` where mmcv has no compiled one; import nothing; act once."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        # Last: a compiled extension beside mmcv's files is found before this finder is asked.
        sys.meta_path.append(_ExtensionFinder())


class _ExtensionFinder(MetaPathFinder):
    """Find ``mmcv._ext`` and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        return ModuleSpec(fullname, _ExtensionLoader(), origin=__file__)


class _ExtensionLoader(Loader):
    """Fill the module with the operators of this file."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # Registers torch.ops.torchvision, which the operators below call.
        importlib.import_module("torchvision.ops")
        module.__doc__ = __doc__
        module.__dict__.update(_OPERATORS, __getattr__=_unmapped_operator)


def _unmapped_operator(name: str) -> Callable:
    """Return a function that refuses; mmcv checks at import that every operator's name is there."""
    if name.startswith("__"):
        raise AttributeError(f"module {EXTENSION!r} has no attribute {name!r}")

    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"mmcv's operator {name!r} needs mmcv's compiled extension, which this mmcv lacks and "
            "densezoo replaces only in part. Install mmcv with its operators: a wheel for your "
            "PyTorch and CUDA, or a build with a C++ compiler (and nvcc for CUDA) by "
            "MMCV_WITH_OPS=1 pip install --no-build-isolation --no-deps --force-reinstall "
            "git+https://github.com/VBTI-development/onedl-mmcv"
        )

    return refuse


def _operator(function: Callable) -> Callable:
    """Add a function to the module."""
    _OPERATORS[function.__name__] = function
    return function


def _widen(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors to their common dtype, at least float32."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return [x.to(dtype) for x in tensors]


@_operator
def get_compiler_version() -> str:
    """Say that no compiler made these operators."""
    import torchvision

    return f"none (densezoo's operators on torchvision {torchvision.__version__})"


@_operator
def get_compiling_cuda_version() -> str:
    """Return the CUDA version of PyTorch's own operators."""
    return torch.version.cuda or "not available"


@_operator
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Keep boxes that overlap no better box by more than a threshold.

    Args:
        boxes: (N, 4), x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: a box is dropped when its IoU with a kept one is greater.
        offset: 0 or 1; a box is ``x2 - x1 + offset`` wide.

    Returns:
        (K,) int64 indices of the kept boxes, best score first.
    """
    boxes, scores = _widen(boxes, scores)
    if offset:
        # Float64, so that moving an edge by a pixel does not round.
        boxes, scores = boxes.double(), scores.double()
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def _iou(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """Return the IoU of a box, (4,), with others, (N, 4); 0 where neither has an area."""
    top_left = np.maximum(box[:2], others[:, :2])
    bottom_right = np.minimum(box[2:], others[:, 2:])
    overlap = np.maximum(bottom_right - top_left + offset, 0).prod(axis=1)
    area = (box[2:] - box[:2] + offset).prod()
    union = area + (others[:, 2:] - others[:, :2] + offset).prod(axis=1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


@_operator
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap a better one (Bodla et al., ICCV 2017, section 3).

    Each round takes the best box left and multiplies the scores of the others by a weight w(IoU);
    those that fall below ``min_score`` are dropped. All tensors are on the CPU: mmcv moves them.

    Args:
        boxes: (N, 4), x1, y1, x2, y2 in pixels.
        scores: (N,).
        dets: (N, 5), receives the kept boxes and their new scores in its first K rows.
        iou_threshold: from this IoU on, methods 0 and 1 act.
        sigma: of method 2.
        min_score: the score that a box needs to stay.
        method: 0 naive, w = 0; 1 linear, w = 1 - IoU; 2 gaussian, w = exp(-IoU^2 / sigma).
        offset: 0 or 1; a box is ``x2 - x1 + offset`` wide.

    Returns:
        (K,) int64 indices of the kept boxes, in the order in which they were taken.
    """
    # NumPy, whose small operations cost a fraction of PyTorch's: there is a round for each box.
    rows = torch.cat(_widen(boxes, scores[:, None]), dim=1).numpy()
    indices = np.arange(len(rows))
    kept = []
    while len(rows):
        best = rows[:, 4].argmax()
        dets[len(kept)] = torch.from_numpy(rows[best])
        kept.append(int(indices[best]))
        iou = _iou(rows[best, :4], rows[:, :4], offset)
        if method == 2:
            rows[:, 4] *= np.exp(-(iou**2) / sigma)
        else:
            rows[:, 4] *= np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        stays = rows[:, 4] >= min_score
        stays[best] = False
        rows, indices = rows[stays], indices[stays]
    return torch.tensor(kept, dtype=torch.long)


@_operator
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group each box that NMS keeps with the boxes that it suppresses.

    Args:
        dets: (N, 5), x1, y1, x2, y2 in pixels and a score, on the CPU.
        iou_threshold: a box is suppressed when its IoU with a kept one is not smaller.

    Returns:
        One list per kept box, best first: its index, then those it suppresses, best first.
    """
    rows = _widen(dets)[0].numpy()
    left = np.argsort(-rows[:, 4], kind="stable")
    groups = []
    while len(left):
        best, left = left[0], left[1:]
        is_match = _iou(rows[best, :4], rows[left, :4], offset=0) >= iou_threshold
        groups.append([int(best), *left[is_match].tolist()])
        left = left[~is_match]
    return groups


def _corners(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lower index, upper index, upper weight and whether a position counts, along one axis.

    As RoIAlign samples: up to a pixel outside takes the border's value, further out is 0.
    """
    inside = (position >= -1) & (position <= size)
    position = position.clamp(0, size - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=size - 1), position - low, inside


def _max_in_bins(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the greatest value of each bin and which sample it is.

    Args:
        values: (C, PH, GH, PW, GW), GH x GW samples in each of PH x PW bins.
        valid: (PH, GH, PW, GW) bool.

    Returns:
        The maximum (C, PH, PW), 0 in a bin without valid samples; the index of the sample in GH and
        in GW, of the same shape, -1 in such a bin.
    """
    channels, bins_h, samples_h, bins_w, samples_w = values.shape
    if samples_h * samples_w == 0:
        zeros = values.new_zeros(channels, bins_h, bins_w)
        return zeros, zeros.long() - 1, zeros.long() - 1
    values = values.masked_fill(~valid, -torch.inf).transpose(2, 3).flatten(3)
    is_empty = ~valid.transpose(1, 2).flatten(2).any(dim=-1)
    maximum, index = values.max(dim=-1)
    index_h = (index // samples_w).masked_fill(is_empty, -1)
    index_w = (index % samples_w).masked_fill(is_empty, -1)
    return maximum.masked_fill(is_empty, 0), index_h, index_w


def _align_positions(start: Tensor, length: Tensor, bins: int, samples: int) -> Tensor:
    """Return where RoIAlign samples along one axis: (bins, samples), in pixels of the map."""
    centers = torch.arange(bins * samples, dtype=start.dtype, device=start.device) + 0.5
    # A bin's samples are at its (i + 0.5) / samples, so all samples of a RoI are evenly spaced.
    return (start + centers * (length / max(bins * samples, 1))).view(bins, samples)


def _roi_align_max(
    features: Tensor,
    rois: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return RoIAlign's greatest sample of each bin and its y and x: three (K, C, PH, PW)."""
    height, width = features.shape[2:]
    output = features.new_zeros(len(rois), features.shape[1], *size)
    argmax_y, argmax_x = torch.full_like(output, _NOWHERE), torch.full_like(output, _NOWHERE)
    starts = rois[:, [2, 1]] * spatial_scale - (0.5 if aligned else 0.0)
    lengths = (rois[:, [4, 3]] - rois[:, [2, 1]]) * spatial_scale
    if not aligned:
        lengths = lengths.clamp(min=1)
    if sampling_ratio > 0:
        samples = torch.full_like(lengths, sampling_ratio)
    else:
        samples = (lengths / lengths.new_tensor(size)).ceil().clamp(min=0)
    # RoI by RoI, because their numbers of samples differ.
    for k, (image, (samples_h, samples_w)) in enumerate(
        zip(rois[:, 0].long().tolist(), samples.long().tolist(), strict=True)
    ):
        y = _align_positions(starts[k, 0], lengths[k, 0], size[0], samples_h)
        x = _align_positions(starts[k, 1], lengths[k, 1], size[1], samples_w)
        y_low, y_high, y_weight, y_inside = _corners(y[:, :, None, None], height)
        x_low, x_high, x_weight, x_inside = _corners(x, width)
        feature = features[image]
        top = torch.lerp(feature[:, y_low, x_low], feature[:, y_low, x_high], x_weight)
        bottom = torch.lerp(feature[:, y_high, x_low], feature[:, y_high, x_high], x_weight)
        values = torch.lerp(top, bottom, y_weight).masked_fill(~(y_inside & x_inside), 0)
        output[k], index_h, index_w = _max_in_bins(
            values, torch.ones_like(values[0], dtype=torch.bool)
        )
        if samples_h and samples_w:
            argmax_y[k] = y[torch.arange(size[0], device=y.device)[:, None], index_h]
            argmax_x[k] = x[torch.arange(size[1], device=x.device), index_w]
    return output, argmax_y, argmax_x


@_operator
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool bilinear samples of each RoI's bins (He et al., Mask R-CNN, ICCV 2017, section 3).

    Args:
        input: (B, C, H, W).
        rois: (K, 5), image index and x1, y1, x2, y2 in pixels of the image.
        output: (K, C, aligned_height, aligned_width), receives the result.
        argmax_y: shape of output in max mode, receives where the maximum was sampled.
        argmax_x: likewise.
        aligned_height: bins along y.
        aligned_width: bins along x.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: samples per bin and axis; 0 or less: the bin's size in pixels, rounded up.
        pool_mode: 0 takes the greatest sample, 1 their mean.
        aligned: shift by half a pixel; without it a RoI is at least a pixel wide.
    """
    features, boxes = _widen(input, rois)
    size = (aligned_height, aligned_width)
    if pool_mode == 1:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features, boxes, spatial_scale, *size, sampling_ratio, aligned
            )
        )
        return
    results = _roi_align_max(features, boxes, size, spatial_scale, sampling_ratio, aligned)
    for buffer, result in zip((output, argmax_y, argmax_x), results, strict=True):
        buffer.copy_(result)


def _first_element_of_channel(rois: Tensor, shape: torch.Size) -> Tensor:
    """Return where each RoI's channels begin in the flattened map: (K, C, 1, 1) int64."""
    _, channels, height, width = shape
    channel = torch.arange(channels, device=rois.device)
    return ((rois[:, :1].long() * channels + channel) * (height * width))[..., None, None]


@_operator
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` into ``grad_input``, (B, C, H, W)."""
    grad, boxes = _widen(grad_output, rois)
    if pool_mode == 1:
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad,
                boxes,
                spatial_scale,
                aligned_height,
                aligned_width,
                *grad_input.shape,
                sampling_ratio,
                aligned,
            )
        )
        return
    height, width = grad_input.shape[2:]
    y_low, y_high, y_weight, y_inside = _corners(argmax_y.to(grad.dtype), height)
    x_low, x_high, x_weight, x_inside = _corners(argmax_x.to(grad.dtype), width)
    grad = grad * (y_inside & x_inside)
    first = _first_element_of_channel(boxes, grad_input.shape)
    total = grad.new_zeros(grad_input.numel())
    for y, weight_y in ((y_low, 1 - y_weight), (y_high, y_weight)):
        for x, weight_x in ((x_low, 1 - x_weight), (x_high, x_weight)):
            index = first + y * width + x
            total.index_add_(0, index.flatten(), (grad * weight_y * weight_x).flatten())
    grad_input.copy_(total.view_as(grad_input))


@_operator
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Take the greatest pixel of each RoI's bins (Girshick, Fast R-CNN, ICCV 2015, section 2.1).

    As mmcv defines it, which is not torchvision's way: a RoI reaches from ``x1 * spatial_scale`` to
    ``(x2 + 1) * spatial_scale`` without rounding, and a bin covers every pixel that it touches.

    Args:
        input: (B, C, H, W).
        rois: (K, 5), image index and x1, y1, x2, y2 in pixels of the image.
        output: (K, C, pooled_height, pooled_width), receives the result.
        argmax: int32, shape of output; receives y * W + x of the maximum, -1 in an empty bin.
        pooled_height: bins along y.
        pooled_width: bins along x.
        spatial_scale: pixels of the map per pixel of the image.
    """
    features, boxes = _widen(input, rois)
    height, width = features.shape[2:]
    start = boxes[:, [2, 1]] * spatial_scale
    length = (boxes[:, [4, 3]] + 1) * spatial_scale - start
    has_area = (length > 0).all(dim=1)

    def edges(axis: int, bins: int, limit: int) -> tuple[Tensor, Tensor]:
        bin_size = (length[:, axis] / bins)[:, None]
        index = torch.arange(bins, dtype=boxes.dtype, device=boxes.device)
        low = (index * bin_size + start[:, axis, None]).floor()
        high = ((index + 1) * bin_size + start[:, axis, None]).ceil()
        high = torch.where(has_area[:, None], high, low)
        return low.clamp(0, limit).long(), high.clamp(0, limit).long()

    y_low, y_high = edges(0, pooled_height, height)
    x_low, x_high = edges(1, pooled_width, width)
    counts = torch.stack(((y_high - y_low).amax(dim=1), (x_high - x_low).amax(dim=1)), dim=1)
    # RoI by RoI, because their bins' sizes differ.
    for k, (image, (count_h, count_w)) in enumerate(
        zip(boxes[:, 0].long().tolist(), counts.tolist(), strict=True)
    ):
        y = y_low[k, :, None] + torch.arange(count_h, device=boxes.device)
        x = x_low[k, :, None] + torch.arange(count_w, device=boxes.device)
        valid = (y < y_high[k, :, None])[:, :, None, None] & (x < x_high[k, :, None])
        values = features[image][
            :, y.clamp(max=height - 1)[:, :, None, None], x.clamp(max=width - 1)
        ]
        maximum, index_h, index_w = _max_in_bins(values, valid)
        output[k] = maximum.to(output.dtype)
        pixel = (y_low[k, :, None] + index_h) * width + x_low[k] + index_w
        argmax[k] = pixel.masked_fill(index_h < 0, -1).to(argmax.dtype)


@_operator
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient of :func:`roi_pool_forward` into ``grad_input``, (B, C, H, W)."""
    grad = _widen(grad_output)[0].masked_fill(argmax < 0, 0)
    index = _first_element_of_channel(rois, grad_input.shape) + argmax.clamp(min=0)
    total = grad.new_zeros(grad_input.numel())
    total.index_add_(0, index.flatten(), grad.flatten())
    grad_input.copy_(total.view_as(grad_input))


# Stride, padding, dilation (y before x), groups and deform groups, from what the wrappers pass.
_v1_geometry = itemgetter(
    "dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group"
)
_v2_geometry = itemgetter(
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dilation_h",
    "dilation_w",
    "group",
    "deformable_group",
)


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    """Call torchvision's deformable convolution; geometry is what _v1_geometry gets."""
    arguments = _deform_conv_arguments(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*arguments, *geometry, mask is not None)


def _deform_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight, offset, mask and bias."""
    arguments = _deform_conv_arguments(input, weight, offset, mask, bias)
    grad = grad_output.to(arguments[0].dtype)
    return torch.ops.torchvision._deform_conv2d_backward(
        grad, *arguments, *geometry, mask is not None
    )


def _deform_conv_arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """Return the tensors in torchvision's order and in one dtype; it takes none for absent ones."""
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = input.new_zeros(weight.shape[0]) if bias is None else bias
    return _widen(input, weight, offset, mask, bias)


@_operator
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Convolve at shifted positions (Dai et al., ICCV 2017, section 2.1, equation 2).

    Args:
        input: (B, C_in, H, W).
        weight: (C_out, C_in / group, KH, KW).
        offset: (B, deformable_group * KH * KW * 2, H_out, W_out), y before x, in pixels.
        output: (B, C_out, H_out, W_out), receives the result.
        columns: scratch, unused.
        ones: scratch, unused.
        **geometry: kW, kH, dW, dH (stride), padW, padH, dilationW, dilationH, group,
            deformable_group, im2col_step.
    """
    output.copy_(_deform_conv(input, weight, offset, None, None, _v1_geometry(geometry)))


@_operator
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` by input and by offset."""
    grads = _deform_conv_backward(
        grad_output, input, weight, offset, None, None, _v1_geometry(geometry)
    )
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


@_operator
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry: int,
) -> None:
    """Write ``scale`` times the gradient of :func:`deform_conv_forward` by weight."""
    # The gradient by weight does not depend on the weight, which mmcv does not hand over.
    weight = torch.zeros_like(grad_weight)
    grads = _deform_conv_backward(
        grad_output, input, weight, offset, None, None, _v1_geometry(geometry)
    )
    grad_weight.copy_(scale * grads[1])


@_operator
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Convolve at shifted positions with a weight each (Zhu et al., CVPR 2019, equation 1).

    Args:
        input: (B, C_in, H, W).
        weight: (C_out, C_in / group, KH, KW).
        bias: (C_out,), or empty without ``with_bias``.
        ones: scratch, unused.
        offset: (B, deformable_group * KH * KW * 2, H_out, W_out), y before x, in pixels.
        mask: (B, deformable_group * KH * KW, H_out, W_out).
        output: (B, C_out, H_out, W_out), receives the result.
        columns: scratch, unused.
        with_bias: whether to add the bias.
        **geometry: kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            group, deformable_group.
    """
    bias = bias if with_bias else None
    output.copy_(_deform_conv(input, weight, offset, mask, bias, _v2_geometry(geometry)))


@_operator
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write the five gradients of :func:`modulated_deform_conv_forward`."""
    bias = bias if with_bias else None
    grads = _deform_conv_backward(
        grad_output, input, weight, offset, mask, bias, _v2_geometry(geometry)
    )
    for buffer, grad in zip(
        (grad_input, grad_weight, grad_offset, grad_mask), grads[:4], strict=True
    ):
        buffer.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def _ms_deform_attn(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes: list[list[int]],
    starts: list[int],
) -> Tensor:
    """Sample every level and add up, differentiably; see :func:`ms_deform_attn_forward`."""
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    # grid_sample's coordinates run from -1 to 1 over the map, corners of corner pixels.
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]
    output = value.new_zeros(batch * heads, head_dim, queries)
    for level, ((height, width), start) in enumerate(zip(shapes, starts, strict=True)):
        level_value = value[:, start : start + height * width].permute(0, 2, 3, 1)
        sampled = F.grid_sample(
            level_value.reshape(batch * heads, head_dim, height, width),
            grids[:, :, level],
            align_corners=False,
        )  # (B * heads, head_dim, Q, points)
        output = output + (sampled * weights[:, :, :, level]).sum(dim=-1)
    return output.view(batch, heads * head_dim, queries).transpose(1, 2).contiguous()


@_operator
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Attend to sampled points of several maps (Zhu et al., ICLR 2021, equation 3).

    Args:
        value: (B, S, heads, head_dim), the flattened levels one after the other.
        value_spatial_shapes: (levels, 2) int64, height and width of each.
        value_level_start_index: (levels,) int64, where each begins in S.
        sampling_locations: (B, Q, heads, levels, points, 2), x and y, 0 to 1 over the map; a sample
            outside is 0.
        attention_weights: (B, Q, heads, levels, points).
        im2col_step: unused.

    Returns:
        (B, Q, heads * head_dim) in the dtype of value.
    """
    tensors = _widen(value, sampling_locations, attention_weights)
    layout = (value_spatial_shapes.tolist(), value_level_start_index.tolist())
    return _ms_deform_attn(*tensors, *layout).to(value.dtype)


@_operator
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the three gradients of :func:`ms_deform_attn_forward`."""
    tensors = [
        x.detach().requires_grad_() for x in _widen(value, sampling_locations, attention_weights)
    ]
    layout = (value_spatial_shapes.tolist(), value_level_start_index.tolist())
    with torch.enable_grad():
        output = _ms_deform_attn(*tensors, *layout)
    grads = torch.autograd.grad(output, tensors, grad_output.to(output.dtype))
    for buffer, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        buffer.copy_(grad)


def _class_weights(target: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """Return each row's class weight, (N,); 1 without weights and for rows that have no class."""
    if weight.numel() == 0:
        return like.new_ones(target.shape)
    has_class = (target >= 0) & (target < len(weight))
    row_weights = weight.to(like.dtype)[target.clamp(0, len(weight) - 1)]
    return torch.where(has_class, row_weights, 1)


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Return (N, C) bool, true at the class of each row; nowhere in a row that has no class."""
    return target[:, None] == torch.arange(num_classes, device=target.device)


def _answers(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sign of each logit's right answer, the logit of that answer and its weight.

    With z the logit of the right answer and p = sigmoid(z), every loss is
    -weight (1 - p)^gamma log p, for positives and negatives alike. All are (N, C).
    """
    logits = _widen(input)[0]
    is_positive = _one_hot(target, logits.shape[1])
    sign = torch.where(is_positive, 1.0, -1.0).to(logits.dtype)
    alpha_t = torch.where(is_positive, alpha, 1 - alpha).to(logits.dtype)
    return sign, sign * logits, alpha_t * _class_weights(target, weight, logits)[:, None]


@_operator
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Compute the focal loss of each class on its own (Lin et al., ICCV 2017, equation 5).

    With p = sigmoid(x): -alpha (1 - p)^gamma log p for the row's class, and
    -(1 - alpha) p^gamma log(1 - p) for the others.

    Args:
        input: (N, C) logits.
        target: (N,) int64; a value outside 0 .. C - 1, such as the background's C, makes every
            class of its row a negative.
        weight: (C,), the factor of rows by their class, or empty.
        output: (N, C), receives the losses.
        gamma: exponent, not negative.
        alpha: weight of positives, 0 to 1.
    """
    _, z, weights = _answers(input, target, weight, alpha)
    output.copy_(-weights * torch.sigmoid(-z).pow(gamma) * F.logsigmoid(z))


@_operator
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss of :func:`sigmoid_focal_loss_forward` by its logit."""
    sign, z, weights = _answers(input, target, weight, alpha)
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    grad_input.copy_(sign * weights * q.pow(gamma) * (gamma * p * F.logsigmoid(z) - q))


def _class_probability(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of each row's class, (N,), and whether the row has one, (N,) bool."""
    num_classes = softmax.shape[1]
    has_class = (target >= 0) & (target < num_classes)
    p = softmax.gather(1, target.clamp(0, num_classes - 1)[:, None])[:, 0]
    # The smallest normal number keeps the logarithm finite where the probability underflowed.
    return p.clamp(min=torch.finfo(p.dtype).tiny), has_class


@_operator
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Compute -alpha (1 - p)^gamma log p for the class of each row.

    Args:
        input: (N, C) probabilities: mmcv has applied the softmax.
        target: (N,) int64; a row whose value is outside 0 .. C - 1 has loss 0.
        weight: (C,), the factor of rows by their class, or empty.
        output: (N,), receives the losses.
        gamma: exponent, not negative.
        alpha: factor of every loss.
    """
    softmax = _widen(input)[0]
    p, has_class = _class_probability(softmax, target)
    loss = -alpha * (1 - p).clamp(min=0).pow(gamma) * p.log()
    output.copy_((loss * _class_weights(target, weight, p)).masked_fill(~has_class, 0))


@_operator
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative of each row's loss by its logits into ``grad_input``, (N, C).

    ``buff``, (N,), receives the factor that a row's logits share.
    """
    softmax = _widen(input)[0]
    p, has_class = _class_probability(softmax, target)
    # dL/dp * p; 1 - p is kept off 0, where (1 - p)^(gamma - 1) is infinite for gamma < 1.
    q = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)
    factor = alpha * (gamma * q.pow(gamma - 1) * p * p.log() - q.pow(gamma))
    factor = (factor * _class_weights(target, weight, p)).masked_fill(~has_class, 0)
    buff.copy_(factor)
    grad_input.copy_(factor[:, None] * (_one_hot(target, softmax.shape[1]).to(p.dtype) - softmax))
