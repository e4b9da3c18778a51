"""The comparators of `bench.peers`: right against fp64, forward and gradients, and what they send is their formula."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ulysses_triton.case import Case, draw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _contestants, _costs, _peers, baselines  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

COMPARATORS = ("megatron", "ring", "ring_self_attention")
ODD = (Case(tokens=63, heads=6, kv_heads=6, head_dim=48, value_dim=48, dtype="fp64", ranks=3),)
CASES = (  # 64 tokens: all are among the checked rows
    Case(tokens=64, heads=8, kv_heads=8, head_dim=32, value_dim=32, dtype="fp64", ranks=4),
    Case(tokens=64, heads=8, kv_heads=2, head_dim=64, value_dim=64, dtype="fp64", ranks=4, batch=2),
    Case(tokens=64, heads=8, kv_heads=2, head_dim=64, value_dim=64, dtype="fp32", ranks=4),
    Case(tokens=512, heads=8, kv_heads=2, head_dim=64, value_dim=64, dtype="bf16", ranks=4),
)
HEADERS = 32768  # bytes: gloo has its own for every message, and cuts a gather into many


def compare(ctx: Any, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """The records of all comparators, each case anew."""
    found = []
    for case in cases:
        inputs = draw(case, torch.device("cpu")).zero_but(_peers.checked_rows(case))
        for contestant in _contestants.contestants("attention", {}, COMPARATORS):
            record, _ = _peers.tried(case, "attention", contestant, inputs, torch.device("cpu"))
            found.append({"case": str(case), "name": contestant.name, **record})
    return found


@pytest.mark.parametrize("cases", (CASES, ODD), ids=("4 ranks", "3 ranks"))
def test_comparators_are_right_and_send_what_their_formulas_say(pool, cases):
    records, *others = pool.fresh(cases[0].ranks, compare, cases)
    assert len(records) == len(cases) * len(COMPARATORS)
    for r in records:
        assert r["ok"], r
        assert {"out", "dq", "dk", "dv"} <= set(r["errors"])
        assert r["wire_bytes"] == r["formula_bytes"] > 0, r
        assert 0 <= r["socket_bytes"] - r["wire_bytes"] < HEADERS, r  # the kernel's own count
    assert all(r["ok"] for rank in others for r in rank)


def test_formulas():
    """By hand: 8 heads of 64, fp32, 2,048 tokens on each rank; a tensor of them is 4 MiB."""

    def at(ranks: int, **more: Any) -> Case:
        return Case(tokens=2048 * ranks, heads=8, head_dim=64, value_dim=64, ranks=ranks, **{"kv_heads": 8, **more})

    mib = 2**22
    for ranks in (1, 2, 4, 8):
        # q, k, v, O and their gradients, but for a rank's own part
        assert baselines.ulysses_bytes(at(ranks)) == 8 * mib * (ranks - 1) // ranks
        assert baselines.megatron_bytes(at(ranks)) == ranks * baselines.ulysses_bytes(at(ranks))
        assert baselines.ring_bytes(at(ranks)) == 6 * mib * (ranks - 1)
        assert baselines.ring_self_attention_bytes(at(ranks)) == 8 * mib * (ranks - 1)
    # two kv heads: a ring sends a quarter, Ulysses none less than one kv head a rank
    assert baselines.ring_bytes(at(4, kv_heads=2)) == baselines.ring_bytes(at(4)) // 4
    assert baselines.ulysses_bytes(at(4, kv_heads=2)) == mib * 4 * (8 + 4) // 8 * 3 // 4
    # k and v twice in bf16, dk and dv once in fp32
    assert baselines.ring_bytes(at(4, dtype="bf16")) == 3 * (4 * mib // 2 + 2 * mib)


def too_long(ctx: Any) -> str:
    whole = torch.zeros(1, 1, 1, 1).expand(1, 1 << 20, 8, 64)
    with pytest.raises(MemoryError) as raised:
        baselines.ring_self_attention(whole, whole, whole)
    heads = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="2 ranks do not divide 3 query heads"):
        baselines.megatron(heads, heads, heads, _contestants.sdpa)
    return str(raised.value)


def test_what_does_not_fit_says_so_on_every_rank(pool):
    for said in pool.fresh(2, too_long):
        assert "scores need" in said and "GB on 2 ranks" in said


def traffic(ctx: Any) -> list[tuple[int | None, int | None, int | None]]:
    """What is counted for calls on a group of two of the four ranks, and for tensors too small to be data."""
    pairs = [dist.new_group(pair) for pair in ((0, 1), (2, 3))]
    pair = pairs[ctx.rank // 2]
    x = torch.zeros(4096)
    found = []
    for call in (
        lambda: dist.all_to_all_single(torch.empty_like(x), x, group=pair),
        lambda: dist.all_to_all_single(torch.empty_like(x), x, [2048] * 2, [2048] * 2, group=pair),
        lambda: dist.all_reduce(x, group=pair),
        lambda: dist.all_gather(list(torch.empty(2, 4096)), x, pair),
        lambda: dist.all_reduce(x[:8]),
    ):
        costs = _costs.Costs()
        with costs.counted(None, [x]):
            call()
        found.append((costs.collectives, costs.wire_bytes, costs.socket_bytes))
    return found


def test_counts_follow_the_group_of_a_call(pool):
    counts = pool.fresh(4, traffic)[3]
    sizes = (8192, 8192, 16384, 16384)
    assert [(calls, size) for calls, size, _ in counts] == [*((1, size) for size in sizes), (None, None)]
    for (_, _, sent), size in zip(counts, sizes, strict=False):
        assert sent is not None and 0 <= sent - size < HEADERS


def live(ctx: Any) -> tuple[int, int | None]:
    x = torch.zeros(1 << 20)
    costs = _costs.Costs()
    with costs.counted(None, [x]):
        y = x + 1
        del y
        z = torch.cat((x, x))
    assert z.numel()
    return costs.live_bytes, costs.rss_bytes


def test_peaks_of_memory(pool):
    (tensors, resident), _ = pool.fresh(2, live)
    assert tensors == 8 << 20  # the first was gone before the second came
    assert resident is not None and 8 << 20 <= resident < 48 << 20


def test_zigzag_order():
    assert _contestants.Contestant("", _contestants.sdpa, zigzag=2).order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert _contestants.Contestant("", _contestants.sdpa).order(7).tolist() == list(range(7))
