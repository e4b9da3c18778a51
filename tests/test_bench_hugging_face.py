"""`python -m bench.hugging_face`: what it makes of what ranks say, its truth, and a smallest run of ours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _hugging_face, hugging_face, limits  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

CASE = _hugging_face.Case("Llama", "padded right", tokens=24, ranks=2)


def said(case: Any) -> list[dict[str, Any]]:
    """By rank: its logits, and a half of all gradients."""
    whole = dict(_hugging_face.exact(case))
    logits = whole.pop("logits").chunk(case.ranks, 1)
    return [{"logits": x.numpy(), **{name: (g / case.ranks).numpy() for name, g in whole.items()}} for x in logits]


def test_results_are_held_against_the_truth() -> None:
    right = said(CASE)
    found = hugging_face.judge(CASE, right)
    assert found.verdict == "right" and found.error < 1e-12
    padding = [dict(right[0]), right[1] | {"logits": right[1]["logits"] + 0.0}]
    padding[1]["logits"][0, -1] += 1  # the last tokens of row 0 are padding, those of row 1 are not
    assert hugging_face.judge(CASE, padding).verdict == "right"
    padding[1]["logits"][1, -1] += 1
    assert hugging_face.judge(CASE, padding).verdict == "wrong"
    name = next(name for name in right[0] if "q_proj" in name)
    for wrong in (right[1][name] * 1.001, right[1][name] * math.nan):
        found = hugging_face.judge(CASE, [right[0], right[1] | {name: wrong}])
        assert found.verdict == "wrong" and found.error > 1e-4
    lacking = [{key: x for key, x in of_rank.items() if key != name} for of_rank in right]
    assert hugging_face.judge(CASE, lacking) == ("wrong", math.inf, "")
    assert hugging_face.judge(CASE, [right[0], "E: no"]) == ("raises", None, "E: no")
    assert hugging_face.judge(CASE, [right[0], limits.Silent]).verdict == "hangs"


SEEN = [case for case in hugging_face.cases(1) if case.model != "gpt-oss" or case.input == "plain"]


@pytest.mark.parametrize("case", SEEN, ids=hugging_face.title)
def test_the_truth_is_that_of_transformers_where_it_has_one(case: Any) -> None:
    """Its eager attention sees windows, padding and documents; but those of gpt-oss, whose mask has no positions."""
    model = case.build()
    model.set_attn_implementation("eager")
    found = _hugging_face.step(model, case.batch(), case.weight())
    result = {name: x.numpy() for name, x in found.items()}
    assert hugging_face.judge(case, [result]).verdict == "right"


def test_rows_have_titles_of_their_own() -> None:
    titles = [hugging_face.title(case) for case in hugging_face.cases(2)]
    assert len(set(titles)) == len(titles)
    assert {"Llama", "Llama, packed", "Llama, 47 tokens", "Llama, 3 heads (1 kv)", "BERT, padded right"} <= set(titles)


def test_documents_and_positions() -> None:
    packed = replace(CASE, input="packed")
    assert packed.documents()[0].tolist() == [0] * 7 + [1] + [2] * 12 + [3] * 4
    assert packed.batch()["position_ids"][0].tolist() == [*range(7), 0, *range(12), *range(4)]
    assert CASE.documents()[:, -18:].tolist() == [[0] + [-1] * 17, [0] * 18]


def test_the_smallest_run_shows_ours_and_says_what_to_install(tmp_path: Path) -> None:
    absent = "import sys; sys.modules['deepspeed'] = None; "
    options = ["--ranks", "2", "--only", "Llama, 3 heads"]
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}from bench import hugging_face; sys.exit(hugging_face.main({options}))"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(tmp_path)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DeepSpeed is not installed here: `make hugging-face`" in done.stdout
    cells = next(line for line in done.stdout.splitlines() if line.startswith("| Llama, 3 heads")).split("|")
    assert len(cells) == 6 and all(text.strip().startswith("right, ") for text in cells[2:5])
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["hugging_face"]
