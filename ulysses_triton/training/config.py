"""What a training run is made of: plain values, checked once before any rank starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import OptionError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the language model; `head_dim` does not follow from `width`."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384
    rope_base: float = 500.0  # with the usual 10,000 attention took longer to form
    norm_eps: float = 1e-6
    vocabulary: int = 256  # bytes, or as many tokens as the tokenizer has
    window: int | None = None  # tokens that a token attends to, itself among them; None for all before it
    zero_attention: bool = False  # the ablation: attention's output is multiplied by zero, so only the last byte counts

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "vocabulary", "window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
        _require(
            self.heads % self.kv_heads == 0,
            f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
            "make heads a multiple of kv_heads",
        )
        _require(
            self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE turns pairs of channels, so it must be even"
        )


@dataclass(frozen=True)
class HuggingFaceConfig:
    """A causal model of transformers: the `values` of its config.json, with what the command line sets in them.

    They are kept with the run, so that it can go on when the file they came from is gone.
    """

    source: str  # what was asked for
    values: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """`steps` updates on `batch` sequences of `length` tokens each, counted over all ranks."""

    steps: int
    length: int
    batch: int

    def __post_init__(self) -> None:
        for name in ("steps", "length", "batch"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> Stage:
        """The stage that "500x1024x2" means."""
        parts = text.split("x")
        _require(
            len(parts) == 3 and all(part.isascii() and part.isdecimal() for part in parts),
            f"stage {text!r} is not STEPSxLENGTHxBATCH, such as 500x1024x2",
        )
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.steps}x{self.length}x{self.batch}"


# At 8,192 bytes from the start attention would learn next to nothing in minutes; what it learns at 1,024 carries over.
DEFAULT_STAGES = (Stage(500, 1024, 2), Stage(80, 8192, 1))


@dataclass(frozen=True)
class TrainConfig:
    """One run on a grid of `data_parallel` rows of ranks; the ranks of a row share its sequences.

    A step's data does not depend on the grid, nor on `accumulate`: its batch is shared by the rows, and each row takes
    its part in so many micro-batches.
    """

    out: str
    ranks: int
    data_parallel: int = 1
    text: tuple[str, ...] = ()  # empty: the standard library's source
    column: str = "text"  # of rows in JSONL and parquet files
    tokenizer: str | None = None  # folder or name of one for transformers' AutoTokenizer; None: tokens are bytes
    stages: tuple[Stage, ...] = DEFAULT_STAGES
    accumulate: int = 1
    lr: float = 1e-2
    seed: int = 0
    dtype: str = "fp32"  # of parameters while they compute, and of activations; masters and optimizer are fp32
    checkpoint_activations: bool = False
    chunks: int = 1  # that a rank's heads are exchanged in
    recompute: str | None = None  # "exchange": attention keeps only its inputs for backward and exchanges again
    tile: int | None = None  # tokens of a rank that MLPs and the loss are computed for at once; None: all
    offload: bool = False  # activation checkpoints go to host memory; turns checkpoint_activations on
    held_out: int = 16  # windows that the loss at the end is taken on; 0: none
    checkpoint_every: int = 100  # steps; 0 for none
    keep: int = 2  # checkpoints
    threads: int = 1  # of each rank
    device: str = "cpu"  # or "cuda"
    model: ModelConfig | HuggingFaceConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name in ("ranks", "data_parallel", "accumulate", "keep", "threads", "chunks"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(bool(self.stages), "there are no stages; give at least one")
        _require(
            self.ranks % self.data_parallel == 0,
            f"{self.ranks} ranks cannot form {self.data_parallel} equal data-parallel rows; "
            "make --data-parallel a divisor of the ranks",
        )
        for stage in self.stages:
            _require(
                stage.length >= self.sequence_ranks,
                f"a sequence of {stage.length} {self.unit}s leaves some of {self.sequence_ranks} ranks without any; "
                "make it longer or use fewer ranks",
            )
            _require(
                stage.batch % (self.data_parallel * self.accumulate) == 0,
                f"stage {stage}: a batch of {stage.batch} cannot be shared evenly by {self.data_parallel} "
                f"data-parallel rows in {self.accumulate} micro-batches; make it a multiple of "
                f"{self.data_parallel * self.accumulate}",
            )
        _require(self.lr > 0 and math.isfinite(self.lr), f"the learning rate is {self.lr}; it must be positive")
        _require(self.seed >= 0, f"the seed is {self.seed}; it must not be negative")
        _require(self.dtype in ("fp32", "bf16"), f"dtype is {self.dtype!r}; it must be 'fp32' or 'bf16'")
        _require(
            self.checkpoint_every >= 0,
            f"checkpoint_every is {self.checkpoint_every}; it must not be negative (0: none)",
        )
        _require(self.tile is None or self.tile >= 1, f"tile is {self.tile}; it must be at least 1 token")
        _require(self.held_out >= 0, f"held_out is {self.held_out}; it must not be negative (0: none)")
        _require(
            self.recompute in (None, "exchange"), f"recompute is {self.recompute!r}; it must be 'exchange' or left out"
        )
        _require(self.device in ("cpu", "cuda"), f"device is {self.device!r}; it must be 'cpu' or 'cuda'")

    @property
    def unit(self) -> str:
        """What sequences consist of."""
        return "byte" if self.tokenizer is None else "token"

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share one sequence."""
        return self.ranks // self.data_parallel

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(stage.length for stage in self.stages)

    def tokens_after(self, step: int) -> int:
        """Tokens that the steps after `step` train on."""
        total = 0
        for stage in self.stages:
            total += max(0, stage.steps - step) * stage.batch * stage.length
            step = max(0, step - stage.steps)
        return total

    def is_checkpointed(self, step: int) -> bool:
        """Whether a checkpoint follows on the step: every so many, and the last."""
        return self.checkpoint_every > 0 and (step == self.steps or step % self.checkpoint_every == 0)

    def at(self, step: int) -> tuple[int, int]:
        """The stage of step 1, 2, ... of the run and the step's place in it, both counted from 0."""
        index = step - 1
        for number, stage in enumerate(self.stages):
            if index < stage.steps:
                return number, index
            index -= stage.steps
        raise IndexError(f"step {step} of {self.steps}")


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `dataclasses.asdict` made `values` of, read from JSON again; other keys are ignored."""
    names = {field.name for field in fields(TrainConfig)}
    missing = names - set(values)
    _require(not missing, f"the run was written by another version: its config.json lacks {', '.join(sorted(missing))}")
    kept = {name: value for name, value in values.items() if name in names}
    kept["text"] = tuple(kept["text"])
    kept["stages"] = tuple(Stage(**stage) for stage in kept["stages"])
    model = HuggingFaceConfig if "values" in kept["model"] else ModelConfig
    kept["model"] = model(**kept["model"])
    return TrainConfig(**kept)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1, 2, ...: linear over a tenth of the run (20 steps at most), then a cosine to a tenth of it."""
    steps = config.steps
    warm_up = max(1, min(20, steps // 10))
    if step <= warm_up:
        return config.lr * step / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * done))
