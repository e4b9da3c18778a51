"""The kernels compiled for GPUs that are not here: they fit, and a fixed sample keeps the rules of `bench.aot`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Run where TRITON_INTERPRET is unset, which cannot be undone in this process. The widest heads are those that may not
# fit; D = 72 has padded channels behind a mask, and strides that are multiples of 8 but not of 16 elements; with
# D = 100 the mask ends inside a vector of 16 bytes. Most are compiled for one target of each maker;
# `bench.aot` compiles them all.
COMPILE = """
import json, sys
from dataclasses import asdict
import torch
from bench import aot

wanted = {
    "bf16 D 128": dict(),
    "bf16 D 72 Dv 40 partial": dict(D=72, Dv=40, causal=False, padding=8, partial=True),
    "bf16 D 256": dict(D=256),
}
more = {
    "bf16 D 64 dense": dict(D=64, causal=False),
    "bf16 D 100": dict(D=100),
    "bf16 D 128 window softcap": dict(window=(128, 0), softcap=50.0),
    "bf16 D 128 documents": dict(also="documents"),
    "bf16 D 128 dropout": dict(also="dropout"),
    "fp32 D 256": dict(dtype=torch.float32, D=256),
}
target, found = sys.argv[1], []
if target in ("sm_90", "gfx942"):
    wanted |= more
for name, options in wanted.items():
    for call in aot.attention_case(**options, lse=False):
        for launch in aot.capture(target, call):
            r = aot.compile_launch(launch, target)
            found.append(asdict(r) | dict(case=name, faults=r.faults(), scalar=r.scalar, narrow=r.narrow))
print(json.dumps(found))
"""
UNALIGNED = """
import sys
from bench import _aot_cases, aot

_aot_cases.ATTENTION = {"unaligned": dict(D=64, padding=4)}
_aot_cases.HEAD_DIMS = ()
sys.exit(aot.main(["--targets", "sm_80,gfx942", "--kernels", "forward", "--processes", "0", "--json", sys.argv[1]]))
"""
SPECIALISE = """
import json
import torch
from bench import aot

def keys(**options):
    return [
        (source.hash(), str(chosen))
        for call in aot.attention_case(**options)
        for launch in aot.capture("sm_90", call)
        for source, chosen in [aot.specialise(launch, "sm_90")]
    ]

shapes = [dict(S=1, hq=1, hkv=1), dict(S=4096, hq=8, hkv=1), dict(S=777, hq=6, hkv=2, padding=24)]
print(json.dumps([keys(**shape) == keys() for shape in shapes]))
"""


def start(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def run(code: str, *args: str):
    process = start(code, *args)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports() -> dict[str, list[dict]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(lambda target: run(COMPILE, target), TARGETS), strict=True))


@pytest.fixture(params=TARGETS)
def compiled(reports: dict[str, list[dict]], request: pytest.FixtureRequest) -> list[dict]:
    return reports[request.param]


def test_shipped_configurations_keep_the_rules(compiled: list[dict]) -> None:
    """They fit, use the matrix instructions of their architecture, access rows in vectors, and hardly spill."""
    assert len(compiled) == (27 if compiled[0]["target"] in ("sm_90", "gfx942") else 9)
    assert {(c["case"], c["kernel"]): c["faults"] for c in compiled if c["faults"]} == {}


def test_rows_come_by_tma_where_there_is_such(compiled: list[dict]) -> None:
    """As the tables say, of which `faults` holds that TMA loads are in the machine code."""
    target = compiled[0]["target"]
    by_tma = {(c["case"], c["kernel"]) for c in compiled if c["tma"]}
    assert ("bf16 D 128", "attend_forward_kernel") in by_tma if target in ("sm_90", "sm_100") else not by_tma


def test_rows_are_accessed_in_vectors(compiled: list[dict]) -> None:
    """The forward without an LSE has no scalar access; the backward, and documents, read numbers and store none."""
    for c in compiled:
        assert c["narrow"] == {}, (c["case"], c["kernel"])
        scalar = c["scalar"]
        if c["kernel"] != "attend_forward_kernel" or "documents" in c["case"]:
            scalar = {access: n for access, n in scalar.items() if "st" in access}
        assert scalar == {}, (c["case"], c["kernel"])


def test_an_iteration_of_the_inner_loop_is_one_tile(compiled: list[dict]) -> None:
    """Of the matrix instructions that name their shape: as many operations as the tile has, if no head is padded."""
    for c in compiled:
        assert c["is_loop"], (c["case"], c["kernel"])
        assert 0 < c["share"][0] <= c["share"][1] <= 1, (c["case"], c["kernel"])
        if c["case"] in ("bf16 D 128", "bf16 D 64 dense") and c["target"] != "sm_100":
            assert c["waste"] == 0, (c["case"], c["kernel"])


def test_a_scalar_access_of_rows_fails(tmp_path: Path) -> None:
    process = start(UNALIGNED, str(tmp_path / "table.json"))
    assert process.returncode == 1, process.stderr[-4000:]
    records = json.loads((tmp_path / "table.json").read_text())
    assert len(records) == 2
    for record in records:
        assert any("scalar" in fault and "_rows.py" in fault for fault in record["faults"]), record
        assert f"FAULT: {record['faults'][0]}" in process.stdout
    assert "2 kernels compiled for 2 targets, 2 with faults" in process.stdout


def test_one_binary_serves_all_shapes() -> None:
    """Lengths, strides and head counts are run-time values: none of them makes Triton compile again."""
    assert run(SPECIALISE) == [True, True, True]
