"""Counter-based random streams: every draw is a function of what it is for, never of who draws.

A stream is named by (seed, purpose, epoch, sample index, item). Ranks, loader processes, batch
composition and the order of calls do not enter, so any world size sees the same random choices.
"""

from __future__ import annotations

import numpy as np

# Purposes; never renumber.
ORDER, MASKING, MENTION, NEGATIVES, HELDOUT, HARD_NEGATIVES, ENTITY_NEGATIVES = range(1, 8)
ENTITY_FIRST, KNOWLEDGE_ROW = 8, 9

_MASK64 = (1 << 64) - 1


def generator(
    seed: int, purpose: int, epoch: int = 0, index: int = 0, item: int = 0
) -> np.random.Generator:
    """The Philox stream of one purpose.

    Args:
        seed: the run's seed; any integer, taken modulo 2**64.
        purpose: one of this module's constants.
        epoch: pass over the data, or the optimizer step for step-wide draws.
        index: sample index in its split.
        item: span number inside the sample.
    """
    # The low counter word is left to the generator: 2**64 blocks before two streams could meet.
    counter = np.array([0, item, index, epoch], dtype=np.uint64)
    key = np.array([seed & _MASK64, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
