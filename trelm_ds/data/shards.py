"""Shards on disk: webdataset tars with an offset index and checksums, and the manifest over them.

A shard is an ordinary USTAR file that any webdataset pipeline reads. Training does not parse it:
tar framing loses samples silently when a header is damaged, so samples are read by ``pread`` at
the offsets of the shard's ``.idx`` file, each against its own crc32, and whole files against the
manifest's sha256.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trelm_ds.data.schema import (
    MAX_SAMPLE_BYTES,
    MAX_TOKENS,
    Sample,
    decode_sample,
    encode_sample,
)
from trelm_ds.errors import DataError
from trelm_ds.files import READ_WAITS_S, fsync, try_again, write_text

logger = logging.getLogger(__name__)

FORMAT = "trelm-v1"
SHARD_FOLDER = "shards"
MANIFEST = "manifest.json"
INDEX_RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
_TAR_BLOCK = 512
_MAX_MANIFEST_BYTES = 1 << 26
SAMPLES_PER_SHARD = 25_000  # about 37 MB
MAX_OPEN_SHARDS = 128  # two descriptors each; many systems allow 1024 per process
TELL_S = 60.0  # between two lines about a long check

_SHARD_FIELDS = {
    "name": str,
    "bytes": int,
    "sha256": str,
    "samples": int,
    "first_sample": int,
    "index_sha256": str,
}
_MANIFEST_FIELDS = {
    "name": str,
    "max_seq_length": int,
    "tokenizer": {"sha256": str, "vocab_size": int, "type": str},
    "graph": {"entities": int, "relations": int, "triples": int, "sha256": str},
    "long_tail_words": int,
    "splits": dict,
}


class DamagedSample(DataError):
    """Bytes of one sample that are not what was written, in a shard that can be read."""


# --- manifest -----------------------------------------------------------------------------------


def _check_fields(tree: object, fields: dict, where: str) -> None:
    if not isinstance(tree, dict):
        raise DataError(f"{where}: not a mapping")
    for name, kind in fields.items():
        if name not in tree:
            raise DataError(f"{where}: key {name!r} is missing")
        if isinstance(kind, dict):
            _check_fields(tree[name], kind, f"{where}: {name}")
        elif type(tree[name]) is not kind:
            raise DataError(f"{where}: {name} is not of type {kind.__name__}")
        elif kind is int and tree[name] < 0:
            raise DataError(f"{where}: {name} is negative")


def _check_split(entry: dict, split: str, where: str) -> None:
    where = f"{where}: splits.{split}"
    _check_fields(entry, {"samples": int, "tokens": int, "spans": int, "shards": list}, where)
    first = 0
    for i, shard in enumerate(entry["shards"]):
        _check_fields(shard, _SHARD_FIELDS, f"{where}.shards[{i}]")
        # The name becomes a path: nothing but the form the writer gives may pass.
        if shard["name"] != f"{split}-{i:05d}.tar":
            raise DataError(f"{where}.shards[{i}]: unexpected shard name {shard['name']!r}")
        if shard["first_sample"] != first or not shard["samples"]:
            raise DataError(f"{where}.shards[{i}]: sample numbers are not consecutive")
        first += shard["samples"]
    if first != entry["samples"]:
        raise DataError(f"{where}: shards hold {first} samples, not {entry['samples']}")


def _check_manifest(manifest: object, where: str) -> None:
    _check_fields(manifest, _MANIFEST_FIELDS, where)
    if manifest["max_seq_length"] > MAX_TOKENS:  # tables of lengths have a row for each
        raise DataError(f"{where}: max_seq_length is above {MAX_TOKENS}")
    for split, entry in manifest["splits"].items():
        if not re.fullmatch(r"[a-z]{1,20}", split):
            raise DataError(f"{where}: split name {split!r} is not lower-case letters")
        _check_split(entry, split, where)


def _dataset_id(manifest: dict) -> str:
    rest = {k: v for k, v in manifest.items() if k != "dataset_id"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(folder: str | Path, manifest: dict) -> dict:
    """Publishes ``manifest.json`` atomically; the folder is a data folder from then on.

    Args:
        folder: the prepared data folder.
        manifest: everything but ``format`` and ``dataset_id``, which are set here.
    Returns:
        The complete manifest.
    Raises:
        DataError: a key is missing or of the wrong type.
    """
    path = Path(folder) / MANIFEST
    _check_manifest(manifest, str(path))
    manifest = {"format": FORMAT, **manifest}
    manifest["dataset_id"] = _dataset_id(manifest)
    write_text(path, json.dumps(manifest, indent=1) + "\n")
    return manifest


def load_manifest(folder: str | Path) -> dict:
    """Reads and checks a prepared folder's manifest.

    Raises:
        DataError: missing, not JSON, of another format, edited (``dataset_id``), or inconsistent.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: over {_MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; is this a folder of launch/prepare.py?") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: format is not {FORMAT!r}")
    _check_manifest(manifest, str(path))
    if manifest.get("dataset_id") != _dataset_id(manifest):
        raise DataError(f"{path}: dataset_id does not match the contents; the file was changed")
    return manifest


