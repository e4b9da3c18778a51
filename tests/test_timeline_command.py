"""`ulysses-triton timeline`: predictions, traces on virtual ranks and under torchrun, wrong use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ulysses_triton import cli

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--seq 60 --heads 4 --kv-heads 2 --dim 16 --backward".split()
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "--standalone")


def table(text: str) -> dict[str, list[float]]:
    lines = re.findall(r"^(\w[\w ,]*?)  +([\d. ]+)$", text, re.MULTILINE)
    return {name: [float(x) for x in values.split()] for name, values in lines}


def lanes(path: Path) -> int:
    return sum(
        g.get("class") == "lane" for g in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_prediction(tmp_path, capsys, ranks):
    files = ["--svg", str(tmp_path / "a.svg"), "--json", str(tmp_path / "a.json")]
    assert cli.main(["timeline", *SMALL, "--ranks", str(ranks), "--machine", "h200-network", *files]) == 0
    said = capsys.readouterr().out
    found = table(said)
    assert "predicted for h200-network" in said and lanes(tmp_path / "a.svg") == 2 * ranks
    assert found["exchanging"] == found["exposed"] and 0 < found["busy"][0] < found["from first to last"][0]
    assert len(json.loads((tmp_path / "a.json").read_text())["traceEvents"]) > ranks * 9


@pytest.mark.parametrize("torchrun", [False, True], ids=["virtual ranks", "torchrun"])
def test_predicted_and_traced_have_the_same_steps_and_bytes(torchrun, tmp_path):
    command = [sys.executable, *(TORCHRUN if torchrun else ()), "-m", "ulysses_triton.cli", "timeline", *SMALL]
    command += ["--uneven", "--trace", "--svg", str(tmp_path / "a.svg"), *(() if torchrun else ("--ranks", "4"))]
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "WORLD_SIZE")}
    done = subprocess.run(
        command, cwd=ROOT, env=kept | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = table(done.stdout)
    predicted, traced = found["MB to other ranks, in all"]
    assert predicted == traced > 0
    assert all(len(values) == 2 for values in found.values())
    assert "unpack" not in found  # both exchanges are one-sided: O is written where it belongs
    assert all(min(values) > 0 for name, values in found.items() if "exchang" not in name)
    assert lanes(tmp_path / "a.svg") == 2 * 2 * (2 if torchrun else 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--seq", "0"], "must be at least 1"),
        (["--machine", "abacus"], "invalid choice"),
    ],
    ids=["seq", "machine"],
)
def test_wrong_use_is_2(options, reason, capsys):
    try:
        status = cli.main(["timeline", *SMALL, *options])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2 and reason in capsys.readouterr().err
