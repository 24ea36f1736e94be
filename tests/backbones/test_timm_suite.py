"""timm's own model tests, unmodified, on the names of the zoo (see tests/timm_suite.py)."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from timm_suite import NAMES, OF_THREE_MAPS, has_three_maps, names_to_test

from densezoo.backbones.registry import BACKBONES

SUITE = Path(__file__).parent.parent / "timm_suite.py"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({r.cls.__name__ for r in BACKBONES.values()}))
def test_timms_own_tests_pass_on_every_name(family):
    of_families = defaultdict(list)
    for name in names_to_test():
        of_families[BACKBONES[name].cls.__name__].append(name)
    names = of_families[family]
    environment = {**os.environ, NAMES: ",".join(names)}
    command = [sys.executable, SUITE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    passed = int(re.search(r"(\d+) passed", summary)[1])
    # forward, backward, configuration, features, intermediates twice, FX twice; newer timm: pruning
    left_out = len(OF_THREE_MAPS) * sum(not has_three_maps(name) for name in names)
    assert passed >= 8 * len(names) - left_out, summary
