"""The wheel: built from the checkout, installed elsewhere, complete."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check(command, **kwargs):
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Of a copy: a build leaves files beside setup.cfg.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    options = ["-z", "--cached", "--others", "--exclude-standard"]
    tracked = check(["git", "ls-files", *options], cwd=ROOT)
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    check(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["-w", str(out), str(source)]
    )
    (path,) = out.glob("densezoo-*.whl")
    return path


def test_the_wheel_holds_every_module_config_and_tool(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("backbones", "layers", "kernels", "configs", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"densezoo/{path.relative_to(ROOT)}" in names, path
    assert not [n for n in names if n.startswith(("tests/", "backbones/", "tools/"))]


def test_the_wheel_works_in_a_fresh_environment_outside_the_checkout(wheel, tmp_path):
    venv = tmp_path / "venv"
    check([sys.executable, "-m", "venv", str(venv)])
    python = venv / "bin" / "python"
    site = check([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", str(wheel)]
    check([python, *install, "--force-reinstall"])
    script = """
import densezoo, timm
print(densezoo.__file__)
print(timm.create_model("cas_vit_xs", device="meta").num_features)
"""
    where, features = check([python, "-c", script], cwd=tmp_path).split()
    assert where.startswith(site) and features == "220"
    listed = check([venv / "bin" / "densezoo", "list"], cwd=tmp_path)
    assert "cas_vit_xs" in listed


def test_versions_agree():
    import densezoo

    assert check([sys.executable, "-m", "densezoo", "--version"]).split() == [
        "densezoo",
        densezoo.__version__,
    ]
