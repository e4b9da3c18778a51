"""`ulysses-triton doctor`: on this machine, on machines that are made up, and on ranks, also such that fail.

Nothing here has seen a GPU: machines with some are made-up facts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ulysses_triton import UlyssesGroup, cli, doctor, doctor_facts, doctor_stages, executor
from ulysses_triton.case import Case
from ulysses_triton.doctor import Report, _Examination
from ulysses_triton.doctor_checks import FAIL, OK, SKIPPED, STATUSES, TOPICS, WARNING, Check, machine
from ulysses_triton.doctor_facts import Facts, Gpu, Tuned
from ulysses_triton.doctor_ranks import across, merged
from ulysses_triton.doctor_stages import Ranks, Stages
from ulysses_triton.kernels import _cache

ROOT = Path(__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 80 << 30, 232448, "580.65.06", "Disabled", "Enabled", "0")


here = cache(doctor_facts.gather)


def gpus(**changes: Any) -> Facts:
    """A machine with 2 H100 where everything fits, but for the changes."""
    found = replace(
        here(), host="alpha", system="Linux-6.8", python="3.12.3", open_files=65536, locked_memory=None, shm=64 << 30,
        shared_memory_error="", torch="2.13.0+cu130", cuda="13.0", nccl=(2, 29, 7), backends=("gloo", "nccl"),
        triton="3.7.1", torchs_triton="3.7.1", interpret=False, tiles="0123", tuned=(), tables=("sm_80", "sm_90"),
        packages={name: "5.23.0" for name in doctor_facts.PACKAGES}, cupy_packages=("cupy-cuda13x",), cupy="14.0.1",
        cupy_error="", cupy_nccl=(2, 29, 3), driver_gpus=2, gpus=(H100, H100), no_access=(), links={"0-1": "NV18"},
        interfaces={"eth0": 100000, "lo": None}, infiniband=("mlx5_0",), variables={},
    )  # fmt: skip
    return replace(found, **changes)


def problems(checks: list[Check]) -> dict[str, tuple[str, str, str]]:
    return {c.name: (c.status, c.found, c.remedy) for c in checks if c.status in (WARNING, FAIL)}


def test_a_machine_where_all_fits() -> None:
    found = machine(gpus())
    assert not problems(found)
    said = doctor.text(found)
    assert "GPU 1: NVIDIA H100 80GB HBM3, sm_90, 80.0 GiB, 227 KiB of shared memory, driver 580.65.06" in said
    assert "NV18 between 1 pairs" in said and "eth0 100 Gb/s, lo; InfiniBand mlx5_0" in said
    assert "nccl (cupy's NCCL fits torch's)" in said and "cupy found 2.29.3, torch has 2.29.7" in said


MISMATCHES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {  # facts; check, status, what is found, remedy
    "NCCL": (
        {"cupy_nccl": (2, 27, 5)}, "NCCL", FAIL, "cupy found 2.27.5, torch has 2.29.7; their minor versions must",
        'pip install "ulysses-triton[cuda13]" "nvidia-nccl-cu13==2.29.7"',
    ),
    "no NCCL": ({"cupy_nccl": None}, "NCCL", FAIL, "nvidia-nccl-cu13 is missing", "ulysses-triton[cuda13]"),
    "cupy for another CUDA": (
        {"cupy_packages": ("cupy-cuda12x",)}, "cupy", FAIL, "cupy-cuda12x beside torch for CUDA 13.0",
        'pip uninstall -y cupy-cuda12x && pip install "ulysses-triton[cuda13]"',
    ),
    "two cupys": ({"cupy_packages": ("cupy-cuda12x", "cupy-cuda13x")}, "cupy", FAIL, "cupy-cuda12x, ", "uninstall"),
    "a broken cupy": ({"cupy": None, "cupy_error": "ImportError: x"}, "cupy", FAIL, "imported: ImportError: x", "pip"),
    "an old cupy": ({"cupy": "13.6.0"}, "cupy", FAIL, "13.6.0", 'pip install "cupy-cuda13x>=14"'),
    "no cupy": ({"cupy_packages": (), "cupy": None}, "cupy", WARNING, 'takes "torch"', "ulysses-triton[cuda13]"),
    "an old GPU": ({"gpus": (replace(H100, architecture="sm_75"),)}, "GPU 0", FAIL, "not made for it", "sm_80"),
    "a GPU without a table": (
        {"gpus": (replace(H100, architecture="sm_120"),)}, "tiles", WARNING, "nearest older architecture", "tune",
    ),
    "ECC errors": ({"gpus": (replace(H100, ecc_errors="3"),)}, "GPU 0 memory", FAIL, "3 uncorrected", "reset"),
    "MIG": ({"gpus": (replace(H100, mig="Enabled"),)}, "GPU 0 MIG", WARNING, "MIG is on", "nvidia-smi -mig 0"),
    "an unusable GPU": ({"gpus": ()}, "GPUs", FAIL, "nvidia-smi knows 2, torch can use none", "driver"),
    "a torch for CPUs": ({"gpus": (), "cuda": None}, "torch's build", WARNING, "with 2 NVIDIA GPUs", "for CUDA"),
    "no peer access": ({"no_access": ((0, 1),)}, "peer access", WARNING, "GPUs 0 and 1", "NVLink"),
    "an old triton": ({"triton": "3.5.1"}, "triton", FAIL, "3.5.1; tested are 3.6 to 3.9", '"triton==3.7.1"'),
    "a new triton": (
        {"triton": "3.10.0", "torchs_triton": None}, "triton", WARNING, "3.10.0; tested", '"triton>=3.6,<3.10"',
    ),
    "not torch's triton": ({"triton": "3.8.0"}, "torch's triton", WARNING, "asks for 3.7.1", '"triton==3.7.1"'),
    "an old torch": ({"torch": "2.9.1"}, "torch", FAIL, "2.9.1, for CUDA 13.0", '"torch>=2.11"'),
    "no gloo": ({"backends": ("nccl",)}, "torch.distributed", FAIL, "no gloo", "gloo"),
    "torch without NCCL": ({"backends": ("gloo",)}, "torch.distributed", FAIL, "no NCCL", "NCCL"),
    "an old Python": ({"python": "3.10.4"}, "Python", FAIL, "3.10.4", "3.11 to 3.13"),
    "no numpy": (
        {"packages": dict.fromkeys(doctor_facts.PACKAGES) | {"filelock": "4", "platformdirs": "4"}},
        "numpy and others", FAIL, "numpy missing", "pip install numpy",
    ),
    "an old transformers": (
        {"packages": dict.fromkeys(doctor_facts.PACKAGES, "4.57.1")}, "transformers", WARNING, "4.57.1", ">=5.0",
    ),
    "few files": ({"open_files": 256}, "open files", WARNING, "256 may be open", "ulimit -n"),
    "little locked memory": ({"locked_memory": 8 << 20}, "locked memory", WARNING, "8192 KiB", "ulimit -l unlimited"),
    "a small /dev/shm": ({"shm": 64 << 20}, "/dev/shm", WARNING, "0.1 GiB free", "--shm-size"),
    "no shared memory": ({"shared_memory_error": "ENOMEM"}, "shared memory", WARNING, "ENOMEM", "limit"),
    "gloo elsewhere": (
        {"variables": {"GLOO_SOCKET_IFNAME": "ens7"}}, "GLOO_SOCKET_IFNAME", FAIL, "ens7 is not up", "one of eth0, lo",
    ),
    "NCCL elsewhere": (
        {"variables": {"NCCL_SOCKET_IFNAME": "^eth,lo"}}, "NCCL_SOCKET_IFNAME", FAIL, "fits no interface", "eth0, lo",
    ),
    "no P2P": ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE", WARNING, "slower", "unset"),
    "the interpreter": ({"interpret": True}, "tiles", WARNING, "Triton's interpreter", "unset TRITON_INTERPRET"),
    "stale tiles": ({"tuned": (Tuned("/c/h.json", 3, 2),)}, "file /c/h.json", WARNING, "2 of other kernels", "tune"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES.values(), ids=list(MISMATCHES))
def test_what_does_not_fit_is_named_with_its_remedy(case: tuple[dict[str, Any], str, str, str, str]) -> None:
    changes, name, status, found, remedy = case
    facts = gpus(**changes)
    said = problems(machine(facts))
    assert said[name][0] == status and found in said[name][1] and remedy in said[name][2]
    report = Report(tuple(merged([(0, machine(facts))])), (facts,))
    assert report.fit is (status == WARNING)
    assert report.text().splitlines()[-1].startswith("Fit" if report.fit else "NOT fit: ")


@pytest.mark.parametrize("value", ["eth", "=eth0", "=eth0,eth1", "^docker", "^=lo"])
def test_interfaces_are_chosen_as_nccl_does(value: str) -> None:
    assert not problems(machine(gpus(variables={"NCCL_SOCKET_IFNAME": value})))


def test_hidden_gpus_are_no_fault() -> None:
    found = machine(gpus(gpus=(), variables={"CUDA_VISIBLE_DEVICES": ""}))
    assert not problems(found) and "none: CPU only (CUDA_VISIBLE_DEVICES='')" in doctor.text(found)


def test_links_are_read_from_nvidia_smis_table() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A\nGPU1\tNV18\t X \tPHB\tSYS\t0-31\t0\t\tN/A\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t0-31\t0\t\tN/A\nNIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n  X    = Self\n"
    )
    assert doctor_facts.links(text) == {"0-1": "NV18", "0-2": "SYS", "1-2": "PHB"}
    assert doctor_facts.links("") == {}


def test_tuned_files_are_found_and_the_stale_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_cache.FOLDER, str(tmp_path))
    entry = {
        "kernel": "pack", "dtype": "bfloat16", "dims": [64, 64], "flags": [], "seq": 0, "triton": "3.7.1",
        "source": _cache.source("pack")[0], "gate": {"passed": True}, "tiles": None,
    }  # fmt: skip
    stale = [entry | {"source": "of before", "dims": [dim, dim]} for dim in (32, 128)]
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    path.write_text(json.dumps({"gpu": H100.name, "entries": [entry, *stale]}))
    assert doctor_facts._tuned({H100.name}) == (Tuned(str(path), 1, 2),)


def test_tables_are_those_of_architectures() -> None:
    assert here().tables == ("gfx942", "sm_100", "sm_80", "sm_90")


def test_facts_survive_the_way_to_other_ranks() -> None:
    for facts in (here(), gpus(no_access=((0, 1),), tuned=(Tuned("x", 1, 2),))):
        assert Facts.of(json.loads(facts.text())) == facts


def ranks_of(count: int, **changes: Any) -> list[Facts]:
    return [gpus(rank=rank, local_rank=rank % 2, host=f"host{rank // 2}", **changes) for rank in range(count)]


def test_the_rank_that_differs_is_named() -> None:
    every = ranks_of(4)
    assert not problems(across(every))
    assert "4 ranks on 2 hosts: host0: ranks 0, 1; host1: ranks 2, 3" in across(every)[0].found
    every[2] = replace(every[2], torch="2.12.0+cu130", nccl=(2, 28, 3), python="3.11.7")
    report = Report(tuple(merged((rank, across(every)) for rank in range(4))), tuple(every))
    (found,) = (check for check in report.checks if check.name == "equal torch")
    assert (found.status, found.ranks) == (FAIL, (2,)) and "host2" not in found.remedy and "host1" in found.remedy
    assert found.found == "torch 2.12.0+cu130, on the other ranks 2.13.0+cu130"
    assert "fail     equal NCCL of torch (rank 2): NCCL of torch 2.28.3, on the other ranks 2.29.7" in report.text()
    assert "warning  equal Python (rank 2)" in report.text() and not report.fit
    assert report.text().endswith(
        "NOT fit: ranks: equal torch (rank 2); ranks: equal NCCL of torch (rank 2) (1 warning)."
    )


def test_every_rank_needs_a_gpu_of_its_own() -> None:
    every = ranks_of(3)
    every[1] = replace(every[1], gpus=())
    every[2] = replace(every[2], local_rank=2)
    found = {check.ranks: check.found for check in across(every) if check.name == "devices"}
    assert found == {(1,): "no GPU here, while other ranks have one", (2,): "local rank 2, and 2 GPUs on host1"}


def test_reports_of_ranks_are_one() -> None:
    calm, odd = Check("GPUs", "memory", OK, "5 GiB"), Check("system", "files", WARNING, "few", "more")
    found = merged([(0, [calm]), (1, [replace(calm, found="4 GiB"), odd]), (2, [calm, odd])])
    assert found == [replace(odd, ranks=(1, 2)), replace(calm, ranks=(0, 1, 2))]


# -- ranks that fail


def on_threads(count: int, work: Any, timeout: float = 5.0) -> list[Any]:
    store, found = dist.HashStore(), [None] * count

    def run(rank: int) -> None:
        found[rank] = work(Ranks(store, rank, count, timedelta(seconds=timeout)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_rank_that_fails_in_a_stage_is_named_and_the_later_ones_are_skipped() -> None:
    def work(ranks: Ranks) -> list[Check]:
        def fails() -> list[Check]:
            if ranks.rank == 1:
                raise ValueError("no luck")
            return [Check("ranks", "fine", OK, "yes")]

        run = _Examination(ranks, debug=False)
        run.stage("ranks", "first", fails)
        run.stage("self-test", "second", lambda: pytest.fail("it was not skipped"))
        return merged(run.found)

    first, *others = on_threads(3, work)
    assert all(other == first for other in others)
    assert [(check.name, check.status, check.ranks) for check in first] == [
        ("fine", OK, (0, 2)), ("first", FAIL, (1,)), ("second", SKIPPED, (0, 1, 2)),
    ]  # fmt: skip
    assert first[1].found == "ValueError: no luck"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_gives_no_answer_is_named_at_the_deadline(silent: int) -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.rank == silent:
            return None
        run = _Examination(ranks, debug=False)
        run.stage("ranks", "first", lambda: [])
        return [(c.name, c.status, c.found, c.ranks) for c in merged(run.found)], ranks.agreed(False)

    found = on_threads(3, work, timeout=0.4)
    found.pop(silent)
    expected = [("first", FAIL, "no answer", (silent,))], (None if silent == 0 else False)
    assert found == [expected, expected]


def test_what_fails_on_one_rank_raises_on_all() -> None:
    def work(ranks: Ranks) -> str:
        try:
            return ranks.together("it", lambda: 1 // ranks.rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert on_threads(2, work)[1] == "ExchangeError: rank 0: ZeroDivisionError: integer division or modulo by zero"


def test_rank_0_has_the_verdict() -> None:
    for fit in (True, False):
        assert on_threads(3, lambda ranks, fit=fit: ranks.agreed(fit if ranks.rank == 0 else not fit)) == [fit] * 3


def wrong_rows(ctx: Any) -> list[list[Check]]:
    stages = Stages(Ranks(dist.HashStore(), ctx.rank, ctx.size, timedelta(seconds=60)), torch.device("cpu"), "auto")
    right, found = doctor_stages.exchanged, []
    with UlyssesGroup() as group:
        for factor in (1.0, 1.001):
            doctor_stages.exchanged = lambda *given, factor=factor: right(*given) * factor
            found.append(stages._measured(group, 16 << 10))
    return found


def test_rows_that_arrive_wrong_are_noticed(pool: Any) -> None:
    for right, wrong in pool.fresh(2, wrong_rows):
        assert [check.status for check in right] == [OK, OK] and [check.status for check in wrong] == [FAIL, OK]
        assert "WRONG rows arrive" in wrong[0].found and right[0].name.startswith("shm, 16 KiB")
        assert all(check.numbers["bytes"] == 8192 and check.numbers["seconds"] > 0 for check in right)


# -- the command


def test_the_command_on_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = doctor_stages._cases("cpu", 1)
    assert len(others) > 1
    monkeypatch.setattr(doctor_stages, "_cases", lambda *_: [first])
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^Fit \(\d+ warnings?\)\.$", said, re.MULTILINE) and "fail " not in said
    assert re.findall(r"^\S+$", said, re.MULTILINE) == list(TOPICS)
    assert len(re.findall(r"^  ok .*off most", said, re.MULTILINE)) == 1


def test_a_wrong_layer_is_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = executor.forward

    def wrong(*arguments: Any) -> Any:
        out, *others = right(*arguments)
        out[:, -1] *= 1.01
        return out, *others

    monkeypatch.setattr(executor, "forward", wrong)
    monkeypatch.setattr(doctor_stages, "_cases", lambda *_: [Case(40, attention="reference")])
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["status"] == FAIL]
    assert not report["fit"] and {check["topic"] for check in failed} == {"self-test"}
    assert all("WRONG" in check["found"] and "verify" in check["remedy"] for check in failed)


@pytest.mark.parametrize("options", [["--timeout", "0"], ["--timeout", "nan"], ["--exchange", "two_hop"], ["--jsn"]])
def test_wrong_use_is_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["doctor", *options])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2 and "error: " in capsys.readouterr().err


def run(*command: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1")
    started = (*torchrun, "--standalone", *(["--no-python", sys.executable] if command[0] == "-c" else ()))
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "WORLD_SIZE")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *(started if ranks else ()), *command]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def has_schema(report: dict[str, Any], ranks: int) -> None:
    assert list(report) == ["schema", "fit", "ranks", "checks", "facts"]
    assert (report["schema"], report["ranks"], len(report["facts"])) == (1, ranks, ranks)
    assert report["fit"] is all(check["status"] != FAIL for check in report["checks"])
    kinds = {"topic": str, "name": str, "status": str, "found": str, "remedy": str, "ranks": list, "numbers": dict}
    for check in report["checks"]:
        assert list(check) == list(kinds) and all(type(check[name]) is kind for name, kind in kinds.items())
        assert check["topic"] in TOPICS and check["status"] in STATUSES and set(check["ranks"]) <= set(range(ranks))
        assert all(type(number) is float for number in check["numbers"].values())
    for facts in report["facts"]:
        assert Facts.of(facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus_is_fit() -> None:
    process = run("-m", "ulysses_triton.cli", "doctor", "--json")
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout)
    has_schema(report, 1)
    found = {check["name"]: (check["status"], check["found"]) for check in report["checks"]}
    assert found["GPUs"] == (OK, "none: CPU only") and found["cupy"][0] == SKIPPED
    assert found["exchange of ranks here"][1] == "shm for ranks on this host, torch for those of several"
    assert found["attention, causal"][1].startswith("aten (") and found["attention, documents"][1].startswith("refer")
    tests = [check for check in report["checks"] if check["topic"] == "self-test"]
    assert len(tests) == 5 and all(0 < error < 1e-2 for check in tests for error in check["numbers"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_ranks_of_torchrun() -> None:
    process = run("-m", "ulysses_triton.cli", "doctor", "--json", ranks=4)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout)
    has_schema(report, 4)
    assert [facts["rank"] for facts in report["facts"]] == [0, 1, 2, 3]
    found = {check["name"]: check for check in report["checks"]}
    assert "4 ranks on 1 host" in found["hosts"]["found"] and "equal on all ranks" in found["versions"]["found"]
    assert found["exchange"]["found"] == "shm (auto: the ranks share this host's memory)"
    for way in ("shm", "process group"):
        assert "the latency" in found[f"{way}, 16 KiB a rank"]["found"]
        for size in (1 << 20, 16 << 20):
            check = found[f"{way}, {size >> 20} MiB a rank"]
            numbers = check["numbers"]
            assert check["status"] == OK and "GB/s from each rank to the others" in check["found"]
            assert numbers["bytes"] == size * 3 / 4 and numbers["bytes_per_second"] > 1e6
            assert numbers["bytes_per_second"] == pytest.approx(numbers["bytes"] / numbers["seconds"])
    tests = [check for check in report["checks"] if check["topic"] == "self-test"]
    assert len(tests) == 5 and all(check["status"] == OK and check["ranks"] == [0, 1, 2, 3] for check in tests)


# The command, where rank 1 has another torch and fails while rows are measured.
ODD = """
import os, sys
from dataclasses import replace
from ulysses_triton import cli, doctor, doctor_stages

if os.environ["RANK"] == "1":
    right = doctor.gather
    doctor.gather = lambda: replace(right(), torch="2.12.0", open_files=100)

    def fails(*_):
        raise MemoryError("all gone")

    doctor_stages._choices = fails
sys.exit(cli.main(["doctor", "--timeout", "60"]))
"""


def test_a_rank_with_another_torch_that_fails_is_named() -> None:
    """Ranks leave with 1; torchrun may end the other one first."""
    process = run("-c", ODD, ranks=2)
    assert process.returncode == 1
    said = process.stdout
    assert "fail     equal torch (rank 1): torch 2.12.0, on the other ranks " + torch.__version__ in said
    assert "warning  open files (rank 1): 100 may be open" in said
    assert "fail     exchange (rank 1): MemoryError: all gone" in said
    assert re.search(r"fail     exchange \(rank 0\): ExchangeError: .*rank 1 in .*MemoryError: all gone", said)
    assert said.count("not tried, after what was found in: exchange") == 5
    assert "NOT fit: ranks: equal torch (rank 1); " in said
    assert set(re.findall(r"exitcode *: (-?\d+)", process.stderr)) in ({"1"}, {"1", "-15"}), process.stderr
