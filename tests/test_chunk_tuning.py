"""`chunks="auto"` from files: the lookup, what a call makes of it, and the ranks that time layers together.

Ranks on the CPU stand in for GPUs, under a made-up name; times are made up too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ulysses_triton import api, chunk_cache, chunk_tuner, cli, cost, op, run_virtual, tuning, ulysses_attention, verify
from ulysses_triton.call import Call, describe
from ulysses_triton.case import Case
from ulysses_triton.chunk_cache import Entry, Key
from ulysses_triton.errors import OptionError
from ulysses_triton.kernels import _cache, _config
from ulysses_triton.machine import Machine, Resources
from ulysses_triton.spec import Problem, differences

ROOT = Path(__file__).parent.parent
GPU, FILE = "Fake GPU 9", "fake-gpu-9.chunks.json"
KEY = Key("virtual", 2, True, 8, 2, (16, 16), "float32", True, False, 64)
PROBLEM = Problem(
    batch=1, lens=(30, 20), kv_lens=(30, 20), heads=8, kv_heads=2, head_dim=16, value_dim=16, dtype="float32",
    device="cpu", causal=True, scale=0.25, attention="triton",
)  # fmt: skip

interpreted = pytest.mark.skipif(not _config.INTERPRET, reason="the interpreter stands in for the GPU")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and beside it `shipped` with the tables of the architectures."""
    shutil.copytree(_cache.SHIPPED, tmp_path / "shipped")
    monkeypatch.setenv(_cache.FOLDER, str(tmp_path / "user"))
    monkeypatch.setattr(_cache, "SHIPPED", tmp_path / "shipped")
    chunk_cache.forget()
    yield tmp_path / "user"
    chunk_cache.forget()


def entry(key: Key = KEY, chunks: Any = 2, **changes: Any) -> Entry:
    made = {**key._asdict(), "chunks": chunks, "ms": {"1": 2.0, "2": 1.5}, "source": chunk_cache.source()}
    return made | changes


def write(folder: Path, *entries: Entry) -> None:
    chunk_tuner.write(folder / FILE, GPU, entries)
    chunk_cache.forget()


# -- the lookup


def test_what_was_measured_is_found_for_its_key_only(user: Path) -> None:
    write(user, entry())
    assert chunk_cache.key_of(PROBLEM, "virtual", True) == KEY
    assert chunk_cache.lookup(GPU, KEY) == 2 and chunk_cache.lookup("another", KEY) is None
    others = {"exchange": "nccl", "ranks": 4, "one_host": False, "heads": 4, "kv_heads": 4, "dims": (16, 8),
              "dtype": "bfloat16", "causal": False, "backward": True, "seq": 128}  # fmt: skip
    assert set(others) == set(Key._fields)
    for name, value in others.items():
        assert chunk_cache.lookup(GPU, KEY._replace(**{name: value})) is None, name


OTHERWISE = {
    "window": (8, 0), "kv_lens": (9, 9), "recompute": True, "features": 32, "out_features": 32, "attention": "aten",
}  # fmt: skip


@pytest.mark.parametrize("field", OTHERWISE)
def test_layers_that_work_otherwise_have_no_key(field: str) -> None:
    assert chunk_cache.key_of(replace(PROBLEM, **{field: OTHERWISE[field]}), "virtual", True) is None


def test_the_users_file_overrides_the_shipped_one_key_by_key(user: Path) -> None:
    other = KEY._replace(seq=128)
    write(user.parent / "shipped", entry(chunks=4), entry(other, 4))
    write(user, entry(chunks=1))
    assert (chunk_cache.lookup(GPU, KEY), chunk_cache.lookup(GPU, other)) == (1, 4)


