"""`python -m bench.accuracy`: errors of the layer against fp64, beside the errors of PyTorch's own attention.

Virtual ranks on the CPU; the Triton kernels run in Triton's interpreter when TRITON_INTERPRET=1 is set (fp32 only: it
multiplies bf16 wrongly). An error is the norm of the difference by the norm of the truth. "PyTorch" is
`scaled_dot_product_attention` on one device in the same dtype, with kv heads repeated for GQA.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ulysses_triton import run_virtual
from ulysses_triton.case import Case, Inputs, Layer, Results, draw, exact, peer
from ulysses_triton.kernels._config import INTERPRET
from ulysses_triton.truth import FP32

from . import _record

NAMES = ("out", "dq", "dk", "dv")


def sharded(case: Case, inputs: Inputs) -> Results:
    """The case on virtual ranks, joined."""
    parts = run_virtual(case.ranks, lambda group: Layer(case, inputs, group).results())
    return {name: torch.cat([part[name] for part in parts], 1) for name in NAMES}


def errors(results: Results, truth: Results) -> list[float]:
    return [((results[n].double() - truth[n]).norm() / truth[n].norm()).item() for n in NAMES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    asked = parser.parse_args()
    about = _record.environment(torch.device("cpu"), dry=False)
    base = Case(
        tokens=asked.tokens, heads=asked.heads, kv_heads=asked.kv_heads, head_dim=asked.head_dim,
        value_dim=asked.head_dim, ranks=asked.ranks,
    )  # fmt: skip
    print(f"{'dtype':5} {'mask':7} {'attention':10} " + " ".join(f"{name:>9}" for name in NAMES) + "   times PyTorch's")
    records = []
    for dtype in ("fp32",) if INTERPRET else ("fp32", "bf16", "fp16"):
        for causal in (False, True):
            case = replace(base, dtype=dtype, causal=causal)
            inputs = draw(case, torch.device("cpu"))
            truth = exact(case, inputs, torch.arange(case.tokens))
            theirs = errors(peer(case, inputs), truth)
            rows = {"PyTorch": theirs}
            for attention in ("aten", "reference", "triton") if INTERPRET else ("aten", "reference"):
                rows[attention] = errors(sharded(replace(case, attention=attention), inputs), truth)
            limits = [FP32] * len(NAMES) if dtype == "fp32" else [2 * e for e in theirs]
            for name, mine in rows.items():
                numbers = " ".join(f"{e:9.2e}" for e in mine)
                ratios = " ".join(f"{e / p:5.2f}" for e, p in zip(mine, theirs, strict=True))
                print(f"{dtype:5} {'causal' if causal else 'dense':7} {name:10} {numbers}   {ratios}")
                fine = all(e <= limit for e, limit in zip(mine, limits, strict=True))
                mask = "causal" if causal else "dense"
                records.append({"case": f"{dtype}, {mask}, {name}", "dtype": dtype, "mask": mask, "attention": name,
                                "ok": fine, "errors": dict(zip(NAMES, mine, strict=True))})  # fmt: skip
    held = all(record["ok"] for record in records)
    sizes = {key: getattr(asked, key) for key in ("tokens", "heads", "kv_heads", "head_dim", "ranks")}
    path = _record.write(asked.out or _record.default_folder(), "accuracy", about | sizes | {"cases": records})
    verdict = "holds" if held else "DOES NOT HOLD"
    print(f"{base}\nfp32 at most {FP32:g}, bf16 and fp16 at most twice PyTorch's own: {verdict}\nrecord: {path}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
