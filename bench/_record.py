"""Records: what ran on what, as one JSON file per part, and the tables that are printed from them."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device, *, dry: bool) -> dict[str, Any]:
    """Device, versions, commit and date: what every record begins with."""
    name, memory = platform.processor() or platform.machine(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry_run": dry,
        "device": {"name": name, "type": device.type, "memory_bytes": memory},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        },
    }


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


def default_folder() -> Path:
    return Path(os.environ.get("OUT") or ROOT / "bench" / "results")


def write(folder: Path, part: str, record: dict[str, Any]) -> Path:
    """Write the record of one part; its name has the device and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^A-Za-z0-9]+", "-", record["device"]["name"]).strip("-").lower()
    moment = re.sub(r"[^0-9T]", "", record["date"].split("+")[0])
    dry = "dry-run-" if record["dry_run"] else ""
    path = folder / f"{dry}{part}-{device}-{moment}.json"
    path.write_text(json.dumps(_plain({"part": part, **record}), indent=1) + "\n")
    return path


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
