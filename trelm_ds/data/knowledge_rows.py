"""Rows without text: packed training triples, one name of each masked whole.

    [CLS] head relation [MASK] [MASK] [SEP] [MASK] relation tail [SEP] ...

They carry no mentions: nothing is injected, remembered or decoded, so nothing but the row's own
words can give the answer away. Withheld facts are not among the training triples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trelm_ds.data import rng
from trelm_ds.data.collate import Example
from trelm_ds.data.sampling import no_mentions
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.weights import weighted_draw
from trelm_ds.errors import DataError

if TYPE_CHECKING:  # a floor above: only the names, for the reader
    from trelm_ds.knowledge.graph import KnowledgeGraph, KnowledgeTables

_ROUNDS = 8  # of candidates for a further triple of a row


def tail_share(triples: np.ndarray, num_relations: int) -> np.ndarray:
    """How often a relation is asked for the tail: heads / (heads + tails), each kind counted once.

    A relation with many heads for a tail (born in) determines its tail and hardly its head, and
    is asked accordingly; one of equally many is asked for both ends alike.

    Returns:
        float64 [R]; 1 for a relation without triples.
    """
    distinct = []
    for end in (0, 2):
        codes = np.unique(triples[:, end].astype(np.int64) * num_relations + triples[:, 1])
        distinct.append(np.bincount(codes % num_relations, minlength=num_relations))
    heads, tails = distinct
    return np.where(heads > 0, heads / np.maximum(heads + tails, 1), 1.0)


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
        # How often (head, tail) is the masked end.
        tail = tail_share(graph.triples, graph.num_relations)
        self._end_share = np.stack([1.0 - tail, tail])
        room = max_length - 1
        chunk = 1 << 20
        for first in range(0, len(graph.triples), chunk):
            last = min(first + chunk, len(graph.triples))
            rows = np.repeat(np.arange(first, last), 2)
            ends = np.tile([0, 1], last - first)
            if (self._chances(rows, ends, None, room) > 0).any():
                return
        raise DataError(
            f"{graph.folder}: no training triple whose names are known fits into a row of "
            f"{max_length} tokens (sampling.knowledge_rows)"
        )

    def _chances(self, rows, ends, weights, room: int) -> np.ndarray:
        """float [n] in [0, 1]: weight of asking for an end (0 head, 1 tail) of triples ``rows``."""
        head, relation, tail = self._graph.triples[rows].T
        answer = np.where(ends == 1, tail, head)
        names, via = self._tables.entity_names, self._tables.relation_names[relation]
        parts = names[head], via, names[tail]
        lengths = [(part >= 0).sum(1) for part in parts]
        asked = names[answer]
        possible = np.all([length > 0 for length in lengths], axis=0)
        possible &= ((asked >= 0) & ~self._is_special[asked]).any(1)
        possible &= np.sum(lengths, axis=0) + 1 <= room
        chance = self._end_share[ends, relation] * possible
        return chance if weights is None else chance * weights[answer]

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

            def chance(candidates, room=room):
                # A fact asked twice, once for each end, would answer itself.
                rows, ends = np.divmod(candidates, 2)
                fresh = ~np.isin(rows, used)
                return self._chances(rows, ends, weights, room) * fresh

            drawn = weighted_draw(
                stream, 2 * len(self._graph.triples), chance, _ROUNDS if number else None
            )
            if drawn is None:  # no room is left, or no fact
                break
            row, end = divmod(drawn, 2)
            used.append(row)
            ids += self._words(row, end, len(ids), masked)
        original = np.array(ids, dtype=np.int32)
        corrupted = original.astype(np.int64)
        targets = np.zeros(len(ids), dtype=bool)
        for left, right, _ in masked:
            targets[left:right] = ~self._is_special[original[left:right]]
        corrupted[targets] = self._special.mask
        spans = np.array(masked, dtype=np.int64)
        return Example(position, original, corrupted, targets, no_mentions(), spans)

    def _words(self, row: int, end: int, start: int, masked: list) -> list[int]:
        """Tokens of a triple and the separator; adds its masked name to ``masked``."""
        head, relation, tail = self._graph.triples[row].tolist()
        words: list[int] = []
        for name, asked in (
            (self._tables.entity_names[head], head if end == 0 else None),
            (self._tables.relation_names[relation], None),
            (self._tables.entity_names[tail], tail if end == 1 else None),
        ):
            name = name[name >= 0].tolist()
            if asked is not None:
                left = start + len(words)
                masked.append((left, left + len(name), asked))
            words += name
        return [*words, self._special.sep]
