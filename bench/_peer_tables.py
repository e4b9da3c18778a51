"""What the records of `bench.peers` say: a table per case, one of scaling, and which targets are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from . import _record
from ._session import verdict


def fastest_peer(records: Sequence[dict[str, Any]]) -> float | None:
    """The lowest median among the peers of one table."""
    return min((r["ms"]["p50"] for r in records if not r["ours"] and "ms" in r), default=None)


COSTS = {  # of one forward and backward, in 10^6 bytes
    "copied": "copied_bytes",
    "sent": "wire_bytes",
    "formula": "formula_bytes",
    "sockets": "socket_bytes",
    "saved": "saved_bytes",
    "live": "live_bytes",
    "rss": "rss_bytes",
}


def _megabytes(r: dict[str, Any], key: str) -> float | None:
    size = r.get(key)
    return None if size is None else size / 1e6


def show(records: Sequence[dict[str, Any]]) -> str:
    """A line per contestant of one case and part."""
    best = fastest_peer(records)
    costs = {name: key for name, key in COSTS.items() if any(r.get(key) is not None for r in records)}

    def line(r: dict[str, Any]) -> tuple[object, ...]:
        ms = r.get("ms", {})
        times = [ms.get(name) for name in ("p20", "p50", "p80")]
        ratio = ms["p50"] / best if best and ms else None
        counts = [r.get(key) for key in ("collectives", "control_messages", "copies")]
        said = "ok" if r["ok"] else "cannot" if "cannot" in r else "WRONG"
        name = f"{r['contestant']} (default)" if r.get("default") else r["contestant"]
        return name, *times, ratio, ms.get("repeats"), *counts, *(_megabytes(r, x) for x in costs.values()), f" {said}"

    header = ("", "p20 ms", "p50", "p80", "of fastest peer", "repeats", "collectives", "control", "copies")
    text = _record.table((*header, *(f"{name} MB" for name in costs), " check"), map(line, records))
    lines = [f"others: {r['others_cores']:.2f} cores busy with other programs" for r in records if "ms" in r][:1]
    lines += [f"{r['contestant']} cannot: {r['cannot'].splitlines()[0]}" for r in records if "cannot" in r]
    lines += [
        f"{r['contestant']} is {verdict({'refused': '', **r})}" for r in records if r.get("errors") and not r["ok"]
    ]
    return "\n".join([text, *lines])


def scaling(records: Sequence[dict[str, Any]]) -> str:
    """Of the part `scaling`: a table each of time, bytes and memory, with a column for each number of ranks."""
    found = [r for r in records if r["part"] == "scaling"]
    ranks = sorted({r["ranks"] for r in found})
    figures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "MB that a rank sends, forward + backward": lambda r: _megabytes(r, "wire_bytes"),
        "MB by the formula": lambda r: _megabytes(r, "formula_bytes"),
        "MB that its sockets sent": lambda r: _megabytes(r, "socket_bytes"),
        "median ms, forward + backward": _p50,
        "peak MB of live tensors beside the inputs": lambda r: _megabytes(r, "live_bytes"),
        "peak growth of resident MB": lambda r: _megabytes(r, "rss_bytes"),
    }
    texts = []
    for (kv_heads, dtype), of_kind in groupby(sorted(found, key=_kind), _kind):
        by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for r in of_kind:
            by_name.setdefault(r["contestant"], {})[r["ranks"]] = r
        each = f"{r['tokens'] // r['ranks']:,} tokens on each rank"
        heads = f"{r['heads']} query and {kv_heads} kv heads of {r['head_dim']}"
        texts.append(f"== scaling: {each}, {heads}, {dtype}")
        for title, figure in figures.items():
            rows = [(name, *(figure(at[n]) if n in at else None for n in ranks)) for name, at in by_name.items()]
            shown = [row for row in rows if any(value is not None for value in row[1:])]
            header = (title, *(f"{n} rank{'s' * (n > 1)}" for n in ranks))
            texts.append(f"{_record.table(header, shown)}\n")
    return "\n".join(texts)


def _kind(r: dict[str, Any]) -> tuple[int, str]:
    return r["kv_heads"], r["dtype"]


class Target(NamedTuple):
    """A ratio of ours to a peer that may not be exceeded, in cases that fit."""

    text: str
    ours: Callable[[dict[str, Any]], bool]
    theirs: Callable[[Sequence[dict[str, Any]]], float | None]
    value: Callable[[dict[str, Any]], float | None]
    most: float
    fits: Callable[[dict[str, Any]], bool] = lambda r: True


def _p50(r: dict[str, Any]) -> float | None:
    return r["ms"]["p50"] if "ms" in r else None


def _of(name: str, key: Callable[[dict[str, Any]], float | None]) -> Callable[[Sequence[dict[str, Any]]], float | None]:
    return lambda records: next((key(r) for r in records if r["contestant"] == name), None)


def _least_saved(records: Sequence[dict[str, Any]]) -> float | None:
    """Of those that trade sequence for heads, too: a ring has no k and v but its inputs."""
    names = ("deepspeed", "yunchang")
    return min((r["saved_bytes"] for r in records if r["contestant"] in names and r["ok"]), default=None)


def _shipped(r: dict[str, Any]) -> bool:
    """Ours by the default exchange, as a user gets it."""
    return bool(r.get("default")) and not r["contestant"].endswith(", sdpa")


def _exchange_of_32k(r: dict[str, Any]) -> bool:
    sizes = [r[key] for key in ("part", "tokens", "ranks", "heads", "kv_heads", "head_dim", "dtype")]
    return sizes == ["exchange", 32768, 4, 8, 8, 64, "fp32"]


def _with_attention(r: dict[str, Any]) -> bool:
    return r["part"] == "attention" and r["ranks"] == 4 and r["dtype"] == "fp32"


TARGETS = (
    Target("exchange alone, 32,768 tokens, 4 ranks: default <= 0.5 x deepspeed", _shipped,
           _of("deepspeed", _p50), _p50, 0.5, _exchange_of_32k),
    Target("exchange alone, 32,768 tokens, 4 ranks: torch <= 0.9 x deepspeed", lambda r: r.get("exchange") == "torch",
           _of("deepspeed", _p50), _p50, 0.9, _exchange_of_32k),
    Target("with attention, 4 ranks: default <= 1 x fastest peer", _shipped, fastest_peer, _p50, 1.0, _with_attention),
    Target("with attention, 4 ranks, 2,048 tokens: default <= 0.85 x fastest peer", _shipped, fastest_peer, _p50, 0.85,
           lambda r: _with_attention(r) and r["tokens"] == 2048),
    Target("collectives: ours <= 0.5 x deepspeed", lambda r: r["ours"],
           _of("deepspeed", lambda r: r.get("collectives")), lambda r: r.get("collectives"), 0.5),
    Target("saved bytes: ours <= 1 x less of deepspeed, yunchang", _shipped, _least_saved,
           lambda r: r.get("saved_bytes"), 1.0, lambda r: r["part"] == "attention"),
)  # fmt: skip


def targets(records: Sequence[dict[str, Any]]) -> str:
    """A line per target: in how many cases it is met, and the highest ratio."""
    by_table = [list(table) for _, table in groupby(records, lambda r: (r["part"], r["case"]))]

    def ratios(target: Target) -> Iterator[tuple[float, str]]:
        for table in by_table:
            theirs = target.theirs(table)
            for r in table:
                if theirs and target.ours(r) and target.fits(r) and (own := target.value(r)) is not None:
                    yield own / theirs, r["case"]

    def line(target: Target) -> tuple[object, ...]:
        found = list(ratios(target))
        if not found:
            return target.text, "not measured", None, None, None
        met = sum(x <= target.most for x, _ in found)
        worst, case = max(found)
        return target.text, "met" if met == len(found) else "NOT MET", f"{met} of {len(found)}", worst, case

    return _record.table(("target", "", "cases", "highest", "at"), map(line, TARGETS))
