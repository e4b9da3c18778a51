"""How a model is trained: the sequence, how ranks share it, and what is kept, computed again or put aside."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError

EXCHANGES = ("symm", "nccl", "two_hop")  # stores into peers' memory; one hop; inside the nodes and then between them
CHECKPOINTS = ("none", "full", "offload")  # of a layer: all, its input alone, its input on the host


@dataclass(frozen=True)
class Setup:
    """One training step on `sequence_ranks` x `rows` GPUs: each row takes whole sequences of `seq` tokens, one by one.

    Sizes in bytes: `item` of activations and of weights while they compute, `grad` of gradients, `states` of all that
    the optimiser keeps for a parameter (fp32 master, and Adam's two).
    """

    seq: int
    sequence_ranks: int
    rows: int = 1
    batch: int | None = None  # sequences of a step; one for each row unless said
    chunks: int = 1
    exchange: str = "nccl"
    zero: int = 3  # ZeRO's stage; 3 is FSDP
    checkpoint: str = "full"
    offload_optimizer: bool = False
    tiled_logits: bool = True
    tiled_mlp: bool = False
    recompute_exchange: bool = (
        False  # keep what was sent for backward and exchange again, in place of what was received
    )
    skips_masked: bool = True  # attention computes no tile that the causal mask hides
    item: int = 2
    grad: int = 2
    states: int = 12

    def __post_init__(self) -> None:
        for name in ("seq", "sequence_ranks", "rows", "chunks", "item", "grad"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; it must be at least 1")
        for name, known in (("exchange", EXCHANGES), ("checkpoint", CHECKPOINTS), ("zero", (0, 1, 2, 3))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        if self.states < 0:
            raise OptionError(f"states = {self.states}; the optimiser's bytes for a parameter are at least 0")
        if self.seq < self.sequence_ranks:
            raise OptionError(
                f"a sequence of {self.seq} tokens leaves some of {self.sequence_ranks} ranks without any; make it "
                "longer or use fewer ranks"
            )
        if self.batch is not None and (self.batch < 1 or self.batch % self.rows):
            raise OptionError(
                f"a batch of {self.batch} sequences cannot be shared evenly by {self.rows} data-parallel rows; make it "
                f"a multiple of {self.rows}"
            )

    @property
    def gpus(self) -> int:
        return self.sequence_ranks * self.rows

    @property
    def tokens(self) -> int:
        """Of a sequence, on the rank that has most."""
        return math.ceil(self.seq / self.sequence_ranks)

    @property
    def sequences(self) -> int:
        """That a step trains on."""
        return self.batch or self.rows

    @property
    def micro_batches(self) -> int:
        """Sequences that a row takes one after the other."""
        return self.sequences // self.rows

    @property
    def one_sided(self) -> bool:
        return self.exchange == "symm"

    def divided(self, since: int) -> int:
        """Over how many ranks ZeRO shards what it shards from stage `since` on."""
        return self.gpus if self.zero >= since else 1
