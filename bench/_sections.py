"""What is shown of each kind of record: text, tables, pictures. `SECTIONS` has their order; others come as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from . import stability
from ._plots import Curve, Panel, Picture
from ._results import Record, setting, table

Cases = Sequence[dict[str, Any]]


class Section(NamedTuple):
    """A part of the report. Tables have names, under which README shows some; they are in the order of the report."""

    title: str
    text: str
    tables: Mapping[str, str]
    pictures: Sequence[Picture] = ()


def cases(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [case for record in records for case in record["cases"]]


# ---- against other libraries


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


# ---- studies of the trained model


def training_stability(records: Sequence[Record]) -> Section:
    record = records[-1]
    pictures = []
    for dtype in dict.fromkeys(case["dtype"] for case in record["cases"]):
        runs = [case for case in record["cases"] if case["dtype"] == dtype]
        steps = list(range(1, len(runs[0]["losses"]) + 1))
        apart = [
            Curve(f"{c['ranks']} ranks", steps, [max(x, 1e-8) for x in c["from_one_rank"]["losses"]])
            for c in runs
            if "from_one_rank" in c
        ]
        panels = [
            Panel(f"{dtype}: loss", "step", "nats per byte",
                  [Curve(f"{c['ranks']} ranks", steps, c["losses"]) for c in runs], marked=False),
            Panel(f"{dtype}: gradient norm", "step", "before it is clipped",
                  [Curve(f"{c['ranks']} ranks", steps, c["gradient_norms"]) for c in runs], marked=False),
        ]  # fmt: skip
        if apart:
            panels.append(
                Panel(f"{dtype}: loss, apart from one rank", "step", "nats per byte", apart, log_y=True, marked=False)
            )
        about = f"Losses and gradient norms of training in {dtype}, by step, for each number of ranks"
        pictures.append(Picture(f"stability-{dtype}", about, panels))
    return Section(
        "Training over more ranks is the same training",
        f"`ulysses-triton train --stage {record['stage']}` with the same weights and sequences for every number of "
        "ranks. Differences are the largest of a step: losses in nats per byte, gradient norms as a share of the norm.",
        {"stability": table(stability.HEADER, stability.rows(record["cases"]))},
        pictures,
    )


def retrieval(records: Sequence[Record]) -> Section:
    record = records[-1]
    lengths = list(dict.fromkeys(case["tokens"] for case in record["cases"]))
    rows, curves = [], []
    for length in lengths:
        found = [case for case in record["cases"] if case["tokens"] == length]
        total, right = sum(case["questions"] for case in found), sum(case["right"] for case in found)
        rows.append((f"{length:,} tokens", *(f"{case['right']}/{case['questions']}" for case in found),
                     f"{right / total:.1%} of {total}"))  # fmt: skip
        x = [100 * (case["part"] + 0.5) / record["needles"] for case in found]
        shares = [case["right"] / case["questions"] for case in found]
        curves.append(Curve(f"{length:,} tokens", x, shares, *zip(*(case["interval"] for case in found), strict=True)))
    trained = ", then ".join(f"{s['steps']:,} of {s['batch']} x {s['length']:,} tokens" for s in record["stages"])
    share = 100 // record["needles"]
    header = ("right of asked, by depth", *(f"{p * share}-{p * share + share}%" for p in range(record["needles"])))
    return Section(
        "Finding needles in long sequences",
        f"{record['layers']} layers of attention, trained on {record['ranks']} ranks: {trained}. {record['needles']} "
        f"needles lie in a sequence and all are asked for at its end; guessing is right {record['chance']:.1%} of the "
        "time. Bands are 95% intervals.",
        {"retrieval": table((*header, "in all"), rows)},
        [Picture("retrieval", "Share of needles found, by depth and length",
                 [Panel(f"{record['ranks']} ranks", "depth, %", "share found", curves)])],
    )  # fmt: skip


def memory(records: Sequence[Record]) -> Section:
    found, sizes = cases(records), records[-1]["sizes"]
    header = ("a step", "peak, MiB", "in host memory, MiB", "gradients off by")

    def row(case: dict[str, Any]) -> tuple[object, ...]:
        mebibytes = (f"{case[key] / 2**20:,.0f}" for key in ("peak_bytes", "host_bytes"))
        return case["case"], *mebibytes, f"{case['errors']['gradients']['error']:.1e}"

    said = ", ".join(f"{sizes[name]:,} {what}" for name, what in (
        ("tokens", "tokens"), ("layers", "layers"), ("width", "channels"), ("vocabulary", "entries of the vocabulary"),
        ("tile", "tokens in a tile")))  # fmt: skip
    return Section(
        "What a training step holds at most",
        f"One rank: {said}; fp32. On CPUs live tensors are counted, and those in host memory apart. Gradients are held "
        "against the plain step's, with offload against the same step without.",
        {"memory": table(header, map(row, found))},
    )


# ---- what is right, and what happens when something is not


def accuracy(records: Sequence[Record]) -> Section:
    found = cases(records)
    ranks = records[-1]["ranks"]
    names = list(found[0]["errors"])

    def rows(mask: str) -> Iterator[tuple[object, ...]]:
        for case in (case for case in found if case["mask"] == mask):
            where = "" if case["attention"] == "PyTorch" else f" on {ranks} ranks"
            yield case["dtype"], case["attention"] + where, *(f"{case['errors'][name]:.2e}" for name in names)

    header = ("dtype", "attention", *names)
    return Section(
        "Errors against fp64",
        "The norm of the difference by the norm of the truth. PyTorch is `scaled_dot_product_attention` on one device.",
        {"accuracy": table(header, rows("causal")), "accuracy, dense": table(header, rows("dense"))},
    )


def faults(records: Sequence[Record]) -> Section:
    record = records[-1]

    def row(what: str, found: Cases) -> tuple[object, ...]:
        by = {case["exchange"]: case for case in found}
        cells = (_seconds(by[name]) if name in by else None for name in record["exchanges"])
        kinds = sorted({kind or "nothing" for case in found for kind in case["errors"]})
        return what, *cells, ", ".join(kinds)

    grouped = groupby(record["cases"], lambda case: case["case"])
    header = (f"one rank of {record['ranks']}", *(f"`{name}`" for name in record["exchanges"]), "error")
    return Section(
        "When a rank fails",
        "Seconds until a survivor raises: median and longest over survivors, forward and backward; the deadline "
        f"is {record['deadline']:g} s.",
        {"faults": table(header, (row(what, list(found)) for what, found in grouped))},
    )


def _seconds(case: dict[str, Any]) -> str:
    seconds = case["seconds"]
    middle = (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2 if seconds else 0.0
    return f"**{case['why_not']}**" if case["why_not"] else f"{middle:.2f}, {max(seconds):.2f}"


REFUSALS = {  # what a message has in it: what a table says in place of "raises"
    "is invalid for input of size": "error of a reshape",
    "has no attribute": "no such attribute",
    "s_aux must have shape": "error of the kernel",
    "does not support an attention implementation": "transformers refuses",
}


def verdicts(records: Sequence[Record]) -> str:
    """A line per row of `bench.limits` or `bench.hugging_face`: what became of each contestant's run."""
    found = cases(records)
    names = list(dict.fromkeys(case["contestant"] for case in found))

    def said(case: dict[str, Any]) -> str:
        if case["verdict"] == "raises":
            return next((words for sign, words in REFUSALS.items() if sign in case["message"]), "refuses")
        told = {"dies": "process dies"}.get(case["verdict"], case["verdict"])
        return told if case["verdict"] == "right" else f"**{told}**"

    grouped = {what: {case["contestant"]: said(case) for case in found if case["case"] == what}
               for what in dict.fromkeys(case["case"] for case in found)}  # fmt: skip
    rows = [(what, *(told.get(name) for name in names)) for what, told in grouped.items()]
    return table(("", *names), rows)


