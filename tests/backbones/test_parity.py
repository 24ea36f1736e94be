"""Official checkpoints through timm's own loading path give the official outputs."""

import pytest
import timm
import torch
from oracles import error, load_cases, make_checkpoint, make_input

from densezoo.tools.count_macs import count_macs

CASES = load_cases()


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory):
    """A case's published file on disk, written once."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), {}

    def write(case_file, case):
        key = case_file["variant"], case["seed"], str(case.get("weights"))
        if key not in written:
            written[key] = folder / f"{case_file['variant']}-{len(written)}.pth"
            torch.save(make_checkpoint(case_file, case), written[key])
        return str(written[key])

    return write


def load(case_file, case, path, **kwargs):
    return timm.create_model(
        case_file["model_name"],
        pretrained=True,
        pretrained_cfg_overlay=dict(file=path),
        **case["model_kwargs"],
        **kwargs,
    ).eval()


def is_large(name):
    """Whether a case costs more than 10^10 multiply-accumulates, or weights of 10^8 numbers."""
    case_file, case = CASES[name]
    size, macs = next(iter(case_file["macs"].items()))
    height, width = map(int, size.split("x"))
    _, _, rows, columns = case["input"]
    return macs * rows * columns / (height * width) > 1e10 or case_file["params"] > 1e8


def is_left_to_slow_tests(name, dtype):
    """Every case is compared in float64, which tells most; in float32 the small classifiers."""
    return dtype == torch.float32 and (is_large(name) or CASES[name][1]["mode"] == "dense")


COMPARISONS = [
    pytest.param(
        name,
        dtype,
        bound,
        marks=pytest.mark.slow if is_left_to_slow_tests(name, dtype) else (),
        id=f"{name}-{str(dtype).removeprefix('torch.')}",
    )
    for name in CASES
    for dtype, bound in [(torch.float64, 1e-6), (torch.float32, 1e-3)]
]


@pytest.mark.parametrize("name, dtype, bound", COMPARISONS)
def test_outputs_equal_the_official_ones(name, dtype, bound, checkpoint_file):
    case_file, case = CASES[name]
    path = checkpoint_file(case_file, case)
    image = make_input(case["input"], case["seed"]).to(dtype)
    dense = case["mode"] == "dense"
    model = load(case_file, case, path, features_only=dense).to(dtype)
    with torch.no_grad():
        last, stages = (None, model(image)) if dense else model.forward_intermediates(image)
        errors = [error(s, m) for s, m in zip(case["outputs"]["stages"], stages, strict=True)]
        if not dense:  # float64 is slow: there one pass serves both
            is_slow = dtype == torch.float64
            logits = model.forward_head(last) if is_slow else model(image)
            errors.append(error(case["outputs"]["logits"], logits))
    assert max(errors) < bound, errors


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if is_large(name) else ())
        for name, (_, case) in CASES.items()
        if case["mode"] == "classification"
    ],
)
def test_inference_paths_agree_with_autograd_ones(name, checkpoint_file):
    """Under no_grad the CPU takes other kernels than while gradients are recorded."""
    case_file, case = CASES[name]
    model = load(case_file, case, checkpoint_file(case_file, case))
    image = make_input(case["input"], case["seed"])
    logits = model(image)
    assert logits.requires_grad
    assert error(case["outputs"]["logits"], logits) < 1e-3


# The first case of each is of the model that the counts are of.
FILES = {
    case_file["variant"]: (case_file, case_file["cases"][0]) for case_file, _ in CASES.values()
}


def lookup_macs(case_file):
    """What timm's MaxViT spends on its biases: two products with one-hot matrices a table."""
    tables = [shape for key, shape, _ in case_file["keys"] if key.endswith("bias_table")]
    total = 0
    for heads, rows, columns in (shape for shape in tables if len(shape) == 3):
        height, width = (rows + 1) // 2, (columns + 1) // 2
        total += heads * height**2 * columns * (rows + width**2)
    return total


@pytest.mark.parametrize(
    "variant",
    [
        # Large ones take seconds to trace.
        pytest.param(variant, marks=pytest.mark.slow if max(file["macs"].values()) > 8e9 else ())
        for variant, (file, _) in FILES.items()
    ],
)
def test_parameters_and_macs_are_the_official_ones(variant):
    case_file, case = FILES[variant]
    model = timm.create_model(case_file["model_name"], **case["model_kwargs"])
    for size, macs in case_file["macs"].items():
        report = count_macs(model, tuple(map(int, size.split("x"))))
        assert report.params == case_file["params"]
        # The recorded figures have all norms, none, or all but LayerNorm; averages of heads, which
        # they may lack, are less than the tolerance.
        norms = [report.operators.get(f"{kind}_norm", 0) for kind in ("layer", "batch")]
        counts = [report.macs, report.macs - norms[0], report.macs - sum(norms)]
        wanted = pytest.approx(macs - lookup_macs(case_file), rel=1e-3)
        assert any(count == wanted for count in counts), counts
        assert report.uncounted == {}
