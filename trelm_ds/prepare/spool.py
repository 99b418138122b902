"""Records parked on disk between two passes, so that a corpus need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgpack

_MAX_RECORD = 1 << 30


class Spool:
    """An append-only file of msgpack records, read back in order as often as needed."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "wb")
        self._packer = msgpack.Packer()

    def add(self, record: tuple) -> None:
        self._file.write(self._packer.pack(record))

    def finish(self) -> None:
        """Ends writing."""
        self._file.close()

    def __iter__(self) -> Iterator[list]:
        with open(self._path, "rb") as file:
            yield from msgpack.Unpacker(file, max_buffer_size=_MAX_RECORD)

    def remove(self) -> None:
        """Deletes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)
