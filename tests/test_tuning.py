"""Tuning: the files of launch configurations and the lookup in them, the gate before every timing, and all ranks alike.

Triton's interpreter stands in for the GPU, under a made-up name; times are made up too.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layers import absolute, imports, modules, within

from ulysses_triton import cli, trial, tuner, tuning, ulysses_attention
from ulysses_triton.errors import ExchangeError, OptionError, UlyssesError
from ulysses_triton.kernels import _cache, _config
from ulysses_triton.kernels._cache import Entry, Key, Tiles
from ulysses_triton.kernels._views import Options
from ulysses_triton.machine import Machine, Resources
from ulysses_triton.spec import MAX_HEAD_DIM, Problem, differences
from ulysses_triton.trial_options import FLAGS

ROOT = Path(__file__).parent.parent
GPU, FILE = "Fake GPU 9", "fake-gpu-9.json"
CPU = torch.device("cpu")
HEADS = (2, 1)
TILES = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
TABLE = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}  # of the interpreter
KEY = Key("attend_forward", "float32", (16, 16), ("causal",), 64)

interpreted = pytest.mark.skipif(not _config.INTERPRET, reason="the interpreter stands in for the GPU")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and beside it `shipped` with the tables of the architectures. The GPU is a made-up one."""
    (tmp_path / "user").mkdir()
    shutil.copytree(_cache.SHIPPED, tmp_path / "shipped")
    monkeypatch.setenv(_cache.FOLDER, str(tmp_path / "user"))
    monkeypatch.setattr(_cache, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(_config, "gpu", lambda device: GPU)
    monkeypatch.setattr(_config, "architecture", lambda device: "interpreter")
    _config.forget()
    yield tmp_path / "user"
    _config.forget()


def entry(key: Key = KEY, tiles: Tiles | None = None, **changes: Any) -> Entry:
    made = {
        **key._asdict(),
        "tiles": tiles or TILES,
        "ms": 1.5,
        "registers": 168,
        "spills": 0,
        "gate": {"passed": True, "out": [1e-7, 2e-6]},
        "source": _cache.source(key.kernel)[0],
        "triton": "3.7.1",
        "tried": {"M 64, N 16": "1.5 ms", "M 32, N 32": "wrong: out"},
    }
    return made | changes


def write(folder: Path, *entries: Entry) -> None:
    tuner.write(folder / FILE, GPU, entries)
    _config.forget()


def asked(key: Key = KEY, seq: int | None = None) -> Tiles:
    like = torch.empty(0, dtype=getattr(torch, key.dtype))
    return _config.tiles(key.kernel, like, key.dims, key.seq if seq is None else seq, key.flags)


def with_stages(n: int) -> Tiles:
    return TILES | {"num_stages": n}


# -- files and lookup


def test_an_entry_comes_back(user: Path) -> None:
    write(user, entry())
    assert _cache.read(user / FILE) == {KEY: json.loads(json.dumps(entry()))}
    assert asked() == TILES
    asked()["BLOCK_M"] = 1  # a caller's own
    assert asked() == TILES


def test_a_file_is_for_reading(user: Path) -> None:
    write(user, entry(), entry(KEY._replace(seq=128)))
    lines = (user / FILE).read_text().splitlines()
    assert '   "dims": [16, 16],' in lines and '    "M 32, N 32": "wrong: out"' in lines
    assert json.loads((user / FILE).read_text())["gpu"] == GPU
    assert sorted(p.name for p in user.iterdir()) == [FILE, f"{FILE}.lock"]


def test_the_bucket_is_a_power_of_two() -> None:
    assert [_cache.bucket(n) for n in (0, 1, 2, 3, 64, 65, 5000)] == [0, 1, 2, 4, 64, 128, 8192]


def test_the_nearest_bucket_is_taken(user: Path) -> None:
    write(user, entry(KEY._replace(seq=64), with_stages(1)), entry(KEY._replace(seq=4096), with_stages(2)))
    stages = {seq: asked(seq=seq)["num_stages"] for seq in (1, 64, 65, 512, 513, 4096, 100_000)}
    assert stages == {1: 1, 64: 1, 65: 1, 512: 1, 513: 2, 4096: 2, 100_000: 2}


def test_fewer_flags_are_taken_before_the_table(user: Path) -> None:
    for flags, stages in (((), 1), (("causal",), 2), (("causal", "window"), 3)):
        write(user, entry(KEY._replace(flags=flags, seq=4096), with_stages(stages)))

    def found(*flags: str) -> int:
        return asked(KEY._replace(flags=flags))["num_stages"]

    assert [found(), found("causal"), found("causal", "window")] == [1, 2, 3]
    assert [found("window"), found("causal", "softcap"), found("alibi", "causal", "window")] == [1, 2, 3]
    write(user, entry(KEY._replace(flags=(), seq=64), with_stages(4)))
    assert found("causal") == 2, "the flags count before the bucket"


def test_flags_that_are_off_are_not_taken(user: Path) -> None:
    write(user, entry())
    assert asked(KEY._replace(flags=())) == TABLE


@pytest.mark.parametrize("change", [{"dims": (16, 24)}, {"dtype": "float16"}, {"kernel": "attend_dq"}], ids=str)
def test_the_table_of_the_architecture_is_the_last_resort(user: Path, change: dict[str, Any]) -> None:
    write(user, entry())
    assert asked(KEY._replace(**change)) == TABLE


def test_an_entry_of_a_table_may_be_for_flags(user: Path) -> None:
    """The first that fits is taken: where all of its flags are on."""

    def special(stages: int, *flags: str) -> dict[str, Any]:
        return {"head_dim": 32, "flags": list(flags)} | with_stages(stages)

    path = user.parent / "shipped" / "interpreter.json"
    table = json.loads(path.read_text())
    table["kernels"]["attend_forward"][:0] = [special(3, "dropout", "documents"), special(2, "dropout")]
    path.write_text(json.dumps(table))
    _config.forget()

    def found(*flags: str, **changes: Any) -> int:
        return asked(KEY._replace(flags=flags, **changes))["num_stages"]

    assert [found("dropout"), found("causal", "dropout"), found("causal", "documents", "dropout")] == [2, 2, 3]
    assert asked(KEY._replace(flags=("documents",))) == asked(KEY._replace(flags=())) == TABLE
    assert found("dropout", dims=(40, 40)) == 1, "the head dim must fit, too"


def test_every_table_serves_what_has_no_option() -> None:
    """For each kernel, size of an element and head dim, there is an entry that asks for no flags."""
    for path in (ROOT / "autotune_cache").glob("*.json"):
        table = json.loads(path.read_text())
        if "entries" in table:  # a file of one GPU, over the table of its architecture
            continue
        assert set(table["kernels"]) == set(_cache.KERNELS), path
        for kernel, size in itertools.product(_cache.KERNELS, (2, 4)):
            of_size = [e for e in table["kernels"][kernel] if e.get("bytes", size) == size]
            plain = [e["head_dim"] for e in of_size if "flags" not in e]
            assert plain == sorted(set(plain)) and plain[-1] == MAX_HEAD_DIM, (path, kernel, size)
            assert {e["head_dim"] for e in of_size} == set(plain), (path, kernel, size)
            for i, e in enumerate(of_size):  # of a head dim, what is special comes first
                assert set(e.get("flags", ())) <= set(FLAGS), (path, kernel, e)
                assert all(rest["head_dim"] >= e["head_dim"] for rest in of_size[i:]), (path, kernel, e)
                if "flags" not in e:
                    assert all(rest["head_dim"] > e["head_dim"] for rest in of_size[i + 1 :]), (path, kernel, e)


def test_the_user_overrides_what_is_shipped(user: Path) -> None:
    shipped = user.parent / "shipped"
    write(shipped, entry(tiles=with_stages(1)), entry(KEY._replace(seq=4096), with_stages(2)))
    assert asked()["num_stages"] == 1
    write(user, entry(tiles=with_stages(3)))
    assert asked()["num_stages"] == 3 and asked(seq=4096)["num_stages"] == 2


def test_a_stale_entry_is_ignored(user: Path) -> None:
    write(user, entry(source="0" * 16))
    assert asked() == TABLE


def test_an_entry_whose_gate_failed_is_ignored(user: Path) -> None:
    write(user, entry(gate={"passed": False}))
    assert asked() == TABLE
    write(user, entry(gate={"passed": False}) | {"tiles": None})
    assert asked() == TABLE


def test_an_unknown_kernel_is_ignored(user: Path) -> None:
    write(user, entry(), entry() | {"kernel": "attend_sideways"})
    assert asked() == TILES


def test_a_hash_is_of_the_kernel_and_its_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_cache, "__file__", str(folder / "_cache.py"))

    def hashes() -> dict[str, str]:
        _cache.source.cache_clear()
        return {kernel: _cache.source(kernel)[0] for kernel in _cache.KERNELS}

    before = hashes()
    assert {"_mask.py", "_rows.py", "attend_backward.py"} <= set(_cache.source("attend_dq")[1])
    assert "_config.py" not in _cache.source("attend_dq")[1]
    with (folder / "_mask.py").open("a") as file:
        file.write("# another\n")
    changed = {kernel for kernel, value in hashes().items() if value != before[kernel]}
    assert changed == {"attend_forward", "attend_dq", "attend_dkv"}
    monkeypatch.undo()
    _cache.source.cache_clear()


