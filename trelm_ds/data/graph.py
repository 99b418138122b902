"""The knowledge graph of a prepared folder.

A read-only view of the files in ``graph/``: arrays are memory-mapped, so the processes of a machine
share one copy, and the object travels to loader processes as a path. The triples' indices are files
too (``graph/index_*.npy``, 12 bytes a triple and 16 an entity): with a folder from before they were
written each process makes and holds its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from trelm_ds.data.schema import ROLE_HEAD, ROLE_TAIL
from trelm_ds.data.table_files import (
    count_lines,
    load_array,
    load_numbered_rows,
    load_rows,
    parse_count,
    save_array,
    save_rows,
)
from trelm_ds.errors import DataError


def _check_triples(triples: np.ndarray, entities: int, relations: int, where: object) -> None:
    if not len(triples):
        return
    if triples.min() < 0:
        raise DataError(f"{where}: a negative index")
    if max(triples[:, 0].max(), triples[:, 2].max()) >= entities:
        raise DataError(f"{where}: an entity index is not below {entities}")
    if triples[:, 1].max() >= relations:
        raise DataError(f"{where}: a relation index is not below {relations}")


def _triple_codes(triples: np.ndarray, entities: int, relations: int) -> np.ndarray:
    """int64 [T]: one number per triple, in the order of (head, relation, tail)."""
    if entities * entities * relations >= 1 << 63:
        raise DataError(f"{entities} entities and {relations} relations are too many to number")
    codes = triples[:, 0].astype(np.int64)
    for column, size in ((1, relations), (2, entities)):  # in place: this is of the size of a graph
        codes *= size
        codes += triples[:, column]
    return codes


def _offsets(column: np.ndarray, entities: int) -> np.ndarray:
    """int64 [N+1]: where each entity's rows begin among the triples sorted by this column."""
    return np.concatenate([[0], np.cumsum(np.bincount(column, minlength=entities))])


# What is looked up by: triples are sorted by head, so an entity's head edges are a slice of them;
# tail edges are a slice of one int32 permutation. Name: (dtype, how it is made of a graph).
_INDICES = {
    "codes": ("int64", lambda g: _triple_codes(g.triples, g.num_entities, g.num_relations)),
    "head_offsets": ("int64", lambda g: _offsets(g.triples[:, 0], g.num_entities)),
    "tail_order": ("int32", lambda g: np.argsort(g.triples[:, 2], kind="stable").astype(np.int32)),
    "tail_offsets": ("int64", lambda g: _offsets(g.triples[:, 2], g.num_entities)),
}


def _is_tail_order(order: np.ndarray, triples: np.ndarray) -> bool:
    """Whether it is the one that ``_INDICES`` makes, without its sort."""
    if len(order) != len(triples):
        return False
    if len(order) and (order.min() < 0 or order.max() >= len(order)):
        return False
    tails = triples[order, 2]
    # Among equal tails by place. So no place is there twice, and every one once.
    later = (tails[1:] == tails[:-1]) & (order[1:] > order[:-1])
    return bool((later | (tails[1:] > tails[:-1])).all())


