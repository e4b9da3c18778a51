"""`ulysses-triton tune`: measures launch configurations on this machine's GPU and keeps the fastest right ones.

Under torchrun rank 0 tunes (`tuner`) while the others wait, and every host writes what rank 0 found to its own cache:
ranks that tuned for themselves would choose differently. Then all time whole layers together (`chunk_tuner`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from . import chunk_cache, chunk_tuner, tuner
from .case import DTYPES
from .errors import ExchangeError, OptionError
from .group import EXCHANGES, UlyssesGroup
from .kernels import _cache, _config
from .kernels._cache import Key
from .machine import Machine, dry_machine, gpu_machine
from .spec import MAX_HEAD_DIM
from .trial_options import FLAGS
from .verify import joined

POLL_SECONDS = 0.5
SILENT_SECONDS = 120.0  # after which rank 0, which gives a sign of life every POLL_SECONDS, is taken for dead
LAYER_REPEATS = 20

_DESCRIPTION = """\
Find the fastest launch configurations of the kernels on this machine's GPU, and keep them in the user's cache folder
(or the one that ULYSSES_TRITON_CACHE names), where every later run finds them. A configuration is held against fp64
before it is timed. A run that is stopped goes on where it was; what is done already is left out.

Under torchrun rank 0 tunes, and all hosts get the same file:

    torchrun --nproc-per-node 8 -m ulysses_triton.cli tune --head-dims 128 --flags "causal;causal,window"

With --chunks they also run layers of such a model together, in 1, 2 and 4 chunks, and keep which is fastest: what
UlyssesGroup(chunks="auto") takes for such layers.