def spoilt(whole: dict[str, Any], **changes: Any) -> str:
    (first,) = whole["entries"]
    return json.dumps(whole | {"entries": [first | changes]})


DAMAGED: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda whole: "",
    "cut off": lambda whole: json.dumps(whole)[:-40],
    "a list": lambda whole: "[1]",
    "of another GPU": lambda whole: json.dumps(whole | {"gpu": "Fake GPU 8"}),
    "of a dry run": lambda whole: json.dumps(whole | {"gpu": "dry run"}),
    "a block that divides nothing": lambda whole: spoilt(whole, tiles=TILES | {"BLOCK_M": 48}),
    "a block of text": lambda whole: spoilt(whole, tiles=TILES | {"BLOCK_M": "64"}),
    "no stages": lambda whole: spoilt(whole, tiles={"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4}),
    "no gate": lambda whole: spoilt(whole, gate=None),
    "one dim": lambda whole: spoilt(whole, dims=[16]),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_reported_once_and_ignored(user: Path, damage: Callable[[dict[str, Any]], str]) -> None:
    write(user.parent / "shipped", entry(tiles=with_stages(1)))
    write(user, entry())
    (user / FILE).write_text(damage(json.loads((user / FILE).read_text())))
    _config.forget()
    with pytest.warns(UserWarning, match=f"{FILE}.*is ignored: delete it, or run `ulysses-triton tune`"):
        assert asked()["num_stages"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _config.forget()
        assert asked()["num_stages"] == 1, "reported again"
        write(user, entry(tiles=with_stages(3)))
    assert asked()["num_stages"] == 3


def test_bytes_that_are_no_text_are_a_damaged_file(user: Path) -> None:
    (user / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is ignored"):
        assert asked() == TABLE


def test_no_gpu_reads_a_dry_run(user: Path) -> None:
    tuner.write(user / "dry-run.json", "dry run", [entry()])
    _config.forget()
    assert asked() == TABLE


def test_without_platformdirs_there_is_no_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_cache.FOLDER, raising=False)
    folder = _cache.user_folder()
    assert folder is not None and folder.name == "ulysses-triton"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert _cache.user_folder() is None


def test_a_recorded_launch_is_that_of_the_table(user: Path) -> None:
    """What is compiled ahead of time for an architecture does not depend on the machine that compiles."""
    write(user, entry())
    with _config.capture("sm_90"):
        assert asked() == {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


@pytest.mark.parametrize("kernel", _cache.KERNELS)
def test_what_a_launcher_asks_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention asks for the whole sequence. The layout kernels see a shard, whose length must not choose: it depends
    on the number of ranks."""
    attends = kernel.startswith("attend")
    key = Key(kernel, "float32", (16, 16), ("causal", "window") if attends else (), 0)
    seen: dict[str, tuple] = {}
    look_up = _config.tiles

    def spy(name: str, like: torch.Tensor, *rest: Any) -> Tiles:
        seen[name] = rest
        return look_up(name, like, *rest)

    problem = trial.Problem(key, 20, *HEADS, CPU)
    problem.run(trial.TWINS)  # draws the inputs
    with monkeypatch.context() as patch, _config.capture("sm_90"):
        patch.setattr(_config, "tiles", spy)
        problem.run(trial.KERNELS)
    assert seen[kernel] == (((16, 16), 20, ("causal", "window")) if attends else ((16, 16), _config.SHARD))


WRITER = """
import json, sys
from pathlib import Path
from ulysses_triton import tuner
path, gpu, entry = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for i in range(20):
    tuner.write(path, gpu, [entry | {"seq": 1 << i}])
"""


def test_writers_at_once_lose_nothing(user: Path) -> None:
    kernels = ("attend_forward", "attend_dq")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    entries = [json.dumps(entry(KEY._replace(kernel=kernel))) for kernel in kernels]
    commands = [[sys.executable, "-c", WRITER, str(user / FILE), GPU, one] for one in entries]
    writers = [subprocess.Popen(command, env=environment) for command in commands]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = _cache.read(user / FILE)
    assert set(found) == {KEY._replace(kernel=kernel, seq=1 << i) for kernel in kernels for i in range(20)}


# -- what ranks compare


def test_a_fingerprint_is_of_what_is_in_force(user: Path) -> None:
    before = _config.fingerprint("cpu")
    write(user, entry(source="0" * 16))
    assert _config.fingerprint("cpu") == before, "of a stale entry"
    write(user, entry(ms=1.0))
    tuned = _config.fingerprint("cpu")
    write(user, entry(ms=2.0))
    assert _config.fingerprint("cpu") == tuned != before
    write(user.parent / "shipped", entry())
    assert _config.fingerprint("cpu") == tuned, "it is in force already"
    write(user, entry(tiles=with_stages(1)))
    assert _config.fingerprint("cpu") not in (before, tuned)


def test_ranks_that_would_launch_differently_are_told_what_to_do() -> None:
    def problem(tuning: str) -> Problem:
        sizes = {"batch": 1, "lens": (4, 4), "kv_lens": (4, 4), "heads": 2, "kv_heads": 2, "head_dim": 8}
        return Problem(**sizes, value_dim=8, dtype="float32", device="cpu", causal=True, scale=1.0, tuning=tuning)

    text = differences([problem(tuning).signature for tuning in ("ab12", "ab12", "cd34")])
    assert text.startswith("tuning: rank 2 has cd34, ranks 0, 1 have ab12") and "ulysses-triton tune" in text


def attend_with_own_cache(ctx, folder: str, attention: str, differ: bool) -> str:
    """A call on ranks of which rank 1, where they `differ`, has a configuration of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_cache.FOLDER, f"{folder}/{ctx.rank}")
        patch.setattr(_config, "gpu", lambda device: GPU)
        if ctx.rank == 1 and differ:
            write(Path(folder, "1"), entry())
        _config.forget()
        try:
            q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
            ulysses_attention(q, k, v, ctx.group, attention=attention)
            return "fine"
        except UlyssesError as error:
            return str(error)
        finally:
            _config.forget()


@interpreted
def test_a_rank_with_a_cache_of_its_own_is_an_error_on_every_rank(pool, tmp_path: Path) -> None:
    assert pool.run(2, attend_with_own_cache, str(tmp_path), "triton", False) == ["fine"] * 2
    for said in pool.run(2, attend_with_own_cache, str(tmp_path), "triton", True):
        assert "tuning: rank 0 has" in said and "rank 1 has" in said
    assert pool.run(2, attend_with_own_cache, str(tmp_path), "reference", True) == ["fine"] * 2, "nothing is launched"


# -- the gate


@interpreted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", _cache.KERNELS)
def test_what_is_right_passes_the_gate(kernel: str, dtype: str) -> None:
    key = Key(kernel, dtype, (24, 24), ("causal", "softcap", "window") if kernel.startswith("attend") else (), 0)
    for tokens in (45, 3):
        problem = trial.Problem(key, tokens, *HEADS, CPU)
        errors = trial.gate(problem, asked(key))
        assert tuple(errors) == tuple(name for name in trial.OUTPUTS[kernel] if name not in ("dsinks", "dslopes"))
        assert all(error.ok for error in errors.values()), errors


HIDING = {"causal": {"window"}, "window": {"documents"}}  # what leaves an option nothing to take away
ATTEND = ("attend_forward", "attend_dq", "attend_dkv")
FIELDS = {"alibi": {"slopes": None}, "causal": {"causal": False}}  # without an option; others are fields that are None


def test_all_options_can_be_tuned_for() -> None:
    problem = trial.Problem(Key("attend_forward", "float32", (16, 16), tuple(sorted(FLAGS)), 0), 20, *HEADS, CPU)
    assert problem.options.flags == problem.key.flags == tuple(sorted(FLAGS))


@interpreted
@pytest.mark.parametrize("flag", [*FLAGS, "all"])
def test_every_option_passes_the_gate(flag: str) -> None:
    flags = tuple(sorted(FLAGS)) if flag == "all" else (flag,)
    per_head = {"alibi": {"dslopes"}, "sinks": {"dsinks"}, "all": {"dsinks", "dslopes"}}.get(flag, set())
    for kernel in ATTEND:
        problem = trial.Problem(Key(kernel, "float32", (16, 16), flags, 0), 20, *HEADS, CPU)
        errors = trial.gate(problem, asked(problem.key))
        assert set(errors) & {"dsinks", "dslopes"} == (per_head if kernel == "attend_dq" else set())
        assert all(error.ok for error in errors.values()), (kernel, errors)


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != "blocks"])  # which change what is walked only
@pytest.mark.parametrize("kernel", ATTEND)
def test_who_ignores_an_option_does_not_pass(kernel: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins in the kernels' place, since the gate is what is tried; with all other options on, and with none."""

    def ignoring(twin: Callable[..., None]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            twin(*(x._replace(**FIELDS.get(flag, {flag: None})) if isinstance(x, Options) else x for x in given))

        return run

    attends = {name: ignoring(getattr(trial.TWINS, name)) for name in ("attend_forward", "attend_backward")}
    others = tuple(sorted(set(FLAGS) - HIDING.get(flag, set())))
    for flags in ((flag,), others):
        problem = trial.Problem(Key(kernel, "float32", (16, 16), flags, 0), 20, *HEADS, CPU)
        with monkeypatch.context() as patch:
            patch.setattr(trial, "KERNELS", trial.TWINS)
            assert all(error.ok for error in trial.gate(problem, {}).values())
            patch.setattr(trial, "KERNELS", trial.TWINS._replace(**attends))
            ok = all(error.ok for error in trial.gate(problem, {}).values())
        assert ok == (kernel == "attend_dkv" and flag == "sinks"), "the LSE counts the sinks, dk and dv know them by it"


@interpreted
@pytest.mark.parametrize("kernel", _cache.KERNELS)
def test_what_is_not_written_does_not_pass(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "launch", lambda *args, **options: None)
    problem = trial.Problem(Key(kernel, "float32", (16, 16), (), 0), 5, *HEADS, CPU)
    assert not any(error.ok for error in trial.gate(problem, asked(problem.key)).values())


@interpreted
@pytest.mark.parametrize("kernel", _cache.KERNELS)
def test_one_kernel_is_prepared_with_its_tiles(kernel: str) -> None:
    key = Key(kernel, "float32", (16, 16), (), 0)
    problem = trial.Problem(key, 20, *HEADS, CPU)
    tiles = trial.candidates(key, asked(key))[1]
    prepared = trial.prepare(problem, tiles)
    launch = prepared.launch
    assert kernel in launch.kernel.__name__ and tiles.items() <= (launch.args | launch.options).items()
    names = [name for name in trial.OUTPUTS[kernel] if name in prepared.results and "norm" not in name]
    assert all(part.isnan().all() for name in names for part in prepared.results[name])
    prepared.run()
    assert not any(part.isnan().any() for name in names for part in prepared.results[name])


BINARIES = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ulysses_triton import trial
from ulysses_triton.kernels import _cache, _config

class Driver:  # of a GPU that is not there
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
_config.gpu, _config.architecture = lambda device: None, lambda device: "sm_90"
same = {}
for kernel in _cache.KERNELS:
    key = _cache.Key(kernel, "bfloat16", (64, 64), ("causal",) if kernel.startswith("attend") else (), 512)
    tiles = _config.tiles(kernel, torch.empty(0, dtype=torch.bfloat16), key.dims, 512)
    for i, variant in enumerate(trial.VARIANTS[kernel]):
        found = []
        for tokens, heads, cut in ((512, 8, False), (1037, 4, True), (3, 4, True)):
            problem = trial.Problem(key, tokens, heads, 2, torch.device("cpu"))
            _ = problem.forward
            with _config.fixed(kernel, tiles), _config.capture("sm_90") as launches:
                problem.run(trial.KERNELS, variant=variant, cut=cut)
            (launch,) = [x for x in launches if x.kernel.__name__.strip("_") == f"{kernel}_kernel"]
            found.append(launch.kernel.warmup(**launch.args, **launch.options, grid=launch.grid))
        same[f"{kernel} {i}"] = all(binary is found[0] for binary in found)
        same[f"{kernel} {i} compiled"] = found[0].metadata.num_warps == tiles["num_warps"]
print(json.dumps(same))
"""


def test_what_is_checked_is_the_binary_that_is_timed() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", BINARIES], env=variables | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert len(found) == 2 * sum(map(len, trial.VARIANTS.values())) and all(found.values()), found


def test_blocks_divide_128_in_all_tables_and_candidates() -> None:
    """The lists of blocks that masks are given as rely on it."""
    tables = list((ROOT / "autotune_cache").glob("*.json"))
    found: list[Tiles] = []
    for table in tables:
        content = json.loads(table.read_text())
        if "entries" in content:
            found += [e["tiles"] for e in _cache.read(table).values() if e["tiles"]]
        else:
            found += [e for entries in content["kernels"].values() for e in entries]
    assert len(tables) >= 5 and len(found) > 50
    for kernel in _cache.KERNELS:
        for dims in ((16, 16), (64, 64), (128, 128), (192, 128), (256, 256)):
            some = trial.candidates(Key(kernel, "bfloat16", dims, (), 0), dict(found[0]))
            assert len(some) > 1, (kernel, dims)
            found += some
            first = {"num_warps": 4}
            by_tma = trial.candidates(Key(kernel, "bfloat16", dims, (), 0), first, descriptors=(False, True))
            by_tma = [tiles for tiles in by_tma if "descriptors" in tiles]
            assert [tiles | {"descriptors": True} for tiles in some[1:] if kernel.startswith("attend")] == by_tma
    for tiles in found:
        assert all(_cache.BLOCK % tiles[name] == 0 for name in tiles if name.startswith("BLOCK")), tiles


# -- tuning


class Stopwatch:
    """Made-up times: the more stages, the faster; `timed` has the tiles of every launch that was measured."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.timed: list[Tiles] = []
        self.stop_after = stop_after

    def __call__(self, call: Callable[[], None]) -> float:
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        launch = call.__self__.launch
        blocks = {name: launch.args[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_T") if name in launch.args}
        self.timed.append(blocks | launch.options)
        return 1.0 / launch.options["num_stages"] + len(self.timed) / 1e6


def machine(measure: Callable[[Callable[[], None]], float], **changes: Any) -> Machine:
    made = Machine(
        GPU, CPU, lambda launch: Resources(40, 0, 1024), measure, gate_tokens=(21, 3), shard_tokens=16, most=4
    )
    return made._replace(**changes)


@interpreted
def test_the_fastest_is_kept_with_all_that_is_known(user: Path) -> None:
    stopwatch = Stopwatch()
    assert tuner.tune([KEY], machine(stopwatch), user / FILE, HEADS, stream=io.StringIO()) == []
    _config.forget()
    (found,) = _cache.read(user / FILE).values()
    assert asked() == found["tiles"] == max(stopwatch.timed, key=lambda tiles: tiles["num_stages"])
    assert found["gate"]["passed"] is True and found["gate"]["out"][0] <= found["gate"]["out"][1]
    assert (found["registers"], found["spills"], found["shared"]) == (40, 0, 1024) and found["ms"] > 0
    assert found["source"] == _cache.source("attend_forward")[0] and "_mask.py" in found["source_files"]
    assert found["triton"] and len(found["tried"]) == 4 and found["timed"]["tokens"] == 64


@interpreted
def test_what_is_wrong_is_neither_timed_nor_kept(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that the compiler breaks with two or three stages, which would be the fastest."""

    right = trial.KERNELS.attend_forward

    def broken(q, k, v, out, lse, options) -> None:
        right(q, k, v, out, lse, options)
        if _config.tiles("attend_forward", q, (16, 16), 0)["num_stages"] > 1:
            out[-1].views[0][-1, 0, -1, 3] += 1e-3

    monkeypatch.setattr(trial, "KERNELS", trial.KERNELS._replace(attend_forward=broken))
    stopwatch = Stopwatch()
    found = tuner.fastest(KEY, machine(stopwatch), HEADS)
    assert found["tiles"]["num_stages"] == 1 and {tiles["num_stages"] for tiles in stopwatch.timed} == {1}
    wrong = [text for text in found["tried"].values() if text.startswith("wrong: out ")]
    assert len(wrong) == 2 and len(stopwatch.timed) == 2


@interpreted
def test_when_nothing_is_right_nothing_is_used(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch()
    monkeypatch.setattr(tuner, "_errors", lambda problems, tiles: {"out": trial.Error(float("inf"), 2e-6)})
    stream = io.StringIO()
    tuner.tune([KEY], machine(stopwatch), user / FILE, HEADS, stream=stream)
    _config.forget()
    (found,) = _cache.read(user / FILE).values()
    assert found["tiles"] is None and found["gate"] == {"passed": False} and not stopwatch.timed
    assert asked() == TABLE and "NOTHING PASSED" in stream.getvalue()


@interpreted
def test_what_does_not_compile_is_recorded_and_left_out(user: Path) -> None:
    def compiled(launch: _config.Launch) -> Resources:
        if launch.options["num_stages"] > 1:
            raise RuntimeError("out of resource: shared memory,\n Required: 300000")
        return Resources(40, 0, 1024)

    stopwatch = Stopwatch()
    found = tuner.fastest(KEY, machine(stopwatch, compile=compiled), HEADS)
    assert found["tiles"]["num_stages"] == 1 and {tiles["num_stages"] for tiles in stopwatch.timed} == {1}
    assert "does not compile: RuntimeError: out of resource: shared memory, Required: 300000" in found["tried"].values()


KEYS = [KEY, KEY._replace(seq=128), KEY._replace(flags=())]


@interpreted
def test_a_stopped_run_goes_on_where_it_was(user: Path) -> None:
    stopped = Stopwatch(stop_after=5)  # in the middle of the second key
    path = user / FILE
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(KEYS, machine(stopped), path, HEADS, stream=io.StringIO())
    assert set(_cache.read(path)) == {KEYS[0]}
    rest, none, all_again, stream = Stopwatch(), Stopwatch(), Stopwatch(), io.StringIO()
    tuner.tune(KEYS, machine(rest), path, HEADS, stream=stream)
    assert set(_cache.read(path)) == set(KEYS) and len(rest.timed) == 8
    assert (
        "1 of 3 are done already" in stream.getvalue() and "2/2 attend_forward float32 16/16 64:" in stream.getvalue()
    )
    tuner.tune(KEYS, machine(none), path, HEADS, stream=io.StringIO())
    assert none.timed == []
    tuner.tune(KEYS[:1], machine(all_again), path, HEADS, again=True, stream=io.StringIO())
    assert len(all_again.timed) == 4


@interpreted
@pytest.mark.parametrize("change", [{"source": "0" * 16}, {"triton": "3.0.0"}], ids=["source", "triton"])
def test_what_was_tuned_for_another_kernel_or_compiler_is_done_anew(user: Path, change: dict[str, str]) -> None:
    write(user, entry(**change))
    stopwatch = Stopwatch()
    tuner.tune([KEY], machine(stopwatch), user / FILE, HEADS, stream=io.StringIO())
    assert len(stopwatch.timed) == 4


def test_a_budget_ends_before_the_next_key(user: Path) -> None:
    assert tuner.tune(KEYS, machine(Stopwatch()), user / FILE, HEADS, budget=0.0, stream=io.StringIO()) == KEYS
    assert _cache.read(user / FILE) == {}


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stopwatch = Stopwatch()
    refused = pytest.raises(OptionError, match="cannot be written .*ULYSSES_TRITON_CACHE")
    with pytest.warns(UserWarning, match="Not a directory"), refused:
        tuner.tune(KEYS, machine(stopwatch), tmp_path / "file" / FILE, HEADS, stream=io.StringIO())
    assert stopwatch.timed == []


def test_an_error_of_the_gpu_says_what_was_tried(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(problems: object, tiles: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuner, "_errors", failing)
    with pytest.raises(RuntimeError) as caught:
        tuner.fastest(KEY, machine(Stopwatch()), HEADS)
    assert caught.value.__notes__ == [
        "while attend_forward float32 16/16 causal 64 was tried with M 32, N 32, warps 4, stages 1"
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "fastest", lambda key, machine, heads: entry(key))
    stream = Terminal()
    tuner.tune(KEYS, machine(Stopwatch()), user / FILE, HEADS, stream=stream)
    assert f"[{'#' * 10}{'.' * 20}] 1/3, 0 s left: attend_forward float32 16/16 causal 128" in stream.getvalue()
    assert "3/3 attend_forward float32 16/16 64: 1.5 ms with M 64, N 16, warps 4, stages 2\n" in stream.getvalue()


# -- ranks


def tune_on_ranks(ctx, folder: str, hosts: list[int]) -> tuple[Tiles, str, str]:
    """What a rank looks up once all have tuned together; each clock prefers something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_cache.FOLDER, f"{folder}/{hosts[ctx.rank]}")
        patch.setenv("LOCAL_RANK", str(ctx.rank - hosts.index(hosts[ctx.rank])))
        patch.setattr(_config, "gpu", lambda device: GPU)
        _config.forget()

        def clock(call: Callable[[], None]) -> float:
            time.sleep(0.3)
            assert ctx.rank == 0, "only rank 0 measures"
            return 1.0 / call.__self__.launch.options["num_stages"]

        assert asked() == TABLE
        left = tuning.tune_everywhere([KEY], machine(clock), _cache.user_folder(), HEADS, group=ctx.group)
        assert left == 0
        found = asked(), _config.fingerprint("cpu"), (_cache.user_folder() / FILE).read_text()
    _config.forget()
    return found


@interpreted
def test_all_ranks_use_what_rank_0_found(pool, tmp_path: Path) -> None:
    results = pool.run(4, tune_on_ranks, str(tmp_path), [0, 0, 1, 1])
    assert results == [results[0]] * 4
    assert results[0][0]["num_stages"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def fail_on_rank_0(ctx) -> str:
    def work() -> str:
        raise RuntimeError("no luck")

    try:
        return tuning.from_rank_0(work, ctx.group)
    except (ExchangeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_what_fails_on_rank_0_fails_everywhere(pool) -> None:
    first, *others = pool.run(3, fail_on_rank_0)
    assert first == "RuntimeError: no luck"
    assert others == ["ExchangeError: rank 0 could not tune: RuntimeError: no luck"] * 2


def leave_the_others(ctx) -> str:
    """Rank 0 works for longer than the others have patience for a silent one, and gives signs or does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "POLL_SECONDS", 0.1)
        patch.setattr(tuning, "SILENT_SECONDS", 1.0)

        def work() -> str:
            time.sleep(2.0)
            return "done"

        said = [tuning.from_rank_0(work, ctx.group)]
        patch.setattr(threading.Thread, "start", lambda self: None)  # no signs
        patch.setattr(threading.Thread, "join", lambda self: None)
        try:
            said.append(tuning.from_rank_0(work, ctx.group))
        except ExchangeError as error:
            said.append(str(error))
        return " / ".join(said)


def test_the_others_wait_as_long_as_rank_0_is_alive(pool) -> None:
    first, second = pool.run(2, leave_the_others)
    assert first == "done / done"
    assert second == "done / rank 0, which tunes, gave no sign of life for 1 s; start again"


def test_nothing_is_timed_in_a_call() -> None:
    """What a call runs cannot reach what measures."""
    known = modules()

    def reached(name: str, seen: set[str]) -> set[str]:
        if name in known and name not in seen:
            seen.add(name)
            for item in imports(name, known[name]):
                if within(item.target):
                    reached(item.target.removeprefix("ulysses_triton").removeprefix("."), seen)
        return seen

    of_a_call = reached("api", set()) | reached("shard", set())
    assert {"executor", "kernels._config", "kernels.attend_backward"} <= of_a_call
    assert not of_a_call & {"chunk_tuner", "machine", "trial", "trial_options", "tuner", "tuning", "verify", "cli"}
    for name in of_a_call - {"tracing"}:  # which is the user's own `with trace()`: test_off_it_is_one_attribute
        assert "enable_timing" not in known[name].read_text(), absolute(name)
    assert "tuner" in reached("tuning", set())


# -- the command


@interpreted
def test_a_dry_run_goes_through_all_of_it(
    user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tuning.keys_of
    monkeypatch.setattr(tuning, "keys_of", lambda *asked: everything(*asked)[1:2])
    out = user.parent / "out"
    assert cli.main(["tune", "--interpret", "--out", str(out), "--flags", "causal, window", "--seq", "10"]) == 0
    said = capsys.readouterr()
    assert "DRY RUN" in said.out and "1/1 attend_dq float32 16/16 causal window 16: " in said.err
    assert f"{out}/dry-run.json" in said.out and list(user.iterdir()) == []
    (found,) = _cache.read(out / "dry-run.json").values()
    assert found["gate"]["passed"] and found["flags"] == ["causal", "window"] and found["registers"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--interpret"], "--interpret needs --out"),
        (["--head-dims", "64,12"], "multiples of 8"),
        (["--head-dims", "64,,128"], "--head-dims has ''"),
        (["--dtypes", "fp64"], "--dtypes has 'fp64'"),
        (["--seq", "2k"], "--seq has '2k'"),
        (
            ["--flags", "causal,sideways"],
            "--flags has sideways; it takes dense, or some of alibi, causal, documents, dropout",
        ),
        (["--heads", "8:3"], "8 query heads cannot share 3 kv heads"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_use_is_2(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ulysses_triton.cli", "tune"]
    process = subprocess.run(command, env=variables | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 2 and "tune needs a GPU" in process.stderr and "--interpret" in process.stderr


@interpreted
def test_the_interpreter_is_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "unset TRITON_INTERPRET, or pass --interpret" in capsys.readouterr().err


def test_the_keys_of_a_run() -> None:
    keys = tuning.keys_of([(64, 64), (192, 128)], ["bfloat16"], [2000, 2048], [("causal",), ()])
    assert len(keys) == len(set(keys)) == 2 * (2 * 3 + 4)
    assert Key("attend_dkv", "bfloat16", (192, 128), ("causal",), 2048) in keys
    assert Key("unpack", "bfloat16", (128, 128), (), 0) in keys and Key("pack", "bfloat16", (192, 128), (), 0) in keys
