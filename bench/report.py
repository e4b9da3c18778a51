"""Draw what the records in `bench/results` say: `bench/REPORT.md`, its pictures, and README's tables of measurements.

    make report                                 # after a bench wrote a record, or a newer one was added
    python -m bench.report --check              # only say what differs; exit status 1 if anything does

Of every kind of record it shows the newest measurement of each case on each machine, with the command, the machine, the
date, the versions and the commit. Nothing in the tables is typed by hand: in README they stand between
`<!-- table: NAME -->` and `<!-- end -->`, in the report everything is rewritten. Dry runs are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import _plots, _record, _results, _sections
from ._plots import Picture

PLACE = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
INTRODUCTION = """# Results

Drawn by `make report` from the records in [`results`](results): for every case the newest measurement on each machine.
Each section says what was run, where, when and with which versions. Nothing here is typed by hand.
"""


class Report(NamedTuple):
    """What the records give: the report's text, tables by name for README, and pictures."""

    text: str
    tables: Mapping[str, str]
    pictures: Sequence[Picture]


def compose(folder: Path) -> Report:
    """The report on the records of a folder. What there is no record of has no section."""
    records = _results.newest(_results.read(folder))
    known = [part for part in _sections.SECTIONS if any(record["part"] == part for record in records)]
    others = sorted({record["part"] for record in records} - set(known))
    blocks, tables, pictures = [INTRODUCTION], dict[str, str](), list[Picture]()
    for part in (*known, *others):
        machines = dict.fromkeys(record["device"]["name"] for record in records if record["part"] == part)
        for machine in machines:
            chosen = [r for r in records if r["part"] == part and r["device"]["name"] == machine]
            section = _sections.SECTIONS.get(part, _sections.other)(chosen)
            title = f"{section.title}, on {machine}" if len(machines) > 1 else section.title
            origins = "\n".join(f"- {_results.origin(record)}" for record in chosen)
            blocks.append(f"## {title}\n\n{section.text}\n\n{origins}\n")
            if machine == list(machines)[-1]:  # README and the pictures have the machine that was measured last
                blocks += [f"![{p.about}](figures/{p.name}.svg)\n" for p in section.pictures]
                pictures += section.pictures
                tables |= section.tables
            blocks += [f"### {name}\n\n{text}\n" for name, text in section.tables.items()]
    timelines, found = _results.timelines(folder)
    if found:
        blocks += ["## Timelines\n\nPredicted by the cost model and traced, by chunks; milliseconds.\n", f"{found}\n"]
        blocks += [f"![{path.stem}](results/{path.name})\n" for path in timelines]
        tables["timeline"] = found
    return Report("\n".join(blocks), tables, pictures)


def filled(text: str, tables: Mapping[str, str]) -> str:
    """`text` with its tables replaced. Raises SystemExit for a name that no record gives."""

    def put(place: re.Match[str]) -> str:
        begin, name, _, end = place.groups()
        if name not in tables:
            raise SystemExit(f"README has a place for a table {name!r}, and no record gives it: run what writes one")
        return f"{begin}\n{tables[name]}\n\n{end}"

    return PLACE.sub(put, text)


def stale(root: Path, folder: Path) -> list[str]:
    """What does not say what the records give: files, relative to `root`."""
    report = compose(folder)
    wanted = {"bench/REPORT.md": report.text, "README.md": filled((root / "README.md").read_text(), report.tables)}
    found = [name for name, text in wanted.items() if not (root / name).exists() or (root / name).read_text() != text]
    for picture in report.pictures:
        path = root / "bench" / "figures" / f"{picture.name}.svg"
        if not path.exists() or picture.hash not in path.read_text():
            found.append(str(path.relative_to(root)))
    return found


def write(root: Path, folder: Path) -> list[Path]:
    """Write the report, its pictures and README's tables: the files."""
    report = compose(folder)
    readme, page = root / "README.md", root / "bench" / "REPORT.md"
    readme.write_text(filled(readme.read_text(), report.tables))
    page.write_text(report.text)
    return [readme, page, *(_plots.draw(picture, root / "bench" / "figures") for picture in report.pictures)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=lines[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and say what differs from the records")
    folder = _record.ROOT / "bench" / "results"
    if parser.parse_args(argv).check:
        differing = stale(_record.ROOT, folder)
        print("\n".join(f"{name} is not what the records give: `make report`" for name in differing) or "up to date")
        return 1 if differing else 0
    for path in write(_record.ROOT, folder):
        print(path.relative_to(_record.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
