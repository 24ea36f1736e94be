"""timm's own model tests, unmodified, on every name of the zoo (see tests/timm_suite.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import densezoo

SUITE = Path(__file__).parent.parent / "timm_suite.py"


@pytest.mark.slow
def test_timms_own_tests_pass_on_every_name():
    done = subprocess.run([sys.executable, SUITE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    passed = int(re.search(r"(\d+) passed", summary)[1])
    # forward, backward, configuration, features, intermediates twice, FX twice; newer timm: pruning
    assert passed >= 8 * len(densezoo.list_backbones()), summary