Calls use the configuration whose flags and sequence are nearest, and where there is none that of the architecture.
"""


def tune_everywhere(
    keys: Sequence[Key], machine: Machine, folder: Path, heads: tuple[int, int], *,
    group: dist.ProcessGroup | None = None, again: bool = False, budget: float | None = None,
) -> int:  # fmt: skip
    """Tune on rank 0 and write its file on every host; returns how many keys are left. Every rank calls it."""

    def work() -> str:
        path = folder / f"{_cache.slug(machine.gpu)}.json"
        left = tuner.tune(keys, machine, path, heads, again=again, budget=budget)
        return json.dumps([path.name, tuner.text(machine.gpu, _cache.read(path)), len(left)])

    name, content, left = json.loads(from_rank_0(work, group))
    _spread(folder / name, content, group)
    _config.forget()
    return int(left)


def tune_chunks_everywhere(
    keys: Sequence[chunk_cache.Key], machine: Machine, folder: Path, exchange: str, repeats: int, *,
    again: bool = False, budget: float | None = None,
) -> int:  # fmt: skip
    """Time layers on all ranks of the default group, write the file on every host; returns how many are left."""
    begin = time.monotonic()
    path = folder / chunk_cache.file_of(machine.gpu)

    def unfinished() -> str:
        chunk_tuner.write(path, machine.gpu, [])  # what cannot be written is found out first
        known = {} if again else chunk_cache.read(path)
        done = [key for key, entry in known.items() if entry["source"] == chunk_cache.source()]
        return json.dumps([i for i, key in enumerate(keys) if key not in done])

    def in_time() -> str:
        return "yes" if budget is None or time.monotonic() - begin < budget else ""

    todo = json.loads(from_rank_0(unfinished))
    left = len(todo)
    for i in todo:
        if not from_rank_0(in_time):
            break
        entry = chunk_tuner.fastest(keys[i], machine, exchange, repeats)
        left -= 1
        if dist.get_rank() == 0:
            chunk_tuner.write(path, machine.gpu, [entry])
            ms = ", ".join(f"{time} ms in {n}" for n, time in entry["ms"].items())
            print(f"{len(todo) - left}/{len(todo)} {chunk_tuner.named(keys[i])}: {ms}", file=sys.stderr, flush=True)
    _spread(path, from_rank_0(path.read_text), None)
    chunk_cache.forget()
    return left


def _spread(path: Path, content: str, group: dist.ProcessGroup | None) -> None:
    """Give every host the file that rank 0 has."""
    if dist.is_initialized():
        if dist.get_rank(group) and not int(os.environ.get("LOCAL_RANK", 0)):
            with tuner.writing(path):
                tuner.replace(path, content)
        dist.barrier(group)


_calls = itertools.count()


def from_rank_0(work: Callable[[], str], group: dist.ProcessGroup | None = None) -> str:
    """What `work` returns on rank 0, on every rank.

    It may take hours, so the others look into the store now and then: a collective would time out.
    """
    if not dist.is_initialized():
        return work()
    store = dist.PrefixStore(f"ulysses-triton tune {next(_calls)}", dist.distributed_c10d._get_default_store())
    if dist.get_rank(group) == 0:
        with _signs_of_life(store):
            try:
                result = work()
            except BaseException as error:
                store.set("failure", f"{type(error).__name__}: {error}")
                raise
        store.set("result", result)
        return result
    signs, last = -1, time.monotonic()
    while not store.check(["result"]):
        if store.check(["failure"]):
            raise ExchangeError(f"rank 0 could not tune: {store.get('failure').decode()}")
        if (found := store.add("signs", 0)) != signs:
            signs, last = found, time.monotonic()
        if time.monotonic() - last > SILENT_SECONDS:
            raise ExchangeError(f"rank 0, which tunes, gave no sign of life for {SILENT_SECONDS:.0f} s; start again")
        time.sleep(POLL_SECONDS)
    return store.get("result").decode()


@contextmanager
def _signs_of_life(store: dist.Store) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(POLL_SECONDS):
            store.add("signs", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# -- the command


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `tune` with the command's subparsers."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest launch configurations for this machine's GPU",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    listed = "comma-separated"
    parser.add_argument("--head-dims", metavar="D,...", help=f"{listed}; 192:128 for D and Dv (default: 64,128)")
    parser.add_argument("--dtypes", metavar="NAME,...", help=f"{listed}: bf16, fp16, fp32 (default: bf16)")
    parser.add_argument("--seq", metavar="S,...", help=f"{listed}, of whole sequences (default: 2048,8192,32768)")
    parser.add_argument(
        "--flags", metavar="SET;...", default="causal;dense",
        help=f"sets of options, divided by ';': dense, or some of {','.join(FLAGS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--heads", metavar="HQ:HKV", help="query and kv heads of one rank (default: 8:2)")
    parser.add_argument("--chunks", metavar="HQ:HKV", help="also layers of a model with so many heads, on all ranks")
    parser.add_argument("--exchange", choices=EXCHANGES, default="auto", help="of those layers (default: %(default)s)")
    parser.add_argument("--budget", metavar="SECONDS", type=float, help="begin nothing after so long (default: no end)")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="in place of the user's cache folder")
    parser.add_argument(
        "--interpret", action="store_true", help="dry run without a GPU, into --out: times mean nothing"
    )
    parser.add_argument("--debug", help="print the traceback of an error", action="store_true")


def command(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; returns the exit status."""
    dry = arguments.interpret
    if dry and arguments.out is None:
        raise OptionError("--interpret needs --out FOLDER: what a dry run finds is not for the user's cache")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.chunks and ranks == 1:
        raise OptionError("--chunks needs the ranks that a sequence is to be sharded over: start tune under torchrun")
    shapes = (
        [_dims(text) for text in (arguments.head_dims or ("16" if dry else "64,128")).split(",")],
        [_dtype(text) for text in (arguments.dtypes or ("fp32" if dry else "bf16")).split(",")],
        [_number("--seq", text) for text in (arguments.seq or ("64" if dry else "2048,8192,32768")).split(",")],
        [_flags(text) for text in arguments.flags.split(";")],
    )
    keys = keys_of(*shapes)
    heads = _heads("--heads", arguments.heads or ("2:1" if dry else "8:2"))
    model_heads = _heads("--chunks", arguments.chunks) if arguments.chunks else None
    machine = dry_machine() if dry else gpu_machine()
    folder = arguments.out or _cache.user_folder()
    if folder is None:
        raise OptionError(f"the user's cache needs platformdirs: pip install it, or name a folder in {_cache.FOLDER}")
    again, budget = arguments.again, arguments.budget
    with joined(machine.device):
        begin = time.monotonic()
        left = tune_everywhere(keys, machine, folder, heads, again=again, budget=budget)
        files, count = [f"{_cache.slug(machine.gpu)}.json"], len(keys)
        if model_heads is not None and not left:  # layers run with the tiles that were found
            with UlyssesGroup(exchange=arguments.exchange) as group:
                layers = chunk_tuner.keys_of(group.exchange.name, ranks, model_heads, *shapes)
            rest = None if budget is None else budget - (time.monotonic() - begin)
            repeats = 1 if dry else LAYER_REPEATS
            left = tune_chunks_everywhere(
                layers, machine, folder, arguments.exchange, repeats, again=again, budget=rest
            )
            files, count = [*files, chunk_cache.file_of(machine.gpu)], len(layers)
    if int(os.environ.get("RANK", 0)) == 0:
        if dry:
            print("DRY RUN in Triton's interpreter: the gate is real, times mean nothing, no GPU will read the file")
        if left:
            print(f"{left} of {count} are left, for want of time: the same command goes on with them")
        print("\n".join(str(folder / name) for name in files), flush=True)
    return 0


