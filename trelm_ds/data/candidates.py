"""The entities that a micro-batch's triples choose among in entity decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trelm_ds.config import Config
from trelm_ds.data import rng
from trelm_ds.data.negatives import NegativeSampler, entity_distribution

if TYPE_CHECKING:  # a floor above: only the names, for the reader
    from trelm_ds.knowledge.graph import KnowledgeGraph, KnowledgeTables


def no_candidates() -> dict[str, np.ndarray]:
    """The arrays of a batch without entity decoding."""
    none = np.zeros(0, dtype=np.int64)
    return {
        "entity_words": none,
        "entity_names": none.reshape(0, 0),
        "entity_log_q": none.astype(np.float32),
        "entity_gold": none,
        "entity_hits": none,
    }


class EntityCandidates:
    """Collects a micro-batch's candidates and says which of them answer which triple.

    Candidates are the micro-batch's own answers, ``decoding.entity_negatives`` entities drawn for
    the step (the same on every rank), and entities on offer as far as there is room for them in
    ``decoding.entity_candidates``; the answers are never left out. So they are a function of the
    step and the micro-batch. Entities of one name have one vector and are one candidate, or else a
    model that knows the answer would be punished for its namesake.

    Args:
        config: the run's configuration.
        graph: training triples: a candidate that is a right answer is not a negative.
        tables: entity names as tokens.
    Raises:
        DataError: no training triple has an entity with a name.
    """

    def __init__(self, config: Config, graph: KnowledgeGraph, tables: KnowledgeTables):
        settings = config.decoding
        self._graph = graph
        self._tables = tables
        self._most = settings.entity_candidates
        self._count = settings.entity_negatives
        self._q = entity_distribution(tables, graph, settings.unigram_power)
        self._draw = NegativeSampler(self._q, self._count, config.train.seed, rng.ENTITY_NEGATIVES)

    def __call__(
        self,
        step: int,
        entities: np.ndarray,
        relations: np.ndarray,
        gold: np.ndarray,
        offered: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Candidates of a micro-batch.

        Args:
            step: optimizer step.
            entities: int64 [D], what a question is about.
            relations: int64 [D] in [0, 2R).
            gold: int64 [D], its answer.
            offered: int64 [n] entities that would be good negatives, most wanted first.
        Returns:
            Fields of ``Batch``: ``entity_words``, ``entity_names``, ``entity_log_q``,
            ``entity_gold``, ``entity_hits``.
        """
        kept = np.union1d(gold, self._draw(step))
        offered = offered[self._q[offered] > 0]  # what is never an answer teaches nothing
        offered, first = np.unique(offered, return_index=True)
        offered = offered[np.argsort(first)]
        offered = offered[~np.isin(offered, kept)][: max(0, self._most - len(kept))]
        candidates = np.union1d(kept, offered)
        # Of the batch's few alone: a list of all names in every loader process is 300 MB at 5M.
        names = self._tables.entity_names[candidates]
        listed, column = np.unique(names, axis=0, return_inverse=True)
        column = column.reshape(-1)
        words, places = np.unique(listed, return_inverse=True)
        if words[:1] != -1:
            words, places = np.r_[-1, words], places + 1
        # Drawn with replacement, listed once: the chance to be listed takes the place of N Q, and
        # where all entities are drawn it is 1 and the softmax the full one, without correction.
        q = np.bincount(column, weights=self._q[candidates])
        log_q = np.log(-np.expm1(self._count * np.log1p(-np.minimum(q, 1 - 1e-12))))
        answer = column[np.searchsorted(candidates, gold)]
        rows, columns = self._graph.answers(entities, relations, candidates)
        columns = column[columns]
        others = columns != answer[rows]
        return {
            "entity_words": words[1:].astype(np.int64),
            "entity_names": places.reshape(len(listed), -1),
            "entity_log_q": log_q.astype(np.float32),
            "entity_gold": answer,
            "entity_hits": rows[others] * len(listed) + columns[others],
        }
