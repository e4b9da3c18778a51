"""Check every kernel against fp64 on this machine's GPU, then time them, and write records.

    python -m bench.gpu [--part check,move,attend,layer,exchange,memory] [--seconds N] [--out FOLDER]
        [--resume FOLDER]

from the root of the repository; it needs the repository and the machine's own torch and triton. A part ends by its
budget of seconds at the latest: cases not begun by then are skipped, and the record says which. The telling cases come
first, and the record is written as they are done. With `--resume`, cases that the records of a folder have, of the same
sources on the same device, are taken from there: a few short runs make a whole one. Every timed case is checked at its
own size first, and what is wrong, there or in the part `check`, is not timed. Last comes what became of the targets.

    python -m bench.gpu --interpret

runs the same code on a CPU, at toy sizes, in Triton's interpreter: its checks are real, its times mean nothing.
Exit status: 0 all is right, 1 something is wrong, 2 it could not run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._check import Check
    from ._data import Kernels
    from ._session import Session

SECONDS = {  # of each part, in this order
    "check": 150.0, "move": 40.0, "attend": 240.0, "layer": 60.0, "exchange": 180.0, "memory": 60.0,
}  # fmt: skip
WRITE_EVERY = 5.0  # seconds, of the record of a part that runs
_CONTENT = {
    "check": "every kernel and the whole layer on 1, 2 and 4 virtual ranks against fp64",
    "move": "pack, unpack, pack_grad, unpack_grad: GB/s against a copy and PyTorch's permute",
    "attend": "attention forward and backward: TFLOP/s against SDPA, FlexAttention and FlashAttention",
    "layer": "a layer on virtual ranks that share the GPU: milliseconds per phase, and against SDPA",
    "exchange": "a layer on processes that share the GPU, over symm and nccl, also captured; overlap, emulated",
    "memory": "what a training step holds at most, with loss and MLPs over tiles and checkpoints in host memory",
}


def main(argv: Sequence[str] | None = None, kernels: Kernels | None = None) -> int:
    """Run the command; `kernels` are those under test instead of the repository's. Returns the exit status."""
    arguments = _arguments(argv)
    if arguments.list:
        for part, text in _CONTENT.items():
            print(f"{part:8} {text} (at most {SECONDS[part]:g} s)")
        return 0
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from ulysses_triton.kernels._config import INTERPRET

    if arguments.interpret != INTERPRET:
        print("bench.gpu: TRITON_INTERPRET must be unset, and is set by --interpret itself", file=sys.stderr)
        return 2
    if not arguments.interpret and not torch.cuda.is_available():
        print("bench.gpu: PyTorch finds no GPU here; --interpret makes a dry run without one", file=sys.stderr)
        return 2
    from ._data import Kernels
    from ._session import Session

    device = torch.device("cpu" if arguments.interpret else "cuda")
    session = Session(device, dry=arguments.interpret, kernels=kernels or Kernels())
    return _run(session, arguments)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=lines[0])
    parser.add_argument("--part", type=_parts, default=list(SECONDS), metavar="NAME[,NAME]", help=", ".join(SECONDS))
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument("--seconds", type=float, metavar="N", help="budget of each part, instead of its own")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for records; $OUT if set, or else bench/results")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="of records; what they have is not run again")
    parser.add_argument("--interpret", action="store_true", help="dry run on a CPU; writes records only under --out")
    return parser.parse_args(argv)


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECONDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(SECONDS)}")
    return [name for name in SECONDS if name in names]


def _folder(arguments: argparse.Namespace) -> Path | None:
    from ._record import default_folder

    return arguments.out or (None if arguments.interpret else default_folder())


