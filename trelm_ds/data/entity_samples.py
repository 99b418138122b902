"""Which training samples mention which entity: the shards' spans, inverted once."""

from __future__ import annotations

import json
import logging
import os
import time
from functools import cached_property
from pathlib import Path

import numpy as np

from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.table_files import load_array, save_array
from trelm_ds.errors import DataError
from trelm_ds.files import own_suffix, write_text

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # (entity, sample) pairs handled at a time
_LOG_EVERY_S = 30.0


class EntitySamples:
    """The inverted index, memory-mapped; make it with ``load``.

    Attributes:
        num_entities: N.
        offsets: int64 [N+1]; entity e has ``samples[offsets[e] : offsets[e+1]]``.
        samples: int32 [pairs] sample indices, ascending for each entity, each once.
    """

    def __init__(self, folder: str | Path, num_entities: int):
        self.folder = Path(folder)
        self.num_entities = num_entities
        tables = self.folder / "tables"
        self.offsets = load_array(
            tables / "entity_sample_offsets.npy", "int64", (num_entities + 1,)
        )
        self.samples = load_array(tables / "entity_samples.npy", "int32", (None,))

    def __reduce__(self):
        # Loader processes map the same files again instead of receiving copies.
        return EntitySamples, (self.folder, self.num_entities)

    @classmethod
    def load(cls, folder: str | Path) -> EntitySamples:
        """Opens the index of a prepared folder.

        Raises:
            DataError: not made yet, made for other data, or inconsistent.
        """
        manifest = load_manifest(folder)
        if not is_indexed(folder, manifest):
            raise DataError(
                f"{folder}: the samples of each entity are not indexed: "
                f"python launch/prepare.py index --output {folder}"
            )
        index = cls(folder, manifest["graph"]["entities"])
        offsets, samples = index.offsets, index.samples
        limit = manifest["splits"]["train"]["samples"]
        if (
            offsets[0] != 0
            or offsets[-1] != len(samples)
            or (np.diff(offsets) < 0).any()
            or not len(samples)
            or samples.min() < 0
            or samples.max() >= limit
        ):
            raise DataError(f"{folder}/tables/entity_samples.npy: not an index of {limit} samples")
        return index

    @cached_property
    def entities(self) -> np.ndarray:
        """int32, those that some training sample mentions, ascending."""
        return np.flatnonzero(np.diff(self.offsets)).astype(np.int32)

    def of(self, entity: int) -> np.ndarray:
        """int32, the samples that mention ``entity``."""
        return self.samples[self.offsets[entity] : self.offsets[entity + 1]]


def _report_path(folder: str | Path) -> Path:
    return Path(folder) / "tables" / "entity_samples.json"  # written last


def is_indexed(folder: str | Path, manifest: dict) -> bool:
    """Whether the folder has an index of the data its manifest describes."""
    try:
        report = json.loads(_report_path(folder).read_text())
        return report["dataset_id"] == manifest["dataset_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def index_entity_samples(folder: str | Path) -> int:
    """Writes ``tables/entity_samples.npy`` and its offsets; one pass over the training shards.

    Memory: the offsets and a few chunks, whatever the number of samples; pairs wait on disk.

    Returns:
        The number of (entity, sample) pairs.
    Raises:
        DataError: the folder cannot be read, or no sample mentions an entity.
    """
    manifest = load_manifest(folder)
    tables = Path(folder) / "tables"
    # Machines that share the folder may do this at once: each in files of its own.
    spool, unsorted = (tables / f".tmp-{name}-{own_suffix()}" for name in ("pairs", "samples"))
    try:
        counts = _spool_pairs(folder, manifest, spool)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        if not offsets[-1]:
            raise DataError(f"{folder}: no training sample mentions an entity")
        _sort_pairs(spool, unsorted, offsets)
        save_array(tables / "entity_sample_offsets.npy", offsets)
        os.replace(unsorted, tables / "entity_samples.npy")
    finally:
        spool.unlink(missing_ok=True)
        unsorted.unlink(missing_ok=True)
    report = {"dataset_id": manifest["dataset_id"], "pairs": int(offsets[-1])}
    write_text(_report_path(folder), json.dumps(report, indent=2) + "\n")
    return report["pairs"]


def _spool_pairs(folder, manifest: dict, spool: Path) -> np.ndarray:
    """Writes int32 rows (entity, sample) in sample order; returns int64 [N] rows per entity."""
    reader = ShardReader(folder, manifest, "train")
    num_entities = manifest["graph"]["entities"]
    counts = np.zeros(num_entities, dtype=np.int64)
    started = logged = time.monotonic()
    pending: list[np.ndarray] = []
    waiting = begun = 0

    def flush(file, end):
        if not pending:
            return
        sample = np.repeat(np.arange(begun, end), [len(keys) for keys in pending])
        keys = np.concatenate(pending).astype(np.int64)
        mentions = keys < num_entities
        # Sorted by sample, then entity; each pair once.
        codes = np.unique(sample[mentions] * num_entities + keys[mentions])
        rows = np.stack([codes % num_entities, codes // num_entities], axis=1).astype(np.int32)
        counts[:] += np.bincount(rows[:, 0], minlength=num_entities)
        file.write(rows.tobytes())
        pending.clear()

    with open(spool, "wb") as file:
        for i in range(len(reader)):
            pending.append(reader[i].spans[:, 2])
            waiting += len(pending[-1])
            if waiting >= _CHUNK:
                flush(file, i + 1)
                waiting, begun = 0, i + 1
            if i % 1024 == 0 and time.monotonic() - logged > _LOG_EVERY_S:
                logged = time.monotonic()
                rate = (i + 1) / (logged - started)
                logger.info(
                    "indexing: %d of %d samples | eta %.0f s",
                    i + 1,
                    len(reader),
                    (len(reader) - i) / rate,
                )
        flush(file, len(reader))
    reader.close()
    return counts


def _sort_pairs(spool: Path, target: Path, offsets: np.ndarray) -> None:
    """Counting sort of the spooled pairs by entity into ``target``; sample order is kept."""
    samples = np.lib.format.open_memmap(target, "w+", np.int32, (int(offsets[-1]),))
    with open(target, "rb+") as file:
        # The file has no blocks yet. On a full disk writing to the map would be a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
    place = offsets[:-1].copy()
    with open(spool, "rb") as file:
        while block := file.read(8 * _CHUNK):
            rows = np.frombuffer(block, np.int32).reshape(-1, 2)
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            entities, first, count = np.unique(rows[:, 0], return_index=True, return_counts=True)
            within = np.arange(len(rows)) - np.repeat(first, count)
            samples[np.repeat(place[entities], count) + within] = rows[:, 1]
            place[entities] += count
    samples.flush()
    with open(target, "rb") as file:
        os.fsync(file.fileno())
