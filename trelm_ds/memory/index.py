"""Entities near each other in memory space, through FAISS, as hard negatives of Eq. 2.

A table of nearest entities is built now and then from a snapshot of the bank, written as a
versioned file, and activated by all ranks at one step. Building belongs into a process of its own,
started by ``spawn``: FAISS must never run in a forked child, where its thread pool, inherited dead
from the parent, hangs the first search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from trelm_ds.data.versioned import read_versioned, write_versioned
from trelm_ds.errors import DataError
from trelm_ds.memory.shard_files import visited_rows
from trelm_ds.vector_index import inner_product_index

logger = logging.getLogger(__name__)

FORMAT = "trelm-neighbours-v1"
FLAT_LIMIT = 100_000  # entities searched exhaustively; more go through inverted lists
_SEARCH_CHUNK = 4096
_NPROBE = 32  # recall@10 0.90 to 0.95 at 4096 lists


class MemoryIndex:
    """Nearest visited entities by cosine of their centred local memories.

    Last-layer states share a large common component, which would make all cosines nearly 1, so
    the mean over the visited entities is taken away first. Vectors are projected to ``dim`` by a
    fixed random orthogonal matrix: distances stay comparable between versions of the table.
    """

    def __init__(self, index, keys: np.ndarray, vectors: np.ndarray, num_entities: int):
        self._index = index
        self.keys = keys  # int64 [n], ascending
        self.vectors = vectors  # float32 [n, dim], unit length
        self.num_entities = num_entities

    @classmethod
    def build(
        cls,
        chunks: Iterable[tuple],
        num_entities: int,
        dim: int = 128,
        seed: int = 0,
    ) -> MemoryIndex:
        """Indexes the visited entities.

        Args:
            chunks: pairs (keys int64 [n], local memory float32 [n, d]) as arrays or CPU tensors,
                each key once; what ``shard_files.visited_rows`` yields.
            num_entities: keys from here on are long-tail words and left out.
            dim: of the projection; wider than d means d, unprojected.
            seed: of the projection.

        Raises:
            ConfigError: FAISS is not installed.
            DataError: no visited entity.
        """
        all_keys, all_vectors, projection = [], [], None
        for keys, rows in chunks:
            keys, rows = np.asarray(keys), np.asarray(rows, dtype=np.float32)
            keep = keys < num_entities
            if projection is None:
                projection = _orthogonal(rows.shape[1], dim, seed)
            all_keys.append(keys[keep])
            all_vectors.append(rows[keep] @ projection)
        if not sum(map(len, all_keys)):
            raise DataError("hard negatives: the memory bank holds no visited entity yet")
        keys, vectors = np.concatenate(all_keys), np.concatenate(all_vectors)
        order = np.argsort(keys)
        keys, vectors = keys[order], vectors[order]
        vectors -= vectors.mean(0)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        index = inner_product_index(
            vectors,
            flat_limit=FLAT_LIMIT,
            probes=_NPROBE,
            seed=seed,
            needed_for="decoding.hard_negatives (0 does without)",
        )
        return cls(index, keys, vectors, num_entities)

    def neighbours(self, k: int) -> np.ndarray:
        """The ``k`` nearest other visited entities of every visited entity.

        Returns:
            int32 [num_entities, k], nearest first; -1 where there are fewer, and in the rows
            of entities that were never visited.
        """
        table = np.full((self.num_entities, k), -1, dtype=np.int32)
        for low in range(0, len(self.keys), _SEARCH_CHUNK):
            own = np.arange(low, min(low + _SEARCH_CHUNK, len(self.keys)))
            _, found = self._index.search(self.vectors[own], k + 1)
            # The entity itself is usually, not always (equal vectors, SQ8), the first hit.
            # A stable sort moves it and missing results to the end and keeps the order.
            useless = (found == own[:, None]) | (found < 0)
            order = np.argsort(useless, axis=1, kind="stable")[:, :k]
            found = np.where(useless, -1, self.keys[found])
            table[self.keys[own]] = np.take_along_axis(found, order, axis=1)
        return table


def _orthogonal(rows: int, columns: int, seed: int) -> np.ndarray:
    """float32 [rows, min(rows, columns)] with orthonormal columns; the identity if square."""
    if columns >= rows:
        return np.eye(rows, dtype=np.float32)
    gauss = np.random.Generator(np.random.Philox(key=seed)).standard_normal((rows, columns))
    q, r = np.linalg.qr(gauss)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def hard_negative_tokens(
    table: np.ndarray,
    gold: np.ndarray,
    entity_names: np.ndarray,
    count: int,
    rng: np.random.Generator,
    is_true: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Name tokens of entities near the gold ones.

    Args:
        table: int32 [num_entities, k] of :meth:`MemoryIndex.neighbours`.
        gold: int64 [D], the entity each decoding must produce.
        entity_names: int32 [num_entities, T] name tokens, -1 padded.
        count: tokens wanted.
        rng: keyed by seed and step.
        is_true: (rows int64 [n] into ``gold``, candidates int64 [n]) -> bool [n], True where the
            candidate answers the same question as the gold entity: a known true tail is not a
            negative. Only the caller knows the question (head and relation), so it filters here
            and not when the table is built.

    Returns:
        int64 [<= count], distinct token ids drawn uniformly from the neighbours' names, none of
        them a token of a gold name. Fewer if the neighbours have fewer: fill up from Q(y).
    """
    rows = np.repeat(np.arange(len(gold)), table.shape[1])
    candidates = table[gold].reshape(-1).astype(np.int64)
    keep = candidates >= 0
    rows, candidates = rows[keep], candidates[keep]
    if is_true is not None and len(candidates):
        candidates = candidates[~is_true(rows, candidates)]
    tokens = np.setdiff1d(entity_names[candidates], entity_names[gold])  # sorted and distinct
    tokens = tokens[tokens >= 0].astype(np.int64)
    return rng.permutation(tokens)[:count]


