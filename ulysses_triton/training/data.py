"""Which files are the text, which part of its tokens is held out, and which windows a step trains on.

A window is S + 1 tokens; inputs are its first S, labels its last S. Labels are shifted here, on the whole sequence: a
rank that shifted its own shard would lose the label of its last token.

    text     t r a i n i n g . . . . . . . . . . . . . | h e l d   o u t
    windows  [0 .. S] [S .. 2S] [2S .. 3S]               labels of one window end where the inputs of the next begin
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OptionError

HELD_OUT_SHARE = 20  # one token in so many, from the end of the text, is never trained on
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BINARY_PROBE = 8192
ROWS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # files of rows by their ending, as `datasets` says


def standard_library_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file for file in root.rglob("*.py") if not _NOT_THE_LIBRARY.intersection(file.relative_to(root).parts[:-1])
    ]
    if not files:
        raise OptionError(f"no source of the standard library under {root}; give files or folders with --text")
    return sorted(files)


def text_files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, folders searched: there, hidden and binary files are left out."""
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_text_in_folder(file, path))
            if not found:
                raise OptionError(f"no text files in the folder {name}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise OptionError(f"no such text file or folder: {name}")
    return files


@dataclass(frozen=True)
class Split:
    """A text cut in two: `train` comes first, `held_out` is the end of the text, empty where nothing is evaluated.

    Both [tokens], of the text's dtype.
    """

    train: torch.Tensor
    held_out: torch.Tensor


def split_text(text: torch.Tensor, length: int, *, held_out: bool = True) -> Split:
    """Hold out the last twentieth of `text`, and never less than one window of `length` tokens; or nothing.

    Raises OptionError if either part cannot hold a window.
    """
    window = length + 1
    kept = max(len(text) // HELD_OUT_SHARE, window) if held_out else 0
    if len(text) < kept + window:
        windows = "two windows, one to train on and one held out" if held_out else "one window"
        raise OptionError(
            f"the text holds {len(text):,} tokens (bytes, without a tokenizer); sequences of {length:,} need at least "
            f"{(2 if held_out else 1) * window:,} ({windows}): give more text or a shorter sequence"
        )
    return Split(text[: len(text) - kept], text[len(text) - kept :])


class TrainingWindows:
    """The training text as windows of `length` + 1 bytes, each seen once per epoch, in an order that `seed` decides.

    A batch is a function of the step alone, so a run can go on from any step.
    """

    def __init__(self, text: torch.Tensor, length: int, seed: int) -> None:
        self.text, self.length, self.seed = text, length, seed
        self.count = (len(text) - 1) // length
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The windows of step 0, 1, ...: [size, length + 1]."""
        return torch.stack([self._window(step * size + index) for index in range(size)])

    def _window(self, index: int) -> torch.Tensor:
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        start = int(self._order[place]) * self.length
        return self.text[start : start + self.length + 1]


def held_out_windows(text: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """At most `count` windows spread evenly over the held-out text, always the same: [windows, length + 1]."""
    possible = (len(text) - 1) // length
    count = min(count, possible)
    starts = [index * possible // count * length for index in range(count)]
    return torch.stack([text[start : start + length + 1] for start in starts])


def inputs_and_labels(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the labels that follow them, int64 [B, S] each, of windows [B, S + 1]. To be sharded after this."""
    tokens = windows.to(torch.int64)
    return tokens[:, :-1], tokens[:, 1:]


def byte_entropies(text: torch.Tensor) -> tuple[float, float]:
    """Nats per byte of `text`: of its bytes alone, and of each byte given the one before it.

    What a model reaches that has learnt only how frequent bytes are, or also which byte follows which.
    """
    pairs = torch.zeros(256 * 256, dtype=torch.int64)
    for part in _parts(text, overlap=1):
        pairs += torch.bincount(part[:-1] * 256 + part[1:], minlength=256 * 256)
    counts = pairs.view(256, 256).double()
    return _entropy(counts.sum(0)), _entropy(counts) - _entropy(counts.sum(1))


def token_entropy(text: torch.Tensor, vocabulary: int) -> float:
    """Nats per token of `text`: what a model reaches that has learnt only how frequent tokens are."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for part in _parts(text):
        counts += torch.bincount(part, minlength=vocabulary)
    return _entropy(counts.double())


def _parts(text: torch.Tensor, overlap: int = 0) -> Iterator[torch.Tensor]:
    """int64 [tokens] of one part of `text` after another, each with `overlap` tokens of the next."""
    for start in range(0, len(text) - overlap, 1 << 20):
        yield text[start : start + (1 << 20) + overlap].to(torch.int64)


def _entropy(counts: torch.Tensor) -> float:
    return float(torch.special.entr(counts / counts.sum()).sum())


def _is_text_in_folder(file: Path, folder: Path) -> bool:
    if not file.is_file() or _left_out(file.relative_to(folder).parts):
        return False
    if file.suffix in ROWS:
        return True
    try:
        with file.open("rb") as stream:
            return b"\0" not in stream.read(_BINARY_PROBE)
    except OSError as error:
        raise OptionError(f"cannot read the text file {file}: {error.strerror}") from error


def _left_out(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in parts)
