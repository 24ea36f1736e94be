"""The Triton kernels of neighborhood attention, compiled ahead of time for GPUs not at hand.

In another process: a kernel that was decorated for the interpreter cannot be compiled.
"""

import csv
import importlib.metadata
import os
import subprocess
import sys

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PUBLISHED = ("nat", "dinat", "dinat_11x11", "head_49")
OTHERS = ("head_64", "head_128", "line", "causal_extra")
INSTRUCTIONS = {
    "sm_80": {"mma.sync"},
    "sm_90": {"mma.sync", "wgmma.mma_async"},
    "sm_100": {"mma.sync", "tcgen05.mma"},
    "gfx942": {"v_mfma"},
}
IS_OLD = importlib.metadata.version("triton").startswith("3.2.")


def compile_kernels(tmp_path, **choices):
    """Compile the kernels in every tiling; give the rows of the CSV."""
    if IS_OLD and {"sm_100", "gfx942"} & set(choices["targets"]):
        pytest.skip("Triton 3.2 brings no assembler for sm_100 and no linker for gfx942")
    options = [word for name, values in choices.items() for word in (f"--{name}", *values)]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "densezoo.tools.kernel_resources", *options]
        + ["--out", tmp_path / "resources.csv"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "resources.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_sound(rows, targets, dtypes, shapes):
    """Every kernel is there, spills nothing and multiplies on matrix units."""
    for column, expected in (("target", targets), ("dtype", dtypes), ("shape", shapes)):
        assert {row[column] for row in rows} == set(expected)
    kernels = {row["kernel"] for row in rows}
    assert {"_forward_kernel", "_backward_query_kernel", "_backward_key_kernel"} <= kernels
    spilling = [row for row in rows if row["spills"] != "0"]
    assert not spilling, spilling
    for row in rows:
        instructions = set(row["matrix_instructions"].split())
        assert instructions <= INSTRUCTIONS[row["target"]], row
        if row["dtype"] != "float32":  # NVIDIA's matrix units have no IEEE float32
            assert instructions, row


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_without_spills_to_matrix_instructions(target, tmp_path):
    choices = dict(targets=[target], dtypes=["float16"], shapes=["nat", "head_49"])
    rows = compile_kernels(tmp_path, **choices)
    assert {row["kernel"] for row in rows} >= {"_backward_bias_kernel"}
    assert_sound(rows, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", ["float16 bfloat16", "float32", "tf32"])
def test_published_shapes_compile_for_every_target(target, dtypes, tmp_path):
    if (target, dtypes) == ("gfx942", "tf32"):
        dtypes = "float32"  # the kernels multiply so on AMD's GPUs, whatever PyTorch allows
    choices = dict(targets=[target], dtypes=dtypes.split(), shapes=PUBLISHED)
    assert_sound(compile_kernels(tmp_path, **choices), **choices)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_shapes_compile_for_every_target(target, tmp_path):
    choices = dict(targets=[target], dtypes=["float16", "float32"], shapes=OTHERS)
    rows = compile_kernels(tmp_path, **choices)
    assert {row["kernel"] for row in rows} >= {"_backward_extra_kernel"}
    assert_sound(rows, **choices)
