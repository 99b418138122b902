"""What the model knows of each entity: a moving average of p(gold) where it is the answer.

An observation is a mention that was masked whole: the mean over its tokens of the probability the
MLM head gives the original one. Observations of a window of steps are summed, and the average moves
once, when the window is closed: m of them with mean p move it by Eq. 5's rule for m mentions,
K <- (1-g)^m K + (1-(1-g)^m) p; the first window of an entity sets K = p, and K = 0 before.

Sums are whole numbers of 2^-40, so they are exact in any order: the state does not depend on ranks,
micro-batches or the order of arrival. It is 12 bytes an entity in each rank's accelerator and 12
in its host memory (3 million entities: 36 MB each), so that it is not sharded.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trelm_ds.distributed import has_peers
from trelm_ds.errors import CheckpointError

_ONE = 2.0**40  # fixed point of a probability: 2^23 observations of an entity fit in a window


class KnowledgeState:
    """The averages of ``num_entities`` entities, the same on every rank.

    Args:
        num_entities: N.
        discount: g, of the average.
        process_group: host-side group of all ranks; None: the default group, or a single rank.
        device: where observations are summed.

    Attributes:
        value: float32 [N], K; 0 for an entity without an estimate.
        count: int64 [N], observations so far.
    """

    def __init__(
        self,
        num_entities: int,
        discount: float,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ):
        self._discount = discount
        self._group = process_group
        self.value = np.zeros(num_entities, dtype=np.float32)
        self.count = np.zeros(num_entities, dtype=np.int64)
        # This rank's share of the window.
        self._sum = torch.zeros(num_entities, dtype=torch.int64, device=device)
        self._seen = torch.zeros(num_entities, dtype=torch.int32, device=device)
        self._staged: list[tuple[Tensor, Tensor, Tensor]] = []

    def stage(self, entity: Tensor, group: Tensor, given: Tensor, probability: Tensor) -> None:
        """Notes a micro-batch's observations; they count from ``commit`` on. No device is waited
        for.

        Args:
            entity, group: int64 [K], ``Batch.mlm_mention`` and ``Batch.mlm_mention_group``.
            given: bool [G], ``Batch.mlm_mention_given``: such a mention shows what the input says,
                not what the model knows, and does not count.
            probability: float32 [G], of each masked mention, in [0, 1].
        """
        if not len(probability):
            return
        # Every target of a mention writes the same entity; text goes to one entry more.
        size = len(probability)
        keys = entity.new_zeros(size + 1).scatter_(0, torch.where(group < 0, size, group), entity)
        counted = (~given).int()
        value = (probability.double() * _ONE).round().long() * counted
        self._staged.append((keys[:size], value, counted))

    def commit(self) -> None:
        """Adds what was staged to the window: the step was applied."""
        for keys, value, counted in self._staged:
            self._sum.index_add_(0, keys, value)
            self._seen.index_add_(0, keys, counted)
        self._staged.clear()

    def drop(self) -> None:
        """Forgets what was staged: the step was skipped."""
        self._staged.clear()

    def _gather(self) -> tuple[Tensor, Tensor]:
        """The window of all ranks, on the host: int64 [N] sums and counts."""
        total = torch.stack([self._sum.cpu(), self._seen.cpu().long()])
        if has_peers():
            dist.all_reduce(total, group=self._group)
        return total[0], total[1]

    def close_window(self) -> None:
        """Moves the averages by the window's observations and begins another. Collective."""
        total, seen = (part.numpy() for part in self._gather())
        self._sum.zero_()
        self._seen.zero_()
        moved = np.flatnonzero(seen)
        m = seen[moved]
        mean = total[moved] / _ONE / m
        kept = np.where(self.count[moved] > 0, (1.0 - self._discount) ** m, 0.0)
        self.value[moved] = kept * self.value[moved] + (1.0 - kept) * mean
        self.count[moved] += m

    def state_dict(self) -> dict[str, Tensor]:
        """The averages and the open window, equal on all ranks. Collective."""
        total, seen = self._gather()
        return {
            "value": torch.from_numpy(self.value.copy()),
            "count": torch.from_numpy(self.count.copy()),
            "window_sum": total,
            "window_count": seen,
        }

    def load_state_dict(self, state: dict[str, Tensor], is_main: bool) -> None:
        """Takes up a state; one rank, ``is_main``, holds the window of all.

        Raises:
            CheckpointError: not a state of so many entities.
        """
        try:
            if {len(state[name]) for name in self.state_names} != {len(self.value)}:
                raise CheckpointError("the knowledge state is of another number of entities")
            self.value[:] = state["value"].numpy()
            self.count[:] = state["count"].numpy()
            self._sum.copy_(state["window_sum"] * int(is_main))
            self._seen.copy_(state["window_count"] * int(is_main))
        except KeyError as error:
            raise CheckpointError(f"the knowledge state has no {error}") from None
        self._staged.clear()

    state_names = ("value", "count", "window_sum", "window_count")


def frequency_bands(frequency: np.ndarray) -> dict[str, np.ndarray]:
    """The entities that make the first, second and last third of all mentions, frequent first.

    Args:
        frequency: int64 [N] mentions of each entity.
    Returns:
        head, mid, tail -> int64 entity indices; unmentioned entities are in none.
    """
    order = np.argsort(-frequency, kind="stable")
    order = order[frequency[order] > 0]
    # By the mass before an entity, so that the most frequent is in the head whatever its share.
    before = np.cumsum(frequency[order]) - frequency[order]
    third = 3 * before // max(1, int(frequency.sum()))
    return {name: order[third == i] for i, name in enumerate(("head", "mid", "tail"))}