def _run(session: Session, asked: argparse.Namespace) -> int:
    from ulysses_triton import doctor

    from . import _record

    about = _record.environment(session.device, dry=session.dry)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['device']['name']}; {versions}; commit {about['commit']}, sources {about['sources']}")
    print(doctor.text(doctor.machine(doctor.gather())), flush=True)
    if session.dry:
        print("DRY RUN in Triton's interpreter, on a CPU: checks are real, times mean nothing")
        print("bf16 is left out: the interpreter multiplies its raw bits")
    _measure_ceilings(session, asked.part)
    folder = _folder(asked)
    everything: list[dict[str, Any]] = []
    for part in SECONDS:
        known = _record.earlier(asked.resume, part, about) if asked.resume else []
        everything += _part(session, part, asked.seconds, folder, about, known) if part in asked.part else known
    for kernel, case in session.wrong.items():
        print(f"WRONG: {kernel}, first at {case}")
    print(f"\n== targets\n{_record.targets(everything)}")
    return 0 if all(case["ok"] for case in everything) else 1


def _part(
    session: Session, part: str, seconds: float | None, folder: Path | None, about: dict[str, Any],
    known: list[dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Run a part, write its record now and then, and print its table; the records of its cases, those known first."""
    from . import _record

    module = None if part == "check" else importlib.import_module(f"bench._{part}")
    begin = time.monotonic()
    cases = list(known)
    session.begin(SECONDS[part] if seconds is None else seconds, (_record.name_of(part, r) for r in known))

    def write() -> Path | None:
        spent = time.monotonic() - begin
        record = {"ceilings": session.ceilings, "seconds": spent, "cases": cases, "skipped": session.skipped}
        return folder and _record.write(folder, part, about | record)

    written = begin
    for fresh in module.run(session) if module else _checked(session):
        cases += fresh
        if time.monotonic() - written > WRITE_EVERY:
            write()
            written = time.monotonic()
    text = module.show(cases) if module else _show(cases)
    print(f"\n== {part}, {time.monotonic() - begin:.0f} s\n{text}", flush=True)
    if known:
        print(f"from an earlier run: {len(known)} of {len(cases)} records")
    if session.skipped:
        print(f"skipped, out of time: {len(session.skipped)} cases, from {session.skipped[0]}")
    if path := write():
        print(f"record: {path}", flush=True)
    return cases


def _measure_ceilings(session: Session, parts: Sequence[str]) -> None:
    """What the device does at best: shares in the records are of these."""
    if "move" in parts:
        session.ceilings["copy_gb_per_s"] = session.stopwatch.copy_bandwidth()
    if "attend" in parts:
        session.ceilings["matmul_tflop_per_s"] = session.stopwatch.matmul_rate()
    if session.ceilings and not session.dry:
        print("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in session.ceilings.items()))


def _checked(session: Session) -> Iterator[list[dict[str, Any]]]:
    """The part `check`: many at once, since most of their time is compilation."""
    from . import _check, _layer

    def judge(check: Check) -> list[dict[str, Any]]:
        if not list(session.in_time([check])):  # asked when its turn comes
            return []
        return [session.judge(check.kernel, check.case, lambda: check.run(session.kernels, session.device))]

    first, *others = _check.checks(dry=session.dry)
    yield judge(first)  # alone: Triton's driver is set up by the first launch
    with session.threads() as threads:
        yield from threads.map(judge, others)
    yield from map(judge, _layer.checks(dry=session.dry))  # each has threads of its own


def _show(cases: list[dict[str, Any]]) -> str:
    from . import _record
    from ._session import verdict

    lines = []
    for kernel in dict.fromkeys(r["kernel"] for r in cases):
        own = [r for r in cases if r["kernel"] == kernel]
        lines.append((kernel, len(own), sum(r["ok"] for r in own), _closest(own)))
    text = _record.table(("kernel", "cases", "right", "largest error / allowed"), lines)
    wrong = [(r["kernel"], r["case"], verdict(r)) for r in cases if not r["ok"]]
    return text + "\n" + _record.table(("wrong", "case", "what"), wrong) if wrong else text


def _closest(records: list[dict[str, Any]]) -> float | None:
    """How near to what is allowed the errors come."""
    errors = [e for r in records for e in r["errors"].values() if e["allowed"]]
    return max((e["error"] / e["allowed"] for e in errors), default=None)


if __name__ == "__main__":
    sys.exit(main())
