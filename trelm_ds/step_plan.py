"""What all ranks agree on before a step computes: global counts, and the schedules' values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from trelm_ds.data.collate import Batch
from trelm_ds.model import Normalizers


class StepCounts(NamedTuple):
    """Sums over the micro-batches of a step: of one rank, or of all.

    Attributes:
        masked: MLM targets.
        objects: those of them in whole masked mentions.
        decoded: tokens of decoded triples.
        entities: triples decoded as entities.
        tokens: real ones, pads not counted.
        sequences: rows.
        damaged: samples that an empty sequence replaces.
    """

    masked: int = 0
    objects: int = 0
    decoded: int = 0
    entities: int = 0
    tokens: int = 0
    sequences: int = 0
    damaged: int = 0

    @classmethod
    def of(cls, micro_batches: Iterable[Batch], damaged: int) -> StepCounts:
        """The counts of one rank's micro-batches, on the host still."""
        names = ("mlm", "objects", "cka", "entity", "tokens", "sequences")
        counts = [batch.counts() for batch in micro_batches]
        return cls(*(sum(count[name] for count in counts) for name in names), damaged)

    def plus(self, other: StepCounts) -> StepCounts:
        return StepCounts(*(a + b for a, b in zip(self, other, strict=True)))

    def normalizers(self, share: int) -> Normalizers:
        """Divisors of a micro-batch's loss sums, of global counts.

        Args:
            share: micro-batches of all ranks, over which the engine takes the mean.
        """
        return Normalizers(
            *(max(1, n) / share for n in (self.masked, self.decoded, self.entities)),
            *(n / share for n in (self.masked - self.objects, self.objects)),
        )


@dataclass(frozen=True)
class StepPlan:
    """What every rank knows about a step before it computes: global counts and the schedule.

    Attributes:
        step: optimizer steps done before this one.
        progress: share of the run's budget spent, in [0, 1].
        lr: learning rate.
        memory_weight: lambda_q of Eq. 8.
        normalizers: divisors of this rank's loss sums such that DeepSpeed's mean over ranks and
            micro-batches is the exact mean over the global batch.
        counts: of all ranks.
    """

    step: int
    progress: float
    lr: float
    memory_weight: float
    normalizers: Normalizers
    counts: StepCounts
