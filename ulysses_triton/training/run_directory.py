"""The folder of one run: `config.json`, `metrics.csv`, `summary.json` and `loss.png`, beside its checkpoints.

The folder and all files but one appear whole (made beside their place, then renamed) and `metrics.csv` grows by whole
lines: a run that is stopped at any moment leaves nothing half-written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import OptionError
from .config import TrainConfig

SUMMARY = "summary.json"
METRICS = ("step", "loss", "gradient_norm", "lr", "tokens_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.csv`: `loss` in nats per token, before the step's update; `seconds` since training began.

    `gradient_norm` is that of the whole model's gradient, before it is clipped.
    """

    step: int
    loss: float
    gradient_norm: float
    lr: float
    tokens_per_second: float
    seconds: float


def fresh_path(parent: str = "runs") -> str:
    """A folder under `parent` that is named after the time and does not exist yet."""
    name = time.strftime("%Y%m%d-%H%M%S")
    candidates = [name, *(f"{name}-{count}" for count in range(2, 100))]
    return next(str(Path(parent, candidate)) for candidate in candidates if not Path(parent, candidate).exists())


def require_unused(out: str) -> None:
    """Raise OptionError if `out` holds anything: a run never writes over another."""
    path = Path(out)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise OptionError(f"{out} exists and is not an empty folder; give another --out")


class RunDirectory:
    """Writes one run's files; `metrics.csv` is open until `close`."""

    def __init__(self, path: Path, metrics: IO[str]) -> None:
        self.path, self._metrics = path, metrics

    @classmethod
    def create(cls, config: TrainConfig, text: Mapping[str, object]) -> RunDirectory:
        """The folder of a run that begins. Raises OptionError if `config.out` holds anything or cannot be written."""
        require_unused(config.out)
        path = Path(config.out)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
            (partial / "config.json").write_text(_json(_description(config, text)))
            metrics = (partial / "metrics.csv").open("w", buffering=1)
            metrics.write(",".join(METRICS) + "\n")
            partial.rename(path)
        except OSError as error:
            raise OptionError(f"cannot write the run directory {config.out}: {error.strerror}; give --out") from error
        return cls(path, metrics)

    @classmethod
    def reopen(cls, config: TrainConfig, step: int) -> tuple[RunDirectory, list[StepMetrics]]:
        """The folder of a run that goes on after `step`, and the lines of `metrics.csv` up to there; others are cut."""
        path = Path(config.out)
        kept = [metrics for metrics in read_metrics(path) if metrics.step <= step]
        try:
            _replace(path / "metrics.csv", ",".join(METRICS) + "\n" + "".join(map(_line, kept)))
            described = read_description(config.out)
            described.setdefault("resumed", []).append(_circumstances(config) | {"after_step": step})
            _replace(path / "config.json", _json(described))
            metrics = (path / "metrics.csv").open("a", buffering=1)
        except OSError as error:
            raise OptionError(f"cannot write the run directory {config.out}: {error.strerror}") from error
        return cls(path, metrics), kept

    def log(self, metrics: StepMetrics) -> None:
        self._metrics.write(_line(metrics))

    def sync(self) -> None:
        """Force what was logged to disk."""
        os.fsync(self._metrics.fileno())

    def summarise(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json`: what came out of the run."""
        _replace(self.path / SUMMARY, _json(summary))

    def close(self) -> None:
        self._metrics.close()


def read_description(out: str) -> dict[str, Any]:
    """The `config.json` of a run. Raises OptionError if `out` is no run directory."""
    try:
        described = json.loads((Path(out) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{out} is not the directory of a run: its config.json cannot be read") from error
    assert isinstance(described, dict)
    return described


def require_same_text(out: str, sha256: str) -> None:
    """Raise OptionError if the run in `out` was trained on another text."""
    before = read_description(out)["text_read"]["sha256"]
    if before != sha256:
        raise OptionError(
            f"the text is not the one that {out} was trained on (sha256 {sha256[:12]}... now, {before[:12]}... then); "
            "a run can only go on with the same text"
        )


def read_metrics(run: Path) -> list[StepMetrics]:
    """The lines of a run's `metrics.csv`; a last line that was cut short is left out."""
    header, *lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    if header.strip() != ",".join(METRICS):
        raise OptionError(f"{run} was written by another version: metrics.csv has {header.strip()}, not {METRICS}")
    rows = [line.strip().split(",") for line in lines if line.endswith("\n")]
    return [StepMetrics(int(row[0]), *map(float, row[1:])) for row in rows]


def read_summary(run: Path) -> dict[str, Any]:
    """What came out of a run that ended."""
    summary = json.loads((run / SUMMARY).read_text())
    assert isinstance(summary, dict)
    return summary


def _line(metrics: StepMetrics) -> str:
    # Nine digits give back the same fp32 number.
    numbers = f"{metrics.loss:.9g},{metrics.gradient_norm:.9g},{metrics.lr:.6g},{metrics.tokens_per_second:.1f}"
    return f"{metrics.step},{numbers},{metrics.seconds:.3f}\n"


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content)
    partial.replace(path)


def _description(config: TrainConfig, text: Mapping[str, object]) -> dict[str, object]:
    return {
        **dataclasses.asdict(config),
        "text": list(config.text),
        "text_read": dict(text),
        **_circumstances(config),
    }


def _circumstances(config: TrainConfig) -> dict[str, object]:
    """What may be another at each start of one run."""
    return {
        "ranks": config.ranks,
        "data_parallel": config.data_parallel,
        "threads": config.threads,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "ulysses_triton": _own_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
        },
    }


def _own_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("ulysses-triton")
    except metadata.PackageNotFoundError:
        return None  # run from a source tree that is not installed


def _commit() -> str | None:
    """The commit of this package's checkout, with `-dirty` after local changes; None outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
