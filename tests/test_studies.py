"""`python -m bench.stability` and `python -m bench.retrieval` at toy size, and what they reckon."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _retrieval, retrieval, stability  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package


def test_a_needle_can_only_be_told_by_finding_it() -> None:
    stage = _retrieval.Stage(1, 101, 7, 5)
    tokens, labels, parts = _retrieval.draw(stage, torch.Generator().manual_seed(3))
    body = 101 - 2 * 5
    for row, its_labels, its_parts in zip(tokens.tolist(), labels.tolist(), parts.tolist(), strict=True):
        places = [n for n, token in enumerate(row[:body]) if token >= _retrieval.VALUES]
        needles = {row[n - 1]: (row[n], n) for n in places}
        assert len(needles) == 5  # keys differ
        assert [row[n] for n in range(body, 101, 2)] != sorted(needles)
        for n, part in zip(range(body, 101, 2), its_parts, strict=True):
            value, place = needles[row[n]]
            assert row[n + 1] == value == its_labels[n] + _retrieval.VALUES
            assert part * body // 5 < place < (part + 1) * body // 5  # both tokens are in the part
        asked = set(range(body, 101, 2))
        assert {n for n, label in enumerate(its_labels) if label != _retrieval.IGNORE_INDEX} == asked


def test_intervals_are_wilsons() -> None:
    assert retrieval.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Newcombe 1998 has such numbers
    assert retrieval.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert retrieval.interval(10, 10)[1] == pytest.approx(1.0)


def test_more_ranks_train_the_model_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    stages = (_retrieval.Stage(4, 32, 4, 4), _retrieval.Stage(2, 64, 2, 4))
    one, two = (retrieval.run(_retrieval.Asked(ranks, stages, ((64, 3),), needles=4, width=32)) for ranks in (1, 2))
    for mine, its in zip(two["steps"], one["steps"], strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], abs=1e-5)
    assert two["examined"] == one["examined"]
    assert len(one["steps"]) == 6 and 3 < one["steps"][0]["loss"] < 6
    assert one["examined"][0]["sequences"] == 3 and len(one["examined"][0]["right"]) == 4


def test_a_quick_retrieval_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined = [{"length": 128, "sequences": 4, "right": [4, 2, *[1] * 8]}]
    monkeypatch.setattr(retrieval, "run", lambda asked: {"steps": [{"loss": 1.0}], "examined": examined})
    assert retrieval.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name.startswith("dry-run-retrieval-") and found["dry_run"]
    assert [(case["right"], case["questions"]) for case in found["cases"]][:3] == [(4, 4), (2, 4), (1, 4)]
    assert "4/4" in capsys.readouterr().out


def test_runs_apart_are_measured_by_step() -> None:
    one = {"losses": [3.0] * 30, "gradient_norms": [2.0] * 30, "held_out_loss": 1.0}
    two = {"losses": [3.0] * 5 + [3.1] + [3.0] * 23 + [2.7], "gradient_norms": [2.0] * 29 + [3.0], "held_out_loss": 1.5}
    found = stability.apart(two, one)
    assert found["loss_early"] == pytest.approx(0.1) and found["loss"] == pytest.approx(0.3)
    assert found["gradient_norm_early"] == 0 and found["gradient_norm"] == 0.5
    assert found["end"] == pytest.approx(0.2 / 30) and found["held_out"] == 0.5
    assert len(found["losses"]) == 30


@pytest.mark.slow
def test_a_small_study_of_stability_runs(tmp_path: Path, capsys: Any) -> None:
    options = ["--ranks", "1,2", "--dtype", "fp32", "--stage", "3x64x2", "--out", str(tmp_path)]
    assert stability.main(options) == 0
    (path,) = tmp_path.iterdir()
    one, two = json.loads(path.read_text())["cases"]
    assert len(one["losses"]) == len(two["gradient_norms"]) == 3 and "from_one_rank" not in one
    assert 0 < two["gradient_norms"][0] and two["from_one_rank"]["loss"] < 1e-5
    assert two["from_one_rank"]["gradient_norm"] < 1e-4
    assert "its difference from one rank" in capsys.readouterr().out


def test_a_run_that_fails_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="(?s)bench.stability: .*STEPSxLENGTHxBATCH"):
        stability.main(["--ranks", "1", "--dtype", "fp32", "--stage", "3x64", "--out", str(tmp_path)])
