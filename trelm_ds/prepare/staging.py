"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.data.shards import MANIFEST
from trelm_ds.errors import DataError
from trelm_ds.files import fsync, fsync_tree


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses a target before any work is done.

    Raises:
        DataError: ``output`` exists and may not be replaced. Only a prepared folder (or an empty
            one) is ever replaced, so that a mistyped path costs nothing.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise DataError(f"--output {output}: exists and is not a prepared data folder")
    if not overwrite:
        raise DataError(f"--output {output}: exists; choose another folder or add --overwrite")


@contextlib.contextmanager
def staged_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``output`` to fill; takes its place at the end, or vanishes on an error.

    Raises:
        DataError: see ``check_output``; or the parent folder cannot be written.
    """
    check_output(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{output.name}.tmp-", dir=output.parent))
    except OSError as error:
        raise DataError(f"--output {output}: {error.strerror}") from None
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp's 0700 would hide the data from colleagues
        fsync_tree(staging)
        check_output(output, overwrite)
        if output.exists():
            # Two renames: a kill in between leaves old and new whole beside each other.
            old = Path(tempfile.mkdtemp(prefix=f"{output.name}.old-", dir=output.parent))
            os.rename(output, old / output.name)
            os.rename(staging, output)
            fsync(output.parent)
            shutil.rmtree(old)
        else:
            os.rename(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
