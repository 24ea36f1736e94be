"""`import densezoo` in fresh processes: order, silence, cost, and with parts missing."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(script, blocked=()):
    script = BLOCK.format(blocked=set(blocked)) + script if blocked else script
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize(
    "blocked",
    [
        pytest.param(("triton",), marks=pytest.mark.slow),
        pytest.param(("mmengine",), marks=pytest.mark.slow),
        ("mmcv",),
        ("triton", "mmcv", "mmengine"),
    ],
    ids="-".join,
)
def test_it_works_silently_without_optional_packages(blocked):
    result = run(
        """
import densezoo, timm, torch
model = timm.create_model("cas_vit_xs", features_only=True).eval()
with torch.no_grad():
    maps = model(torch.zeros(1, 3, 33, 65))
assert [tuple(m.shape[2:]) for m in maps] == [(9, 17), (5, 9), (3, 5), (2, 3)]
""",
        blocked,
    )
    assert result.stdout == result.stderr == ""


# As timm alone would, densezoo imports no heavy package.
LIGHT = """
import sys, timm, densezoo
heavy = {"mmcv", "mmdet", "mmseg", "sklearn", "matplotlib", "onnx", "fvcore", "datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.mark.parametrize("first", ["mmengine", "densezoo"])
def test_the_adapter_is_registered_whichever_import_comes_first_and_the_import_is_light(first):
    result = run(
        f"""
{LIGHT if first == "densezoo" else ""}
import mmengine, densezoo
from mmengine.registry import MODELS, Registry
assert MODELS.get("DenseBackbone").__name__ == "DenseBackbone"
assert MODELS.get("ImageClassifier") is not None
child = Registry("model", parent=MODELS, scope="elsewhere")
assert child.get("DenseBackbone") is MODELS.get("DenseBackbone")
"""
    )
    assert result.stdout == result.stderr == ""


def test_it_costs_at_most_300_ms_over_timm(monkeypatch):
    """Processor time, least of three: other work on the machine is not ours, nor is compiling.

    The first may write the byte code that installed packages have.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    script = """
import time, timm
start = time.process_time()
import densezoo
print(time.process_time() - start)
"""
    times = []
    while len(times) < 3 and not any(time <= 0.3 for time in times):
        times.append(float(run(script).stdout))
    assert min(times) <= 0.3, times
