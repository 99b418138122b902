"""Who this process is in the job, and the few collectives the trainer makes itself.

Rank and rendezvous come from the launcher's variables (``deepspeed``, ``torchrun``), else from
SLURM's when the process was started by ``srun``, else the job is this one process.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from trelm_ds.errors import (
    ConfigError,
    DataError,
    TrelmError,
    WriteError,
    exit_code,
    report,
)


@dataclass(frozen=True)
class World:
    """Ranks of the job and of this machine."""

    rank: int
    size: int
    local_rank: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World(0, 1, 0, "none")


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: ``gpu[003-007,9],login`` gives ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    if not match:
        raise ConfigError(f"cannot read the first host of SLURM's node list {nodelist!r}")
    return match.group(1) + (match.group(2) or "")


def _integer(env: dict, name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"environment variable {name}={env[name]!r} is not a number") from None


def get_world(env: dict | None = None) -> World:
    """Reads the launcher's variables and completes them for ``torch.distributed``.

    Args:
        env: defaults to ``os.environ``; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR
            and MASTER_PORT are set in it.
    Raises:
        ConfigError: a variable is missing or not a number.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "launcher"
        rank, size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        local_rank = _integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        # SLURM_STEP_*: set by srun only, so that a batch script without srun stays one process.
        launcher = "slurm"
        rank, size = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_STEP_NUM_TASKS")
        local_rank = _integer(env, "SLURM_LOCALID")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        launcher, rank, size, local_rank = "none", 0, 1, 0
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in env:
            env["MASTER_PORT"] = str(free_port())
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below the world size {size}")
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        env[name] = str(value)
    per_node = env.get("SLURM_NTASKS_PER_NODE", str(size)) if launcher == "slurm" else "1"
    env.setdefault("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", per_node))
    return World(rank, size, local_rank, launcher)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group=None) -> int:
    """Ranks of the group, or of the job; 1 before they have met."""
    return dist.get_world_size(group) if is_initialised() else 1


def has_peers() -> bool:
    """Whether this process has met others in its job."""
    return world_size() > 1


DEFAULT_TIMEOUT_MINUTES = 30  # a rank that stops answering ends the job after this


def timeout(env: dict | None = None) -> timedelta:
    """How long a collective waits for a rank: ``DEEPSPEED_TIMEOUT`` minutes, or 30.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = (os.environ if env is None else env).get("DEEPSPEED_TIMEOUT")
    try:
        minutes = DEFAULT_TIMEOUT_MINUTES if text is None else float(text)
        if not 0 < minutes < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"environment variable DEEPSPEED_TIMEOUT={text!r} is not a number of minutes"
        ) from None
    return timedelta(minutes=minutes)


def new_group(backend: str | None = None):
    """A process group of all ranks with an order of its own; None for a single process.

    With this module's timeout: a new group has its backend's default otherwise, not the job's.
    """
    if not has_peers():
        return None
    return dist.new_group(backend=backend, timeout=timeout())


def cpu_group():
    """A gloo group for small host-side collectives: no device synchronisation, own order."""
    return new_group("gloo")


def gather_vector(values: list[float], group=None) -> torch.Tensor:
    """Every rank's ``values`` as float64 [world, len(values)]; one small host collective."""
    mine = torch.tensor(values, dtype=torch.float64)
    if not has_peers():
        return mine[None]
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(rows, mine, group=group)
    return torch.stack(rows)


def gather_objects(value, group=None) -> list:
    """``value`` of every rank, in rank order (small, JSON-like objects only)."""
    if not has_peers():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_problem(problem: str | None, group=None) -> str | None:
    """The first rank's problem, the same on every rank, so that all go the same way."""
    problems = [f"rank {r}: {p}" for r, p in enumerate(gather_objects(problem, group)) if p]
    return problems[0] if problems else None


@contextlib.contextmanager
def write_together(what: str, group=None):
    """A block that writes: where it fails on one rank it fails on all. Collective.

    A rank that raised alone would leave the others waiting for it in their next collective.

    Args:
        what: what the message begins with.
        group: host-side process group.
    Raises:
        WriteError: on all ranks, naming the first that failed and why.
    """
    problem = None
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, TrelmError) as error:
        # RuntimeError: what torch.save raises
        problem = f"{type(error).__name__}: {error}"
    if problem := first_problem(problem, group):
        raise WriteError(f"{what}: {problem}", everywhere=True)


@contextlib.contextmanager
def agree(group=None):
    """A block that fails on all ranks where it fails on one. Collective, and nothing in it may be.

    A rank that raised alone would leave the others waiting for it in their next collective; ranks
    that all raised, of a folder that is missing everywhere, would all say so.

    Raises:
        TrelmError: on all ranks: what the first that failed raised (an OSError as a DataError),
            naming it unless all failed alike.
    """
    problem = None
    try:
        yield
    except (TrelmError, OSError) as error:
        if not has_peers():
            raise
        problem = error if isinstance(error, TrelmError) else DataError(str(error))
    problems = gather_objects(problem, group)
    rank = next((rank for rank, found in enumerate(problems) if found is not None), None)
    if rank is not None:
        first = problems[rank]
        alike = all(str(found) == str(first) for found in problems)
        raise type(first)(str(first) if alike else f"rank {rank}: {first}", everywhere=True)


def together(work: Callable[[], object], group=None) -> list:
    """What ``work()`` returns on every rank, in rank order (as ``gather_objects``).

    Raises:
        TrelmError: as ``agree``.
    """
    with agree(group):
        value = work()
    return gather_objects(value, group)


def report_once(error: Exception) -> int:
    """``report`` for ranks: by rank 0 alone where all of them fail alike (``TrelmError``)."""
    rank, alike = os.environ.get("RANK", "0"), getattr(error, "everywhere", None)
    if alike is None:
        alike = not is_initialised()
    if rank == "0":
        report(error)
    elif not alike:
        report(error, f"error on rank {rank}")
    return exit_code(error)


def leave() -> None:
    """Takes leave of the other ranks at the end of a job that went well.

    A process that ends with its groups open takes their threads down in no order, and now and then
    gloo's abort it, after all is done.
    """
    if is_initialised():
        dist.destroy_process_group()


def barrier(group=None) -> None:
    if has_peers():
        dist.barrier(group=group)
