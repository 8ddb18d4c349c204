"""The output of a case file that runs as a script, in a process of its own.

On the device "cpu" its kernels run in Triton's interpreter, on another one they are compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

KERNELS = Path(__file__).parents[2] / "kernels"


def printed(case: ModuleType, device: str = "cpu") -> Any:
    path = os.pathsep.join([str(KERNELS), *sys.path])
    made = subprocess.run(
        [sys.executable, case.__file__, device],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(made.stdout)
