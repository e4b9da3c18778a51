"""Tuning on one GPU: the fastest right configuration of every key, and the file that keeps them.

Each candidate is compiled, then held against fp64, and only then timed. The file is written after every key, so that a
run which was stopped goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import triton
from filelock import FileLock

from . import trial
from .errors import OptionError
from .kernels import _cache, _config
from .kernels._cache import Entry, Key, Tiles
from .machine import Machine, Resources

GATE_HEADS = (4, 2)
MOST_THREADS = 16  # that compile at once


def fastest(key: Key, machine: Machine, heads: tuple[int, int]) -> Entry:
    """Try all candidates of a key; its entry, of the fastest of those that are right."""
    problem = trial.Problem(key, key.seq or machine.shard_tokens, *heads, machine.device)
    gates = [trial.Problem(key._replace(seq=0), tokens, *GATE_HEADS, machine.device) for tokens in machine.gate_tokens]
    like = torch.empty(0, dtype=problem.dtype, device=machine.device)
    stages = (1, 2) if torch.version.hip else (1, 2, 3)
    descriptors = (False, True) if _config.has_tma(machine.device) else (False,)
    first = _config.tiles(key.kernel, like, key.dims, key.seq, key.flags)
    tiles = trial.candidates(key, first, stages, descriptors)[: machine.most]
    tried: dict[str, str] = {}
    best: tuple[float, Tiles, Resources, dict[str, trial.Error]] | None = None
    for each, compiled in zip(tiles, _compiled(problem, tiles, machine), strict=True):
        if isinstance(compiled, str):
            tried[label(each)] = f"does not compile: {compiled}"
            continue
        try:
            errors = _errors(gates, each)
            wrong = [f"{name} {e.error:.1e}, allowed {e.allowed:.1e}" for name, e in errors.items() if not e.ok]
            if wrong:
                tried[label(each)] = f"wrong: {'; '.join(wrong)}"
                continue
            ms = machine.measure(trial.prepare(problem, each).run)
        except Exception as error:  # a GPU that failed once answers nothing more, so there is nothing to go on with
            error.add_note(f"while {named(key)} was tried with {label(each)}")
            raise
        tried[label(each)] = f"{ms:.4g} ms"
        if best is None or ms < best[0]:
            best = ms, each, compiled, errors
    return _entry(key, machine, heads, problem.tokens, best, tried)


def _compiled(problem: trial.Problem, tiles: Sequence[Tiles], machine: Machine) -> list[Resources | str]:
    """What each launch compiles to, many at once, or why it does not. All are ready before anything is timed."""

    def attempt(each: Tiles) -> Resources | str:
        launches = [trial.prepare(problem, each, variant).launch for variant in problem.variants]
        try:
            return [machine.compile(launch) for launch in launches][0]
        except Exception as error:  # Triton raises anything: out of resources, an assertion, a failed pass
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"

    first = attempt(tiles[0])  # alone: inputs are drawn, and Triton's driver is set up
    on_this_gpu = torch.cuda.set_device if machine.device.type == "cuda" else lambda device: None
    threads = max(1, min(MOST_THREADS, os.cpu_count() or 1))
    with ThreadPoolExecutor(threads, initializer=on_this_gpu, initargs=(machine.device,)) as pool:
        return [first, *pool.map(attempt, tiles[1:])]


def _errors(gates: Sequence[trial.Problem], tiles: Tiles) -> dict[str, trial.Error]:
    """The worst error of each result, over all problems."""
    errors: dict[str, trial.Error] = {}
    for problem in gates:
        for name, found in trial.gate(problem, tiles).items():
            trial.worst(errors, name, found)
    return errors


def named(key: Key) -> str:
    seq = (str(key.seq),) if key.seq else ()
    return " ".join((key.kernel, key.dtype, "/".join(map(str, key.dims)), *key.flags, *seq))


def label(tiles: Tiles) -> str:
    return ", ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')} {value}" for name, value in tiles.items())


def _entry(
    key: Key, machine: Machine, heads: tuple[int, int], tokens: int,
    best: tuple[float, Tiles, Resources, dict[str, trial.Error]] | None, tried: dict[str, str],
) -> Entry:  # fmt: skip
    found: Entry = {"tiles": None, "gate": {"passed": False}}
    if best is not None:
        ms, tiles, resources, errors = best
        shown = {name: [float(f"{x:.2g}") for x in error] for name, error in errors.items()}  # error, allowed
        found = {"tiles": tiles, "ms": float(f"{ms:.4g}"), **resources._asdict(), "gate": {"passed": True, **shown}}
    hashed, files = _cache.source(key.kernel)
    return {
        **key._asdict(),
        **found,
        "source": hashed,
        "source_files": files,
        "triton": triton.__version__,
        "timed": {"tokens": tokens, "heads": heads[0], "kv_heads": heads[1]},
        "tried": tried,
    }


# -- the file


def write(path: Path, gpu: str, entries: Iterable[Entry]) -> None:
    """Add entries to a GPU's file, over those with the same keys. Processes that do so at once wait for each other."""
    with writing(path):
        replace(path, text(gpu, _cache.read(path) | {Key.of(entry): entry for entry in entries}))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The one writer of a file, whose folder is made if there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written ({error}): name another folder with --out or in {_cache.FOLDER}"
        ) from error


