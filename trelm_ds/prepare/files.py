"""Reading foreign files: text, maybe compressed, line by line, every fault with file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import DataError

# A Wikipedia article is well under 4 MiB; a gzip file can expand a thousandfold without a limit.
MAX_LINE_CHARACTERS = 1 << 26
MAX_TEXT_CHARACTERS = 1 << 22  # of a document, encoded whole: 1 GB, 3 GB of nothing but dots
MAX_JSON_CHARACTERS = 1 << 30  # of a file that is one object
_OPEN = {".gz": gzip.open, ".bz2": bz2.open}
_ENDINGS = ("", *_OPEN)
_ID = re.compile(r"[^\s]{1,200}")
_WIKIDATA_ID = re.compile(r"Q[1-9][0-9]{0,17}")


def is_wikidata_id(text: object) -> bool:
    """Whether ``text`` is an item id such as ``Q42``."""
    return isinstance(text, str) and _WIKIDATA_ID.fullmatch(text) is not None


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of ``names``, or of the same compressed, that is in ``folder``."""
    for name in names:
        for ending in _ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    return None


def bare_name(path: Path) -> str:
    """The file's name without what compression adds."""
    return path.stem if path.suffix in _OPEN else path.name


def need_file(folder: Path, *names: str) -> Path:
    """Like ``find_file``.

    Raises:
        DataError: none of them is there.
    """
    path = find_file(folder, *names)
    if path is None:
        raise DataError(f"{folder}: no {' or '.join(names)} (or the same compressed) in it")
    return path


def expand(inputs: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files named by ``inputs``; of a folder, those with one of ``suffixes``, or compressed.

    Raises:
        DataError: an input does not exist, a folder holds no such file, or ``once`` refuses.
    """
    wanted = tuple(suffix + ending for suffix in suffixes for ending in _ENDINGS)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(wanted))
            if not found:
                raise DataError(f"{path}: no file ending in {' or '.join(wanted)} in it")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return once(files)


def once(files: list[Path]) -> list[Path]:
    """``files``, unless one is named twice or there plain and compressed: it would count double.

    Raises:
        DataError: one is.
    """
    seen: dict[Path, Path] = {}
    for path in files:
        bare = path.resolve().with_name(bare_name(path.resolve()))
        if bare in seen:
            raise DataError(f"{path} and {seen[bare]} are one text twice: keep or name one of them")
        seen[bare] = path
    return files


def iter_lines(path: Path, longest: int | None = None) -> Iterator[tuple[str, str]]:
    """(``file:line``, text without its line end) of a UTF-8 file, plain, ``.gz`` or ``.bz2``.

    Only ``\\n`` ends a line: text may hold Unicode's other line separators.

    Args:
        path: the file.
        longest: characters of a line, its end included, that are refused; None:
            ``MAX_LINE_CHARACTERS``.

    Raises:
        DataError: the file is missing, not compressed as its name says, cut short, not UTF-8, or a
            line is too long.
    """
    number, longest = 0, longest or MAX_LINE_CHARACTERS
    try:
        raw = _OPEN.get(path.suffix, open)(path, "rb")
        with raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as stream:
            while line := stream.readline(longest):
                number += 1
                if not line.endswith("\n") and len(line) == longest:
                    raise DataError(f"{path}:{number}: longer than {longest} characters")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                yield f"{path}:{number}", line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: broken {path.suffix} file: {error}") from None
    except OSError as error:
        if error.errno is None:  # not the system's: what gzip and bz2 say of bytes not theirs
            raise DataError(f"{path}:{number + 1}: broken {path.suffix} file: {error}") from None
        raise DataError(f"{path}: {error.strerror}") from None


def first_line(path: Path, longest: int | None = None) -> str:
    """The first line that is not empty, by which the forms of a file are told apart; "": none."""
    return next((line for _, line in iter_lines(path, longest) if line.strip()), "")


def iter_columns(path: Path, at_least: int) -> Iterator[tuple[str, list[str]]]:
    """(``file:line``, tab-separated columns) of every line that is not empty.

    Raises:
        DataError: a line has fewer than ``at_least`` columns.
    """
    for where, line in iter_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) < at_least:
            raise DataError(
                f"{where}: expected {at_least} tab-separated columns, got {len(columns)}"
            )
        yield where, columns


def iter_triples(path: Path) -> Iterator[tuple[str, str, str]]:
    """(head, relation, tail) ids of a tab-separated file."""
    for where, columns in iter_columns(path, 3):
        triple = (columns[0].strip(), columns[1].strip(), columns[2].strip())
        for part in triple:
            check_id(part, where)
        yield triple


def iter_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(``file:line``, object) of every line that is not empty.

    Raises:
        DataError: a line is not a JSON object.
    """
    for where, line in iter_lines(path):
        if line.strip():
            yield where, _parse(line, where)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, on however many lines: JSON of one value often is on one.

    Raises:
        DataError: as ``iter_lines``, or it is too long.
    """
    text = io.StringIO()
    for _, line in iter_lines(path, MAX_JSON_CHARACTERS):
        text.write(f"{line}\n")
        if text.tell() > MAX_JSON_CHARACTERS:
            raise DataError(f"{path}: longer than {MAX_JSON_CHARACTERS} characters")
    return text.getvalue()


def read_json(path: Path) -> dict:
    """A file that is one JSON object.

    Raises:
        DataError: it is not, or it is too long.
    """
    return _parse(read_text(path), str(path))


def _parse(text: str, where: str) -> dict:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if "\\u" in text:  # an escape may stand for half a character
        check_text(json.dumps(record, ensure_ascii=False), where)
    return record


def get(record: dict, key: str, kind: type | tuple[type, ...], where: str):
    """``record[key]``, checked.

    Raises:
        DataError: it is missing or of another type.
    """
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing")
    value = record[key]
    # bool is an int in Python, and never what an integer field means.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{where}: {key!r} has the wrong type: {type(value).__name__}")
    if isinstance(value, str):
        return check_text(value, where)
    return value


def check_text(text: str, where: str) -> str:
    """``text``, if UTF-8 can hold it (JSON may carry lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds a lone surrogate, which is not valid Unicode") from None
    return text


def check_length(doc: str, text: str) -> None:
    """Refuses a text that is too long to be linked and encoded whole."""
    if len(text) > MAX_TEXT_CHARACTERS:
        raise DataError(
            f"document {doc!r}: {len(text)} characters, more than {MAX_TEXT_CHARACTERS}: make it "
            "several documents (of one id, they fall in one split)"
        )


def check_id(text: str, where: str) -> str:
    """``text``, if it can be an entity's or relation's id: 1 to 200 characters, no white space."""
    if not isinstance(text, str) or _ID.fullmatch(text) is None:
        raise DataError(
            f"{where}: {str(text)[:40]!r} is not an id (1 to 200 characters, no blanks)"
        )
    return text


def check_span(start: object, end: object, text: str, where: str) -> tuple[int, int]:
    """``(start, end)``, if it is a non-empty span of characters inside ``text``."""
    for value in (start, end):
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{where}: span ends must be integers, got {value!r}")
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: span [{start}, {end}) is not inside the text of {len(text)} characters"
        )
    return start, end
