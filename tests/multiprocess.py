"""Runs a function on several ranks on this machine and collects what each returns."""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trelm_ds.distributed import free_port


def _entry(rank, function, world_size, port, folder, args, backend):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        result = function(rank, world_size, *args)
        torch.save(result, Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run_ranks(function, world_size: int, *args, backend: str = "gloo") -> list:
    """``function(rank, world_size, *args)`` on every rank; module-level, picklable.

    Returns:
        The ranks' return values, in rank order.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(
                _entry,
                (function, world_size, free_port(), folder, args, backend),
                nprocs=world_size,
            )
        except Exception as error:
            reports = [p.read_text() for p in sorted(Path(folder).glob("*.error"))]
            raise AssertionError("\n".join(reports) or str(error)) from error
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
