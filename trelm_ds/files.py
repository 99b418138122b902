"""Files that a reader sees whole or not at all, whatever happens to their writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_BLOCK = 1 << 20
READ_WAITS_S = (0.1, 2.0, 10.0)  # before a failed read is tried again


def try_again(
    work: Callable, waits: Iterable[float], errors=OSError, failed: Callable = lambda: None
):
    """What ``work()`` returns. Network file systems have bad moments: it is tried a few times.

    Args:
        waits: seconds before each further try.
        errors: what is tried again, and raised if the last try fails by it.
        failed: called after each failure.
    """
    for wait in (*waits, None):
        try:
            return work()
        except errors:
            failed()
            if wait is None:
                raise
            time.sleep(wait)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: str | Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """``fsync`` of a folder and of all that is in it, before it takes another one's place."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def own_suffix() -> str:
    """Part of a temporary name that no other process has, on this machine or another."""
    return f"{platform.node()}-{os.getpid()}"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; takes its place when the block ends well.

    What was there before stays until then, and after an error. Two writers do not meet: the later
    one's file stays.
    """
    path = Path(path)
    # The ending stays the last part: some writers choose a format by it.
    temporary = path.with_name(f".tmp-{own_suffix()}-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """``text`` as UTF-8, by ``whole_file``."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
