"""A ZeRO checkpoint for another number of ranks: DeepSpeed's universal form of it.

ZeRO cuts weights and moments by rank, and refuses the files of another number. Its converter puts
every parameter together again, into a folder from which any number of ranks can load. It runs in a
process of its own, since it holds whole files in memory and prints what it does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.distributed import World, barrier, first_problem
from trelm_ds.errors import CheckpointError

_WORKERS = 4  # processes that convert files side by side
_CONVERTED = {"exp_avg", "exp_avg_sq", "step"}  # of a parameter's optimizer state


def _what_is_lost(engine, truncated: bool) -> str | None:
    """What of the run's state the universal form does not hold, with the setting that makes it."""
    frozen = [n for n, p in engine.module.named_parameters() if not p.requires_grad]
    if frozen:  # no part of the optimizer
        return f"parameters that do not train, {frozen[0]} (routing.scope, routing.form)"
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    more = {key for state in optimizer.state.values() for key in state} - _CONVERTED
    if more:
        return f"{', '.join(sorted(more))} of every parameter (routing.paths full)"
    if truncated:
        return "the updates that each layer has had (routing.truncated_depth)"
    return None


def _convert(checkpoint: Path, folder: Path) -> str | None:
    """Writes ``folder``; says what went wrong."""
    # By name, in its parent: the converter makes patterns of the path it writes to.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint.resolve()), "--output_folder", folder.name]
    command += ["--num_extract_workers", str(_WORKERS), "--num_merge_workers", str(_WORKERS)]
    command += ["--inject_missing_state"]
    # DeepSpeed's import wants whole minutes, and the converter waits for no one.
    env = {key: value for key, value in os.environ.items() if key != "DEEPSPEED_TIMEOUT"}
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed: parts would be mixed
        folder.mkdir(parents=True)
        done = subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True)
        # The converter's own pointer to what it wrote last: nobody here reads it.
        (folder.parent / "latest_universal").unlink(missing_ok=True)
    except OSError as error:
        return str(error)
    if done.returncode:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return None


@contextlib.contextmanager
def universal_checkpoint(
    checkpoint: Path, folder: Path, engine, world: World, group=None, truncated: bool = False
) -> Iterator[Path]:
    """The checkpoint in universal form, and the engine set to read it. Collective.

    Args:
        checkpoint: a verified checkpoint of any number of ranks.
        folder: temporary, on a file system all ranks share.
        truncated: whether the run's backward is cut at some time.
    Raises:
        CheckpointError: on all ranks, where it cannot be converted or would lose something.
    """
    if lost := _what_is_lost(engine, truncated):
        raise CheckpointError(
            f"{checkpoint} can be resumed on its own number of ranks only: its universal form "
            f"would lose {lost}",
            everywhere=True,
        )
    problem = _convert(checkpoint, folder) if world.is_main else None
    if problem := first_problem(problem, group):
        raise CheckpointError(f"{checkpoint} cannot be converted: {problem}", everywhere=True)
    # Under ZeRO 3 it gives all groups the first one's settings: weight decay, what is routed.
    groups = engine.optimizer.param_groups
    settings = [{k: v for k, v in part.items() if k != "params"} for part in groups]
    engine._config.load_universal_checkpoint = True
    yield folder
    # Not where the load has failed: a rank that waited here for the others would hide why.
    engine._config.load_universal_checkpoint = False
    for part, kept in zip(engine.optimizer.param_groups, settings, strict=True):
        part.update(kept)
    barrier(group)
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
