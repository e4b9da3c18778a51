"""`make report`: README and the report say what the records say; and what is made of records, made-up ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _peers_section, _plots, _record, _results, _sections, report  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

RESULTS = ROOT / "bench" / "results"


def record(part: str, date: str, cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    about = {"part": part, "date": f"2026-01-{date}T10:00:00+00:00", "commit": "abcdef0123", "dry_run": False,
             "device": {"name": "box", "type": "cpu"}, "versions": {"torch": "2.13", "cuda": None}}  # fmt: skip
    return about | more | {"cases": cases}


def fault(seconds: list[float], **more: Any) -> dict[str, Any]:
    case = {"case": "is killed", "exchange": "shm", "ok": True, "why_not": "", "seconds": seconds, "errors": ["E"]}
    return case | more


def put(folder: Path, *records: dict[str, Any]) -> Path:
    for number, found in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a README and one record."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- table: faults -->\n| stale |\n<!-- end -->\nb\n")
    more = {"deadline": 5.0, "ranks": 3, "exchanges": ["shm"]}
    put(tmp_path / "bench" / "results", record("faults", "02", [fault([1.0, 3.0])], **more))
    return tmp_path


def test_readme_and_report_say_what_the_records_say() -> None:
    assert report.stale(ROOT, RESULTS) == []


def test_readme_shows_every_table_between_marks() -> None:
    text = (ROOT / "README.md").read_text()
    names = [name for _, name, _, _ in report.PLACE.findall(text)]
    assert names[0] == "lead" and {"peers", "accuracy", "faults", "limits", "hugging_face"} <= set(names)
    assert len(names) == text.count("<!-- table: ") == text.count("<!-- end -->")
    assert re.search(r"!\[.+\]\(bench/figures/exchange\.svg\)", text[: text.index("<!-- table: lead -->")])


def test_records_are_small_and_whole() -> None:
    files = [path for folder in ("results", "figures") for path in (ROOT / "bench" / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for found in _results.read(RESULTS):
        assert found["commit"] != "unknown" and found["versions"]["torch"], found["file"]
        assert str(ROOT) not in json.dumps(found), found["file"]


def test_what_is_stale_is_named_and_made_new(root: Path) -> None:
    folder = root / "bench" / "results"
    assert report.stale(root, folder) == ["bench/REPORT.md", "README.md"]
    report.write(root, folder)
    assert report.stale(root, folder) == []
    text = (root / "README.md").read_text()
    assert "stale" not in text and "| is killed | 2.00, 3.00 | E |" in text and text.startswith("a\n")
    (root / "README.md").write_text(text.replace("2.00", "1.90"))  # typed by hand
    assert report.stale(root, folder) == ["README.md"]


def test_a_table_that_no_record_gives_is_an_error(root: Path) -> None:
    (root / "README.md").write_text("<!-- table: peers -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="place for a table 'peers'"):
        report.stale(root, root / "bench" / "results")


def test_the_newest_measurement_of_a_case_on_a_machine_is_taken(tmp_path: Path) -> None:
    old, new = [{"case": "a", "n": 1}, {"case": "b", "n": 1}], [{"case": "a", "n": 2}]
    other = record("x", "01", [{"case": "a", "n": 3}], device={"name": "other", "type": "cuda"})
    put(tmp_path, record("x", "03", new), record("x", "02", old), other, record("x", "04", new, dry_run=True))
    found = _results.newest(_results.read(tmp_path))
    assert [(r["device"]["name"], [(c["case"], c["n"]) for c in r["cases"]]) for r in found] == [
        ("other", [("a", 3)]),
        ("box", [("b", 1)]),
        ("box", [("a", 2)]),
    ]
    text = report.compose(tmp_path).text
    assert "## x, on box" in text and "## x, on other" in text and "| a | 2 | - |" in text


def test_an_origin_says_what_where_when_and_with_what() -> None:
    about = record("x", "02", [], command="python -m bench.x --n 1", cpu="Box 9000", cpus=2, file="x.json")
    assert _results.origin(about) == (
        "`python -m bench.x --n 1` on Box 9000, 2 cores, 2026-01-02, commit `abcdef0`; torch 2.13; "
        "record [`x.json`](results/x.json)"
    )


def contestant(name: str, tokens: int, p50: float, **more: Any) -> dict[str, Any]:
    sizes = {"tokens": tokens, "ranks": 4, "heads": 8, "kv_heads": 8, "dtype": "fp32", "part": "exchange"}
    ms = {"p20": p50 - 1, "p50": p50, "p80": p50 + 1}
    return {"case": str(tokens), "contestant": name, "ok": True, "ms": ms, "collectives": 4} | sizes | more


def test_contestants_stand_beside_each_other_and_what_cannot_run_is_said() -> None:
    ours = [contestant("ours shm, identity", n, n / 100, default=True) for n in (1024, 2048)]
    theirs = [contestant("deepspeed", n, n / 50, collectives=8) for n in (1024, 2048)]
    grouped = contestant("ours shm, identity", 1024, 5, default=True, kv_heads=2, case="grouped")
    refused = contestant("deepspeed", 1024, 0, kv_heads=2, case="grouped", ok=False, cannot="Error: no\nmore")
    del refused["ms"], refused["collectives"]
    section = _peers_section.peers([record("peers", "01", [*ours, *theirs, grouped, refused], file="x.json")])
    assert "| exchange alone, 2,048 tokens | 20 | 41 |" in section.tables["peers"]
    assert "| collectives | 4 | 8 |" in section.tables["peers"]
    assert "| 8 query and 2 kv heads | yes | cannot |" in section.tables["peers"]
    assert "| deepspeed | 20 | 41 |" in section.tables["lead"] and "2026-01-01" in section.tables["lead"]
    assert "Error: no |" in section.tables["exchange: grouped"]
    (picture,) = section.pictures
    assert [(curve.name, list(curve.y)) for curve in picture.panels[0].curves] == [
        ("ours shm (default)", [10.24, 20.48]),
        ("deepspeed", [20.48, 40.96]),
    ]
    scaled = [contestant("ours shm", 1024 * n, 1, ranks=n, part="scaling", wire_bytes=4e6) for n in (2, 4)]
    section = _peers_section.peers([record("peers", "01", [*ours, *scaled], file="x.json")])
    assert list(section.pictures[0].panels[1].curves[0].y) == [4.0, 4.0]


def test_verdicts_say_who_refuses_and_mark_what_is_worse() -> None:
    def found(case: str, who: str, verdict: str, message: str = "") -> dict[str, Any]:
        return {"case": case, "contestant": who, "verdict": verdict, "message": message, "ok": verdict == "right"}

    reshape = "RuntimeError: shape '[1, 2]' is invalid for input of size 6"
    cases = [found("6 heads", "ours", "right"), found("6 heads", "a", "hangs"), found("6 heads", "b", "raises", "no"),
             found("7 heads", "ours", "right"), found("7 heads", "b", "raises", reshape)]  # fmt: skip
    assert _sections.verdicts([record("limits", "01", cases)]).splitlines()[2:] == [
        "| 6 heads | right | **hangs** | refuses |",
        "| 7 heads | right | - | error of a reshape |",
    ]


def test_every_picture_of_the_records_can_be_drawn(tmp_path: Path) -> None:
    pictures = report.compose(RESULTS).pictures
    assert "exchange" in [picture.name for picture in pictures]
    for picture in pictures:
        path = _plots.draw(picture, tmp_path)
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert picture.hash in text
        assert all(panel.title in text and panel.curves[0].name in text for panel in picture.panels)
        assert path.read_bytes() == _plots.draw(picture, tmp_path).read_bytes()


def test_machine_code_has_a_row_for_each_kernel() -> None:
    forward = {"kernel": "attend_forward_kernel", "ok": True, "compiled": 3, "faults": 0, "registers": [90, 246],
               "spills": 0, "share": [0.5, 0.98]}  # fmt: skip
    found = [
        forward | {"case": "sm_80"},
        forward | {"case": "gfx942", "share": [0.334, 1.0]},
        forward
        | {"case": "sm_80", "kernel": "pack_kernel", "share": [1.0, 1.0], "faults": 1, "spills": 2, "ok": False},
    ]
    more = {"plain": "a case", "products": {"attend_forward_kernel": "forward"}, "gpus": {"sm_80": "A100 (sm_80)"}}
    section = _sections.machine_code([record("aot", "01", found, **more)])
    assert section.text.startswith("9 kernels, 1 with a fault")
    assert section.tables["roofline"].splitlines()[0::2] == [
        "|  | A100 (sm_80) | gfx942 |",
        "| forward | 50-98% | 33-100% |",
    ]
    assert section.tables["machine code"].splitlines()[3] == (
        "| `pack_kernel` | 3: 90-246 registers, 2 spills, **1 at fault** | - |"
    )


def test_a_record_names_its_command_and_not_the_folder_it_lies_in() -> None:
    words = ["bin/python", "-m", "bench.peers", "--part", "exchange", "--out", "some/folder", "--quick"]
    assert _record.command(words) == "python -m bench.peers --part exchange --quick"
