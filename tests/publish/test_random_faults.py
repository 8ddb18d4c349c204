"""push ends complete, or with an error after which it can be repeated, whatever the Hub does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 50), *(pytest.param(n, 100, marks=pytest.mark.slow) for n in range(50, 1000, 100))],
)
def test_random_faults(first, count):
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "upload_faults.py"), str(first), str(count)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > count // 10
