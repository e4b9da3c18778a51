"""The attention kernels compiled for GPUs that are not here: they fit, use matrix instructions and wide accesses."""

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
# D = 100 the mask ends inside a vector of 16 bytes.
COMPILE = """
import json, sys
import torch
from bench import aot

wanted = {
    "bf16 D 128": dict(),
    "bf16 D 72 Dv 40 partial": dict(D=72, Dv=40, causal=False, padding=8, partial=True),
    "bf16 D 100": dict(D=100),
    "bf16 D 128 window softcap": dict(window=(128, 0), softcap=50.0),
    "bf16 D 256": dict(D=256),
    "fp32 D 256": dict(dtype=torch.float32, D=256),
}
target, found = sys.argv[1], []
for name, options in wanted.items():
    for call in aot.attention_case(**options, lse=False):
        for launch in aot.capture(target, call):
            report = aot.compile_launch(launch, target)
            found.append(dict(
                case=name, kernel=report.kernel, problems=report.problems(), mma=sorted(report.mma),
                scalar=report.scalar, narrow=report.narrow,
                uses_mma=aot.MMA[target] in report.mma, spills=report.spill_stores,
            ))
print(json.dumps(found))
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


def run(code: str, *args: str):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports() -> dict[str, list[dict]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(lambda target: run(COMPILE, target), TARGETS), strict=True))


@pytest.fixture(params=TARGETS)
def compiled(reports: dict[str, list[dict]], request: pytest.FixtureRequest) -> list[dict]:
    return reports[request.param]


def test_kernels_fit(compiled: list[dict]) -> None:
    assert len(compiled) == 18
    assert {(c["case"], c["kernel"]): c["problems"] for c in compiled if c["problems"]} == {}


def test_bf16_uses_matrix_instructions(compiled: list[dict]) -> None:
    assert [(c["case"], c["kernel"], c["mma"]) for c in compiled if "bf16" in c["case"] and not c["uses_mma"]] == []


def test_rows_are_accessed_in_vectors(compiled: list[dict]) -> None:
    """The forward without an LSE has no scalar access at all; the backward reads LSE and delta, and stores none."""
    for c in compiled:
        assert c["narrow"] == {}, (c["case"], c["kernel"])
        scalar = c["scalar"]
        if c["kernel"] != "attend_forward_kernel":
            scalar = {access: n for access, n in scalar.items() if "st" in access}
        assert scalar == {}, (c["case"], c["kernel"])


def test_accumulators_stay_in_registers(compiled: list[dict]) -> None:
    """A handful of spills may lie outside of the loops; more means that a tile does not fit."""
    assert {(c["case"], c["kernel"]): c["spills"] for c in compiled if c["spills"] > 16} == {}


def test_one_binary_serves_all_shapes() -> None:
    """Lengths, strides and head counts are run-time values: none of them makes Triton compile again."""
    assert run(SPECIALISE) == [True, True, True]
