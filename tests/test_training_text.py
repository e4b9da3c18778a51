"""What a training run reads: text, JSONL and parquet, as bytes and by a tokenizer."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from ulysses_triton import cli
from ulysses_triton.errors import OptionError
from ulysses_triton.training import data, tokens

WORDS = ["<end>", "<unknown>", *"the cat and dog see hear".split()]
DOCUMENTS = ["the cat and the dog", "see the cat", "hear", "the dög"]
END = 0


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ULYSSES_TRITON_CACHE", str(folder))
    yield folder / "tokens"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="<end>")


def saved_tokenizer(folder: Path, **special: str) -> str:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unknown>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def written(folder: Path, kind: str, column: str = "text") -> list[str]:
    """The documents in one form."""
    rows = [{"number": number, column: document} for number, document in enumerate(DOCUMENTS)]
    if kind == "text":
        for row in rows:
            (folder / f"{row['number']}.txt").write_text(str(row[column]))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
        (folder / "b.jsonl").write_text(json.dumps(rows[3]))
    elif kind == "json":
        (folder / "[all].json").write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "all.parquet")
    return [str(folder)]


def by_hand() -> list[int]:
    found = [[WORDS.index(word) if word in WORDS else 1 for word in document.split()] for document in DOCUMENTS]
    return [token for document in found for token in [*document, END]]


@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "parquet"])
def test_all_forms_of_a_text_give_the_same_tokens(kind: str, tmp_path: Path, tokenizer: str) -> None:
    text = tokens.read_text(written(tmp_path, kind, "story"), "story", tokenizer)
    assert text.content.tolist() == by_hand()
    assert text.vocabulary == len(WORDS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_without_a_tokenizer_rows_are_bytes_with_a_zero_at_their_end(kind: str, tmp_path: Path) -> None:
    text = tokens.read_text(written(tmp_path, kind))
    assert text.content.dtype == torch.uint8
    assert bytes(text.content.tolist()) == b"".join(document.encode() + b"\0" for document in DOCUMENTS)
    assert text.vocabulary == 256


def test_large_vocabularies_need_wider_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> None:
    paths = written(tmp_path, "jsonl")
    for vocabulary, dtype in ((65536, torch.uint16), (65537, torch.int32)):
        made = tokens.Tokenizer(tokenizer)
        made.vocabulary = vocabulary
        with monkeypatch.context() as patch:
            patch.setattr(tokens.Tokenizer, "identity", str(vocabulary))
            patch.setattr(tokens, "Tokenizer", lambda name, made=made: made)
            text = tokens.read_text(paths, tokenizer=tokenizer)
        assert text.content.dtype == dtype
        assert text.content.tolist() == by_hand()
        windows = data.TrainingWindows(text.content, 4, seed=0)
        assert data.inputs_and_labels(windows.batch(0, 2))[0].dtype == torch.int64


def test_tokens_are_written_once_until_a_file_or_the_tokenizer_changes(
    tmp_path: Path, cache: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written(tmp_path, "jsonl")
    first = tokens.read_text(paths, tokenizer=tokenizer)
    assert first.content.tolist() == by_hand()
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", None)
        assert tokens.read_text(paths, tokenizer=tokenizer).content.tolist() == by_hand()
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".json"]
    with first.path.open("r+b") as stream:
        stream.truncate(3)  # a copy that was cut short
    assert tokens.read_text(paths, tokenizer=tokenizer).content.tolist() == by_hand()
    file = tmp_path / "a.jsonl"
    file.write_text(file.read_text().replace("cat", "dog"))
    os.utime(file, ns=(0, 0))
    changed = tokens.read_text(paths, tokenizer=tokenizer)
    cat, dog = WORDS.index("cat"), WORDS.index("dog")
    assert changed.content.tolist() == [dog if token == cat else token for token in by_hand()]
    assert changed.sha256 != first.sha256
    assert tokens.read_text(paths).sha256 != changed.sha256


def test_the_entropy_of_tokens() -> None:
    assert data.token_entropy(torch.tensor([0, 1, 2, 3] * 1000, dtype=torch.uint16), 9) == pytest.approx(math.log(4))


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.jsonl", '{"story": "x", "n": 1}\n', "no column 'text', only story, n; say which one"),
        ("none.jsonl", '{"text": "x"}\n{"text": null}\n', "row 1 of .* has NoneType in column 'text'"),
        ("number.jsonl", '{"text": 1}\n', "row 0 of .* has int in column 'text'"),
        ("empty.jsonl", "", "has no rows: it is empty"),
        ("blank.jsonl", '{"text": ""}\n', "the text is empty"),
        ("broken.jsonl", "{nope\n", "cannot be read as json: "),
        ("broken.parquet", "nope", "cannot be read as parquet: "),
    ],
    ids=lambda value: value if str(value).endswith(("jsonl", "parquet")) else "",
)
def test_rows_that_cannot_be_read(name: str, content: str, said: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(OptionError, match=said):
        tokens.read_text([str(tmp_path / name)])
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_tokenizer_needs_an_end_of_sequence_and_text(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "latin").write_bytes("dög".encode("latin-1"))
    with pytest.raises(OptionError, match="latin is not UTF-8 text"):
        tokens.read_text([str(tmp_path / "latin")], tokenizer=tokenizer)
    with pytest.raises(OptionError, match="has no end-of-sequence token"):
        tokens.Tokenizer(saved_tokenizer(tmp_path / "endless"))


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    paths = written(tmp_path, "text")
    assert bytes(tokens.read_text(paths).content.tolist()).decode() == "".join(DOCUMENTS)
    with pytest.raises(OptionError, match=r"ulysses-triton\[data\]"):
        tokens.read_text(written(tmp_path, "jsonl"))


def test_a_vocabulary_that_is_too_small_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 7}))
    arguments = ["train", "--device", "cpu", "--out", str(tmp_path / "run"), "--model", f"hf:{config}"]
    arguments += ["--set", "num_hidden_layers=1,intermediate_size=8", "--text", str(tmp_path / "a.jsonl")]
    written(tmp_path, "jsonl")
    for options, said in (
        ((), "up to 256 (bytes)"),
        (("--tokenizer", tokenizer), f"up to 8 (of the tokenizer {tokenizer})"),
    ):
        assert cli.main([*arguments, *options]) == 2
        assert said in capsys.readouterr().err
