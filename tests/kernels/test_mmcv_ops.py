"""mmcv's public operators, on densezoo's stand-in, against formulas written out here."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmcv import ops

from densezoo.kernels import mmcv_ops

LOW_PRECISION = [torch.float16, torch.bfloat16]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", devices, scope="function")


@pytest.fixture
def rand(device):
    """Return a function that draws float64 uniform numbers from a range."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, low=-1.0, high=1.0):
        numbers = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (numbers * (high - low) + low).to(device)

    return draw


def random_boxes(rand, number, size=30.0):
    """Return (number, 4) boxes that overlap a lot, x1, y1, x2, y2."""
    corner = rand(number, 2, low=0, high=size)
    return torch.cat((corner, corner + rand(number, 2, low=1, high=size / 2)), dim=1)


def assert_same_with_gradients(function, oracle, inputs):
    """Compare two functions' results and their gradients by every input, in float64."""
    results = []
    for candidate in (function, oracle):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = candidate(*leaves)
        seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        output.backward(seed.view_as(output))
        results.append([output.detach(), *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert expected.abs().sum() > 0


def assert_rounded_once(actual, exact):
    """Check a low precision result: off by at most one rounding of the greatest value."""
    error = (actual.double() - exact).abs().max()
    assert error <= torch.finfo(actual.dtype).eps * exact.abs().max()


# The finder


def run_python(code):
    """Run code in a fresh process and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The module by its file, without the package: numpy and torch are all that it may import.
LOAD_ALONE = f"""
import importlib.util, json, sys
import numpy, torch
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("stand_in", {mmcv_ops.__file__!r})
stand_in = importlib.util.module_from_spec(spec)
sys.modules["stand_in"] = stand_in
spec.loader.exec_module(stand_in)
stand_in.install()
"""


@pytest.fixture(scope="module")
def fresh_process():
    """Return what a fresh process saw that installed the stand-in twice, then used it."""
    code = """
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
stand_in.install()
finders = [type(finder).__module__ for finder in sys.meta_path]
from mmcv.ops import nms
kept = nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)[1].tolist()
print(json.dumps({"new": new, "finders": finders, "kept": kept}))
"""
    return json.loads(run_python(LOAD_ALONE + code).splitlines()[-1])


def test_install_imports_neither_mmcv_nor_torchvision(fresh_process):
    assert "stand_in" in fresh_process["new"]
    heavy = {"mmcv", "mmengine", "torchvision", "timm", "densezoo"}
    assert not heavy & set(fresh_process["new"])


def test_install_twice_adds_one_finder_at_the_end(fresh_process):
    assert fresh_process["finders"].count("stand_in") == 1
    assert fresh_process["finders"][-1] == "stand_in"


def test_extension_loads_torchvision_itself(fresh_process):
    assert fresh_process["kept"] == [0]


def test_a_real_extension_wins(tmp_path):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_ext.py").write_text("nms = 'compiled'\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + LOAD_ALONE
    assert run_python(code + "import mmcv._ext; print(mmcv._ext.nms)") == "compiled"


def test_finder_answers_for_the_extension_only():
    finder = next(x for x in sys.meta_path if isinstance(x, mmcv_ops._ExtensionFinder))
    assert finder.find_spec("mmcv._ext").name == "mmcv._ext"
    assert finder.find_spec("mmcv._extra") is None
    assert finder.find_spec("mmcv") is None


def test_extension_module_has_a_real_spec():
    module = sys.modules["mmcv._ext"]
    assert module.__spec__.name == "mmcv._ext"
    assert importlib.util.find_spec("mmcv._ext") is module.__spec__


def test_an_unmapped_operator_names_itself_and_the_way_out(device):
    with pytest.raises(NotImplementedError, match=r"'bbox_overlaps'.*MMCV_WITH_OPS=1 pip install"):
        ops.bbox_overlaps(torch.rand(2, 4, device=device), torch.rand(2, 4, device=device))


def test_dunder_lookups_raise_attribute_error():
    module = sys.modules["mmcv._ext"]
    assert hasattr(module, "an_operator_of_the_future")
    assert not hasattr(module, "__wrapped__")


def test_mmcv_reports_what_compiled_it():
    assert "torchvision" in ops.get_compiler_version()
    assert ops.get_compiling_cuda_version() in (torch.version.cuda, "not available")


def test_operators_ignore_autocast(rand, device):
    value, locations = rand(1, 6, 1, 2).float(), rand(1, 2, 1, 1, 2, 2, low=0, high=1).float()
    weights = rand(1, 2, 1, 1, 2).float()
    layout = torch.tensor([[2, 3]], device=device), torch.tensor([0], device=device)
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    expected = apply(value, *layout, locations, weights, 64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(apply(value, *layout, locations, weights, 64), expected)


# Non-maximum suppression


def iou_of(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def greedy_groups(boxes, scores, threshold, offset, suppresses):
    """Return, for each kept box, its index and those of the boxes that it suppresses."""
    left = sorted(range(len(scores)), key=lambda i: -scores[i])
    groups = []
    while left:
        best, *left = left
        hit = [i for i in left if suppresses(iou_of(boxes[best], boxes[i], offset), threshold)]
        groups.append([best, *hit])
        left = [i for i in left if i not in hit]
    return groups


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nms_is_greedy_suppression(rand, offset, dtype):
    boxes, scores = random_boxes(rand, 60).to(dtype), rand(60).to(dtype)
    expected = greedy_groups(
        boxes.tolist(), scores.tolist(), 0.4, offset, lambda iou, limit: iou > limit
    )
    dets, kept = ops.nms(boxes, scores, 0.4, offset=offset)
    assert kept.tolist() == [group[0] for group in expected]
    assert 5 < len(kept) < 55
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), dim=1)[kept])


def test_nms_offset_counts_a_pixel_more(device):
    # 3 of 5 columns overlap, or 4 of 6 when the end pixel belongs to the box.
    boxes = torch.tensor([[0.0, 0, 4, 9], [1.0, 0, 5, 9]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert len(ops.nms(boxes, scores, 0.63, offset=0)[1]) == 2
    assert len(ops.nms(boxes, scores, 0.63, offset=1)[1]) == 1


def test_nms_counts_pixels_exactly_far_from_the_origin(device):
    # Where float32 holds even numbers only; batched_nms moves boxes of late classes so far.
    far = 2.0**24
    boxes = torch.tensor([[far - 4, 0, far, 4], [far - 2, 0, far + 2, 4]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert iou_of(*boxes.tolist(), offset=1) == 3 / 7
    assert len(ops.nms(boxes, scores, 0.42, offset=1)[1]) == 1
    assert len(ops.nms(boxes, scores, 0.43, offset=1)[1]) == 2


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_nms_takes_low_precision(rand, offset, dtype):
    boxes, scores = random_boxes(rand, 20).to(dtype), torch.arange(20).to(rand(1).device, dtype)
    _, kept = ops.nms(boxes, scores, 0.4, offset=offset)
    _, expected = ops.nms(boxes.double(), scores.double(), 0.4, offset=offset)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("offset", [0, 1])
def test_suppression_of_no_boxes_is_empty(device, offset):
    boxes, scores = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    for function in (ops.nms, ops.soft_nms):
        dets, kept = function(boxes, scores, 0.5, offset=offset)
        assert dets.shape == (0, 5)
        assert kept.shape == (0,) and kept.dtype == torch.int64
    assert ops.nms_match(torch.zeros(0, 5, device=device), 0.5) == []


def test_batched_nms_keeps_classes_apart(rand, device):
    boxes, scores = random_boxes(rand, 40), rand(40, low=0)
    classes = torch.arange(40, device=device) % 3
    dets, kept = ops.batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.4))
    expected = []
    for label in range(3):
        members = (classes == label).nonzero()[:, 0].tolist()
        groups = greedy_groups(
            boxes[members].tolist(),
            scores[members].tolist(),
            0.4,
            0,
            lambda iou, limit: iou > limit,
        )
        expected += [members[group[0]] for group in groups]
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i].item())
    assert torch.equal(dets[:, 4], scores[kept])


def test_batched_nms_takes_soft_nms(rand, device):
    boxes, scores = random_boxes(rand, 12), rand(12, low=0.1)
    config = dict(type="soft_nms", iou_threshold=0.3, min_score=0.05)
    dets, kept = ops.batched_nms(boxes, scores, torch.zeros(12, device=device), config)
    assert torch.equal(kept, ops.soft_nms(boxes, scores, 0.3, min_score=0.05)[1])
    assert torch.equal(dets[:, :4], boxes[kept])


def decayed(boxes, scores, threshold, sigma, min_score, method, offset):
    """Return Soft-NMS's (index, score) pairs, box by box."""
    left = dict(enumerate(scores))
    kept = []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            iou = iou_of(boxes[best], boxes[i], offset)
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                left[i] *= 0 if method == "naive" else 1 - iou
            if left[i] < min_score:
                del left[i]
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["linear", "gaussian", "naive"])
def test_soft_nms_decays_scores(rand, device, method, offset):
    boxes, scores = random_boxes(rand, 50), rand(50, low=0.01, high=1)
    settings = dict(sigma=0.4, min_score=0.05, method=method, offset=offset)
    expected = decayed(boxes.tolist(), scores.tolist(), 0.3, **settings)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, **settings)
    assert kept.tolist() == [i for i, _ in expected]
    assert 5 < len(kept) < 50
    assert torch.equal(dets[:, :4], boxes[kept])
    expected_scores = torch.tensor([score for _, score in expected], dtype=torch.float64)
    torch.testing.assert_close(dets[:, 4].cpu(), expected_scores)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_soft_nms_takes_low_precision(rand, dtype):
    boxes, scores = random_boxes(rand, 10).to(dtype), torch.linspace(0.1, 1, 10).to(dtype)
    dets, kept = ops.soft_nms(boxes.cpu(), scores)
    exact, expected = ops.soft_nms(boxes.cpu().double(), scores.double())
    assert torch.equal(kept, expected)
    assert_rounded_once(dets[:, 4], exact[:, 4])


