"""The operators' Triton kernels, compiled ahead of time for GPUs not at hand.

In another process: a kernel that was decorated for the interpreter cannot be compiled.
"""

import argparse
import csv
import importlib.metadata
import os
import subprocess
import sys

import pytest

from densezoo.tools import kernel_resources

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PUBLISHED = {
    "neighborhood_attention": ("nat", "dinat", "dinat_11x11", "head_49"),
    "routing_attention": ("windows", "tiny_32", "small_32", "large_32", "dense", "dense_padded"),
    "polyline_attention": ("full_short_32", "full_medium_32", "full_long_32")
    + ("full_row_first_short", "full_row_first_medium", "full_row_first_long")
    + ("axial_medium_32", "axial_long_16", "axial_long_32")
    + ("axial_values", "axial_middle", "axial_nothing"),
}
OTHERS = {
    "neighborhood_attention": ("head_64", "head_128", "line", "causal_extra"),
    "routing_attention": ("uneven_tiny", "uneven_large", "tiny_64", "small_64", "large_64")
    + ("tiny_128", "small_128", "large_128"),
    "polyline_attention": ("full_short_64", "full_long_64", "full_short_128", "full_long_128")
    + ("axial_long_64", "axial_short_128", "axial_long_128", "full_uneven", "axial_uneven"),
}
POLYLINE = ["full_short_32", "axial_short_16"]
KERNELS = {"_forward_kernel", "_backward_query_kernel", "_backward_key_kernel"}
INSTRUCTIONS = {
    "sm_80": {"mma.sync"},
    "sm_90": {"mma.sync", "wgmma.mma_async"},
    "sm_100": {"mma.sync", "tcgen05.mma"},
    "gfx942": {"v_mfma"},
}
IS_OLD = importlib.metadata.version("triton").startswith("3.2.")


def compile_kernels(tmp_path, operator, **choices):
    """Compile the kernels in every tiling; give the rows of the CSV."""
    if IS_OLD and {"sm_100", "gfx942"} & set(choices["targets"]):
        pytest.skip("Triton 3.2 brings no assembler for sm_100 and no linker for gfx942")
    options = [word for name, values in choices.items() for word in (f"--{name}", *values)]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "densezoo.tools.kernel_resources", operator, *options]
        + ["--out", tmp_path / "resources.csv"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "resources.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_sound(rows, kernels, targets, dtypes, shapes):
    """Every kernel is there, spills nothing and multiplies on matrix units."""
    for column, expected in (("target", targets), ("dtype", dtypes), ("shape", shapes)):
        assert {row[column] for row in rows} == set(expected)
    assert {row["kernel"] for row in rows} >= KERNELS | kernels
    spilling = [row for row in rows if row["spills"] != "0"]
    assert not spilling, spilling
    for row in rows:
        instructions = set(row["matrix_instructions"].split())
        assert instructions <= INSTRUCTIONS[row["target"]], row
        # Float32 is IEEE's, which NVIDIA's matrix units have not; padded tokens take no products.
        if row["dtype"] != "float32" and row["kernel"] != "_backward_pad_kernel":
            assert instructions, row


@pytest.mark.parametrize(
    "operator, target, shapes, kernel",
    [
        ("neighborhood_attention", "sm_90", ["nat", "head_49"], "_backward_bias_kernel"),
        ("neighborhood_attention", "gfx942", ["nat", "head_49"], "_backward_bias_kernel"),
        ("routing_attention", "sm_90", ["tiny_32"], "_backward_pad_kernel"),
        ("routing_attention", "gfx942", ["small_32"], "_backward_pad_kernel"),
        ("polyline_attention", "sm_90", POLYLINE, "_backward_line_key_kernel"),
        ("polyline_attention", "gfx942", POLYLINE, "_backward_line_key_kernel"),
    ],
)
def test_kernels_compile_without_spills_to_matrix_instructions(
    operator, target, shapes, kernel, tmp_path
):
    choices = dict(targets=[target], dtypes=["float16"], shapes=shapes)
    assert_sound(compile_kernels(tmp_path, operator, **choices), {kernel}, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("operator", PUBLISHED)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", ["float16 bfloat16", "float32", "tf32"])
def test_published_shapes_compile_for_every_target(operator, target, dtypes, tmp_path):
    if (target, dtypes) == ("gfx942", "tf32"):
        dtypes = "float32"  # the kernels multiply so on AMD's GPUs, whatever PyTorch allows
    choices = dict(targets=[target], dtypes=dtypes.split(), shapes=PUBLISHED[operator])
    assert_sound(compile_kernels(tmp_path, operator, **choices), set(), **choices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, kernel",
    [
        ("neighborhood_attention", "_backward_extra_kernel"),
        ("routing_attention", "_backward_pad_kernel"),
        ("polyline_attention", "_backward_line_key_kernel"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_other_shapes_compile_for_every_target(operator, kernel, target, tmp_path):
    choices = dict(targets=[target], dtypes=["float16", "float32"], shapes=OTHERS[operator])
    assert_sound(compile_kernels(tmp_path, operator, **choices), {kernel}, **choices)


def test_shapes_of_another_operator_are_refused():
    parser = argparse.ArgumentParser()
    kernel_resources.add_arguments(parser)
    args = parser.parse_args(["routing_attention", "--shapes", "nat"])
    with pytest.raises(
        ValueError, match="--shapes has 'nat': routing_attention has windows, dense"
    ):
        kernel_resources.run(args)
