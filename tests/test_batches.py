"""Batches as Hugging Face's models take them, cut into shards: what each rank gets, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Context, Pool

from ulysses_triton import OptionError, shard_lens
from ulysses_triton.integrations.data import SequenceShards, sequence_group, share_batches, whole_batch

B, S = 2, 11


def batch(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (B, S), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask, **more}


def shards_of(ctx: Context, given: dict[str, Any]) -> dict[str, Any]:
    return SequenceShards(ctx.group)(given)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_join_to_the_batch_with_labels_shifted(pool: Pool, ranks: int) -> None:
    given = batch(inputs_scale=torch.rand(B, S, 3), use_cache=False)
    found = pool.run(ranks, shards_of, given)
    lens = shard_lens(S, ranks)
    for shard, tokens in zip(found, lens, strict=True):
        assert shard["input_ids"].shape == (B, tokens)
        assert shard["use_cache"] is False
        assert shard.get("ulysses_lens", lens) == lens
        assert ("ulysses_lens" in shard) == (ranks > 1)
    joined = {name: torch.cat([shard[name] for shard in found], 1) for name in (*given, "position_ids", "shift_labels")
              if name != "use_cache"}  # fmt: skip
    for name in ("input_ids", "labels", "attention_mask", "inputs_scale"):
        assert torch.equal(joined[name], given[name])
    assert torch.equal(joined["position_ids"], torch.arange(S).expand(B, S))
    assert torch.equal(joined["shift_labels"][:, :-1], given["labels"][:, 1:])
    assert (joined["shift_labels"][:, -1] == -100).all()


def test_equal_shards_need_no_lengths(pool: Pool) -> None:
    given = {"input_ids": torch.arange(8)[None]}
    assert all("ulysses_lens" not in shard and "shift_labels" not in shard for shard in pool.run(2, shards_of, given))


def test_positions_are_the_batchs_own_or_those_of_its_documents() -> None:
    ids = torch.arange(6)[None]
    own = torch.tensor([[0, 1, 0, 1, 2, 0]])
    assert torch.equal(whole_batch({"input_ids": ids, "position_ids": own})["position_ids"], own)
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    packed = whole_batch({"input_ids": ids, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 3})
    assert torch.equal(packed["position_ids"], own)
    assert set(packed) == {"input_ids", "position_ids"}


def test_labels_that_are_shifted_stay_as_they_are() -> None:
    shifted = torch.full((B, S), 7)
    assert torch.equal(whole_batch(batch(shift_labels=shifted))["shift_labels"], shifted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (batch(position_ids=torch.zeros(3, B, S)), "position_ids has shape"),
        (batch(pixel_values=torch.zeros(B, 3, 4, 4)), "pixel_values has shape"),
        (batch(attention_mask=torch.ones(B, 1, S, S)), "attention_mask has shape"),
        (batch(cu_seq_lens_q=torch.tensor([0, 5, S])), "batch of 1"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64)}, "3 tokens cannot be sharded over 4 ranks"),
    ],
    ids=["position_ids", "pixel_values", "mask of pairs", "offsets", "tokens"],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(pool: Pool, given: dict[str, Any], said: str) -> None:
    found = pool.run(4, one_is_wrong, given, expect_errors=True)
    assert all("ShapeError" in error.kinds and said in error.message for error in found)


def one_is_wrong(ctx: Context, given: dict[str, Any]) -> None:
    SequenceShards(ctx.group)(given if ctx.rank == 1 else batch())


def test_different_batches_on_the_ranks_of_a_sequence_are_refused(pool: Pool) -> None:
    found = pool.run(4, one_has_others, expect_errors=True)
    assert all("ShapeError" in error.kinds and "labels" in error.message for error in found)


def one_has_others(ctx: Context) -> None:
    given = batch()
    if ctx.rank == 2:
        given["labels"][0, 3] += 1
    SequenceShards(ctx.group)(given)


def test_a_batch_without_inputs_is_refused() -> None:
    with pytest.raises(OptionError, match="neither input_ids nor inputs_embeds, only pixels"):
        whole_batch({"pixels": torch.zeros(1, 3)})


# ---- the grid of ranks, and data loaders


def test_sequences_go_to_consecutive_ranks_and_batches_to_rows(pool: Pool) -> None:
    found = pool.run(8, in_a_grid)
    assert [ranks for ranks, _ in found] == [[r // 4 * 4 + i for i in range(4)] for r in range(8)]
    assert [place for _, place in found] == [(2, r // 4, True) for r in range(8)]


def in_a_grid(ctx: Context) -> tuple[list[int], tuple[int, int, bool]]:
    with sequence_group(4) as group:
        place = SimpleNamespace(num_processes=8, process_index=ctx.rank, even_batches=True)
        share_batches(SimpleNamespace(batch_sampler=place), group)
        return dist.get_process_group_ranks(group.process_group), tuple(vars(place).values())


def test_one_row_has_no_others_to_match(pool: Pool) -> None:
    assert all(not even for even in pool.run(8, in_one_row))


def in_one_row(ctx: Context) -> bool:
    with sequence_group(8) as group:
        place = SimpleNamespace(num_processes=8, process_index=ctx.rank, even_batches=True)
        share_batches(SimpleNamespace(batch_sampler=place), group)
        assert (place.num_processes, place.process_index) == (1, 0)
        return place.even_batches


def test_grids_and_loaders_that_do_not_fit_are_refused(pool: Pool) -> None:
    pool.run(8, refused)


def refused(ctx: Context) -> None:
    with pytest.raises(OptionError, match="3 ranks for each sequence do not divide the 8 ranks"):
        sequence_group(3)
    with sequence_group(2) as group:
        for other in (
            SimpleNamespace(),
            SimpleNamespace(batch_sampler=SimpleNamespace(num_processes=1, process_index=0)),
        ):
            with pytest.raises(OptionError, match="does not split batches over ranks"):
                share_batches(other, group)


def test_a_rank_alone_needs_nothing() -> None:
    with sequence_group(1) as group:
        assert group.size == 1
        loader = object()
        assert share_batches(loader, group) is loader
        shards = SequenceShards(group)(batch())
        assert shards["shift_labels"].shape == (B, S)
