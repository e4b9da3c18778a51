"""Which Hugging Face models are right over shards, with our `enable` and with DeepSpeed's integration.

    make hugging-face                        # from the root of the repository; some minutes
    make hugging-face ARGS="--ranks 2"

Tiny random models of transformers, forward and backward in fp32, logits and parameters' gradients held against the same
model on one process in fp64, whose attention is written here with a mask of pairs. Every cell is a run of its own:
ranks are processes of this machine that meet over gloo, with one thread each. "right" and "wrong" come with the largest
error of a tensor by its largest value; right is at most 1e-5. Of tokens that are padding nothing is looked at. What
raises or dies (its process ends) has its message below the table. Where a rank has neither result nor error at the
deadline, it hangs.

DeepSpeed is ALST, which accelerate and the Trainer of transformers use: `UlyssesSPAttentionHF`, registered for the
model, and `UlyssesSPDataLoaderAdapter`, position_ids in every batch. "sdpa" and "flash" are the attention of
transformers that it wraps; kernels of flash attention need a GPU, so functions of PyTorch stand in for them, called by
transformers' own code. "one process" is transformers alone, for what would be its mistake. Without DeepSpeed it shows
the others. Exit status: 1 if ours is wrong, hangs or dies.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _record
from ._contestants import missing
from .limits import Found, failed, show, told

LIMIT = 1e-5
NEEDS = {"DeepSpeed ALST, sdpa": "deepspeed", "DeepSpeed ALST, flash": "deepspeed"}
ALST = "deepspeed.runtime.sequence_parallel.ulysses_sp"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    asked = _arguments(argv)
    if missing(["transformers"]):
        print("transformers is not installed here: `make hugging-face` runs this where it is")
        return 0
    from ._hugging_face import CONTESTANTS

    names = [name for name in CONTESTANTS if not missing([NEEDS.get(name, "transformers")])]
    about = _record.environment(torch.device("cpu"), dry=False)
    packages = ["transformers", *dict.fromkeys(NEEDS[name] for name in names if name in NEEDS)]
    about["versions"] |= {package: version(package) for package in packages}
    print(f"{_record.versions(about)}; commit {about['commit']}, sources {about['sources']}")
    if len(names) < len(CONTESTANTS):
        print("DeepSpeed is not installed here: `make hugging-face` runs this where it is")
    rows = [(title(case), case) for case in cases(asked.ranks) if asked.only in title(case)]
    about |= {"deadline": asked.deadline, "ranks": asked.ranks}
    return show(
        f"{asked.ranks} ranks", names, rows, lambda name, case: attempt(name, case, asked.deadline),
        "hugging_face", about, asked.out,
    )  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.hugging_face", description=lines[0])
    parser.add_argument("--ranks", default=4, type=int, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose title has this text")
    parser.add_argument("--deadline", default=60.0, type=float, metavar="N", help="seconds (default: %(default)g)")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    return parser.parse_args(argv)


def cases(ranks: int) -> list[Any]:
    from ._hugging_face import Case

    llama = Case("Llama", ranks=ranks)
    found = [replace(llama, input=kind) for kind in ("plain", "packed", "2 packed rows", "padded right", "padded left")]
    found += [replace(llama, tokens=47), replace(llama, heads=6, kv_heads=6), replace(llama, heads=3, kv_heads=1)]
    for model in ("Mistral, window", "Gemma 2", "gpt-oss"):
        found += [Case(model, kind, ranks=ranks) for kind in ("plain", "packed")]
    return found + [Case("BERT", kind, ranks=ranks) for kind in ("plain", "padded right")]


def title(case: Any) -> str:
    parts = [case.model, *[case.input] * (case.input != "plain")]
    parts += [f"{case.tokens} tokens"] * (case.tokens != type(case).tokens)
    if case.heads != type(case).heads:
        parts.append(f"{case.heads} heads" + (f" ({case.kv_heads} kv)" if case.kv_heads != case.heads else ""))
    return ", ".join(parts)


def attempt(name: str, case: Any, deadline: float) -> Found:
    """Run a contestant on ranks of its own, and judge what these have said by the deadline, in seconds."""
    from ._hugging_face import MODULES, tell

    modules = ["bench._hugging_face", *MODULES, *[ALST] * (not missing(["deepspeed"]))]
    case = replace(case, ranks=1) if name.startswith("one process") else case
    said = told(tell, (name, case), case.ranks, modules, deadline)
    return said if isinstance(said, Found) else judge(case, said)


def judge(case: Any, heard: Sequence[Any]) -> Found:
    """The verdict on what the ranks said: an error, `Silent`, or arrays by name."""
    if failure := failed(heard):
        return failure
    expected = _exact(replace(case, ranks=1))
    real = case.documents() >= 0
    results = {name: [torch.from_numpy(of_rank[name]) for of_rank in heard] for name in heard[0]}
    logits = torch.cat(results.pop("logits"), 1)
    if logits.shape != expected["logits"].shape or {"logits", *results} != set(expected):
        return Found("wrong", math.inf)
    errors = [_error(logits[real], expected["logits"][real], expected["logits"])]
    for name, parts in results.items():
        # A bias of all keys changes no softmax: its gradient is zero but for rounding, that of queries' is the measure.
        like = expected[name.replace("key.bias", "query.bias")]
        errors.append(_error(torch.stack(parts).sum(0), expected[name], like))
    return Found("right" if max(errors) <= LIMIT else "wrong", max(errors))


@cache
def _exact(case: Any) -> dict[str, Tensor]:
    from ._hugging_face import exact

    return exact(case)


def _error(result: Tensor, exact: Tensor, like: Tensor) -> float:
    """The largest difference by the largest of the values `like`; infinite where a result is not a number."""
    error = float((result - exact).abs().max() / like.abs().max())
    return error if math.isfinite(error) else math.inf


if __name__ == "__main__":
    sys.exit(main())