def build_table(
    bank_folder: str | Path, table_folder: str | Path, version: int, num_entities: int, k: int
) -> Path:
    """Snapshot of the bank to a versioned table; picklable target of a spawned process.

    Args:
        bank_folder: what ``MemoryBank.save_shards`` wrote on all ranks.
        table_folder: of the tables.
        version: of the new table, for example the snapshot's step.
        num_entities, k: as in :class:`MemoryIndex`.

    Raises:
        CheckpointError: the snapshot is missing, incomplete or corrupt.
        ConfigError: FAISS is not installed.
        DataError: no visited entity.
    """
    index = MemoryIndex.build(visited_rows(bank_folder, num_entities), num_entities)
    return write_table(table_folder, index.neighbours(k), version)


def table_path(folder: str | Path, version: int) -> Path:
    return Path(folder) / f"neighbours-{version:08d}.safetensors"


def write_table(folder: str | Path, table: np.ndarray, version: int) -> Path:
    """Writes an int32 [num_entities, k] table under its version, complete or not at all."""
    path = table_path(folder, version)
    write_versioned(path, table.astype(np.int32, copy=False), version, FORMAT)
    return path


def read_table(folder: str | Path, version: int, num_entities: int) -> np.ndarray:
    """The int32 [num_entities, k] table of ``version``.

    Raises:
        DataError: missing, truncated, another version or size, or its sha256 does not match.
    """
    path = table_path(folder, version)
    table = read_versioned(path, version, FORMAT)
    if table.dtype != np.int32 or table.ndim != 2 or len(table) != num_entities:
        raise DataError(f"{path}: {table.dtype} {table.shape}, expected int32 [{num_entities}, k]")
    return table


class NeighbourTable:
    """The table in use; a version that cannot be read leaves the previous one in place.

    Attributes:
        table: int32 [num_entities, k], or None before the first activation.
        version: of ``table``, or None.
        failures: activations that kept the previous version.
    """

    def __init__(self, folder: str | Path, num_entities: int):
        self.folder = Path(folder)
        self.num_entities = num_entities
        self.table: np.ndarray | None = None
        self.version: int | None = None
        self.failures = 0

    def activate(self, version: int, all_ranks: Callable[[bool], bool] = bool) -> bool:
        """Switches to ``version``, at the same step on all ranks.

        Args:
            version: of a written table.
            all_ranks: logical and over the ranks of "this rank has read it", so that either all
                switch or none does; the default is for one rank.

        Returns:
            Whether the table was switched.
        """
        table, reason = None, "another rank could not read it"
        try:
            table = read_table(self.folder, version, self.num_entities)
        except DataError as error:
            reason = str(error)
        if not all_ranks(table is not None):
            self.failures += 1
            logger.warning(
                "hard negatives: version %s not activated (%s); keeping %s",
                version,
                reason,
                "none" if self.version is None else f"version {self.version}",
            )
            return False
        self.table, self.version = table, version
        return True
