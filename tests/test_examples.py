"""The scripts in `examples/` run as their first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_command import ROOT, environment

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
ACCELERATE = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "4", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=lambda x: x[0])
def test_fine_tuning(tmp_path: Path, launcher: list[str]) -> None:
    launch = [sys.executable, "-m", *launcher]
    command = [*launch, str(ROOT / "examples" / "sft.py"), "--sequence-ranks", "2", "--cpu", "--output", str(tmp_path)]
    env = environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": os.fspath(tmp_path / "home")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
