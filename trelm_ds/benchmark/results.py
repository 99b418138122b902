"""What every benchmark writes: rows under one JSON header that says where they were measured."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from pathlib import Path

from trelm_ds import environment
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.files import write_text

HEADER = ("kind", "commit", "command", "hardware", "versions")


def header(kind: str) -> dict:
    """``kind``, ``commit``, ``command``, ``hardware`` and ``versions`` of this process."""
    found = environment.describe()
    return {
        "kind": kind,
        "commit": found["commit"],
        "command": shlex.join(found["command"]),
        "hardware": found["hardware"],
        "versions": found["versions"],
    }


def finite(value):
    """``value`` with every NaN or infinity in it as None: JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(path: str | Path, content: dict) -> None:
    """Writes ``content`` so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(finite(content), indent=1) + "\n")


def write_result(path: str | Path, kind: str, rows: list[dict], **more) -> dict:
    """Writes ``{header..., "rows": rows, **more}`` to ``path`` and returns it."""
    result = header(kind) | {"rows": rows} | more
    write_json(path, result)
    return result


def timing_rows(times: dict[str, list[float]], baseline: str) -> list[dict]:
    """A row an arm: ``min_ms``, ``median_ms`` and the median of its paired ratios to ``baseline``.

    Args:
        times: milliseconds of each arm, one a turn.
    """
    rows = []
    for arm, values in times.items():
        ratios = [a / b for a, b in zip(values, times[baseline], strict=True)]
        rows.append(
            {
                "arm": arm,
                "min_ms": round(min(values), 3),
                "median_ms": round(statistics.median(values), 3),
                "median_ratio": round(statistics.median(ratios), 3),
            }
        )
    return rows


def read_result(path: str | Path) -> dict:
    """A benchmark's JSON.

    Raises:
        DataError: no such file, not JSON, or a part of the header is missing.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None
    missing = [key for key in (*HEADER, "rows") if key not in content]
    if missing:
        raise DataError(f"{path}: not a benchmark result, it lacks {', '.join(missing)}")
    return content


def require_folder(path: Path | None, flag: str = "--json") -> None:
    """Refuses a result file whose folder does not exist, before anything is measured.

    Raises:
        ConfigError: names the flag and the folder.
    """
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: no such folder")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses numbers below 1, and lists that hold one.

    Raises:
        ConfigError: names the flag and the number.
    """
    for name in names:
        value = getattr(args, name)
        smallest = min(value) if isinstance(value, list) else value
        if smallest < 1:
            raise ConfigError(f"--{name} {smallest}: must be at least 1")