def _ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of every range [low, high), one after the other, and whose range each is in.

    Returns:
        int64 [n] the ranges' indices, int64 [n] the numbers.
    """
    size = high - low
    owner = np.repeat(np.arange(len(low)), size)
    return owner, np.arange(len(owner)) + (low - (np.cumsum(size) - size))[owner]


class KnowledgeGraph:
    """Entities, relations and training triples; make it with ``load``.

    Attributes:
        num_entities: N.
        num_relations: R.
        triples: int32 [T, 3] rows (head, relation, tail), unique and sorted, memory-mapped.
        withheld: int32 [*, 3] facts kept out of ``triples``.
    """

    def __init__(self, folder: str | Path, num_entities: int, num_relations: int):
        self.folder = Path(folder)
        self.num_entities = num_entities
        self.num_relations = num_relations

    def __reduce__(self):
        # Loader processes map the same files again instead of receiving copies.
        return KnowledgeGraph, (self.folder, self.num_entities, self.num_relations)

    @classmethod
    def load(cls, folder: str | Path) -> KnowledgeGraph:
        """Opens ``folder/graph`` and checks counts, ranges, order, indices and withheld facts.

        Raises:
            DataError: naming the file that is missing or inconsistent.
        """
        path = Path(folder) / "graph"
        entities, relations = (count_lines(path / f"{k}.tsv") for k in ("entities", "relations"))
        graph = cls(folder, entities, relations)
        for name in ("triples", "withheld"):
            _check_triples(getattr(graph, name), entities, relations, path / f"{name}.npy")
        codes = _triple_codes(graph.triples, entities, relations)
        if (codes[1:] <= codes[:-1]).any():
            raise DataError(f"{path / 'triples.npy'}: triples are not sorted and unique")
        graph._check_indices(codes)
        del codes  # of the size of the graph, and private to this process
        if graph.contains(*graph.withheld.T).any():
            raise DataError(f"{path / 'withheld.npy'}: a withheld fact is a training triple")
        return graph

    def _index_file(self, name: str) -> Path:
        return self.folder / "graph" / f"index_{name}.npy"

    def _index(self, name: str) -> np.ndarray:
        dtype, make = _INDICES[name]
        file = self._index_file(name)
        return load_array(file, dtype, (None,)) if file.exists() else make(self)

    def _check_indices(self, codes: np.ndarray) -> None:
        """Refuses index files that are not of these triples, whose ``codes`` are given."""
        for name, (_, make) in _INDICES.items():
            file = self._index_file(name)
            if not file.exists():
                continue
            index = self._index(name)
            if name == "tail_order":
                fits = _is_tail_order(index, self.triples)
            else:  # made without sorting, so quickly
                fits = np.array_equal(index, codes if name == "codes" else make(self))
            if not fits:
                raise DataError(f"{file}: not of these triples; without the file it is made anew")

    @cached_property
    def triples(self) -> np.ndarray:
        return load_array(self.folder / "graph" / "triples.npy", "int32", (None, 3))

    @cached_property
    def withheld(self) -> np.ndarray:
        return load_array(self.folder / "graph" / "withheld.npy", "int32", (None, 3))

    @cached_property
    def _codes(self) -> np.ndarray:
        return self._index("codes")

    @cached_property
    def _head_offsets(self) -> np.ndarray:
        return self._index("head_offsets")

    @cached_property
    def _tail_order(self) -> np.ndarray:
        return self._index("tail_order")

    @cached_property
    def _tail_offsets(self) -> np.ndarray:
        return self._index("tail_offsets")

    def contains(self, heads: np.ndarray, relations: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """bool [n]: whether (head, relation, tail), int [n] each, is a training triple."""
        asked = np.column_stack([heads, relations, tails])
        asked = _triple_codes(asked, self.num_entities, self.num_relations)
        place = np.searchsorted(self._codes, asked)
        found = np.zeros(len(asked), dtype=bool)
        inside = place < len(self._codes)
        found[inside] = self._codes[place[inside]] == asked[inside]
        return found

    def answers(
        self, entities: np.ndarray, relations: np.ndarray, candidates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which candidates answer which questions, by the training triples.

        Works on head edges alone, the questions' entities' and the candidates', as
        ``edges_between`` does: nothing here is of the size of a country's tail edges, nor of
        questions times candidates.

        Args:
            entities: int64 [D].
            relations: int64 [D] in [0, 2R): r asks for the tails of (entity, r), R + r for the
                heads of (r, entity).
            candidates: int64 [C], distinct and ascending.
        Returns:
            int64 [H] rows of questions and int64 [H] columns of candidates, each pair once.
        """
        forward = np.flatnonzero(relations < self.num_relations)
        codes = self._codes
        # The tails of (head, relation) follow each other in the sorted triples.
        first = (entities[forward] * self.num_relations + relations[forward]) * self.num_entities
        low, high = np.searchsorted(codes, first), np.searchsorted(codes, first + self.num_entities)
        owner, place = _ranges(low, high)
        tails = self.triples[place, 2]
        column = np.searchsorted(candidates, tails)
        found = column < len(candidates)
        found[found] = candidates[column[found]] == tails[found]
        rows, columns = forward[owner[found]], column[found]

        backward = np.flatnonzero(relations >= self.num_relations)
        if not len(backward):
            return rows, columns
        asked = entities[backward] * self.num_relations + relations[backward] - self.num_relations
        order = np.argsort(asked, kind="stable")
        backward, asked = backward[order], asked[order]
        edge_of, place = _ranges(self._head_offsets[candidates], self._head_offsets[candidates + 1])
        edges = self.triples[place]
        given = edges[:, 2].astype(np.int64) * self.num_relations + edges[:, 1]
        low, high = (np.searchsorted(asked, given, side=side) for side in ("left", "right"))
        owner, place = _ranges(low, high)
        return np.r_[rows, backward[place]], np.r_[columns, edge_of[owner]]

    # Names are read when asked for: millions of strings that loader processes never need.

    @cached_property
    def _entity_rows(self) -> list[list[str]]:
        return load_numbered_rows(self.folder / "graph" / "entities.tsv", 4)

    @cached_property
    def _relation_rows(self) -> list[list[str]]:
        return load_numbered_rows(self.folder / "graph" / "relations.tsv", 3)

    @cached_property
    def entity_ids(self) -> list[str]:
        return [row[1] for row in self._entity_rows]

    @cached_property
    def entity_names(self) -> list[str]:
        return [row[2] for row in self._entity_rows]

    @cached_property
    def entity_descriptions(self) -> list[str]:
        return [row[3] for row in self._entity_rows]

    @cached_property
    def relation_ids(self) -> list[str]:
        return [row[1] for row in self._relation_rows]

    @cached_property
    def relation_names(self) -> list[str]:
        return [row[2] for row in self._relation_rows]

    @cached_property
    def aliases(self) -> list[tuple[str, int]]:
        """(alias, entity index) pairs."""
        path = self.folder / "graph" / "aliases.tsv"
        pairs = []
        for number, (alias, text) in enumerate(load_rows(path, 2), 1):
            entity = parse_count(text)
            if entity is None or entity >= self.num_entities:
                raise DataError(f"{path}: line {number}: entity index {text[:40]!r}")
            pairs.append((alias, entity))
        return pairs

    def degree(self, entity: int) -> int:
        """Edges of an entity, in either role."""
        heads = self._head_offsets[entity + 1] - self._head_offsets[entity]
        return int(heads + self._tail_offsets[entity + 1] - self._tail_offsets[entity])

    def degrees(self) -> np.ndarray:
        """int64 [N]: ``degree`` of every entity."""
        return np.diff(self._head_offsets) + np.diff(self._tail_offsets)

    def edge(self, entity: int, i: int) -> tuple[int, int, int]:
        """Row ``i`` of ``edges_of(entity)``, without making the others."""
        first, last = self._head_offsets[entity : entity + 2].tolist()
        if i < last - first:
            _, relation, tail = self.triples[first + i].tolist()
            return ROLE_HEAD, relation, tail
        row = self._tail_order[self._tail_offsets[entity] + i - (last - first)]
        head, relation, _ = self.triples[row].tolist()
        return ROLE_TAIL, relation, head

    def edges_of(self, entity: int) -> np.ndarray:
        """The triples of an entity.

        Returns:
            int32 [k, 3] rows (role, relation, other): role 1 where the entity is the head (in the
            order of ``triples``), then role 2 where it is the tail.
        """
        heads = self.triples[self._head_offsets[entity] : self._head_offsets[entity + 1]]
        order = self._tail_order[self._tail_offsets[entity] : self._tail_offsets[entity + 1]]
        tails = self.triples[order]
        edges = np.empty((len(heads) + len(tails), 3), dtype=np.int32)
        edges[: len(heads), 0], edges[len(heads) :, 0] = ROLE_HEAD, ROLE_TAIL
        edges[: len(heads), 1:] = heads[:, 1:]
        edges[len(heads) :, 1] = tails[:, 1]
        edges[len(heads) :, 2] = tails[:, 0]
        return edges

    def edges_between(self, entity: int, others: Iterable[int]) -> list[tuple[int, int, int]]:
        """The rows of ``edges_of`` whose other end is in ``others`` (distinct), in their order.

        Looks at head edges alone, the entity's and the others': a country has a million tail
        edges, while few entities are the head of more than some hundreds.
        """
        others = np.array(sorted(others), dtype=np.int32)
        heads = self.triples[self._head_offsets[entity] : self._head_offsets[entity + 1]]
        found = heads[(heads[:, 2, None] == others).any(1)]
        rows = [(ROLE_HEAD, relation, tail) for _, relation, tail in found.tolist()]
        for other in others.tolist():
            heads = self.triples[self._head_offsets[other] : self._head_offsets[other + 1]]
            found = heads[heads[:, 2] == entity]
            rows += [(ROLE_TAIL, relation, head) for head, relation, _ in found.tolist()]
        return rows


