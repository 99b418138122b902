"""Rows drawn by entity first: which entity, by its weight, then which of its sentences."""

from __future__ import annotations

import numpy as np

from trelm_ds.data import rng
from trelm_ds.data.entity_samples import EntitySamples
from trelm_ds.data.weights import weighted_draw


class EntityFirst:
    """Draws training samples so that rare entities come as often as frequent ones.

    Args:
        samples: which training samples mention which entity.
        seed: the run's seed.
    """

    def __init__(self, samples: EntitySamples, seed: int):
        self._samples = samples
        self._seed = seed

    def __call__(self, position: int, weights: np.ndarray | None) -> int:
        """Index of the sample at a position of the stream.

        Args:
            position: of the row; with the seed it names the draw.
            weights: float32 [N] in (0, 1]; None: all entities alike. Entities without a training
                sample are passed over.
        """
        stream = rng.generator(self._seed, rng.ENTITY_FIRST, index=position)
        entities = self._samples.entities
        if weights is None:
            entity = entities[stream.integers(len(entities))]
        else:
            entity = entities[weighted_draw(stream, len(entities), lambda i: weights[entities[i]])]
        found = self._samples.of(int(entity))
        return int(found[stream.integers(len(found))])