# --- writing ------------------------------------------------------------------------------------


class _HashingFile:
    """A binary file that knows the sha256 and the number of the bytes written to it."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> str:
        """Syncs to disk and returns the hex digest."""
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class ShardSetWriter:
    """Writes one split's shards; a context manager that publishes all of them or none.

    Shards grow under temporary names and take their own when ``close`` has synced every one, so
    an error, a full disk or a kill leaves no file that looks like a shard.

    Args:
        folder: the prepared data folder; ``shards/`` is made in it.
        split: ``train`` or ``heldout``.
        samples_per_shard: prefer larger shards over more than ``MAX_OPEN_SHARDS`` of them.
    """

    def __init__(self, folder: str | Path, split: str, samples_per_shard: int = SAMPLES_PER_SHARD):
        self._folder = Path(folder) / SHARD_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._shards: list[dict] = []
        self._samples = self._tokens = self._spans = 0
        self._records: list[tuple[int, int, int]] = []
        self._tar = self._file = None
        self._closed = False
        self._entry: dict = {}

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.tmp-{os.getpid()}"

    def _next_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.tar"

    def add(self, sample: Sample) -> None:
        """Appends a sample and sets its ``id`` and ``first_span``."""
        if self._closed:
            raise ValueError("the writer is closed")
        sample.id, sample.first_span = self._samples, self._spans
        payload = encode_sample(sample)
        if self._tar is None:
            # Imported here: it takes seconds, and loader processes only read.
            from webdataset import TarWriter

            self._file = _HashingFile(self._temporary(self._next_name()))
            # Fixed times: equal corpora give equal files. Whole seconds also keep the headers
            # plain USTAR (a float time would add a PAX header to every member).
            self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="")
        before = self._tar.tarstream.offset
        self._tar.write({"__key__": f"{sample.id:08d}", "msgpack": payload})
        blocks = -(-len(payload) // _TAR_BLOCK)
        if self._tar.tarstream.offset != before + _TAR_BLOCK * (1 + blocks):
            raise RuntimeError("the tar library wrote something beside one header and the payload")
        self._records.append((before + _TAR_BLOCK, len(payload), zlib.crc32(payload)))
        self._samples += 1
        self._tokens += len(sample.ids)
        self._spans += len(sample.spans)
        if len(self._records) == self._samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        name = self._next_name()
        self._tar.close()
        digest = self._file.close()
        size = self._file.bytes
        index = _HashingFile(self._temporary(_index_name(name)))
        index.write(np.array(self._records, dtype=INDEX_RECORD).tobytes())
        self._shards.append(
            {
                "name": name,
                "bytes": size,
                "sha256": digest,
                "samples": len(self._records),
                "first_sample": self._samples - len(self._records),
                "index_sha256": index.close(),
            }
        )
        self._tar = self._file = None
        self._records = []

    def close(self) -> dict:
        """Publishes the shards.

        Returns:
            The split's manifest entry.
        """
        if not self._closed:
            try:
                if self._records:
                    self._finish_shard()
                for name in self._names():
                    os.replace(self._temporary(name), self._folder / name)
                fsync(self._folder)
            except BaseException:
                self.discard()
                raise
            self._entry = {
                "samples": self._samples,
                "tokens": self._tokens,
                "spans": self._spans,
                "shards": self._shards,
            }
            self._closed = True
        return self._entry

    def _names(self) -> list[str]:
        tars = [shard["name"] for shard in self._shards]
        return tars + [_index_name(name) for name in tars]

    def discard(self) -> None:
        """Removes everything this writer wrote, published names included."""
        if self._tar is not None:
            with contextlib.suppress(OSError):  # its last blocks may not fit on a full disk
                self._tar.close()
            self._file.abandon()
        for name in [*self._names(), self._next_name(), _index_name(self._next_name())]:
            temporary = self._temporary(name)
            if not temporary.exists() and name in self._names():
                (self._folder / name).unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
        self._tar = self._file = None
        self._records = []
        self._shards = []
        self._closed = True


# --- reading ------------------------------------------------------------------------------------


def _index_name(shard_name: str) -> str:
    return shard_name[: -len(".tar")] + ".idx"


def _open(path: Path, size: int) -> int:
    """A read-only descriptor of a regular file of exactly ``size`` bytes.

    Raises:
        DataError: there is none.
        OSError: the system could not say so, or not open it now.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise DataError(f"{path}: {status.st_size} bytes, the manifest says {size}")
    except (DataError, OSError):
        os.close(descriptor)
        raise
    return descriptor


