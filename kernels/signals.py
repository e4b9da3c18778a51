"""Signals: how ranks that write into each other's memory tell when they may, and when they have.

Every rank has a *pad* of int64 words that its peers can write, `pad[kind, source]`, zero at first, and counts of its
own, `counts[kind, peer]`. `signal` raises a count by one and writes it to the peers' pads; `wait` polls the own pad
until the peers' counts are there. Counts only rise, and kernels alone count, so that a replayed graph goes on counting.

    READY   my buffers of the hop that I open are free: write them
    ARRIVED all that I write in the hop that I start is written

Memory ordering, of pack's stores to a peer's rows as much as of the reads of rows that are written next:

    before the signal   a kernel boundary on one stream, then an exchange with *release* at system scope: whoever sees
                        the count sees what was stored before it, whichever thread or kernel stored it
    after the wait      an addition of nothing with *acquire* at system scope, then a kernel boundary: what the stream
                        runs next sees what the peer had stored, and loads nothing from before

A wait gives up at its deadline, when it is told to, or when a peer says that it gave up. It never traps, and the stream
goes on. `status` is int64 in memory that the host reads and writes at any time (pinned), zero at first:

    status[0]           not 0: this rank has given up, 1 by the host's word; `poison` then spoils what arrives
    status[1]           of `poison`
    status[2 + rank]    of the first wait that failed: SILENT, that rank did not signal in time; GAVE_UP, it gave up

Worked example, 2 ranks: rank 0 signals READY, counts[0] = [1, 1], so that word (READY, 0) of both pads is 1. It waits
until words (READY, 0) and (READY, 1) of its own pad are 1, too. With `behind` = 1 it would wait for 0, the one before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from . import _config

READY, ARRIVED = 0, 1
KINDS = 2
FLAGS = 2  # words of `status` before the ranks'
SILENT, GAVE_UP = 1, 2

_POLL_NS = tl.constexpr(1_000_000)  # what a poll counts where there is no clock: in the interpreter
_SILENT = tl.constexpr(SILENT)
_GAVE_UP = tl.constexpr(GAVE_UP)
_FLAGS = tl.constexpr(FLAGS)
_KINDS = tl.constexpr(KINDS)
_LOOK_EVERY = tl.constexpr(16)  # polls of the pad for a look at the clock, and at the host's memory, which is far


@triton.jit(do_not_specialize=["kind", "rank", "size"])
def _signal_kernel(pads_ptr, counts_ptr, status_ptr, kind, rank, size):
    i = tl.program_id(0)  # the peer
    count_ptr = counts_ptr + kind * size + i
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    if tl.load(status_ptr, volatile=True) != 0:
        count = tl.full((), -1, tl.int64)  # I have given up: what I wrote since is not to be read
    word_ptr = tl.load(pads_ptr + i).to(tl.pointer_type(tl.int64)) + kind * size + rank
    tl.atomic_xchg(word_ptr, count, sem="release", scope="sys")


@triton.jit
def _now(clock_ptr, polls, HAS_CLOCK: tl.constexpr):
    """Nanoseconds, read by one thread for all: threads with a time each could part before a barrier."""
    if HAS_CLOCK:
        tl.atomic_xchg(clock_ptr, globaltimer(), sem="relaxed")
        return tl.atomic_add(clock_ptr, polls * 0, sem="relaxed")
    else:
        return polls * _POLL_NS


@triton.jit(do_not_specialize=["kind", "behind", "size", "timeout"])
def _wait_kernel(pad_ptr, counts_ptr, status_ptr, kind, behind, size, timeout, HAS_CLOCK: tl.constexpr):
    i = tl.program_id(0)  # the peer
    word_ptr = pad_ptr + kind * size + i
    clock_ptr = counts_ptr + _KINDS * size + i
    wanted = tl.load(counts_ptr + kind * size + i) - behind
    mine = wanted * _KINDS + kind + 1  # says that it was this wait, in which every peer is to have its own chance
    zero = tl.full((), 0, tl.int64)
    told = tl.atomic_add(status_ptr, zero, sem="relaxed", scope="sys")
    seen = tl.atomic_add(word_ptr, zero, sem="acquire", scope="sys")
    begin = _now(clock_ptr, zero, HAS_CLOCK)
    polls = zero
    late = zero != 0
    while (seen >= 0) & (seen < wanted) & ((told == 0) | (told == mine)) & (late == 0):
        polls += 1
        if polls % _LOOK_EVERY == 0:
            late = _now(clock_ptr, polls, HAS_CLOCK) - begin > timeout
            told = tl.atomic_add(status_ptr, zero, sem="relaxed", scope="sys")
        seen = tl.atomic_add(word_ptr, zero, sem="acquire", scope="sys")
    if (seen < wanted) & ((told == 0) | (told == mine)):
        tl.store(status_ptr + _FLAGS + i, tl.where(seen < 0, _GAVE_UP, _SILENT).to(tl.int64))
        tl.store(status_ptr, mine)


def signal(pads: Tensor, counts: Tensor, status: Tensor, kind: int, rank: int) -> None:
    """Raise this rank's count of `kind` and tell all ranks; -1 in its place once `status[0]` is set.

    `pads` [P] int64, the addresses of all ranks' pads; `counts` [KINDS + 1, P] int64, the last row for
    clocks; `status` [FLAGS + P] int64, pinned.
    """
    _config.launch(
        _signal_kernel,
        (pads.numel(),),
        pads_ptr=pads, counts_ptr=counts, status_ptr=status, kind=kind, rank=rank, size=pads.numel(),
        num_warps=1, num_stages=1,
    )  # fmt: skip


def wait(pad: Tensor, counts: Tensor, status: Tensor, kind: int, behind: int, timeout: float) -> None:
    """Let the stream wait, `timeout` seconds at most, until all ranks' counts of `kind` are this rank's less `behind`.

    `pad` is this rank's own; `counts` and `status` as for `signal`. Where that fails, `status` says so.
    """
    size = counts.size(1)
    _config.launch(
        _wait_kernel,
        (size,),
        pad_ptr=pad, counts_ptr=counts, status_ptr=status, kind=kind, behind=behind, size=size,
        timeout=int(timeout * 1e9), HAS_CLOCK=not _config.INTERPRET, num_warps=1, num_stages=1,
    )  # fmt: skip
