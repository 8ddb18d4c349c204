"""The output of a case file that runs as a script, in a process with Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

KERNELS = Path(__file__).parents[2] / "kernels"


def printed(case: ModuleType) -> Any:
    path = os.pathsep.join([str(KERNELS), *sys.path])
    made = subprocess.run(
        [sys.executable, case.__file__],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(made.stdout)
