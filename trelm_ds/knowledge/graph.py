"""The knowledge graph of a prepared folder and the per-entity tables beside it.

Both are read-only views of files (``graph/``, ``tables/``): arrays are memory-mapped, so the
processes of a machine share one copy, and both objects travel to loader processes as a path. The
triples' indices are files too (``graph/index_*.npy``, 12 bytes a triple and 16 an entity): with a
folder from before they were written each process makes and holds its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from trelm_ds.data.schema import ROLE_HEAD, ROLE_TAIL
from trelm_ds.data.shards import load_manifest
from trelm_ds.errors import DataError, one_line
from trelm_ds.files import file_sha256, whole_file

NAME_TOKENS = 8  # columns of entity_names and relation_names
TWO_HOP_CAP = 1000
_NPY_MAGIC = b"\x93NUMPY"


def load_array(path: Path, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Memory-maps an ``.npy`` file after checking what it holds.

    Args:
        path: the file.
        dtype: the dtype it must have.
        shape: the shape it must have; None leaves a dimension open.
    Raises:
        DataError: missing, not an array file, pickled, or of another dtype or shape.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:  # np.load opens archives and pickles too
                raise ValueError("it does not begin like one")
        # Mapped however small: a read allocates what the header says, whatever the file holds.
        with np.errstate(over="ignore"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    # The header is parsed as Python and its shape not checked: errors of any kind are possible.
    except Exception as error:
        raise DataError(f"{path}: not a readable .npy array: {one_line(error)}") from None
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != np.dtype(dtype) or not fits:
        raise DataError(
            f"{path}: {array.dtype} {list(array.shape)}, expected {dtype} "
            f"{['*' if want is None else want for want in shape]}".replace("'", "")
        )
    array = np.asarray(array)  # a plain view of the map: np.memmap's own indexing is slow
    array.flags.writeable = False
    return array


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an ``.npy`` file under a temporary name and moves it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def save_rows(path: Path, rows: Iterable[Sequence]) -> None:
    """Writes tab-separated rows; white space inside a value becomes single spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)

    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            line = "\t".join(" ".join(str(value).split()) for value in row)
            file.write(line.encode("utf-8") + b"\n")


def load_rows(path: Path, columns: int) -> list[list[str]]:
    """Reads tab-separated rows of exactly ``columns`` values.

    Raises:
        DataError: missing, not UTF-8, or a line with another number of values.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise DataError(f"{path}: line {number} has {len(row)} values, not {columns}")
    return rows


def _number(text: str) -> int | None:
    """The number a text is in decimal digits; None: no number, or one beyond any index or count."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def _load_numbered_rows(path: Path, columns: int) -> list[list[str]]:
    rows = load_rows(path, columns)
    for number, row in enumerate(rows):
        if row[0] != str(number):
            raise DataError(f"{path}: line {number + 1} has index {row[0]!r}, not {number}")
    return rows


