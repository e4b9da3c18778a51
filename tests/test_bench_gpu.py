"""`python -m bench.gpu`: its dry run goes through all of it, its records are whole, and it refuses what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ulysses_triton.kernels import _config, attend_forward, pack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import gpu  # noqa: E402
from bench._data import Kernels  # noqa: E402
from bench._record import commit  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

PARTS = ("check", "move", "attend", "layer")
DRY_RUN = """
import sys

for name in ("hypothesis", "matplotlib", "platformdirs", "pytest", "tqdm"):  # not on every machine with a GPU
    sys.modules[name] = None

from bench import gpu

sys.exit(gpu.main(["--interpret", "--out", sys.argv[1]]))
"""

interpreted = pytest.mark.skipif(not _config.INTERPRET, reason="a dry run is for Triton's interpreter")


def start(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": interpret} if interpret else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {record["part"]: record for record in found}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("records")
    results = ROOT / "bench" / "results"
    before = sorted(results.glob("*")) if results.exists() else []
    process = start("-c", DRY_RUN, str(folder))
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    assert (sorted(results.glob("*")) if results.exists() else []) == before
    return process.stdout, records(folder)


def test_dry_run_makes_a_record_of_every_part(dry_run) -> None:
    said, found = dry_run
    assert tuple(part for part in PARTS if part in found) == PARTS and "DRY RUN" in said
    for record in found.values():
        assert record["dry_run"] is True and record["skipped"] == []
        assert record["device"]["type"] == "cpu" and record["device"]["name"]
        assert record["versions"]["torch"] == torch.__version__ and record["versions"]["triton"]
        assert record["commit"] == commit() and record["date"].startswith("20")
        assert record["cases"] and all(case["ok"] for case in record["cases"])


def test_dry_run_checks_every_kernel(dry_run) -> None:
    cases = dry_run[1]["check"]["cases"]
    assert {case["kernel"] for case in cases} == {*Kernels._fields, "layer"}
    for case in cases:
        assert case["errors"] and all(x["error"] <= x["allowed"] for x in case["errors"].values())


def test_dry_run_times_every_kernel(dry_run) -> None:
    _, found = dry_run
    timed = [*found["move"]["cases"], *found["attend"]["cases"]]
    assert {case["kernel"] for case in timed} == set(Kernels._fields)
    for case in timed:
        assert case["errors"] and 0 < case["ms"]["p20"] <= case["ms"]["p50"] <= case["ms"]["p80"]
    for case in found["move"]["cases"]:
        assert case["bytes"] > 0 and case["gb_per_s"] > 0 and case["share_of_copy"] > 0
    for case in found["attend"]["cases"]:
        assert case["flops"] > 0 and case["tflop_per_s"] > 0
        assert set(case["peers"]) == {"flash", "cudnn"} and "unavailable" in case["peers"]["cudnn"]
    assert [case["ranks"] for case in found["layer"]["cases"]] == [1, 2, 4]
    for case in found["layer"]["cases"]:
        assert set(case["ms"]) == set(case["sdpa_ms"]) == {"forward", "backward"}


@interpreted
def test_a_wrong_kernel_is_not_timed(tmp_path: Path) -> None:
    """One that leaves out the last token, and one with another scale."""

    def without_the_last_token(q, k, v, rows, transform=None) -> None:
        pack.pack(q, k, v, rows, transform)
        rows[-1].q[-1] = float("nan")

    def with_another_scale(*args) -> None:
        *tensors, options = args
        attend_forward.attend_forward(*tensors, options._replace(scale=options.scale * 1.05))

    kernels = Kernels(pack=without_the_last_token, attend_forward=with_another_scale)
    assert gpu.main(["--interpret", "--part", "attend,move", "--out", str(tmp_path)], kernels) == 1
    found = records(tmp_path)
    assert set(found) == {"move", "attend"}
    for case in [*found["move"]["cases"], *found["attend"]["cases"]]:
        wrong = case["kernel"] in ("pack", "attend_forward")
        assert case["ok"] is not wrong and ("ms" in case) is not wrong and ("refused" in case) is wrong, case
    packs = [case for case in found["move"]["cases"] if case["kernel"] == "pack"]
    assert packs[0]["errors"]["q"]["error"] > 0 and packs[1]["refused"].startswith("wrong at: fp16")


@interpreted
def test_a_kernel_that_fails_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    assert gpu.main(["--interpret", "--part", "move", "--out", str(tmp_path)], Kernels(unpack=broken)) == 1
    assert "WRONG: unpack" in capsys.readouterr().out
    (unpack,) = [case for case in records(tmp_path)["move"]["cases"] if case["kernel"] == "unpack"]
    assert "no such instruction" in unpack["failure"]


@interpreted
def test_cases_past_the_budget_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--interpret", "--part", "check,attend", "--seconds", "0", "--out", str(tmp_path)]) == 0
    for record in records(tmp_path).values():
        assert record["cases"] == [] and len(record["skipped"]) >= 2
    assert "skipped, out of time" in capsys.readouterr().out


def test_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == list(PARTS)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--part", "move,fly"])
    assert error.value.code == 2 and "no part fly; there are check, move" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    process = start("-m", "bench.gpu")
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert "no GPU" in process.stderr


def test_commit_is_read_without_git(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert commit(tmp_path) == "abc123"
    (git / "refs" / "heads" / "main").write_text("def456\n")
    assert commit(tmp_path) == "def456"
