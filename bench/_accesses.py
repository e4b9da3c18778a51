"""Global loads and stores of a kernel: how wide they are, and which of them access rows element by element.

The rows of q, k, v, O and their gradients are read and written as blocks of two dimensions, `[rows, channels]`; what
there is one of per row (LSE, delta) or per channel is a block of one dimension, and a thread may well take single
elements of it. The compiler's first IR (TTIR) names each access with its rank and its line in the source; PTX and
amdgcn name the line of every instruction. A *scalar row access* is an instruction of at most 32 bits per thread that
comes from a line which accesses two dimensions, or from no known line.

Worked example: `tl.load(ptrs)` of `_rows.py:48` is a `tt.load ... : tensor<64x128x!tt.ptr<bf16>>`. In PTX,
`ld.global.v4.b32` below `.loc 4 48 23 // _rows.py:48:23 @[ ... ]` is as it should be, `ld.global.b16` is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

Line = tuple[str, int]  # name of a file of the source, line


def accesses(text: str) -> Iterator[tuple[str, Line | None]]:
    """Every global load and store in PTX or amdgcn by instruction and width (`ld.global.v4.b32`), with its line."""
    line: Line | None = None
    for row in text.splitlines():
        if ".loc" in row:
            match = re.search(r"\.loc\s.*?(?://|;) ([^\s:]+):(\d+):", row)
            line = (match[1], int(match[2])) if match else None
        elif name := _access(row):
            yield name, line


def scalar_rows(text: str, ttir: str) -> Counter[str]:
    """The scalar row accesses, named like `ld.global.b16 at _rows.py:48`."""
    found: Counter[str] = Counter()
    ranks = _ranks(ttir)
    for name, line in accesses(text):
        if is_scalar(name) and ranks.get(line, 2) > 1:
            found[f"{name} at {line[0]}:{line[1]}" if line else f"{name} at an unknown line"] += 1
    return found


def is_scalar(name: str) -> bool:
    """Whether an access is of at most 32 bits per thread."""
    if name.startswith("cp.async."):
        return int(name.split(".")[-1]) <= 4
    if name.startswith(("ld", "st")):
        return ".v" not in name and int(re.findall(r"\d+$", name)[0]) <= 32
    return re.search(r"x[234]|_b(64|96|128)", name) is None


def is_narrow(name: str) -> bool:
    """Whether an access is of at most 16 bits per thread."""
    if name.startswith(("ld", "st")):
        return ".v" not in name and int(re.findall(r"\d+$", name)[0]) <= 16
    return re.search(r"_(u|s)?(byte|short)|_(u|i|b)(8|16)|d16", name) is not None


def _access(row: str) -> str | None:
    if match := re.search(r"\b(?:ld|st)\.[\w.:]*global[\w.:]*", row):
        return ".".join(p for p in match[0].split(".") if re.fullmatch(r"ld|st|global|v[248]|[busf]\d+", p))
    if match := re.search(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", row):
        return f"cp.async.{int(match[1], 0)}"
    if match := re.search(r"\b(?:global|buffer)_(?:load|store)_\w+", row):
        return match[0]
    return None


def _ranks(ttir: str) -> dict[Line | None, int]:
    """The highest rank of a block that each line of the source accesses."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.M))
    ranks: dict[Line | None, int] = {}
    for block, place in re.findall(r"tt\.(?:load|store)\b.* : (\S*)!tt\.ptr<.*loc\((#loc\d*)\)", ttir):
        line = _line(place, places)
        ranks[line] = max(ranks.get(line, 0), block.count("x"))
    ranks.pop(None, None)
    return ranks


def _line(place: str, places: dict[str, str]) -> Line | None:
    """The innermost line of a location: of the function that was inlined, not of its caller."""
    text = places[place]
    if match := re.match(r'"([^"]*)":(\d+):\d+', text):
        return match[1].rsplit("/", 1)[-1], int(match[2])
    inner = re.search(r"#loc\d*", text)
    return _line(inner[0], places) if inner else None
