"""Exchanges between processes that share one GPU, held against the virtual exchange; and overlap, emulated.

A layer of every exchange must have the same bits as over the virtual exchange, which `check` holds against fp64. The
ranks are processes (`_exchange_worker`). A captured layer must have, replayed, the bits of the layer run eagerly. Every
part of this is a case of its own: one that fails, hangs or cannot run here is a record, and the others go on.

How much of an exchange is left to see beside attention, in C chunks: the exchange is a copy on a stream of its own that
is as slow as NVLink, and attention of each chunk waits for its copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulysses_triton import UlyssesGroup, ulysses_attention
from ulysses_triton.case import Case, Inputs, Results, draw
from ulysses_triton.kernels import _config

from ._check import Findings, Found
from ._layer import _results
from ._record import ROOT, table
from ._session import Session, milliseconds, verdict

SECONDS = 180.0  # of one case's processes
NVLINK = 450e9  # bytes per second and direction, of an H100's or H200's
CHUNKS = (1, 2, 4)
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
_MULTI_RANK = (2, 30)  # the first NCCL that takes several ranks on one GPU


class Work(NamedTuple):
    """A layer on processes."""

    exchange: str
    ranks: int
    graph: bool = False
    tool: str = ""

    def __str__(self) -> str:
        marks = ["", *["captured and replayed"] * self.graph, *([f"under {self.tool}"] if self.tool else [])]
        return f"{self.exchange} on {self.ranks} rank{'s' * (self.ranks > 1)}" + ", ".join(marks)


def works(*, dry: bool) -> list[Work]:
    """The most telling first."""
    if dry:
        return [Work("torch", 2)]
    found = [
        Work("symm", 2),
        Work("nccl", 1),
        Work("symm", 4),
        Work("symm", 2, graph=True),
        Work("nccl", 1, graph=True),
    ]
    if torch.cuda.is_available() and torch.cuda.nccl.version() >= _MULTI_RANK:  # type: ignore[operator]
        found += [Work("nccl", 2), Work("nccl", 2, graph=True)]
    if shutil.which("compute-sanitizer"):
        found += [Work("symm", 2, tool=tool) for tool in TOOLS]
    return found


def layer(work: Work, *, dry: bool) -> Case:
    if dry:
        return Case(18, 1, 4, 2, 16, 16, "fp16", attention="triton", ranks=work.ranks)
    if work.tool:
        return Case(200, 1, 4, 2, 64, 64, "bf16", attention="triton", ranks=work.ranks)
    return Case(2003, 2, 8, 4, 128, 128, "bf16", attention="triton", ranks=work.ranks)


def run(session: Session) -> Iterator[list[dict[str, Any]]]:
    for work in session.in_time(works(dry=session.dry)):
        case = layer(work, dry=session.dry)
        yield [session.judge("exchange", str(work), partial(_check, session, work, case)) | {"layer": str(case)}]
    for name in session.in_time(["overlap"]):
        found: dict[str, Any] = {}
        record = session.judge("overlap", name, lambda: _overlap(session, found))  # noqa: B023
        yield [record | {"overlap": found}]


def _check(session: Session, work: Work, case: Case) -> Findings:
    """How many elements differ from the layer over the virtual exchange, or between replays and eager runs."""
    inputs = draw(case, session.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((case, inputs), folder / "case.pt")
        _processes(session, work, folder)
        parts = [torch.load(folder / f"{rank}.pt", map_location=session.device) for rank in range(work.ranks)]
    if work.graph:
        return {f"{n}, rank {rank}": Found(float(x), 0.0) for rank, part in enumerate(parts) for n, x in part.items()}
    return _differences(case, inputs, parts)


def _differences(case: Case, inputs: Inputs, parts: list[Results]) -> Findings:
    expected = _results(case, inputs)
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return {name: Found(float((whole[name] != want).sum()), 0.0) for name, want in expected.items()}


def _processes(session: Session, work: Work, folder: Path) -> None:
    """Run all ranks to their end. Raises RuntimeError with what the first one that failed said last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    if session.dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench._exchange_worker", str(folder), work.exchange]
    if work.tool:
        command = ["compute-sanitizer", "--tool", work.tool, "--error-exitcode", "9", *command]
    running = []
    for rank in range(work.ranks):
        said = (folder / f"{rank}.txt").open("w+")
        ending = [str(rank), str(work.ranks), *["--graph"] * work.graph]
        process = subprocess.Popen(
            [*command, *ending], cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        running.append((process, said))
    late = []
    try:
        for rank, (process, _) in enumerate(running):
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                late.append(rank)
    finally:
        for process, said in running:
            process.kill()
            process.wait()
            said.close()
    for rank, (process, _) in enumerate(running):
        if rank in late or process.returncode:
            lines = (folder / f"{rank}.txt").read_text(errors="replace").strip().splitlines()
            how = f"not done after {SECONDS:g} s" if rank in late else f"exit status {process.returncode}"
            raise RuntimeError(f"rank {rank}: {how}; {lines[-1] if lines else 'it said nothing'}")


# -- overlap


@triton.jit(do_not_specialize=["n"])
def _slow_copy_kernel(source_ptr, target_ptr, n, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    o = i * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    for _ in range(i, tl.cdiv(n, BLOCK), PROGRAMS):
        tl.store(target_ptr + o, tl.load(source_ptr + o, mask=o < n), mask=o < n)
        o += PROGRAMS * BLOCK


def slow_copy(source: Tensor, target: Tensor, programs: int) -> None:
    """Copy, both flat and of one dtype, by so few programs that it is as slow as wanted, and leaves SMs to others."""
    _config.launch(
        _slow_copy_kernel,
        (programs,),
        source_ptr=source, target_ptr=target, n=source.numel(), PROGRAMS=programs, BLOCK=4096,
        num_warps=8, num_stages=1,
    )  # fmt: skip


def _overlap(session: Session, found: dict[str, Any]) -> Findings:
    """Into `found`: milliseconds for each number of chunks. The check is that the copies are right."""
    tokens, heads, kv_heads, dim = (64, 4, 4, 16) if session.dry else (16384, 32, 8, 128)
    dtype = torch.float32 if session.dry else torch.bfloat16
    shape = {"q": heads, "k": kv_heads, "v": kv_heads}
    q, k, v = (torch.randn(1, tokens, n, dim, device=session.device).to(dtype) for n in shape.values())
    rows = torch.cat([x.reshape(-1) for x in (q, k, v)])
    arrived = torch.full_like(rows, float("nan"))
    programs, rate = _programs(session, rows, arrived)
    found |= {"programs": programs, "bytes": rows.nbytes, "copy_gb_per_s": rate / 1e9}
    with UlyssesGroup() as group:
        for chunks in CHUNKS:
            attend = [
                partial(ulysses_attention, *(x.chunk(chunks, 2)[c] for x in (q, k, v)), group, attention="triton")
                for c in range(chunks)
            ]
            copies = list(zip(rows.chunk(chunks), arrived.chunk(chunks), strict=True))
            both = partial(_in_chunks, session, attend, copies, programs)
            alone = partial(_in_turn, attend)
            times = session.stopwatch.time_all({"both": both, "attend": alone})
            exposed = times["both"].p50 - times["attend"].p50
            found[f"C = {chunks}"] = {n: milliseconds(t) for n, t in times.items()} | {"exposed_ms": exposed}
    return {"copy": Found(float((arrived != rows).sum()), 0.0)}


def _programs(session: Session, source: Tensor, target: Tensor) -> tuple[int, float]:
    """The fewest programs, a power of two, that copy as fast as NVLink, and how fast they are (bytes per second)."""
    programs = 1
    while True:
        rate = source.nbytes / session.stopwatch.time(partial(slow_copy, source, target, programs)).p50 * 1e3
        if rate >= NVLINK or programs >= 64 or session.dry:
            return programs, rate
        programs *= 2


def _in_turn(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _in_chunks(
    session: Session, attend: list[Callable[[], object]], copies: list[tuple[Tensor, Tensor]], programs: int
) -> None:
    """All copies on a stream of their own, attention of each chunk behind its copy."""
    if session.device.type == "cpu":
        for copy, call in zip(copies, attend, strict=True):
            slow_copy(*copy, programs)
            call()
        return
    main, exchange = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    exchange.wait_stream(main)
    arrived = []
    with torch.cuda.stream(exchange):
        for copy in copies:
            slow_copy(*copy, programs)
            arrived.append(exchange.record_event())
    for event, call in zip(arrived, attend, strict=True):
        main.wait_event(event)
        call()


def show(records: list[dict[str, Any]]) -> str:
    lines = [(r["case"], r.get("layer"), verdict(r)) for r in records if r["kernel"] == "exchange"]
    text = table(("exchange", "layer", "check"), lines)
    for r in records:
        chunks = {name: x for name, x in r.get("overlap", {}).items() if name.startswith("C")}
        times = [(n, x["attend"]["p50"], x["both"]["p50"], x["exposed_ms"]) for n, x in chunks.items()]
        if times:
            text += "\n\n" + table(("overlap", "attend ms", "with the exchange ms", "exposed ms"), times)
    return text
