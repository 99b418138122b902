"""The entities that a micro-batch's triples choose among in entity decoding."""

from __future__ import annotations

import numpy as np

from trelm_ds.config import Config
from trelm_ds.data import rng
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.negatives import NegativeSampler, answer_distribution, entity_distribution
from trelm_ds.data.tables import KnowledgeTables


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


def _same_rows(rows: np.ndarray) -> np.ndarray:
    """int64 [N]: a number for each row of int [N, n], the same for equal ones."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]  # sorts in a third
    return np.unique(whole, return_inverse=True)[1]


class EntityCandidates:
    """Collects a micro-batch's candidates and says which of them answer which triple.

    Candidates are the micro-batch's own answers, ``decoding.entity_negatives`` entities drawn for
    the step (the same on every rank), and entities on offer as far as there is room for them in
    ``decoding.entity_candidates``; the answers are never left out. So they are a function of the
    step and the micro-batch. Entities of one name have one vector and are one candidate, or else a
    model that knows the answer would be punished for its namesake.

    A candidate's log Q is of its chance to be listed, drawn or as another question's answer: with n
    draws from q and D questions, 1 - (1 - q)^n (1 - a)^D, a ``answer_distribution``, q and a summed
    over all of its name. Sums over candidates, each weighed by 1 / Q, then estimate sums over all
    entities, whatever the micro-batch and the graph's size. (Entities on offer are mostly answers
    to each other, and left out of Q.)

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
        q = entity_distribution(tables, graph, settings.unigram_power)
        self._draw = NegativeSampler(q, self._count, config.train.seed, rng.ENTITY_NEGATIVES)
        asked = settings.max_triples if settings.triple == "all" else 1
        name_of = _same_rows(np.asarray(tables.entity_names))
        # Of each entity's name, log(1 - q) and log(1 - a): loader processes have copies of these.
        self._not_drawn, self._not_asked = (
            np.log1p(-np.minimum(np.bincount(name_of, p), 1 - 1e-12)).astype(np.float32)[name_of]
            for p in (q, answer_distribution(tables, graph, asked))
        )

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
        offered = offered[self._not_drawn[offered] < 0]  # what is never an answer teaches nothing
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
        # Where all entities are drawn Q is 1: the full softmax, without correction.
        unlisted = self._count * self._not_drawn[candidates].astype(np.float64)
        unlisted += len(gold) * self._not_asked[candidates]
        log_q = np.zeros(len(listed))
        log_q[column] = np.log(-np.expm1(unlisted))  # equal for all of a name
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