def test_soft_nms_leaves_its_inputs_alone(rand):
    boxes, scores = random_boxes(rand, 10), rand(10, low=0)
    before = boxes.clone(), scores.clone()
    ops.soft_nms(boxes, scores)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


def test_an_iou_at_the_threshold_spares_in_nms_only(device):
    boxes = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 2, 1]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert len(ops.nms(boxes, scores, 0.5)[1]) == 2
    assert len(ops.soft_nms(boxes, scores, 0.5, method="naive")[1]) == 1
    assert len(ops.nms_match(torch.cat((boxes, scores[:, None]), dim=1), 0.5)) == 1


@pytest.mark.parametrize("as_numpy", [False, True])
def test_nms_match_groups_what_a_box_suppresses(rand, as_numpy):
    dets = torch.cat((random_boxes(rand, 40), rand(40, 1)), dim=1)
    expected = greedy_groups(
        dets[:, :4].tolist(), dets[:, 4].tolist(), 0.3, 0, lambda iou, limit: iou >= limit
    )
    groups = ops.nms_match(dets.cpu().numpy() if as_numpy else dets, 0.3)
    assert [group.tolist() for group in groups] == expected
    assert max(len(group) for group in expected) > 2
    assert isinstance(groups[0], np.ndarray if as_numpy else torch.Tensor)


