"""timm's own model tests on the models of the zoo.

By hand, from the root of the checkout; further arguments go to pytest:

    python tests/timm_suite.py
    python tests/timm_suite.py -x -k "cas_vit_xs and backward"
    TIMM_SUITE_NAMES=nat_mini,dinat_mini python tests/timm_suite.py

Without names all are tested but those of more than 130 M parameters, which take a machine's memory.

The tests are those of the source distribution of the installed timm, unmodified; pip fetches it
once into .cache (or TIMM_SDIST names the file). As a plugin of pytest this module makes timm list
the zoo's models alone, whatever filter a test asks for, and leaves out what is not for them.
"""

import functools
import os
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import timm

import densezoo

CACHE = Path(__file__).parent.parent / ".cache"
# TorchScript is not promised; the others need files of the hub, or other kinds of models.
LEFT_OUT = ("torchscript", "pretrained", "inference", "naflex")
# Their first assertion is that a model has three maps at least; isotropic models have one.
OF_THREE_MAPS = ("test_model_forward_features", "test_model_forward_intermediates")
MOST_PARAMETERS = 130_000_000
NAMES = "TIMM_SUITE_NAMES"  # environment variable


def fetch_tests() -> Path:
    """Unpack the source distribution of the installed timm, and return its test_models.py."""
    tests = CACHE / f"timm-{timm.__version__}" / "tests" / "test_models.py"
    if not tests.exists():
        CACHE.mkdir(exist_ok=True)
        source = os.environ.get("TIMM_SDIST")
        if not source:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", "timm", f"timm=={timm.__version__}", "--dest", str(CACHE)]
            subprocess.run(command, check=True)
            source = CACHE / f"timm-{timm.__version__}.tar.gz"
        with tarfile.open(source) as archive:
            archive.extractall(CACHE, filter="data")
    return tests


def run(arguments: list[str]) -> int:
    """Run timm's tests with further arguments of pytest, and return pytest's exit code."""
    tests = fetch_tests()
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite", "-p", "no:cacheprovider"]
    # timm's pytest settings are not in the distribution: its markers would be warned of.
    command += [str(tests), "--rootdir", str(tests.parent), "-c", os.devnull, "-q", "-ra"]
    command += ["-W", "ignore::pytest.PytestUnknownMarkWarning", *arguments]
    return subprocess.run(command, cwd=tests.parent, env=environment).returncode


@functools.cache
def names_to_test() -> list[str]:
    """List the names that the environment asks for, or those of models that are not too large."""
    if os.environ.get(NAMES):
        return os.environ[NAMES].split(",")
    models = {name: timm.create_model(name, device="meta") for name in densezoo.list_backbones()}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    return [name for name, size in sizes.items() if size <= MOST_PARAMETERS]


def has_three_maps(name: str) -> bool:
    """Whether a model has as many maps as timm's tests of features ask for."""
    return len(timm.create_model(name, device="meta").feature_info) >= 3


def _list_models(filter: str | list[str] = "", **options) -> list[str]:
    """List the zoo's models that match a filter, as `timm.list_models` does with every model."""
    filters = [filter] if isinstance(filter, str) else filter
    names = names_to_test()
    return [n for n in names if any(fnmatch(n, f) for f in filters if f) or not any(filters)]


def pytest_configure() -> None:
    timm.list_models = _list_models


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out the tests of timm's own models, and those that are not for the zoo's."""
    names = set(names_to_test())
    pyramids = {name for name in names if has_three_maps(name)}
    ours = [
        item
        for item in items
        if hasattr(item, "callspec")
        and item.callspec.params.get("model_name") in names
        and not any(word in item.originalname for word in LEFT_OUT)
        and (
            item.originalname not in OF_THREE_MAPS or item.callspec.params["model_name"] in pyramids
        )
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