def save_graph(
    folder: str | Path,
    entities: Iterable[tuple[str, str, str]],
    relations: Iterable[tuple[str, str]],
    triples: np.ndarray,
    withheld: np.ndarray,
    aliases: Iterable[tuple[str, int]] = (),
) -> dict:
    """Writes ``folder/graph`` and reads it back through ``KnowledgeGraph.load``.

    Args:
        folder: the prepared data folder.
        entities: (id, name, description) in index order.
        relations: (id, name) in index order.
        triples: int [T, 3] rows (head, relation, tail); sorted and made unique here.
        withheld: int [*, 3] facts that must not be among ``triples``.
        aliases: (alias, entity index).
    Returns:
        The manifest's ``graph`` entry, with ``graph_digest``.
    Raises:
        DataError: an index is out of range or a withheld fact is a training triple.
    """
    path = Path(folder) / "graph"
    save_rows(path / "entities.tsv", ((i, *row) for i, row in enumerate(entities)))
    save_rows(path / "relations.tsv", ((i, *row) for i, row in enumerate(relations)))
    save_rows(path / "aliases.tsv", aliases)
    counts = [count_lines(path / f"{name}.tsv") for name in ("entities", "relations")]
    for name, rows in (("triples", triples), ("withheld", withheld)):
        rows = np.asarray(rows).reshape(-1, 3)
        _check_triples(rows, *counts, path / f"{name}.npy")
        rows = rows.astype(np.int32)
        # Through one number per triple: ten times faster than np.unique over rows.
        _, first = np.unique(_triple_codes(rows, *counts), return_index=True)
        save_array(path / f"{name}.npy", rows[first])
    graph = KnowledgeGraph(folder, *counts)
    for name, (_, make) in _INDICES.items():
        save_array(graph._index_file(name), make(graph))
    graph = KnowledgeGraph.load(folder)
    return {
        "entities": graph.num_entities,
        "relations": graph.num_relations,
        "triples": len(graph.triples),
        "sha256": graph_digest(folder),
    }


def graph_digest(folder: str | Path) -> str:
    """sha256 over a prepared folder's entities, relations and triples, as in its manifest."""
    digest = hashlib.sha256()
    for name in ("entities.tsv", "relations.tsv", "triples.npy"):
        digest.update((Path(folder) / "graph" / name).read_bytes())
    return digest.hexdigest()
