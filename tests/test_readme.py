"""What README shows runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs_under_torchrun(tmp_path):
    (source,) = re.findall(r"```python\n(import torch, .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(source)
    assert len(source.splitlines()) <= 12
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "example.py"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"rank \d: out \[.*?\], dq \[.*?\]", done.stdout))  # ranks write at once, also on one line
    assert said == [f"rank {r}: out [1, 1024, 8, 64], dq [1, 1024, 8, 64]" for r in range(4)]


def test_the_mask_example_runs(tmp_path):
    (source,) = re.findall(
        r"```python\n(import torch\nimport triton\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (tmp_path / "masked.py").write_text(source)
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "masked.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    off, blocks = re.fullmatch(r"off by (\S+) (BlockMask\(prefix_lm, .*\))\n", done.stdout).groups()
    assert float(off) < 1e-5 and "batch=2, heads=None, q_len=512, kv_len=512" in blocks


def test_the_recipe_for_flash_attention_is_what_is_tested():
    text = (ROOT / "MIGRATING.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert recipe in (ROOT / "tests/test_flex.py").read_text()


def test_the_two_commands_are_make_targets():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"train", "test"} <= set(targets)
    assert re.findall(r"^make (\w+) ", (ROOT / "README.md").read_text(), re.MULTILINE) == ["train", "test"]
    assert re.search(r"^exec make .*\btest\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_every_name_that_the_guides_import_exists():
    import ulysses_triton

    text = (ROOT / "README.md").read_text() + (ROOT / "MIGRATING.md").read_text()
    lines = re.findall(r"from ulysses_triton import ([\w, ]+)", text)
    names = {name.strip() for line in lines for name in line.split(",")}
    assert {"ulysses_attention", "shard_sequence", "token_mean"} <= names
    assert [name for name in names if not hasattr(ulysses_triton, name)] == []


def test_the_example_with_projections_runs():
    import torch

    from ulysses_triton import ulysses_qkv_attention

    (source,) = re.findall(
        r"```python\n(out = ulysses_qkv_attention\(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    model = torch.nn.Module()
    model.qkv, model.out = torch.nn.Linear(64, 48 * 8), torch.nn.Linear(32 * 8, 40, bias=False)
    names = {"ulysses_qkv_attention": ulysses_qkv_attention, "group": None, "self": model, "x": torch.randn(2, 9, 64)}
    exec(source, names)
    assert names["out"].shape == (2, 9, 40)


def test_the_trace_example_runs(tmp_path, monkeypatch, capsys):
    import torch

    import ulysses_triton

    (source,) = re.findall(
        r"```python\n(with ulysses_triton.trace\(\).*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    q, k, v = (torch.randn(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    names = {"ulysses_triton": ulysses_triton, "ulysses_attention": ulysses_triton.ulysses_attention, "group": None}
    exec(source, names | {"q": q, "k": k, "v": v})
    assert "exposed exchange 0.0" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"trace.json", "timeline.svg"}
