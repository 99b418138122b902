"""Rows without text: packed training triples, one name of each masked whole.

    [CLS] head relation [MASK] [MASK] [SEP] [MASK] relation tail [SEP] ...

The relation decides which end is asked for.
They carry no mentions: nothing is injected, remembered or decoded, so nothing but the row's own
words can give the answer away. Withheld facts are not among the training triples.
"""

from __future__ import annotations

import numpy as np

from trelm_ds.data import rng
from trelm_ds.data.collate import Example
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.sampling import no_mentions
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.data.weights import weighted_draw
from trelm_ds.errors import DataError

_ROUNDS = 8  # of candidates for a further triple of a row
_CHUNK = 1 << 20  # triples looked at together


def asks_for_tail(triples: np.ndarray, num_relations: int) -> np.ndarray:
    """Which end of a relation's triples is asked for: the one with fewer different entities.

    "Born in" has many heads for a tail, so it determines the tail and hardly the head; asked for
    the head it would stay unknown for ever, and be drawn for that. Ties go to the tail.

    Returns:
        bool [R], True: the tail.
    """
    distinct = []
    for end in (0, 2):
        codes = np.unique(triples[:, end].astype(np.int64) * num_relations + triples[:, 1])
        distinct.append(np.bincount(codes % num_relations, minlength=num_relations))
    heads, tails = distinct
    return tails <= heads


class KnowledgeRows:
    """Makes the knowledge row of a position.

    Args:
        graph: its training triples.
        tables: names as tokens.
        special: token ids.
        vocab_size: V.
        max_length: longest row, in tokens.
        triples: most of them in a row.
        seed: the run's seed.
    Raises:
        DataError: no training triple has names, or none fits into a row.
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        tables: KnowledgeTables,
        special: SpecialTokens,
        vocab_size: int,
        max_length: int,
        triples: int,
        seed: int,
    ):
        self._graph = graph
        self._tables = tables
        self._special = special
        self._is_special = special.is_special(vocab_size)
        self._max_length = max_length
        self._most = triples
        self._seed = seed
        self._asks_for_tail = asks_for_tail(graph.triples, graph.num_relations)
        for first in range(0, len(graph.triples), _CHUNK):
            rows = np.arange(first, min(first + _CHUNK, len(graph.triples)))
            if self._chances(rows, None, max_length - 1).any():
                return
        raise DataError(
            f"{graph.folder}: no training triple whose names are known fits into a row of "
            f"{max_length} tokens (sampling.knowledge_rows)"
        )

    def _chances(self, rows: np.ndarray, weights: np.ndarray | None, room: int) -> np.ndarray:
        """float [n] in [0, 1]: weights of triples ``rows``; 0 without names or above ``room``."""
        head, relation, tail = self._graph.triples[rows].T
        answer = np.where(self._asks_for_tail[relation], tail, head)
        names = self._tables.entity_names
        parts = names[head], self._tables.relation_names[relation], names[tail]
        lengths = [(part >= 0).sum(1) for part in parts]
        asked = names[answer]
        possible = np.all([length > 0 for length in lengths], axis=0)
        possible &= ((asked >= 0) & ~self._is_special[asked]).any(1)
        possible &= np.sum(lengths, axis=0) + 1 <= room
        return possible.astype(float) if weights is None else possible * weights[answer]

    def __call__(self, position: int, weights: np.ndarray | None) -> Example:
        """The row at a position of the stream.

        Args:
            position: of the row; with the seed it names the draws.
            weights: float32 [N] in (0, 1] of the answers; None: all alike.
        """
        stream = rng.generator(self._seed, rng.KNOWLEDGE_ROW, index=position)
        ids, masked, used = [self._special.cls], [], []
        for number in range(self._most):
            room = self._max_length - len(ids)

            def chance(rows, room=room):
                # A fact that is said twice in a row is worth one question.
                return self._chances(rows, weights, room) * ~np.isin(rows, used)

            row = weighted_draw(
                stream, len(self._graph.triples), chance, _ROUNDS if number else None
            )
            if row is None:  # no room is left, or no fact
                break
            used.append(row)
            ids += self._words(row, len(ids), masked)
        original = np.array(ids, dtype=np.int32)
        corrupted = original.astype(np.int64)
        targets = np.zeros(len(ids), dtype=bool)
        for left, right, _ in masked:
            targets[left:right] = ~self._is_special[original[left:right]]
        corrupted[targets] = self._special.mask
        spans = np.array(masked, dtype=np.int64)
        return Example(position, original, corrupted, targets, no_mentions(), spans)

    def _words(self, row: int, start: int, masked: list) -> list[int]:
        """Tokens of a triple and the separator; adds its masked name to ``masked``."""
        head, relation, tail = self._graph.triples[row].tolist()
        of_tail = self._asks_for_tail[relation]
        words: list[int] = []
        for name, asked in (
            (self._tables.entity_names[head], None if of_tail else head),
            (self._tables.relation_names[relation], None),
            (self._tables.entity_names[tail], tail if of_tail else None),
        ):
            name = name[name >= 0].tolist()
            if asked is not None:
                left = start + len(words)
                masked.append((left, left + len(name), asked))
            words += name
        return [*words, self._special.sep]