# RoI pooling


def tent(positions, size):
    """Return bilinear weights of the pixels 0 .. size - 1 at positions: (..., size)."""
    pixels = torch.arange(size, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[..., None] - pixels).abs()).clamp(min=0)


def roi_align_by_definition(features, rois, size, scale, ratio, mode, aligned):
    """Pool sample by sample; a sample within a pixel of the map counts as on its border."""
    height, width = features.shape[2:]
    results = []
    for image, *box in rois.tolist():
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in box)
        roi_h, roi_w = y2 - y1, x2 - x1
        if not aligned:
            roi_h, roi_w = max(roi_h, 1), max(roi_w, 1)
        count_h = ratio if ratio > 0 else math.ceil(roi_h / size[0])
        count_w = ratio if ratio > 0 else math.ceil(roi_w / size[1])
        for bin_y, bin_x in itertools.product(range(size[0]), range(size[1])):
            samples = []
            for i, j in itertools.product(range(count_h), range(count_w)):
                y = y1 + (bin_y + (i + 0.5) / count_h) * roi_h / size[0]
                x = x1 + (bin_x + (j + 0.5) / count_w) * roi_w / size[1]
                inside = -1 <= y <= height and -1 <= x <= width
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                weights = tent(rois.new_tensor(y), height)[:, None] * tent(
                    rois.new_tensor(x), width
                )
                samples.append((features[int(image)] * weights * inside).sum(dim=(1, 2)))
            samples = torch.stack(samples) if samples else features.new_zeros(1, features.shape[1])
            results.append(samples.amax(dim=0) if mode == "max" else samples.mean(dim=0))
    return torch.stack(results).view(len(rois), *size, -1).permute(0, 3, 1, 2)