def _count_lines(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None


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
        entities, relations = (_count_lines(path / f"{k}.tsv") for k in ("entities", "relations"))
        graph = cls(folder, entities, relations)
        for name in ("triples", "withheld"):
            _check_triples(getattr(graph, name), entities, relations, path / f"{name}.npy")
        codes = _triple_codes(graph.triples, entities, relations)
        if (codes[1:] <= codes[:-1]).any():
            raise DataError(f"{path / 'triples.npy'}: triples are not sorted and unique")
        del codes  # of the size of the graph
        graph._check_indices()
        if graph.contains(*graph.withheld.T).any():
            raise DataError(f"{path / 'withheld.npy'}: a withheld fact is a training triple")
        return graph

    def _index_file(self, name: str) -> Path:
        return self.folder / "graph" / f"index_{name}.npy"

    def _index(self, name: str) -> np.ndarray:
        dtype, make = _INDICES[name]
        file = self._index_file(name)
        return load_array(file, dtype, (None,)) if file.exists() else make(self)

    def _check_indices(self) -> None:
        for name, (_, make) in _INDICES.items():
            file = self._index_file(name)
            if not file.exists():
                continue
            index = self._index(name)
            if name == "tail_order":
                fits = _is_tail_order(index, self.triples)
            else:  # made without sorting, so quickly
                fits = np.array_equal(index, make(self))
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
        return _load_numbered_rows(self.folder / "graph" / "entities.tsv", 4)

    @cached_property
    def _relation_rows(self) -> list[list[str]]:
        return _load_numbered_rows(self.folder / "graph" / "relations.tsv", 3)

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
            entity = _number(text)
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
    counts = [_count_lines(path / f"{name}.tsv") for name in ("entities", "relations")]
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


# Name: (dtype, shape); N entities, R relations, V vocabulary, S spans of the train split.
_TABLES = {
    "entity_embeddings": ("float32", ("N+1", None)),
    "relation_embeddings": ("float32", ("R+1", None)),
    "entity_frequency": ("int64", ("N",)),
    "token_frequency": ("int64", ("V",)),
    "importance": ("float32", ("S",)),
    "entity_names": ("int32", ("N", NAME_TOKENS)),
    "relation_names": ("int32", ("R", NAME_TOKENS)),
    "two_hop": ("int32", ("N",)),
}


def tables_digest(folder: str | Path) -> str:
    """sha256 over what ``KnowledgeTables`` reads: vectors and scores may be made anew later."""
    digest = hashlib.sha256()
    for name in (*(f"{table}.npy" for table in _TABLES), "long_tail_words.tsv"):
        path = Path(folder) / "tables" / name
        digest.update(f"{name} {file_sha256(path) if path.exists() else None}\n".encode())
    return digest.hexdigest()


class KnowledgeTables:
    """The arrays of ``tables/``, memory-mapped; make it with ``load``.

    Attributes:
        entity_embeddings: float32 [N+1, dim] TransE; row 0 is zero, entity e is row e+1.
        relation_embeddings: float32 [R+1, dim], likewise.
        entity_frequency: int64 [N] mentions in the train split.
        token_frequency: int64 [V] in the train split.
        importance: float32 [spans of train] SI (Eq. 1); 1 for word spans. None until scored.
        entity_names: int32 [N, 8] token ids without specials, padded with -1.
        relation_names: int32 [R, 8], likewise.
        two_hop: int32 [N] neighbours within two hops, capped at 1000.
        num_words: long-tail words; their keys follow the entities'.
    """

    def __init__(self, folder: str | Path, num_words: int):
        self.folder = Path(folder)
        self.num_words = num_words
        for name, (dtype, shape) in _TABLES.items():
            path = self.folder / "tables" / f"{name}.npy"
            missing = name == "importance" and not path.exists()
            setattr(self, name, None if missing else load_array(path, dtype, (None,) * len(shape)))

    def __reduce__(self):
        return KnowledgeTables, (self.folder, self.num_words)

    @property
    def num_entities(self) -> int:
        return len(self.entity_frequency)

    @property
    def num_keys(self) -> int:
        """Rows of the memory bank: entities, then long-tail words."""
        return self.num_entities + self.num_words

    @cached_property
    def long_tail_words(self) -> list[tuple[str, int]]:
        """(word, count) in key order."""
        path = self.folder / "tables" / "long_tail_words.tsv"
        words = [(word, _number(count)) for _, word, count in _load_numbered_rows(path, 3)]
        if any(count is None for _, count in words):
            raise DataError(f"{path}: a count is not a number")
        return words

    @classmethod
    def load(cls, folder: str | Path) -> KnowledgeTables:
        """Opens ``folder/tables`` and checks every array against the manifest.

        Raises:
            DataError: naming the array that is missing, of another shape, or out of range.
        """
        manifest = load_manifest(folder)
        sizes = {
            "N": manifest["graph"]["entities"],
            "N+1": manifest["graph"]["entities"] + 1,
            "R": manifest["graph"]["relations"],
            "R+1": manifest["graph"]["relations"] + 1,
            "V": manifest["tokenizer"]["vocab_size"],
            "S": manifest["splits"].get("train", {"spans": 0})["spans"],
            NAME_TOKENS: NAME_TOKENS,
            None: None,
        }
        path = Path(folder) / "tables"
        tables = cls(folder, manifest["long_tail_words"])
        for name, (dtype, shape) in _TABLES.items():
            if getattr(tables, name) is not None:
                load_array(path / f"{name}.npy", dtype, tuple(sizes[size] for size in shape))
        if len(tables.long_tail_words) != tables.num_words:
            raise DataError(f"{path / 'long_tail_words.tsv'}: not {tables.num_words} rows")
        if tables.entity_embeddings.shape[1] != tables.relation_embeddings.shape[1]:
            raise DataError(f"{path}: entity and relation embeddings differ in dimension")
        for name in ("entity_embeddings", "relation_embeddings", "importance"):
            array = getattr(tables, name)
            if array is not None and not np.isfinite(array).all():
                raise DataError(f"{path / f'{name}.npy'}: a value is not finite")
        for name in ("entity_embeddings", "relation_embeddings"):
            if getattr(tables, name)[0].any():
                raise DataError(f"{path / f'{name}.npy'}: row 0 is not zero")
        for name, low, high in (
            ("entity_frequency", 0, None),
            ("token_frequency", 0, None),
            ("two_hop", 0, TWO_HOP_CAP),
            ("entity_names", -1, sizes["V"] - 1),
            ("relation_names", -1, sizes["V"] - 1),
        ):
            array = getattr(tables, name)
            if array.size and (array.min() < low or (high is not None and array.max() > high)):
                raise DataError(f"{path / f'{name}.npy'}: a value is outside {low}..{high or ''}")
        return tables


def save_tables(
    folder: str | Path, *, long_tail_words: Iterable[tuple[str, int]] | None = None, **arrays
) -> None:
    """Writes any of the tables, each atomically, with the dtype ``load`` expects.

    Args:
        folder: the prepared data folder.
        long_tail_words: (word, count) in key order.
        **arrays: any of ``KnowledgeTables``' arrays by name.
    """
    path = Path(folder) / "tables"
    for name, array in arrays.items():
        save_array(path / f"{name}.npy", np.asarray(array, dtype=_TABLES[name][0]))
    if long_tail_words is not None:
        rows = ((i, word, count) for i, (word, count) in enumerate(long_tail_words))
        save_rows(path / "long_tail_words.tsv", rows)
