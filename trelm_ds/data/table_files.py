"""The two kinds of file that a prepared folder's tables are: ``.npy`` arrays and rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from trelm_ds.errors import DataError, one_line
from trelm_ds.files import whole_file

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


def parse_count(text: str) -> int | None:
    """The number a text is in decimal digits; None: no number, or one beyond any index or count."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def load_numbered_rows(path: Path, columns: int) -> list[list[str]]:
    rows = load_rows(path, columns)
    for number, row in enumerate(rows):
        if row[0] != str(number):
            raise DataError(f"{path}: line {number + 1} has index {row[0]!r}, not {number}")
    return rows


def count_lines(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
