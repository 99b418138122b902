"""Records of downstream data sets: JSON lists or JSON lines, tokens with spans, splits by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import DataError
from trelm_ds.prepare import files
from trelm_ds.prepare.files import check_text, find_file, first_line, iter_jsonl, read_text

EVAL_SPLITS = ("dev", "val", "test")


def find_splits(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """The files of ``train`` and of every split of ``EVAL_SPLITS`` that is there.

    Args:
        folder: where they are.
        patterns: file names with ``{}`` for the split, the preferred first, plain or
            compressed.
    Raises:
        DataError: no such folder, no training file or no file to evaluate on.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {}
    for split in ("train", *EVAL_SPLITS):
        path = find_file(folder, *(pattern.format(split) for pattern in patterns))
        if path is not None:
            found[split] = path
    names = " or ".join(pattern.format("train") for pattern in patterns)
    if "train" not in found:
        raise DataError(f"{folder}: no {names} (or the same compressed) in it")
    if len(found) == 1:
        raise DataError(f"{folder}: nothing to evaluate on: no {names} with dev, val or test")
    return found


def iter_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of every record of a file: a JSON list, or JSON objects line by line.

    Raises:
        DataError: it is neither; the message has the file, and the line or the record's number.
    """
    if not first_line(path, files.MAX_JSON_CHARACTERS).lstrip().startswith("["):
        yield from iter_jsonl(path)
        return
    try:
        records = json.loads(read_text(path).rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def strings(record: dict, key: str, where: str) -> list[str]:
    """``record[key]``, if it is a list of strings.

    Raises:
        DataError: it is missing or something else.
    """
    values = record.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: {key!r} is missing or not a list of strings")
    return [check_text(value, where) for value in values]


def join_tokens(
    tokens: list[str], spans: list[tuple[object, object]], where: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The tokens with blanks between them, and spans of tokens as spans of characters.

    Args:
        tokens: the sentence.
        spans: (start, end) in tokens, end excluded.
        where: file and line, for the message.
    Raises:
        DataError: a span is empty, not of integers or not inside the sentence.
    """
    starts, position = [], 0
    for token in tokens:
        starts.append(position)
        position += len(token) + 1
    found = []
    for start, end in spans:
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(tokens):
            raise DataError(
                f"{where}: span [{start!r}, {end!r}) is not inside the {len(tokens)} tokens"
            )
        found.append((starts[start], starts[end - 1] + len(tokens[end - 1])))
    return " ".join(tokens), tuple(found)
