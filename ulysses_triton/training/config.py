"""What a training run is made of: plain values, checked once before any rank starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import OptionError


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the language model; `head_dim` does not follow from `width`."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.heads % self.kv_heads == 0,
            f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
            "make heads a multiple of kv_heads",
        )
        _require(
            self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE turns pairs of channels, so it must be even"
        )


@dataclass(frozen=True)
class TrainConfig:
    """One run. `sequence_length` counts tokens (bytes) over all ranks; `batch` counts sequences per step."""

    out: str
    ranks: int
    text: tuple[str, ...] = ()  # empty: the standard library's source
    sequence_length: int = 8192
    batch: int = 1
    steps: int = 100
    lr: float = 1e-2
    seed: int = 0
    threads: int = 1  # of each rank
    device: str = "cpu"  # or "cuda"
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name in ("ranks", "batch", "steps", "threads"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.sequence_length >= self.ranks,
            f"a sequence of {self.sequence_length} bytes leaves some of {self.ranks} ranks without any; "
            "make it longer or use fewer ranks",
        )
        _require(self.lr > 0 and math.isfinite(self.lr), f"the learning rate is {self.lr}; it must be positive")
        _require(self.seed >= 0, f"the seed is {self.seed}; it must not be negative")
        _require(self.device in ("cpu", "cuda"), f"device is {self.device!r}; it must be 'cpu' or 'cuda'")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1, 2, ...: linear over a tenth of the run (20 steps at most), then a cosine to a tenth of it."""
    warm_up = max(1, min(20, config.steps // 10))
    if step <= warm_up:
        return config.lr * step / warm_up
    done = (step - warm_up) / max(1, config.steps - warm_up)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)
