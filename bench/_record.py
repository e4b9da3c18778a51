"""Records: what ran on what, as one JSON file per part, and what is read from them: tables, targets, earlier cases."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels/*.py", "autotune_cache/*.json", "ulysses_triton/**/*.py", "bench/*.py")


def environment(device: torch.device, *, dry: bool) -> dict[str, Any]:
    """Command, machine, versions, commit and date: what every record begins with."""
    name, memory = platform.processor() or platform.machine(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.orig_argv),
        "commit": commit(),
        "sources": sources(),
        "dry_run": dry,
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "device": {"name": name, "type": device.type, "memory_bytes": memory},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        },
    }


def command(words: Sequence[str]) -> str:
    """As it is typed, but for the folder that records are written to."""
    kept = [w for before, w in zip(words, words[1:], strict=False) if "--out" not in (before, w)]
    return shlex.join(["python", *kept])


def processor() -> str | None:
    """The CPU's own name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE) if told.exists() else []
    return names[0] if names else None


def sources(root: Path = ROOT) -> str:
    """A short hash of the files that results depend on, committed or not."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, read without git; "unknown" where there is no repository."""
    folder = root / ".git"
    if folder.is_file():  # a work tree: the file names the folder
        folder = (root / folder.read_text().partition("gitdir:")[2].strip()).resolve()
    if not (folder / "HEAD").exists():
        return "unknown"
    head = (folder / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    reference = head.removeprefix("ref: ")
    common = folder / "commondir"
    homes = [folder, (folder / common.read_text().strip()).resolve()] if common.exists() else [folder]
    for home in homes:
        if (home / reference).exists():
            return (home / reference).read_text().strip()
        packed = home / "packed-refs"
        for line in packed.read_text().splitlines() if packed.exists() else ():
            if line.endswith(f" {reference}"):
                return line.split()[0]
    return "unknown"


def versions(about: dict[str, Any]) -> str:
    """As "torch 2.13.0, triton 3.7.1, ...": of what is there."""
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)


def default_folder() -> Path:
    return Path(os.environ.get("OUT") or ROOT / "bench" / "results")


def write(folder: Path, part: str, record: dict[str, Any]) -> Path:
    """Write the record of one part; its name has the device and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^A-Za-z0-9]+", "-", record["device"]["name"]).strip("-").lower()
    moment = re.sub(r"[^0-9T]", "", record["date"].split("+")[0])
    dry = "dry-run-" if record["dry_run"] else ""
    path = folder / f"{dry}{part}-{device}-{moment}.json"
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(_plain({"part": part, **record}), indent=1) + "\n")
    whole.replace(path)  # a run that is cut off leaves the one before
    return path


def name_of(part: str, record: dict[str, Any]) -> str:
    """What a case is skipped by: in the part `check`, kernels have cases of equal names."""
    return f"{record['kernel']} {record['case']}" if part == "check" else record["case"]


def earlier(folder: Path, part: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of cases of a part in a folder, of the same sources on the same device, but for those with any fault."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name)):
        found = json.loads(path.read_text())
        if all(found.get(key) == value for key, value in {"part": part, **_identity(about)}.items()):
            fresh: dict[str, list[dict[str, Any]]] = {}
            for record in found["cases"]:
                fresh.setdefault(name_of(part, record), []).append(record)
            cases |= fresh
    return [r for records in cases.values() if all(r["ok"] for r in records) for r in records]


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in ("sources", "device", "versions", "dry_run")}


class Target(NamedTuple):
    """What a ratio of some kernels is to reach in every case, to a ceiling or to a peer."""

    kernels: tuple[str, ...]
    to: str
    least: float


TARGETS = (
    Target(("pack", "unpack"), "copy", 0.9),
    Target(("attend_forward",), "flex", 1.1),
    Target(("attend_forward",), "flash", 1.3),
    Target(("attend_forward",), "cudnn", 1.0),
    Target(("attend_backward",), "fa2", 1.2),
    Target(("attend_backward",), "cudnn", 0.9),
)


def ratio(record: dict[str, Any], to: str) -> float | None:
    """How many times as fast as a peer a case is, by medians, or its share of the bandwidth of a `copy`."""
    if to == "copy":
        return record.get("share_of_copy")
    theirs = record.get("peers", {}).get(to, {}).get("ms")
    return theirs["p50"] / record["ms"]["p50"] if theirs else None


def targets(records: Sequence[dict[str, Any]]) -> str:
    """A line per target: in how many of the timed cases it is met, and what it comes to."""

    def line(target: Target) -> tuple[object, ...]:
        found = [(x, r["case"]) for r in records if r["kernel"] in target.kernels and (x := ratio(r, target.to))]
        wanted = f"{' and '.join(target.kernels)} >= {target.least:g} x {target.to}"
        if not found:
            return wanted, "not measured", None, None, None, None
        met = sum(x >= target.least for x, _ in found)
        said = "met" if met == len(found) else "not met"
        return wanted, said, f"{met} of {len(found)}", min(found)[0], median(x for x, _ in found), min(found)[1]

    return table(("target", "", "cases", "lowest", "median", "lowest at"), map(line, TARGETS))


def _plain(value: Any) -> Any:
    """As JSON knows it: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text: the first to the left, numbers to the right."""
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