def replace(path: Path, content: str) -> None:
    """Whoever reads meanwhile finds the old file or the new one, whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def text(gpu: str, entries: dict[Key, Entry]) -> str:
    """A file: one line for each field of an entry, and for each candidate that was tried."""

    def fields(of: dict[str, object], indent: str) -> str:
        lines = []
        for name, value in of.items():
            shown = fields(value, indent + " ") if name == "tried" and isinstance(value, dict) else json.dumps(value)
            lines.append(f"{indent} {json.dumps(name)}: {shown}")
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    whole = ",\n".join(f"  {fields(entries[key], '  ')}" for key in sorted(entries))
    return f'{{\n "gpu": {json.dumps(gpu)},\n "entries": [\n{whole}\n ]\n}}\n'


# -- all keys


def tune(
    keys: Sequence[Key], machine: Machine, path: Path, heads: tuple[int, int], *,
    again: bool = False, budget: float | None = None, stream: IO[str] | None = None,
) -> list[Key]:  # fmt: skip
    """Fill the file at `path`; returns the keys for which the budget of seconds left no time."""
    known = {} if again else _cache.read(path)
    todo = [key for key in keys if not _finished(key, known.get(key))]
    write(path, machine.gpu, [])  # what cannot be written is found out first
    begin = time.monotonic()
    with _progress(len(todo), len(keys) - len(todo), stream or sys.stderr) as show:
        for i, key in enumerate(todo):
            if budget is not None and time.monotonic() - begin >= budget:
                return todo[i:]
            show(i, key, None)
            entry = fastest(key, machine, heads)
            write(path, machine.gpu, [entry])
            show(i + 1, key, entry)
    return []


def _finished(key: Key, entry: Entry | None) -> bool:
    """Whether an entry is of the kernel and the compiler of now."""
    return (
        entry is not None and entry["source"] == _cache.source(key.kernel)[0] and entry["triton"] == triton.__version__
    )


@contextmanager
def _progress(count: int, finished: int, stream: IO[str]) -> Iterator[Callable[[int, Key, Entry | None], None]]:
    """A line for every key that is done; on a terminal, below them, a bar with what is being tried."""
    begin = time.monotonic()
    bar = stream.isatty()

    def show(done: int, key: Key, entry: Entry | None) -> None:
        clear = "\r\033[K" if bar else ""
        if entry is not None:
            result = f"{entry['ms']} ms with {label(entry['tiles'])}" if entry["tiles"] else "NOTHING PASSED"
            print(f"{clear}{done}/{count} {named(key)}: {result}", file=stream, flush=True)
        elif bar:
            filled = 30 * done // count
            left = f", {(time.monotonic() - begin) / done * (count - done):.0f} s left" if done else ""
            print(
                f"{clear}[{'#' * filled}{'.' * (30 - filled)}] {done}/{count}{left}: {named(key)}",
                end="",
                file=stream,
                flush=True,
            )

    if finished:
        print(f"{finished} of {finished + count} are done already (--again does them anew)", file=stream, flush=True)
    yield show
    if bar:
        print("\r\033[K", end="", file=stream, flush=True)
