"""What is to be said about the facts of all ranks together, and how one report is made of what each of them found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .doctor_checks import FAIL, OK, SKIPPED, TOPICS, WARNING, Check, Found
from .doctor_facts import Facts
from .exchange.nccl_library import dotted


def across(every: Sequence[Facts]) -> list[Check]:
    """What the facts of all ranks say together, in rank order."""
    return [*_hosts(every), *_devices(every), *_equal(every)]


def merged(every: Iterable[tuple[int, Sequence[Check]]]) -> list[Check]:
    """Each rank's checks as one list, by topic.

    A problem is told once, with the ranks that have it. Of the rest the lowest rank's is enough: what else differs,
    such as the free memory, is in the facts.
    """
    found: dict[tuple[str, ...], Check] = {}
    for rank, checks in every:
        for check in checks:
            calm = check.status in (OK, SKIPPED)
            key = (check.topic, check.name, check.status, "" if calm else check.found)
            first = found.setdefault(key, replace(check, ranks=()))
            found[key] = replace(first, ranks=tuple(sorted({*first.ranks, *(check.ranks or (rank,))})))
    return sorted(found.values(), key=lambda check: TOPICS.index(check.topic))


def _hosts(every: Sequence[Facts]) -> Found:
    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(every):
        ranks.setdefault(facts.host, []).append(rank)
    where = "; ".join(f"{host}: {named(own)}" for host, own in ranks.items())
    yield Check("ranks", "hosts", OK, f"{len(every)} ranks on {len(ranks)} host{'s' * (len(ranks) > 1)}: {where}")


def named(numbers: Sequence[int]) -> str:
    whole = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    said = f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))
    return f"rank{'s' * (len(numbers) > 1)} {said}"


def _devices(every: Sequence[Facts]) -> Found:
    """A GPU for every rank, or for none."""
    without = tuple(rank for rank, facts in enumerate(every) if not facts.gpus)
    if 0 < len(without) < len(every):
        remedy = "see what is said of GPUs on these ranks, or hide them from all (CUDA_VISIBLE_DEVICES=)"
        yield Check("ranks", "devices", FAIL, "no GPU here, while other ranks have one", remedy, without)
    for rank, facts in enumerate(every):
        if facts.gpus and facts.local_rank >= len(facts.gpus):
            found = f"local rank {facts.local_rank}, and {len(facts.gpus)} GPUs on {facts.host}"
            remedy = f"start {len(facts.gpus)} ranks there: each needs a GPU of its own"
            yield Check("ranks", "devices", FAIL, found, remedy, (rank,))


_EQUAL: dict[str, tuple[str, Callable[[Facts], object]]] = {  # what must be equal: how bad it is if not, what it is
    "ulysses-triton": (FAIL, lambda f: f"{f.library}, sources {f.sources}"),
    "torch": (FAIL, lambda f: f.torch),
    "triton": (FAIL, lambda f: f.triton),
    "NCCL of torch": (FAIL, lambda f: f.nccl and dotted(f.nccl)),
    "NCCL of cupy": (FAIL, lambda f: f.cupy_nccl and dotted(f.cupy_nccl)),
    "TRITON_INTERPRET": (FAIL, lambda f: f.interpret),
    "tiles": (FAIL, lambda f: f.tiles),
    "cupy": (WARNING, lambda f: f.cupy),
    "Python": (WARNING, lambda f: f.python),
    "GPU": (WARNING, lambda f: f.gpus[min(f.local_rank, len(f.gpus) - 1)].name if f.gpus else None),
    "driver": (WARNING, lambda f: f.gpus[0].driver if f.gpus else None),
}


def _equal(every: Sequence[Facts]) -> Found:
    equal = True
    for name, (status, of) in _EQUAL.items():
        values = [of(facts) for facts in every]
        usual = Counter(values).most_common(1)[0][0]  # of equally many rank 0's, which comes first
        for other in dict.fromkeys(value for value in values if value != usual):
            equal = False
            ranks = tuple(rank for rank, value in enumerate(values) if value == other)
            hosts = ", ".join(dict.fromkeys(every[rank].host for rank in ranks))
            remedy = f"make {name} on {hosts} what it is on the other ranks"
            found = f"{name} {other or 'none'}, on the other ranks {usual or 'none'}"
            yield Check("ranks", f"equal {name}", status, found, remedy, ranks)
    if equal:
        yield Check("ranks", "versions", OK, f"equal on all ranks: {', '.join(_EQUAL)}")
