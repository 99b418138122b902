"""The per-entity and per-token tables of a prepared folder, memory-mapped as the graph is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from trelm_ds.config import NAME_TOKENS
from trelm_ds.data.shards import load_manifest
from trelm_ds.data.table_files import (
    load_array,
    load_numbered_rows,
    parse_count,
    save_array,
    save_rows,
)
from trelm_ds.errors import DataError
from trelm_ds.files import file_sha256

TWO_HOP_CAP = 1000

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
        entity_names: int32 [N, NAME_TOKENS] token ids without specials, padded with -1.
        relation_names: int32 [R, NAME_TOKENS], likewise.
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
        words = [(word, parse_count(count)) for _, word, count in load_numbered_rows(path, 3)]
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