def test_what_was_timed_with_other_kernels_does_not_count(user: Path) -> None:
    write(user, entry(source="0" * 16))
    assert chunk_cache.lookup(GPU, KEY) is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "\xff", '{"layers": [{}]}', json.dumps({"layers": [entry(chunks=0)]}),
     json.dumps({"layers": [entry(chunks="2")]}), json.dumps({"layers": [entry(source=None)]}),
     json.dumps({"layers": [entry(dims=[16])]})],
)  # fmt: skip
def test_a_damaged_file_is_reported_and_has_nothing(user: Path, content: str) -> None:
    user.mkdir()
    (user / FILE).write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match=f"{FILE} is no file of chunks .*tune --chunks"):
        assert chunk_cache.lookup(GPU, KEY) is None


# -- a call


def chunks_of_calls(monkeypatch: pytest.MonkeyPatch, heads: int = 8) -> list[int]:
    """In how many chunks each of two ranks would send a layer, were its tensors on the made-up GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    calls: dict[int, Call] = {}

    def work(group) -> int:
        def kept(*arguments: Any) -> tuple[None, None, None]:
            calls[group.rank] = Call(*arguments)
            return None, None, None

        q, kv = torch.zeros(1, 25, heads, 16), torch.zeros(1, 25, 2, 16)
        kept_calls[group.name] = kept
        ulysses_attention(q, kv, kv, group, causal=True, attention="triton")
        call = calls[group.rank]
        problem, _ = describe(group, call._replace(chunks=api._best_chunks(group, call)))
        return problem.chunks

    kept_calls: dict[str, Any] = {}
    group_at = list(Call._fields).index("group")
    monkeypatch.setattr(op, "attention", lambda *arguments: kept_calls[arguments[group_at]](*arguments))
    return run_virtual(2, work)


@interpreted
def test_auto_takes_what_was_measured_and_otherwise_asks_the_model(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = cost.MACHINES["h100"]
    monkeypatch.setattr(cost, "machine_of", lambda gpu, one_host: machine if gpu == GPU else None)
    monkeypatch.setattr(cost, "best_chunks", lambda problem, machine, *, one_sided: 3)
    assert chunks_of_calls(monkeypatch) == [3, 3]
    write(user, entry(chunks=2))
    assert chunks_of_calls(monkeypatch) == [2, 2]
    assert chunks_of_calls(monkeypatch, heads=6) == [3, 3], "of which nothing was measured"
    monkeypatch.setattr(cost, "machine_of", lambda gpu, one_host: None)
    assert chunks_of_calls(monkeypatch, heads=6) == [1, 1] and chunks_of_calls(monkeypatch) == [2, 2]


@interpreted
def test_what_was_measured_is_lowered_to_what_the_placement_allows(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(user, entry(chunks=9))
    assert chunks_of_calls(monkeypatch) == [4, 4]


def test_ranks_whose_files_differ_are_told_so() -> None:
    """The number is a part of the problem that ranks agree on."""
    said = differences([replace(PROBLEM, chunks=n).signature for n in (2, 4)])
    assert "chunks: rank 0 has 2, rank 1 has 4" in said and "tune --chunks" in said


# -- tuning


def test_the_keys_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(64, 64), (192, 128)], ["bfloat16"], [2000, 2048, 8192], [("causal",), ("causal", "window"), ()]
    keys = chunk_tuner.keys_of("nccl", 8, (32, 8), *shapes)
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * 2
    assert Key("nccl", 8, True, 32, 8, (192, 128), "bfloat16", False, True, 2048) in keys
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not any(key.one_host for key in chunk_tuner.keys_of("nccl", 8, (32, 8), *shapes))


def machine() -> Machine:
    return Machine(GPU, torch.device("cpu"), lambda launch: Resources(), lambda call: 1.0, gate_tokens=(2,))


def tune_on_ranks(ctx, folder: str, runs: list[tuple[dict[int, list[float]], dict[str, Any]]]) -> list[Any]:
    """Two hosts of one rank. Of every run: what is left, what the rank then looks up, and what it timed.

    A run has both ranks' times for each number of chunks.
    """
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_cache.FOLDER, f"{folder}/{ctx.rank}")
        patch.setenv("LOCAL_RANK", "0")
        for ms, options in runs:
            timed = []

            def clock(forward, backward, repeats, ms=ms, timed=timed) -> verify.Times:
                times = torch.tensor(ms[forward.__self__.group.chunks][ctx.rank])
                dist.all_reduce(times, dist.ReduceOp.MAX)
                timed.append(forward.__self__.group.chunks)
                return verify.Times(times.item(), 0.0)

            patch.setattr(verify, "timed", clock)
            keys = [KEY._replace(exchange="shm"), KEY._replace(exchange="shm", backward=True)]
            left = tuning.tune_chunks_everywhere(keys, machine(), _cache.user_folder(), "auto", 1, **options)
            answers.append((left, [chunk_cache.lookup(GPU, key) for key in keys], timed))
    return answers


@interpreted
def test_all_ranks_and_hosts_find_the_same_and_a_stopped_run_goes_on(pool, tmp_path: Path) -> None:
    slowest_counts = {1: [3.0, 5.0], 2: [4.0, 4.0], 4: [3.0, 4.5]}  # for rank 0 alone 2 chunks would be the slowest
    not_worth_it = {1: [1.0, 1.0], 2: [0.99, 0.99], 4: [1.5, 1.5]}
    runs = [
        (slowest_counts, {"budget": 0.0}),
        (slowest_counts, {}),
        (not_worth_it, {}),
        (not_worth_it, {"again": True}),
    ]
    expected = [(2, [None, None], []), (0, [2, 2], [1, 2, 4] * 2), (0, [2, 2], []), (0, [1, 1], [1, 2, 4] * 2)]
    assert pool.fresh(2, tune_on_ranks, str(tmp_path), runs) == [expected] * 2
    files = [(tmp_path / host / FILE).read_text() for host in "01"]
    assert files[0] == files[1] and json.loads(files[0])["gpu"] == GPU


def tune_what_is_wrong(ctx) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "compare", lambda *_: [verify.Row("dq", 1e-3, 2e-6)])
        chunk_tuner.fastest(KEY._replace(exchange="shm"), machine(), "auto", 1)


@interpreted
def test_what_is_wrong_is_not_timed(pool) -> None:
    for failure in pool.fresh(2, tune_what_is_wrong):
        assert failure.kind == "RuntimeError" and "is wrong in 1 chunks: [Row(name='dq'" in failure.message


DRY_RUN = """
import sys
from ulysses_triton import cli, tuning
everything = tuning.keys_of
tuning.keys_of = lambda *asked: everything(*asked)[3:4]
sys.exit(cli.main(["tune", "--interpret", *sys.argv[1:]]))
"""


@interpreted
@pytest.mark.slow
def test_a_dry_run_goes_through_all_of_it(tmp_path: Path) -> None:
    """The gate and the times are real, of the interpreter on two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    options = ["--out", str(tmp_path), "--chunks", "4:2", "--seq", "7", "--flags", "causal"]
    process = subprocess.run(
        [*torchrun, sys.executable, "-c", DRY_RUN, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{tmp_path}/dry-run.json\n{tmp_path}/dry-run.chunks.json" in process.stdout
    found = chunk_cache.read(tmp_path / "dry-run.chunks.json")
    shm = Key("shm", 2, True, 4, 2, (16, 16), "float32", True, False, 8)
    assert set(found) == {shm, shm._replace(backward=True)}
    for key, each in found.items():
        assert each["chunks"] in (1, 2) and list(each["ms"]) == ["1", "2"], "a rank has two heads"
        said = re.escape(chunk_tuner.named(key)) + r": \S+ ms in 1, \S+ ms in 2"
        assert re.search(said, process.stderr), process.stderr


def refuse(case: Case, device: str) -> None:
    raise OptionError(f"{case.heads} heads on {case.ranks} ranks")


def test_wrong_use_is_found_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["tune", "--chunks", "8:2"]) == 2
    assert "--chunks needs the ranks" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(Case, "check", refuse)
    assert cli.main(["tune", "--chunks", "8:2"]) == 2
    assert "8 heads on 2 ranks" in capsys.readouterr().err
    with pytest.raises(OptionError, match="--chunks 8:3: 8 query heads cannot share 3 kv heads"):
        tuning._heads("--chunks", "8:3")