def _check_digest(path: Path, descriptor: int, expected: str) -> None:
    digest = hashlib.sha256()
    offset = 0
    while block := os.pread(descriptor, 1 << 20, offset):
        digest.update(block)
        offset += len(block)
    if digest.hexdigest() != expected:
        raise DataError(f"{path}: sha256 is not the manifest's; the file is corrupt or was changed")


def sample_limits(manifest: dict) -> dict[str, int]:
    """What ``decode_sample`` holds a folder's samples to."""
    return {
        "max_length": manifest["max_seq_length"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "num_keys": manifest["graph"]["entities"] + manifest["long_tail_words"],
    }


class ShardReader:
    """Random access to one split's samples.

    Files are opened on first use and the object can be sent to other processes. Memory use does
    not grow with the corpus: index records are read from disk along with the samples.

    Args:
        folder: the prepared data folder.
        manifest: what ``load_manifest`` returned for it.
        split: ``train`` or ``heldout``.
        verify: check a shard's sha256 and its index's when it is first opened.
        tolerant: a shard of another sha256 is warned of and its samples are left to their own
            checks; its index still has to be right.
    Attributes:
        tolerant: as given.
    Raises:
        DataError: the split is not in the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict,
        split: str,
        verify: bool = True,
        tolerant: bool = False,
    ):
        if split not in manifest["splits"]:
            raise DataError(f"{folder}: no split {split!r} in {MANIFEST}")
        self._folder = Path(folder) / SHARD_FOLDER
        entry = manifest["splits"][split]
        self._shards = entry["shards"]
        self._first = [shard["first_sample"] for shard in self._shards]
        self._samples, self._spans = entry["samples"], entry["spans"]
        self._limits = sample_limits(manifest)
        self._verify = verify
        self.tolerant = tolerant
        self._verified: set[int] = set()
        self._open_shards: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return self._samples

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open_shards": OrderedDict()}

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Closes every file; reading opens them again."""
        for descriptors in self.__dict__.get("_open_shards", {}).values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._open_shards = OrderedDict()

    def _descriptors(self, number: int) -> tuple[int, int]:
        """The open (tar, index) of a shard."""
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        shard = self._shards[number]
        tar_path = self._folder / shard["name"]
        index_path = self._folder / _index_name(shard["name"])
        tar = _open(tar_path, shard["bytes"])
        try:
            index = _open(index_path, shard["samples"] * INDEX_RECORD.itemsize)
        except (DataError, OSError):
            os.close(tar)
            raise
        if self._verify:
            try:
                self._check(number, tar, index)
            except BaseException:
                os.close(tar)
                os.close(index)
                raise
        if len(self._open_shards) >= MAX_OPEN_SHARDS:
            for descriptor in self._open_shards.popitem(last=False)[1]:
                os.close(descriptor)
        self._open_shards[number] = (tar, index)
        return tar, index

    def _check(self, number: int, tar: int, index: int) -> None:
        """The sha256 of a shard's two open files, if it has not been checked yet."""
        if number in self._verified:
            return
        shard = self._shards[number]
        path = self._folder / shard["name"]
        _check_digest(self._folder / _index_name(shard["name"]), index, shard["index_sha256"])
        try:
            _check_digest(path, tar, shard["sha256"])
        except DataError as error:
            if not self.tolerant:
                raise
            logger.warning("%s; its samples are checked one by one", error)
        self._verified.add(number)

    def checked_shards(self, part: int = 0, parts: int = 1) -> Iterator[int]:
        """Checks every ``parts``-th shard from number ``part`` on, about 1.8 GB/s.

        It says how far it is where that takes minutes.

        Yields:
            The number of each shard that was found to be right, as it is iterated over.
        Raises:
            DataError: naming the first file that is missing, damaged or cannot be read.
        """
        numbers = range(part, len(self._shards), parts)
        told, done = time.monotonic(), 0
        total = sum(self._shards[number]["bytes"] for number in numbers)
        for number in numbers:
            self._again(number, lambda n=number: self._check(n, *self._descriptors(n)), "")
            done += self._shards[number]["bytes"]
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                logger.info("checked %.1f of %.1f GB of shards", done / 1e9, total / 1e9)
            yield number

    def verify_all(self) -> None:
        """Checks every shard now; raises as ``checked_shards``."""
        for _ in self.checked_shards():
            pass

    def _again(self, number: int, work: Callable, what: str):
        """What ``work`` returns; where the system fails it, on newly opened files, a few times."""

        def close():  # a handle may have gone stale
            for descriptor in self._open_shards.pop(number, ()):
                os.close(descriptor)

        try:
            return try_again(work, READ_WAITS_S, OSError, close)
        except OSError as error:
            path = self._folder / self._shards[number]["name"]
            raise DataError(f"{path}: {what}{error.strerror}") from None

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i`` of the split.

        Raises:
            DamagedSample: naming shard and key, if any byte of it is not what was written.
            DataError: likewise, if the shard is missing, of another size or cannot be read.
        """
        if not 0 <= i < self._samples:
            raise IndexError(i)
        number = bisect.bisect_right(self._first, i) - 1
        return self._again(number, lambda: self._read(number, i), f"sample {i:08d}: ")

    def _read(self, number: int, i: int) -> Sample:
        shard = self._shards[number]
        tar, index = self._descriptors(number)
        size = INDEX_RECORD.itemsize
        record = np.frombuffer(
            os.pread(index, size, size * (i - self._first[number])), INDEX_RECORD
        )
        try:
            if len(record) != 1:
                raise DataError("the index is truncated")
            offset, length, crc32 = record[0].tolist()
            if length > MAX_SAMPLE_BYTES or offset + length > shard["bytes"]:
                raise DataError("the index points outside the shard")
            payload = os.pread(tar, length, offset)
            if zlib.crc32(payload) != crc32 or len(payload) != length:
                raise DataError("crc32 does not match the index")
            sample = decode_sample(payload, **self._limits)
            if sample.id != i or sample.first_span + len(sample.spans) > self._spans:
                raise DataError(f"holds sample {sample.id}, spans from {sample.first_span}")
        except DataError as error:
            where = f"{self._folder / shard['name']}: sample {i:08d}"
            raise DamagedSample(f"{where}: {error}") from None
        return sample
