"""What is shown of `bench.peers`: the lead table, a table per case, the picture of README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from ._plots import Curve, Panel, Picture
from ._results import Cases, Record, Section, cases, setting, table


def peers(records: Sequence[Record]) -> Section:
    every = [case | {"name": _contestant(case)} for case in cases(records) if not case["contestant"].endswith(", sdpa")]
    by_table = {
        (part, case): list(found)
        for (part, case), found in groupby(sorted(every, key=_size), lambda c: (c["part"], c["case"]))
    }
    origins = "\n".join(dict.fromkeys(f"- {setting(record)}" for record in records))
    tables = {"lead": f"{_lead(every)}\n\n{origins}", "peers": _by_contestant(every)}
    tables |= {f"{part}: {case}": _contestants(found) for (part, case), found in by_table.items()}
    panels = [
        Panel("exchange alone, 4 ranks, forward and backward", "tokens", "ms (median; band: 20-80%)",
              _curves(_equal_heads(every, "exchange"), "tokens"), log_x=True, log_y=True),
    ]  # fmt: skip
    scaling = [case for case in every if case["part"] == "scaling" and case.get("wire_bytes")]
    if scaling:
        panels.append(Panel("tokens / rank constant", "ranks", "MB that a rank sends",
                            _curves(scaling, "ranks", lambda c: c["wire_bytes"] / 1e6), log_x=True))  # fmt: skip
    about = "Milliseconds of the exchange by tokens" + ", and megabytes that a rank sends by ranks" * bool(scaling)
    return Section(
        "Against other libraries",
        "The same tensors and the same local attention for all, by turns, in one run; forward and backward, the "
        "slowest rank. The exchange alone has an identity in attention's place.",
        tables,
        [Picture("exchange", about, panels)],
    )


def _size(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["part"] != "exchange", case["part"], case["ranks"], -case["kv_heads"], case["tokens"], case["case"]


def _contestant(case: dict[str, Any]) -> str:
    name = case["contestant"].removesuffix(", identity")
    return f"{name} (default)" if case.get("default") else name


def _equal_heads(every: Cases, part: str) -> Cases:
    return [
        c for c in every if (c["part"], c["ranks"], c["dtype"]) == (part, 4, "fp32") and c["kv_heads"] == c["heads"]
    ]


def _curves(found: Cases, by: str, value: Callable[[dict[str, Any]], float] | None = None) -> list[Curve]:
    """A curve per contestant of what was measured: milliseconds with their spread, or `value`."""
    curves = []
    for name in dict.fromkeys(case["name"] for case in found):
        points = sorted((case for case in found if case["name"] == name and case["ok"]), key=lambda c: c[by])
        x = [case[by] for case in points]
        if value:
            curves.append(Curve(name, x, [value(case) for case in points]))
        else:
            y, low, high = ([case["ms"][key] for case in points] for key in ("p50", "p20", "p80"))
            curves.append(Curve(name, x, y, low, high))
    return [curve for curve in curves if curve.x]


def _columns(every: Cases) -> list[tuple[str, Cases]]:
    """What the short tables have of each contestant: the case's title and its cases."""
    parts = {"exchange": "exchange alone", "attention": "with attention"}
    return [
        (f"{said}, {tokens:,} tokens", [case for case in of_part if case["tokens"] == tokens])
        for part, said in parts.items()
        if (of_part := _equal_heads(every, part))
        for tokens in sorted({case["tokens"] for case in of_part})
    ]


def _timed(columns: Sequence[tuple[str, Cases]]) -> list[str]:
    """The contestants that were timed in any of the columns."""
    return list(dict.fromkeys(case["name"] for _, found in columns for case in found if "ms" in case))


def _median(found: Cases, name: str) -> str | None:
    return next((f"{case['ms']['p50']:.0f}" for case in found if case["name"] == name and "ms" in case), None)


def _lead(every: Cases) -> str:
    """A line per contestant: its medians in ms."""
    columns = _columns(every)
    rows = [(name, *(_median(found, name) for _, found in columns)) for name in _timed(columns)]
    return table(("ms", *(title for title, _ in columns)), rows)


def _by_contestant(every: Cases) -> str:
    """A line per case, and one each for what is counted and for grouped heads."""
    columns = _columns(every)
    names = _timed(columns)
    rows: list[tuple[object, ...]] = [(title, *(_median(found, name) for name in names)) for title, found in columns]
    counted = {c["name"]: c["collectives"] for _, found in columns for c in found if "collectives" in c}
    rows.append(("collectives", *(counted.get(name) for name in names)))
    grouped = [case for case in every if case["kv_heads"] < case["heads"]]
    for heads in sorted({(case["heads"], case["kv_heads"]) for case in grouped}):
        fine = {name: [c["ok"] for c in grouped if c["name"] == name and (c["heads"], c["kv_heads"]) == heads]
                for name in names}  # fmt: skip
        told = (("yes" if all(fine[name]) else "cannot") if fine[name] else None for name in names)
        rows.append((f"{heads[0]} query and {heads[1]} kv heads", *told))
    return table(("", *names), rows)


def _contestants(found: Cases) -> str:
    """A line per contestant of one case: all that was measured."""

    def line(case: dict[str, Any]) -> tuple[object, ...]:
        ms = case.get("ms", {})
        keys = ("wire_bytes", "formula_bytes", "socket_bytes", "copied_bytes", "saved_bytes", "live_bytes", "rss_bytes")
        sizes = (None if case.get(key) is None else f"{case[key] / 1e6:.1f}" for key in keys if key in known)
        said = case["cannot"].splitlines()[0][:90] if "cannot" in case else "right" if case["ok"] else "**wrong**"
        times = (None if key not in ms else f"{ms[key]:.1f}" for key in ("p20", "p50", "p80"))
        return case["name"], *times, case.get("collectives"), *sizes, said

    known = {key for case in found for key in case}
    names = {"wire_bytes": "sent MB", "formula_bytes": "by formula", "socket_bytes": "over sockets",
             "copied_bytes": "copied MB", "saved_bytes": "saved MB", "live_bytes": "live MB",
             "rss_bytes": "resident MB"}  # fmt: skip
    sizes = [name for key, name in names.items() if key in known]
    return table(("", "p20 ms", "p50", "p80", "collectives", *sizes, "check"), map(line, found))
