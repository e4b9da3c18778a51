"""Records as tables are made of them: the newest of every case, by part and machine, and where they come from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._plots import Picture

Record = dict[str, Any]
Cases = Sequence[dict[str, Any]]


class Section(NamedTuple):
    """A part of the report. Tables have names, under which README shows some; they are in the order of the report."""

    title: str
    text: str
    tables: Mapping[str, str]
    pictures: Sequence[Picture] = ()


def cases(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [case for record in records for case in record["cases"]]


def read(folder: Path) -> list[Record]:
    """All records of a folder but dry runs, the oldest first; `file` is the name of each."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in folder.glob("*.json")]
    return sorted((record for record in found if not record["dry_run"]), key=lambda r: (r["date"], r["file"]))


def newest(records: Iterable[Record]) -> list[Record]:
    """The records without what a later one of the same part and machine measured again.

    A later record takes the place of all that an earlier one has of the same sub-part and case: contestants of one
    table are from one run. What is left without cases is left out.
    """
    taken: set[tuple[object, ...]] = set()
    left = []
    for record in reversed(list(records)):
        own = {case_key(record, case) for case in record["cases"]}
        cases = [case for case in record["cases"] if case_key(record, case) not in taken]
        taken |= own
        if cases:
            left.append(record | {"cases": cases})
    return left[::-1]


def case_key(record: Record, case: dict[str, Any]) -> tuple[object, ...]:
    return record["part"], record["device"]["name"], case.get("part"), case.get("kernel"), case["case"]


def origin(record: Record) -> str:
    """What was run, where, when, with which versions, and the file that says so: a line of Markdown."""
    return f"{setting(record)}; record [`{record['file']}`](results/{record['file']})"


def setting(record: Record) -> str:
    """What was run, where, on which day and with which versions."""
    cpu = record["device"]["type"] == "cpu"
    machine = record.get("cpu") or record["device"]["name"] if cpu else record["device"]["name"]
    if cpu and record.get("cpus"):
        machine += f", {record['cpus']} cores"
    if cpu and "load" in record:
        machine += f", load {record['load'][0]:.1f} at the start"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    command = record.get("command", [f"bench.{record['part']}"])  # a list: the module and its options
    command = command if isinstance(command, str) else shlex.join(["python", "-m", *command])
    return f"`{command}` on {machine}, {record['date'][:10]}, commit `{record['commit'][:7]}`; {versions}"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    lines = [" | ".join(map(cell, row)) for row in (header, *rows)]
    return "\n".join([f"| {lines[0]} |", "|" + "---|" * len(header), *(f"| {line} |" for line in lines[1:])])


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def timelines(folder: Path) -> tuple[list[Path], str]:
    """The pictures of `ulysses-triton timeline` in a folder, and the figures that they have written in them."""
    pictures = sorted(folder.glob("timeline-*.svg"))
    rows = []
    for path in pictures:
        figures = {
            kind: (float(whole) * 1000, _milliseconds(exposed))
            for kind, whole, exposed in re.findall(
                r">(predicted|traced) [^<]*? - ([\d.]+) s: [^<]*of which exposed ([\d.]+ m?s)", path.read_text()
            )
        }
        (predicted, exposed), (traced, seen) = figures["predicted"], figures["traced"]
        name = path.stem.removeprefix("timeline-").replace("-", " ")
        rows.append((name, f"{exposed:.1f}", f"{seen:.1f}", f"{predicted:.0f}", f"{traced:.0f}"))
    header = ("", "exposed exchange, predicted", "traced", "from first to last, predicted", "traced")
    return pictures, table(header, rows) if rows else ""


def _milliseconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * (1000 if unit == "s" else 1)
