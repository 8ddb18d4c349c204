"""Start a script in two processes, as `accelerate launch` does."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def launch(*arguments, distribute=("--multi_gpu",)):
    """Two processes on the CPU, by the launcher that the documentation names."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", *distribute, "--num_processes", "2", "--main_process_port", "0"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(SUPPORT),
    }
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