def messages(records: Sequence[Record]) -> str:
    """Every message, and who said it where."""
    found = [case for case in cases(records) if case["message"]]
    rows = [(case["case"], case["contestant"], case["verdict"], f"`{case['message']}`") for case in found]
    return table(("", "", "", "message"), rows)


def limits(records: Sequence[Record]) -> Section:
    return Section(
        "Head counts",
        "Every cell is a run of its own, forward and backward, against fp64 on one device.",
        {"limits": verdicts(records), "messages": messages(records)},
    )


def hugging_face(records: Sequence[Record]) -> Section:
    return Section(
        "Hugging Face models",
        "Tiny random models over 4 ranks, forward and backward, logits and all gradients against one process in fp64.",
        {"hugging_face": verdicts(records), "messages": messages(records)},
    )


def other(records: Sequence[Record]) -> Section:
    """Any other part: a line per case, with what can be said in a cell."""
    found = cases(records)
    keys = [key for key in dict.fromkeys(key for case in found for key in case) if key not in ("case", "part")]
    keys = [key for key in keys if all(not isinstance(case.get(key), dict | list) for case in found)]
    rows = ((c["case"], *(c.get(key) for key in keys), c.get("ms", {}).get("p50")) for c in found)
    return Section(records[-1]["part"], "", {records[-1]["part"]: table(("", *keys, "p50 ms"), rows)})


SECTIONS: Mapping[str, Callable[[Sequence[Record]], Section]] = {
    "peers": peers,
    "stability": training_stability,
    "retrieval": retrieval,
    "memory": memory,
    "accuracy": accuracy,
    "faults": faults,
    "limits": limits,
    "hugging_face": hugging_face,
}
