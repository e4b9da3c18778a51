"""The folder of one run: `config.json`, `metrics.csv` and `loss.png`.

The folder and the picture appear whole (made beside their place, then renamed) and `metrics.csv` grows by whole lines:
a run that is stopped at any moment leaves nothing half-written.
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
from types import TracebackType
from typing import IO

import torch

from ..errors import OptionError
from .config import TrainConfig

METRICS = ("step", "loss", "lr", "tokens_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.csv`: `loss` in nats per byte, before the step's update; `seconds` since training began."""

    step: int
    loss: float
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

    def __init__(self, config: TrainConfig, text: Mapping[str, object]) -> None:
        require_unused(config.out)
        self.path = Path(config.out)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
            partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
            (partial / "config.json").write_text(json.dumps(_description(config, text), indent=2) + "\n")
            self._metrics: IO[str] = (partial / "metrics.csv").open("w", buffering=1)
            self._metrics.write(",".join(METRICS) + "\n")
            partial.rename(self.path)
        except OSError as error:
            raise OptionError(f"cannot write the run directory {config.out}: {error.strerror}; give --out") from error

    def log(self, metrics: StepMetrics) -> None:
        self._metrics.write(
            f"{metrics.step},{metrics.loss:.6f},{metrics.lr:.6g},{metrics.tokens_per_second:.1f},{metrics.seconds:.3f}\n"
        )

    def close(self) -> None:
        self._metrics.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _description(config: TrainConfig, text: Mapping[str, object]) -> dict[str, object]:
    return {
        **dataclasses.asdict(config),
        "text": dict(text),
        "world_size": config.ranks,
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
