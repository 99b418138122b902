"""The memory bank on disk: safetensors files of consecutive virtual shards, readable by any rank.

A file holds ``rows`` float32 [n, 2, d] (local, global) and ``count`` int64 [n] of n consecutive
slots. Its metadata holds what must agree between the files of one snapshot and the sha256 of
every virtual shard, because safetensors itself does not notice a flipped bit in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trelm_ds.errors import CheckpointError
from trelm_ds.memory.layout import KeyLayout

FORMAT = "trelm-memory-v1"
FILE_BYTES = 256 * 2**20  # a file is at most this or one virtual shard: bounds the copies of a save
_READ_ERRORS = (OSError, SafetensorError, KeyError, ValueError, TypeError)


def shard_digest(rows: Tensor, count: Tensor) -> str:
    """sha256 of one virtual shard's content: ``rows``, then ``count``, little-endian."""
    digest = hashlib.sha256(rows.cpu().contiguous().numpy().data)
    digest.update(count.cpu().contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ShardFile:
    """Header of one file: virtual shards [first, end) at ``version``."""

    path: Path
    first: int
    end: int
    version: int
    hidden_size: int
    num_keys: int
    virtual_shards: int
    multiplier: int
    offset: int
    digests: tuple[str, ...]

    @property
    def layout(self) -> KeyLayout:
        return KeyLayout(self.num_keys, self.virtual_shards)

    def same_snapshot(self) -> tuple[int, ...]:
        """What all files of a snapshot share."""
        return (
            self.version,
            self.hidden_size,
            self.num_keys,
            self.virtual_shards,
            self.multiplier,
            self.offset,
        )

    def read(self, shards: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (shard, rows float32 [n, 2, d], count int64 [n]) of the shards asked for.

        Raises:
            CheckpointError: unreadable, wrong shape or dtype, or not the content that was saved.
        """
        layout = self.layout
        base = layout.first_slot(self.first)
        try:
            with safe_open(self.path, "pt") as file:
                all_rows, all_count = file.get_slice("rows"), file.get_slice("count")
                for shard in shards:
                    low = layout.first_slot(shard) - base
                    high = layout.first_slot(shard + 1) - base
                    rows, count = all_rows[low:high], all_count[low:high]
                    if (rows.shape, rows.dtype, count.shape, count.dtype) != (
                        (high - low, 2, self.hidden_size),
                        torch.float32,
                        (high - low,),
                        torch.int64,
                    ):
                        raise CheckpointError(f"{self.path}: virtual shard {shard} is misshapen")
                    if shard_digest(rows, count) != self.digests[shard - self.first]:
                        raise CheckpointError(
                            f"{self.path}: virtual shard {shard} is not what was saved (sha256)"
                        )
                    yield shard, rows, count
        except _READ_ERRORS as error:
            raise CheckpointError(f"{self.path}: unreadable: {error}") from None


def write_shard_file(
    folder: Path, layout: KeyLayout, version: int, shards: range, rows: Tensor, count: Tensor
) -> Path:
    """Writes consecutive virtual shards and returns the path of the file.

    Args:
        folder: an existing folder.
        layout: of the bank.
        version: commits applied.
        shards: virtual shards of the file.
        rows: float32 [n, 2, d], the shards' slots.
        count: int64 [n].
    """
    rows, count = rows.cpu().contiguous(), count.cpu().contiguous()
    base = layout.first_slot(shards.start)
    bounds = [layout.first_slot(shard) - base for shard in (*shards, shards.stop)]
    digests = [
        shard_digest(rows[low:high], count[low:high])
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    path = folder / f"memory-{shards.start:05d}-{shards.stop:05d}.safetensors"
    metadata = {
        "format": FORMAT,
        "first": shards.start,
        "end": shards.stop,
        "version": version,
        "hidden_size": rows.shape[2],
        "num_keys": layout.num_keys,
        "virtual_shards": layout.virtual_shards,
        "multiplier": layout.multiplier,
        "offset": layout.offset,
        "digests": " ".join(digests),
    }
    save_file({"rows": rows, "count": count}, path, {k: str(v) for k, v in metadata.items()})
    return path


def open_snapshot(folder: str | Path) -> list[ShardFile]:
    """The headers of a saved bank, checked to agree and to cover every virtual shard once.

    Raises:
        CheckpointError: no files, a file is missing, unreadable or of another snapshot.
    """
    folder = Path(folder)
    files = sorted(
        (_read_header(path) for path in folder.glob("memory-*.safetensors")),
        key=lambda file: file.first,
    )
    if not files:
        raise CheckpointError(f"{folder}: no memory bank files (memory-*.safetensors)")
    expected = 0
    for file in files:
        if file.same_snapshot() != files[0].same_snapshot():
            raise CheckpointError(f"{file.path}: belongs to another snapshot than {files[0].path}")
        if file.first != expected:
            raise CheckpointError(
                f"{folder}: virtual shards {min(file.first, expected)} to "
                f"{max(file.first, expected) - 1} are missing or saved twice"
            )
        expected = file.end
    if expected != files[0].virtual_shards:
        raise CheckpointError(
            f"{folder}: virtual shards {expected} to {files[0].virtual_shards - 1} are missing"
        )
    return files


def visited_rows(folder: str | Path, num_entities: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (keys int64 [n], local memory float32 [n, d]) of the visited entities in a snapshot.

    Args:
        folder: what ``MemoryBank.save_shards`` wrote.
        num_entities: keys from here on are long-tail words and left out.

    Raises:
        CheckpointError: the snapshot is missing, incomplete or corrupt.
    """
    for file in open_snapshot(folder):
        layout = file.layout
        for shard, rows, count in file.read(range(file.first, file.end)):
            slots = torch.arange(layout.first_slot(shard), layout.first_slot(shard + 1))
            keys = layout.keys(slots)
            wanted = (count > 0) & (keys < num_entities)
            if wanted.any():
                yield keys[wanted], rows[wanted, 0]


def _read_header(path: Path) -> ShardFile:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a memory bank file of format {FORMAT}")
        numbers = {
            name: int(metadata[name])
            for name in (
                "first",
                "end",
                "version",
                "hidden_size",
                "num_keys",
                "virtual_shards",
                "multiplier",
                "offset",
            )
        }
        header = ShardFile(path=path, digests=tuple(metadata["digests"].split()), **numbers)
    except _READ_ERRORS as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from None
    if not (
        0 <= header.first < header.end <= header.virtual_shards
        and len(header.digests) == header.end - header.first
        and 0 < header.num_keys < 2**31
        and (header.multiplier, header.offset) == (header.layout.multiplier, header.layout.offset)
    ):
        raise CheckpointError(f"{path}: its metadata contradict each other")
    return header
