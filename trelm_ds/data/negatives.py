"""The noise distribution Q of sampled softmax (Eq. 2) and the negatives drawn from it."""

from __future__ import annotations

import numpy as np

from trelm_ds.data import rng
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import DataError


def negative_distribution(
    tables: KnowledgeTables, graph: KnowledgeGraph, vocab_size: int, power: float
) -> np.ndarray:
    """Q(y) ~ count(y) ** power over the names of the training triples' entities.

    An entity counts once for each triple end it stands at, which makes the counts the unigram
    distribution of what decoding is asked for.

    Returns:
        float64 [V], sums to 1; 0 for tokens of no such name, whatever the power.
    Raises:
        DataError: no training triple has an entity with a name.
    """
    names = np.asarray(tables.entity_names)
    ends = np.repeat(graph.degrees(), (names >= 0).sum(1))
    counts = np.bincount(names[names >= 0], weights=ends, minlength=vocab_size)
    if not counts.any():
        raise DataError(f"{graph.folder}: no training triple has an entity with a name to decode")
    weights = np.where(counts > 0, counts, 1.0) ** power * (counts > 0)
    return weights / weights.sum()


def entity_distribution(tables: KnowledgeTables, graph: KnowledgeGraph, power: float) -> np.ndarray:
    """Q(e) ~ count(e) ** power over the entities of the training triples that have a name.

    Returns:
        float64 [N], sums to 1; 0 for an entity without a triple or a name, whatever the power.
    Raises:
        DataError: no training triple has an entity with a name.
    """
    counts = graph.degrees() * (np.asarray(tables.entity_names)[:, 0] >= 0)
    if not counts.any():
        raise DataError(f"{graph.folder}: no training triple has an entity with a name to decode")
    weights = np.where(counts > 0, counts, 1.0) ** power * (counts > 0)
    return weights / weights.sum()


def answer_distribution(
    tables: KnowledgeTables, graph: KnowledgeGraph, max_triples: int
) -> np.ndarray:
    """a(e), how often entities are what decoding asks for: of each mention of the train split, at
    most ``max_triples`` of its entity's triples are asked, all alike.

    Weighted sampling and rows of triples shift it some; it corrects estimates alone.

    Returns:
        float64 [N], sums to 1, or to 0 where no mentioned entity has a triple.
    """
    asked = np.asarray(tables.entity_frequency, dtype=np.float64)
    asked = asked * np.minimum(1.0, max_triples / np.maximum(graph.degrees(), 1))
    head, _, tail = graph.triples.T
    counts = np.bincount(tail, asked[head], graph.num_entities)
    counts += np.bincount(head, asked[tail], graph.num_entities)
    counts *= np.asarray(tables.entity_names)[:, 0] >= 0
    return counts / (counts.sum() or 1.0)


class NegativeSampler:
    """Draws the negatives that one optimizer step shares, the same on every rank.

    Args:
        distribution: float64 [V] from ``negative_distribution`` or ``entity_distribution``.
        count: N.
        seed: the run's seed.
        purpose: of the stream: ``rng.NEGATIVES`` for tokens.
    """

    def __init__(
        self, distribution: np.ndarray, count: int, seed: int, purpose: int = rng.NEGATIVES
    ):
        # Only tokens that can be drawn: rounding can then never hit one of probability zero.
        self._tokens = np.flatnonzero(distribution)
        cumulative = np.cumsum(distribution[self._tokens])
        self._cumulative = cumulative / cumulative[-1]
        self._count = count
        self._seed = seed
        self._purpose = purpose

    def __call__(self, step: int) -> np.ndarray:
        """int64 [N] tokens or entities, drawn with replacement."""
        stream = rng.generator(self._seed, self._purpose, step)
        drawn = np.searchsorted(self._cumulative, stream.random(self._count), side="right")
        return self._tokens[drawn]