def keys_of(
    dims: Sequence[tuple[int, int]], dtypes: Sequence[str], seqs: Sequence[int], flags: Sequence[tuple[str, ...]]
) -> list[Key]:  # fmt: skip
    """Every kernel for every head dim and dtype, attention also for every set of flags and every bucket."""
    found = []
    for dtype, (D, Dv) in itertools.product(dtypes, dims):
        for on, seq, kernel in itertools.product(flags, seqs, ("attend_forward", "attend_dq", "attend_dkv")):
            found.append(Key(kernel, dtype, (D, Dv), on, _cache.bucket(seq)))
        for kernel, of in (("pack", D), ("unpack", Dv), ("pack_grad", Dv), ("unpack_grad", D)):
            found.append(Key(kernel, dtype, (of, Dv), (), _config.SHARD))
    return list(dict.fromkeys(found))


def _number(option: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise OptionError(f"{option} has {text!r} where a number above 0 is expected")
    return int(text)


def _dims(text: str) -> tuple[int, int]:
    D, _, Dv = text.partition(":")
    dims = _number("--head-dims", D), _number("--head-dims", Dv or D)
    if any(dim % 8 or dim > MAX_HEAD_DIM for dim in dims):
        raise OptionError(f"--head-dims has {text}; head dims are multiples of 8 up to {MAX_HEAD_DIM}")
    return dims


def _dtype(text: str) -> str:
    name = text.strip()
    if name not in DTYPES or name == "fp64":
        raise OptionError(f"--dtypes has {name!r}; the kernels take bf16, fp16 and fp32")
    return str(DTYPES[name]).removeprefix("torch.")


def _flags(text: str) -> tuple[str, ...]:
    names = sorted(name for part in text.split(",") if (name := part.strip()) not in ("", "dense"))
    unknown = [name for name in names if name not in FLAGS]
    if unknown:
        raise OptionError(f"--flags has {', '.join(unknown)}; it takes dense, or some of {', '.join(FLAGS)}")
    return tuple(dict.fromkeys(names))


def _heads(option: str, text: str) -> tuple[int, int]:
    hq, _, hkv = text.partition(":")
    heads = _number(option, hq), _number(option, hkv or hq)
    if heads[0] % heads[1]:
        raise OptionError(f"{option} {text}: {heads[0]} query heads cannot share {heads[1]} kv heads")
    return heads
