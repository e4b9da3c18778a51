"""The text of a run as one file of tokens: written once on every machine, mapped into the memory of each rank there.

    notes.txt    {"text": "to be"}  {"text": "or not"}
    n o t e s    t o   b e \\0 o r   n o t \\0             bytes: a file's as they are, a row ends with a zero
    ntes <end>   to be <end>       or not <end>         tokens: a file or a row is a document, and ends with the
                                                        tokenizer's end of sequence

The file lies in the user's cache folder (or in that of ULYSSES_TRITON_CACHE), under a name that follows from the paths,
sizes and times of what was read and from the tokenizer. It may be deleted at any time.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import OptionError
from ..kernels._cache import user_folder
from .data import ROWS, standard_library_files, text_files
from .hugging_face import local_first, transformers

VERSION = 1  # of the files; another one is never read
BYTES = 256
END_OF_ROW = b"\0"
_AT_ONCE = 1 << 20  # bytes of a file
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Text:
    """All tokens, one document after another: uint8, uint16 or int32 [tokens], mapped from `path`.

    Ranks hold the same text if `sha256` is the same. Tokens are below `vocabulary`.
    """

    content: torch.Tensor
    path: Path
    files: int
    vocabulary: int
    sha256: str


class Tokenizer:
    """A tokenizer of transformers, from a folder or by a name on the Hugging Face hub."""

    def __init__(self, name: str) -> None:
        auto = transformers().AutoTokenizer
        self._tokenizer: Any = local_first(name, lambda **where: auto.from_pretrained(name, **where))
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        self.end = self._tokenizer.eos_token_id
        if self.end is None:
            raise OptionError(
                f"the tokenizer {name} has no end-of-sequence token, which documents end with; give it one"
            )

    @property
    def identity(self) -> str:
        """Another one for a tokenizer that makes other tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else json.dumps(sorted(self._tokenizer.get_vocab().items()))
        return f"{type(self._tokenizer).__name__} {self.end} {rules}"

    def tokens(self, documents: list[str]) -> np.ndarray[Any, Any]:
        """The tokens of all documents, int64, each with its end; empty ones are left out."""
        found = self._tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([token for ids in found if ids for token in (*ids, self.end)], dtype=np.int64)


def read_text(paths: Sequence[str], column: str = "text", tokenizer: str | None = None) -> Text:
    """The text of the files that `paths` name, or of the standard library if there are none; mapped, not read.

    Files that end in .jsonl, .json or .parquet are rows, whose text is in `column`; all others are text as they are.
    Raises OptionError for a path that is missing or unreadable, a column that is, and a text without a token.
    """
    files = text_files(paths) if paths else standard_library_files()
    reader = None if tokenizer is None else Tokenizer(tokenizer)
    name = _name(files, column, reader)
    folder = user_folder()
    assert folder is not None, "platformdirs is a dependency"
    path = folder / "tokens" / f"{name}.bin"
    if _known(path) is None:
        _write(path, files, column, reader)
    facts = _known(path)
    assert facts is not None, "it was just written"
    content = torch.from_file(str(path), shared=False, size=facts["tokens"], dtype=getattr(torch, facts["dtype"]))
    return Text(content, path, len(files), facts["vocabulary"], facts["sha256"])


def _known(path: Path) -> dict[str, Any] | None:
    """What was noted of a file of tokens; None if it is not there, or not whole."""
    try:
        facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        return facts if path.stat().st_size == facts["bytes"] else None
    except (OSError, ValueError):
        return None


def _name(files: Sequence[Path], column: str, reader: Tokenizer | None) -> str:
    try:
        read = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise OptionError(f"cannot read the text file {error.filename}: {error.strerror}") from error
    rules = None if reader is None else reader.identity
    return hashlib.sha256(json.dumps([VERSION, read, column, rules]).encode()).hexdigest()[:32]


def _write(path: Path, files: Sequence[Path], column: str, reader: Tokenizer | None) -> None:
    """Write the tokens beside their place, and then what is known of them, so that both appear whole or not at all."""
    vocabulary = BYTES if reader is None else reader.vocabulary
    dtype = "uint8" if vocabulary <= 1 << 8 else "uint16" if vocabulary <= 1 << 16 else "int32"
    digest, count, partial = hashlib.sha256(), 0, None
    parts = _bytes(files, column) if reader is None else _tokens(files, column, reader)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as stream:
            partial = Path(stream.name)
            for part in parts:
                plain = part.astype(dtype, copy=False).tobytes()
                digest.update(plain)
                stream.write(plain)
                count += len(part)
        if not count:
            raise OptionError(f"the text is empty: {', '.join(map(str, files))}")
        size = partial.stat().st_size
        partial.rename(path)
        facts = {"tokens": count, "bytes": size, "dtype": dtype, "vocabulary": vocabulary, "sha256": digest.hexdigest()}
        partial.write_text(json.dumps(facts))
        partial.rename(path.with_suffix(".json"))
    except OSError as error:
        raise OptionError(f"cannot write the tokens to {path.parent}: {error.strerror}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _bytes(files: Sequence[Path], column: str) -> Iterator[np.ndarray[Any, Any]]:
    for file in files:
        if file.suffix in ROWS:
            for texts in _rows(file, column):
                yield np.frombuffer(b"".join(text.encode() + END_OF_ROW for text in texts if text), dtype=np.uint8)
            continue
        with _opened(file) as stream:
            while part := stream.read(_AT_ONCE):
                yield np.frombuffer(part, dtype=np.uint8)


def _tokens(files: Sequence[Path], column: str, reader: Tokenizer) -> Iterator[np.ndarray[Any, Any]]:
    for file in files:
        if file.suffix in ROWS:
            yield from map(reader.tokens, _rows(file, column))
            continue
        with _opened(file) as stream:
            try:
                document = stream.read().decode()
            except UnicodeDecodeError as error:
                raise OptionError(f"{file} is not UTF-8 text, which a tokenizer needs: {error}") from error
        yield reader.tokens([document])


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise OptionError(f"cannot read the text file {file}: {error.strerror}") from error


def _rows(file: Path, column: str) -> Iterator[list[str]]:
    """The texts in `column` of a file's rows, some at a time: `datasets` reads them as they are asked for."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise OptionError(f"reading {file} needs datasets: pip install 'ulysses-triton[data]'") from error
    if not os.path.getsize(file):
        raise OptionError(f"{file} has no rows: it is empty; leave it out")
    before = 0
    try:
        found = datasets.load_dataset(
            ROWS[file.suffix], data_files=glob.escape(str(file)), split="train", streaming=True
        )
        for batch in found.iter(_ROWS_AT_ONCE):
            if column not in batch:
                raise OptionError(
                    f"{file} has no column {column!r}, only {', '.join(batch)}; say which one holds the text (--column)"
                )
            for number, value in enumerate(batch[column], before):
                if not isinstance(value, str):
                    raise OptionError(
                        f"row {number} of {file}, counted from 0, has {type(value).__name__} in column {column!r}, not "
                        "text; leave such rows out"
                    )
            before += len(batch[column])
            yield batch[column]
    except OptionError:
        raise
    except Exception as error:  # of any kind: pyarrow's, pandas', datasets' own
        reason = " ".join(str(error).split())
        raise OptionError(f"{file} cannot be read as {ROWS[file.suffix]}: {type(error).__name__}: {reason}") from error