# Inside, across the border, far outside, thinner than a pixel; not in the order of the images.
ROIS = [
    [1, 2.3, 1.1, 15.2, 11.9],
    [0, -3.7, -2.2, 6.1, 30.3],
    [0, 9.6, 4.4, 10.1, 12.7],
    [1, 40.2, 40.4, 55.5, 60.6],
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_and_its_gradient(rand, device, mode, ratio, aligned):
    rois = torch.tensor(ROIS, dtype=torch.float64, device=device)
    assert_same_with_gradients(
        lambda x: ops.roi_align(x, rois, (3, 2), 0.5, ratio, mode, aligned),
        lambda x: roi_align_by_definition(x, rois, (3, 2), 0.5, ratio, mode, aligned),
        [rand(2, 3, 7, 9)],
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_roi_align_takes_low_precision(rand, device, dtype, mode):
    # Numbers that both types hold exactly, so that only the result is rounded.
    features = (rand(1, 2, 6, 6) * 64).round().to(dtype)
    rois = torch.tensor([[0, 0.5, 1.25, 4.75, 5.5]], dtype=dtype, device=device)
    pooled = ops.roi_align(features, rois, (2, 2), 1.0, 2, mode, True)
    assert pooled.dtype == dtype
    exact = ops.roi_align(features.double(), rois.double(), (2, 2), 1.0, 2, mode, True)
    assert_rounded_once(pooled, exact)


@pytest.mark.parametrize("pool", [ops.roi_align, ops.roi_pool])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_pooling_gradients_take_low_precision(rand, device, dtype, pool):
    features = rand(1, 2, 6, 6).to(dtype).requires_grad_()
    exact = features.detach().double().requires_grad_()
    rois = torch.tensor([[0, 0.5, 1.25, 4.75, 5.5]] * 3, dtype=dtype, device=device)
    seed = rand(3, 2, 2, 2).to(dtype)
    pool(features, rois, (2, 2), 1.0).backward(seed)
    pool(exact, rois.double(), (2, 2), 1.0).backward(seed.double())
    assert features.grad.dtype == dtype
    assert_rounded_once(features.grad, exact.grad)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_of_a_roi_without_area_is_zero(rand, device, mode):
    features = rand(1, 2, 6, 6).requires_grad_()
    rois = torch.tensor([[0, 2, 1, 2, 4.0]], dtype=torch.float64, device=device)
    pooled = ops.roi_align(features, rois, (2, 2), 1.0, 0, mode, True)
    pooled.sum().backward()
    assert torch.count_nonzero(pooled) == 0
    assert torch.count_nonzero(features.grad) == 0


@pytest.mark.parametrize("pool", ["avg", "max", "roi_pool"])
def test_pooling_no_rois_is_empty(rand, device, pool):
    features = rand(2, 3, 5, 5).requires_grad_()
    rois = torch.zeros(0, 5, dtype=torch.float64, device=device)
    if pool == "roi_pool":
        pooled = ops.roi_pool(features, rois, (2, 2), 1.0)
    else:
        pooled = ops.roi_align(features, rois, (2, 2), 1.0, 0, pool, True)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 2, 2)
    assert torch.count_nonzero(features.grad) == 0


def roi_pool_by_definition(features, rois, size, scale):
    """Take the greatest pixel that each bin touches."""
    height, width = features.shape[2:]
    results = []
    for image, x1, y1, x2, y2 in rois.tolist():
        start_y, start_x = y1 * scale, x1 * scale
        roi_h, roi_w = (y2 + 1) * scale - start_y, (x2 + 1) * scale - start_x
        for bin_y, bin_x in itertools.product(range(size[0]), range(size[1])):
            top = math.floor(start_y + bin_y * roi_h / size[0])
            bottom = math.ceil(start_y + (bin_y + 1) * roi_h / size[0])
            left = math.floor(start_x + bin_x * roi_w / size[1])
            right = math.ceil(start_x + (bin_x + 1) * roi_w / size[1])
            pixels = [
                features[int(image), :, y, x]
                for y in range(max(top, 0), min(bottom, height))
                for x in range(max(left, 0), min(right, width))
            ]
            if not pixels or roi_h <= 0 or roi_w <= 0:
                pixels = [features.new_zeros(features.shape[1])]
            results.append(torch.stack(pixels).amax(dim=0))
    return torch.stack(results).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def test_roi_pool_and_its_gradient(rand, device):
    # The last one ends before it begins.
    rois = torch.tensor([*ROIS, [0, 8, 8, 3, 3]], dtype=torch.float64, device=device)
    assert_same_with_gradients(
        lambda x: ops.roi_pool(x, rois, (3, 2), 0.5),
        lambda x: roi_pool_by_definition(x, rois, (3, 2), 0.5),
        [rand(2, 3, 7, 9)],
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_roi_pool_takes_low_precision(rand, device, dtype):
    features = rand(2, 3, 7, 9).to(dtype)
    rois = torch.tensor(ROIS, device=device).to(dtype)
    pooled = ops.roi_pool(features, rois, (3, 2), 0.5)
    assert torch.equal(pooled.double(), ops.roi_pool(features.double(), rois.double(), (3, 2), 0.5))


# Deformable convolution


def deform_conv_by_definition(
    x, offset, weight, mask=None, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1)
):
    """Weigh every pixel of the map for every kernel position; zero outside the map."""
    batch, channels, height, width = x.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    offset = offset.view(batch, -1, taps, 2, out_h, out_w)
    mask = offset.new_ones(1) if mask is None else mask.view(batch, -1, taps, out_h, out_w)

    def grid(kernel, out, axis):
        starts = torch.arange(out, device=x.device) * stride[axis] - padding[axis]
        return torch.arange(kernel, device=x.device)[:, None] * dilation[axis] + starts

    y = grid(kernel_h, out_h, 0)[:, None, :, None].expand(-1, kernel_w, -1, out_w)
    x_grid = grid(kernel_w, out_w, 1)[None, :, None].expand(kernel_h, -1, out_h, -1)
    y = y.reshape(taps, out_h, out_w) + offset[:, :, :, 0]
    x_grid = x_grid.reshape(taps, out_h, out_w) + offset[:, :, :, 1]
    # b batch, d deform group, t tap, i j output, h w input, c channel of the deform group
    columns = torch.einsum(
        "bdtijh,bdtijw,bdchw->bdctij",
        tent(y, height) * (mask[..., None] if mask.dim() > 1 else 1),
        tent(x_grid, width),
        x.view(batch, offset.shape[1], -1, height, width),
    )
    columns = columns.reshape(batch, channels // group_channels, group_channels, taps, out_h, out_w)
    weight = weight.view(columns.shape[1], -1, group_channels, taps)
    output = torch.einsum("goct,bgctij->bgoij", weight, columns)
    output = output.reshape(batch, out_channels, out_h, out_w)
    return output if bias is None else output + bias[:, None, None]


GEOMETRIES = [
    pytest.param((3, 3), (1, 1), (1, 1), (1, 1), 1, 1, id="plain"),
    pytest.param((3, 2), (2, 1), (1, 0), (1, 2), 2, 1, id="groups"),
    pytest.param((2, 3), (1, 2), (2, 1), (2, 1), 1, 2, id="deform_groups"),
    pytest.param((1, 3), (1, 1), (0, 2), (1, 1), 2, 4, id="both"),
]


def conv_inputs(rand, kernel, stride, padding, dilation, groups, deform_groups):
    """Return a map, offsets of up to two pixels and weights."""
    x = rand(2, 4, 6, 7)
    out = [
        (size + 2 * pad - step * (k - 1) - 1) // jump + 1
        for size, pad, step, k, jump in zip(
            x.shape[2:], padding, dilation, kernel, stride, strict=True
        )
    ]
    offset = rand(2, deform_groups * kernel[0] * kernel[1] * 2, *out, low=-2, high=2)
    return x, offset, rand(6, 4 // groups, *kernel)


@pytest.mark.parametrize("kernel, stride, padding, dilation, groups, deform_groups", GEOMETRIES)
@pytest.mark.parametrize("im2col_step", [1, 32])
def test_deform_conv_and_its_gradients(
    rand, kernel, stride, padding, dilation, groups, deform_groups, im2col_step
):
    inputs = conv_inputs(rand, kernel, stride, padding, dilation, groups, deform_groups)
    geometry = (stride, padding, dilation)
    assert_same_with_gradients(
        lambda x, offset, weight: ops.deform_conv2d(
            x, offset, weight, *geometry, groups, deform_groups, False, im2col_step
        ),
        lambda x, offset, weight: deform_conv_by_definition(
            x, offset, weight, None, None, *geometry
        ),
        inputs,
    )


@pytest.mark.parametrize("kernel, stride, padding, dilation, groups, deform_groups", GEOMETRIES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deform_conv_and_its_gradients(
    rand, kernel, stride, padding, dilation, groups, deform_groups, with_bias
):
    inputs = conv_inputs(rand, kernel, stride, padding, dilation, groups, deform_groups)
    mask = rand(2, inputs[1].shape[1] // 2, *inputs[1].shape[2:], low=0)
    geometry = (stride, padding, dilation)
    assert_same_with_gradients(
        lambda x, offset, weight, mask, bias=None: ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, *geometry, groups, deform_groups
        ),
        lambda x, offset, weight, mask, bias=None: deform_conv_by_definition(
            x, offset, weight, mask, bias, *geometry
        ),
        [*inputs, mask, *([rand(6)] if with_bias else [])],
    )


@pytest.mark.parametrize("pack", [ops.DeformConv2dPack, ops.ModulatedDeformConv2dPack])
def test_deform_conv_without_offsets_is_a_convolution(rand, device, pack):
    torch.manual_seed(0)
    layer = pack(4, 6, 3, stride=2, padding=1, deform_groups=2).to(device).double()
    x = rand(2, 4, 6, 7)
    expected = torch.nn.functional.conv2d(x, layer.weight, None, 2, 1)
    # A new ModulatedDeformConv2dPack has the mask sigmoid(0) and the bias 0.
    factor = 0.5 if pack is ops.ModulatedDeformConv2dPack else 1.0
    torch.testing.assert_close(layer(x), factor * expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_deform_conv_takes_low_precision(rand, dtype):
    x, offset, weight = conv_inputs(rand, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1)
    x, offset, weight = (value.to(dtype) for value in (x, offset, weight))
    mask = offset[:, ::2].contiguous()
    tensors = x, offset, mask, weight
    exact = [value.double() for value in tensors]
    plain = ops.deform_conv2d(x, offset, weight, 1, 1)
    assert_rounded_once(plain, ops.deform_conv2d(exact[0], exact[1], exact[3], 1, 1))
    modulated = ops.modulated_deform_conv2d(*tensors, None, 1, 1)
    assert_rounded_once(modulated, ops.modulated_deform_conv2d(*exact, None, 1, 1))


# Multi-scale deformable attention


def attention_by_definition(value, shapes, locations, weights):
    """Weigh every pixel of every level for every sample; zero outside a level."""
    output, start = 0, 0
    for level, (height, width) in enumerate(shapes.tolist()):
        maps = value[:, start : start + height * width].unflatten(1, (height, width))
        start += height * width
        x, y = (locations[:, :, :, level] * value.new_tensor([width, height]) - 0.5).unbind(-1)
        # b batch, q query, n head, p point, h w pixel, c channel of the head
        output = output + torch.einsum(
            "bqnph,bqnpw,bqnp,bhwnc->bqnc",
            tent(y, height),
            tent(x, width),
            weights[:, :, :, level],
            maps,
        )
    return output.flatten(2)


@pytest.fixture
def attention_inputs(rand, device):
    """Return value, locations (some outside the maps), weights, shapes and starts."""
    shapes = torch.tensor([[4, 5], [2, 3], [1, 1]], device=device)
    starts = torch.tensor([0, 20, 26], device=device)
    locations = rand(2, 4, 2, 3, 5, 2, low=-0.3, high=1.3)
    return rand(2, 27, 2, 3), locations, rand(2, 4, 2, 3, 5), shapes, starts


def deform_attention(value, locations, weights, shapes, starts):
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    return apply(value, shapes, starts, locations, weights, 64)


def test_multi_scale_deformable_attention_and_its_gradients(attention_inputs):
    *inputs, shapes, starts = attention_inputs
    assert_same_with_gradients(
        lambda *tensors: deform_attention(*tensors, shapes, starts),
        lambda *tensors: attention_by_definition(tensors[0], shapes, *tensors[1:]),
        inputs,
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_multi_scale_deformable_attention_takes_low_precision(attention_inputs, dtype):
    *inputs, shapes, starts = attention_inputs
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    output = deform_attention(*inputs, shapes, starts)
    assert output.dtype == dtype
    output.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_output = deform_attention(*exact, shapes, starts)
    exact_output.sum().backward()
    assert_rounded_once(output, exact_output)
    for actual, expected in zip(inputs, exact, strict=True):
        assert actual.grad.dtype == dtype
        assert_rounded_once(actual.grad, expected.grad)


@pytest.mark.parametrize("batch, queries", [(0, 4), (2, 0)])
def test_multi_scale_deformable_attention_of_nothing_is_empty(attention_inputs, batch, queries):
    value, locations, weights, *layout = attention_inputs
    value = value[:batch].requires_grad_()
    output = deform_attention(
        value, locations[:batch, :queries], weights[:batch, :queries], *layout
    )
    output.sum().backward()
    assert output.shape == (batch, queries, 6)
    assert torch.count_nonzero(value.grad) == 0


# Focal losses: a target of 4 is the background of 4 classes, -1 and 255 are ignored labels


def sigmoid_focal_by_definition(logits, target, gamma, alpha, weight=None):
    losses = torch.zeros_like(logits)
    for row, column in itertools.product(range(logits.shape[0]), range(logits.shape[1])):
        p = 1 / (1 + torch.exp(-logits[row, column]))
        label = int(target[row])
        if label == column:
            loss = -alpha * (1 - p) ** gamma * torch.log(p)
        else:
            loss = -(1 - alpha) * p**gamma * torch.log(1 - p)
        if weight is not None and 0 <= label < len(weight):
            loss = loss * weight[label]
        losses = losses.index_put((torch.tensor(row), torch.tensor(column)), loss)
    return losses


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss_and_its_gradient(rand, device, reduction, gamma, alpha, weighted):
    target = torch.tensor([0, 3, 4, 1, 255, -1], device=device)
    weight = rand(4, low=0.5, high=2) if weighted else None

    def oracle(logits):
        losses = sigmoid_focal_by_definition(logits, target, gamma, alpha, weight)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 6}[reduction]

    assert_same_with_gradients(
        lambda x: ops.sigmoid_focal_loss(x, target, gamma, alpha, weight, reduction),
        oracle,
        [rand(6, 4, low=-6, high=6)],
    )


def softmax_focal_by_definition(logits, target, gamma, alpha, weight=None):
    losses = []
    for row, label in zip(logits, target.tolist(), strict=True):
        if not 0 <= label < logits.shape[1]:
            losses.append(0 * row[0])
            continue
        p = torch.exp(row[label]) / torch.exp(row).sum()
        factor = alpha if weight is None else alpha * weight[label]
        losses.append(-factor * (1 - p) ** gamma * torch.log(p))
    return torch.stack(losses)


# mmcv's backward multiplies (N, C) by (N,) without a reduction, so only these two can be trained.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss_and_its_gradient(rand, device, reduction, gamma, alpha, weighted):
    target = torch.tensor([0, 3, 4, 1, 255, -1], device=device)
    weight = rand(4, low=0.5, high=2) if weighted else None

    def oracle(logits):
        losses = softmax_focal_by_definition(logits, target, gamma, alpha, weight)
        return losses.sum() / (6 if reduction == "mean" else 1)

    assert_same_with_gradients(
        lambda x: ops.softmax_focal_loss(x, target, gamma, alpha, weight, reduction),
        oracle,
        [rand(6, 4, low=-6, high=6)],
    )


def test_softmax_focal_loss_without_reduction(rand, device):
    target = torch.tensor([0, 3, 4, 1, 255, -1], device=device)
    logits = rand(6, 4, low=-6, high=6)
    losses = ops.softmax_focal_loss(logits.clone(), target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(losses, softmax_focal_by_definition(logits, target, 2.0, 0.25))


@pytest.mark.parametrize("loss", [ops.sigmoid_focal_loss, ops.softmax_focal_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_losses_stay_finite_at_extreme_logits(device, loss, gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], device=device, requires_grad=True)
    value = loss(logits, torch.tensor([0, 0], device=device), gamma, 0.25, None, "sum")
    value.backward()
    assert math.isfinite(value.item()) and value > 10
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [ops.sigmoid_focal_loss, ops.softmax_focal_loss])
def test_focal_losses_of_no_rows_are_zero(device, loss):
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.int64, device=device), 2.0, 0.25, None, "sum")
    value.backward()
    assert value == 0
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_sigmoid_focal_loss_takes_low_precision(rand, device, dtype):
    logits = rand(6, 4, low=-6, high=6).to(dtype)
    target = torch.tensor([0, 3, 4, 1, 2, 2], device=device)
    losses = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    assert losses.dtype == dtype
    assert_rounded_once(losses, sigmoid_focal_by_definition(logits.double(), target, 2.0, 0.25))
