"""`python -m bench.memory`: its numbers follow from the sizes, and its record is written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ulysses_triton.training.offload import IN_FLIGHT

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import gpu, memory  # noqa: E402
from bench._memory import Step, measure  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

TOKENS, WIDTH, VOCABULARY, LAYERS = 512, 64, 2048, 4


def test_the_table_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", TOKENS, "--width", WIDTH, "--vocabulary", VOCABULARY, "--layers", LAYERS, "--tile", 128]
    assert memory.main([*map(str, sizes), "--out", str(tmp_path)]) == 0
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("memory-*.json"))
    assert record["sizes"]["tokens"] == TOKENS and all(case["ok"] for case in record["cases"])
    plain, checkpoints, loss, mlp, offload = (case["peak_bytes"] for case in record["cases"])
    assert offload <= mlp < loss < checkpoints < plain  # with offload, the parameters and gradients at the end
    logits, checkpoint = TOKENS * VOCABULARY * 4, TOKENS * WIDTH * 4
    assert checkpoints - loss > logits
    assert record["cases"][-1]["host_bytes"] == LAYERS * checkpoint
    assert capsys.readouterr().out.count("| ok |") == 5


def test_checkpoints_in_host_memory_are_not_counted() -> None:
    """But for those that never leave. The whole logits make the step's peak, when all checkpoints are there."""
    step = Step(TOKENS, WIDTH, 6, VOCABULARY, checkpoints=True)
    on_device, in_host = (measure(replace(step, offload=on), torch.device("cpu")) for on in (False, True))
    assert on_device.peak - in_host.peak == (6 - IN_FLIGHT) * TOKENS * WIDTH * 4


def test_plain_bytes_are_those_that_can_be_counted() -> None:
    held = measure(Step(tokens=8, width=64, layers=0, vocabulary=256), torch.device("cpu"))
    weights = 2 * 256 * 64 + 64
    logits = 8 * 256
    assert 4 * (weights + 2 * logits) < held.peak < 4 * (2 * weights + 4 * logits + 8 * 64 * 8)


def test_it_is_a_part_of_the_check_on_a_gpu(tmp_path: Path) -> None:
    assert gpu.main(["--interpret", "--part", "memory", "--out", str(tmp_path)]) == 0
