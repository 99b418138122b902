"""Arrays that a run writes in versions: one file each, complete or absent, checked when read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trelm_ds.errors import DataError
from trelm_ds.files import whole_file


def write_versioned(path: Path, array: np.ndarray, version: int, kind: str) -> None:
    """Writes ``array`` and its SHA-256 under a temporary name and moves it into place.

    Args:
        path: of the file; its folder is made if missing.
        array: what to write.
        version: number recorded in the file.
        kind: name and format of the array, recorded too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.ascontiguousarray(array)
    metadata = {"format": kind, "version": str(version)}
    metadata["sha256"] = hashlib.sha256(array.data).hexdigest()
    with whole_file(path) as temporary:
        save_file({"array": array}, temporary, metadata)


def read_versioned(path: Path, version: int, kind: str) -> np.ndarray:
    """The array of ``write_versioned``.

    Raises:
        DataError: missing, truncated, of another version or kind, or not what was written.
    """
    try:
        with safe_open(path, "np") as file:
            metadata, array = file.metadata() or {}, file.get_tensor("array")
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None
    if (metadata.get("format"), metadata.get("version")) != (kind, str(version)):
        raise DataError(f"{path}: not version {version} of a {kind} table")
    if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != metadata.get("sha256"):
        raise DataError(f"{path}: not what was written (sha256)")
    return array
