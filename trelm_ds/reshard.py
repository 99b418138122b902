"""A ZeRO checkpoint for another number of ranks: DeepSpeed's universal form of it.

ZeRO cuts weights and moments by rank, and refuses the files of another number. Its converter puts
every parameter together again, into a folder from which any number of ranks can load. It runs in a
process of its own, since it holds whole files in memory and prints what it does.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.distributed import World, barrier, first_problem
from trelm_ds.errors import CheckpointError, everywhere

_WORKERS = 4  # processes that convert files side by side


def _convert(checkpoint: Path, folder: Path) -> str | None:
    """Writes ``folder``; says what went wrong."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder)]
    command += ["--num_extract_workers", str(_WORKERS), "--num_merge_workers", str(_WORKERS)]
    command += ["--inject_missing_state"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    # The converter's own pointer to what it wrote last: nobody here reads it.
    (folder.parent / "latest_universal").unlink(missing_ok=True)
    if done.returncode:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return None


@contextlib.contextmanager
def universal_checkpoint(
    checkpoint: Path, folder: Path, engine, world: World, group=None
) -> Iterator[Path]:
    """The checkpoint in universal form, and the engine set to read it. Collective.

    Args:
        checkpoint: a verified checkpoint of any number of ranks.
        folder: temporary, on a file system all ranks share.
    Raises:
        CheckpointError: on all ranks, where it cannot be converted.
    """
    frozen = [n for n, p in engine.module.named_parameters() if not p.requires_grad]
    if frozen:  # no part of the optimizer: the universal form loads nothing into them
        raise everywhere(
            CheckpointError(
                f"{checkpoint} can be resumed on its own number of ranks only: {frozen[0]} and "
                f"{len(frozen) - 1} more do not train (routing.scope, routing.form)"
            )
        )
    problem = _convert(checkpoint, folder) if world.is_main else None
    try:
        if problem := first_problem(problem, group):
            raise everywhere(CheckpointError(f"{checkpoint} cannot be converted: {problem}"))
        # Under ZeRO 3 it gives all groups the first one's settings: weight decay, what is routed.
        groups = engine.optimizer.param_groups
        settings = [{k: v for k, v in part.items() if k != "params"} for part in groups]
        engine._config.load_universal_checkpoint = True
        yield folder
        for part, kept in zip(engine.optimizer.param_groups, settings, strict=True):
            part.update(kept)
    finally:
        engine._config.load_universal_checkpoint = False
        barrier(group)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
