"""What is shown of each kind of record: text, tables, pictures. `SECTIONS` has their order; others come as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from . import stability
from ._peers_section import peers
from ._plots import Curve, Panel, Picture
from ._results import Cases, Record, Section, cases, table

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


def machine_code(records: Sequence[Record]) -> Section:
    record = records[-1]
    found = record["cases"]
    targets = list(dict.fromkeys(case["case"] for case in found))

    def by_target(kernel: str, said: Callable[[dict[str, Any]], str]) -> Iterator[str | None]:
        by = {case["case"]: case for case in found if case["kernel"] == kernel}
        return (said(by[target]) if target in by else None for target in targets)

    def worst(case: dict[str, Any]) -> str:
        least, most = case["registers"]
        faults = f", **{case['faults']} at fault**" * bool(case["faults"])
        return f"{case['compiled']}: {least}-{most} registers, {case['spills']} spills{faults}"

    def share(case: dict[str, Any]) -> str:
        low, high = case["share"]
        return f"{100 * low:.0f}-{100 * high:.0f}%"

    kernels = list(dict.fromkeys(case["kernel"] for case in found))
    products = [name for name in kernels if name in record["products"]]
    names = [record["gpus"].get(target, target) for target in targets]
    return Section(
        "Compiled for GPUs that need not be present",
        f"{sum(case['compiled'] for case in found)} kernels, {sum(case['faults'] for case in found)} with a fault. "
        f"The share of the roofline is predicted from the machine code of {record['plain']}, from no overlap of pipes "
        "to perfect overlap; it is not measured. Then, of all that each kernel was compiled with: how many, the "
        "registers of a thread, and most spills.",
        {
            "roofline": table(("", *names), ((record["products"][k], *by_target(k, share)) for k in products)),
            "machine code": table(("", *names), ((f"`{k.strip('_')}`", *by_target(k, worst)) for k in kernels)),
        },
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
    "aot": machine_code,
    "limits": limits,
    "hugging_face": hugging_face,
}
