"""A benchmark's place in a job of several ranks, where ``torchrun`` or ``deepspeed`` started it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from trelm_ds.distributed import World, get_world, timeout
from trelm_ds.engine import local_device
from trelm_ds.errors import ConfigError


def this_world() -> World:
    """The launcher's world; the environment stays as it is, for processes started from here."""
    return get_world(dict(os.environ))


def choose_device(name: str | None, world: World) -> torch.device:
    """This rank's device by ``--device``; None: the GPU if there is one.

    Raises:
        ConfigError: a GPU is asked for and this machine shows none, or fewer than ranks.
    """
    device = torch.device("cpu") if name == "cpu" else local_device(world)
    if name == "cuda" and device.type == "cpu":
        raise ConfigError("--device cuda: this machine shows no GPU")
    return device


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Joins the ranks for the time of the block, if there are several."""
    if world.size == 1:
        yield
        return
    get_world()  # completes the launcher's variables, which the rendezvous reads
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout())
    try:
        yield
    finally:
        dist.destroy_process_group()
