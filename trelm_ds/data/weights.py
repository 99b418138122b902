"""Weights of entities by which rows are drawn, in versions that a position alone decides on.

Table v is made from what the model knew after step v R and is used from half an interval later on,
by every loader process, however far ahead it reads. So what a step draws is a function of the step
and of earlier steps' results, never of timing. Version 0 weighs all entities alike and has no file.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trelm_ds.data.versioned import read_versioned, write_versioned
from trelm_ds.errors import DataError

_FORMAT = "trelm-weights-v1"
_WAIT_S = 1800.0  # longer than an evaluation and a checkpoint between two steps
_CANDIDATES = 64  # drawn at a time


def weighted_draw(
    stream: np.random.Generator,
    count: int,
    weight: Callable[[np.ndarray], np.ndarray],
    rounds: int | None = None,
) -> int | None:
    """An index drawn in proportion to its weight, by rejection: no cumulative table of millions.

    Args:
        stream: the draw's own.
        count: indices lie in 0..count-1.
        weight: int64 [n] indices -> [n] in [0, 1].
        rounds: give up after so many times 64 candidates; None: some weight is positive.
    Returns:
        The index, or None when ``rounds`` have passed.
    """
    while rounds is None or rounds > 0:
        candidates = stream.integers(0, count, _CANDIDATES)
        accepted = np.flatnonzero(stream.random(_CANDIDATES) < weight(candidates))
        if len(accepted):
            return int(candidates[accepted[0]])
        rounds = rounds and rounds - 1
    return None


class WeightTables:
    """The versions of a run, in a folder that its ranks share; picklable for loader processes.

    Args:
        folder: of the tables.
        num_entities: N.
        refresh_steps: R.
        wait_s: how long a reader waits for a version that is not written yet.
    """

    def __init__(
        self,
        folder: str | Path,
        num_entities: int,
        refresh_steps: int,
        wait_s: float = _WAIT_S,
    ):
        self.folder = Path(folder)
        self._num_entities = num_entities
        self._refresh_steps = refresh_steps
        # Readers are a few steps ahead of training. An interval is far more than they are, and
        # the number of loader processes, which a resumed run may change, does not enter.
        self.lead = max(1, refresh_steps // 2)
        self._wait_s = wait_s
        # Lets loader processes that wait for a version go when nobody will write it.
        self._closing = multiprocessing.get_context("spawn").Event()
        self._read: tuple[int, np.ndarray | None] = (0, None)

    def version_at(self, step: int) -> int:
        """The version that step ``step`` draws by."""
        return max(0, step - self.lead) // self._refresh_steps

    def open(self) -> None:
        """Readers may wait from now on."""
        self._closing.clear()

    def close(self) -> None:
        """Readers that wait give up, in every process."""
        self._closing.set()

    def path(self, version: int) -> Path:
        return self.folder / f"weights-{version:08d}.safetensors"

    def write(self, version: int, weights: np.ndarray) -> None:
        """Publishes float32 [N] weights in (0, 1]."""
        write_versioned(self.path(version), weights.astype(np.float32), version, _FORMAT)

    def at_step(self, step: int) -> np.ndarray | None:
        """float32 [N] in (0, 1] of the step's version; None: all alike.

        Raises:
            DataError: the table is damaged, or nobody has written it in time.
        """
        version = self.version_at(step)
        if version != self._read[0]:
            self._read = (version, self._wait_for(version) if version else None)
        return self._read[1]

    def _wait_for(self, version: int) -> np.ndarray:
        path = self.path(version)
        parent = multiprocessing.parent_process()
        deadline = time.monotonic() + self._wait_s
        while not path.exists():
            orphaned = parent is not None and not parent.is_alive()
            if time.monotonic() > deadline or orphaned or self._closing.wait(0.05):
                raise DataError(f"{path}: the sampling weights were not written in time")
        weights = read_versioned(path, version, _FORMAT)
        if weights.dtype != np.float32 or weights.shape != (self._num_entities,):
            raise DataError(
                f"{path}: {weights.dtype} {list(weights.shape)}, expected float32 "
                f"[{self._num_entities}]"
            )
        return weights
