"""``memory``: lookups and commits of the memory bank, by its size and over the ranks of the job.

A round is what a training step asks of the bank: a lookup of every mention, staging of their
contributions, one commit. Banks of all sizes take turns within a round where memory allows. A time
is that of the slowest rank, which all of them wait for; reported are medians over the rounds.

Keys are drawn ``zipf`` (log-uniform, which is Zipf's law with exponent 1 over keys numbered by
frequency, as prepared corpora number them) or ``uniform``.
"""

from __future__ import annotations

import argparse
import logging
import socket
import time
from pathlib import Path

import psutil
import torch

from trelm_ds.benchmark.ranks import choose_device, process_group, this_world
from trelm_ds.benchmark.results import require_folder, require_positive, write_result
from trelm_ds.config import MemoryConfig
from trelm_ds.distributed import barrier, cpu_group, gather_objects, gather_vector
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.memory.bank import MemoryBank
from trelm_ds.memory.budget import required_bytes
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

KEYS = ("zipf", "uniform")
PHASES = ("lookup", "stage", "commit")
MENTIONS_PER_SEQUENCE = 8
WARM_UP = 1  # rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entities", type=int, nargs="+", default=[10_000, 100_000], metavar="N")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--mentions", type=int, default=1024, help="of one rank in one step")
    parser.add_argument("--keys", choices=KEYS, default="zipf", help="how they are drawn")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every size")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    parser.add_argument("--json", type=Path, help="file for the result")


def draw_keys(entities: int, count: int, how: str, generator: torch.Generator) -> torch.Tensor:
    """int64 [count] in [0, entities), on the CPU."""
    if how == "uniform":
        return torch.randint(entities, (count,), generator=generator)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    # P(key < k) = log(k + 1) / log(entities + 1), which needs no table of the entities
    return ((entities + 1.0) ** draws).long().sub_(1).clamp_(0, entities - 1)


class _Arm:
    """A bank of one size and what it is asked."""

    def __init__(self, entities: int, hidden_size: int, mentions: int, keys: str, device, control):
        self.keys, self.device, self.control = keys, device, control
        group = None if device.type == "cuda" else control  # the default one is NCCL's there
        self.bank = MemoryBank(
            entities, hidden_size, MemoryConfig(), group, device=device, control=control
        )
        # Every row is written once: untouched ones share a single page of zeros, in the cache.
        start = torch.full((1, hidden_size), 0.02)
        self.bank.initialise(lambda keys: start.expand(len(keys), -1))
        self.generator = torch.Generator().manual_seed(self.bank.rank)  # each rank draws its own
        self.sequence = torch.arange(mentions) // MENTIONS_PER_SEQUENCE
        states = torch.randn(2, mentions, hidden_size, generator=self.generator).to(device)
        self.local, self.cls = states[0], states[1, self.sequence.to(device)]

    def run(self, number: int) -> list[float]:
        """One step; seconds of each phase on this rank."""
        keys = draw_keys(self.bank.layout.num_keys, len(self.local), self.keys, self.generator)
        place = number * self.bank.layout.world_size + self.bank.rank
        sequences = place * len(keys) + self.sequence  # other ones on each rank, in each round
        calls = (
            lambda: self.bank.lookup(keys, self.device),
            lambda: self.bank.stage(keys, sequences, self.local, self.cls),
            lambda: self.bank.commit(self.bank.version + 1),
        )
        seconds = []
        for call in calls:
            barrier(self.control)  # nobody's time holds the wait for a rank that is not there yet
            began = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return seconds


def measure(
    entities: list[int], shape: tuple[int, int, str], rounds: int, device, stop: StopRequest
) -> list[dict] | None:
    """A row a size; None when it was asked to stop. Collective over the ranks.

    Args:
        entities: keys of each bank.
        shape: width of a row, mentions of one rank in one step, one of ``KEYS``.
        rounds: timed steps of every size.
    Raises:
        ConfigError: a bank does not fit into the memory that is free.
    """
    control = cpu_group()
    hosts = gather_objects(socket.gethostname(), control)
    free = psutil.virtual_memory().available / hosts.count(socket.gethostname())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    free = gather_vector([free], control).min().item()  # all ranks decide alike
    shards = MemoryConfig().virtual_shards
    needed = [
        sum(required_bytes(n, shape[0], len(hosts), shape[1], shards).values()) for n in entities
    ]
    if max(needed) > free:
        raise ConfigError(
            f"--entities {max(entities)}: needs {max(needed) / 2**30:.2f} GiB on each of "
            f"{len(hosts)} rank(s), {free / 2**30:.2f} GiB are free"
        )
    rows: list[dict] = []
    for sizes in [entities] if sum(needed) <= free else [[n] for n in entities]:
        found = _in_turns([_Arm(n, *shape, device, control) for n in sizes], rounds, stop)
        if found is None:
            return None
        rows += found
    return rows


def _in_turns(arms: list[_Arm], rounds: int, stop: StopRequest) -> list[dict] | None:
    control, times = arms[0].control, [[] for _ in arms]
    for number in range(WARM_UP + rounds):
        for arm, taken in zip(arms, times, strict=True):
            slowest = gather_vector(arm.run(number), control).max(0).values
            if number >= WARM_UP:
                taken.append(slowest)
        # each rank has the signal, but one may not have seen it yet
        if gather_vector([stop.requested], control).any():
            return None
    rows = []
    for arm, taken in zip(arms, times, strict=True):
        layout, (mentions, hidden_size) = arm.bank.layout, arm.local.shape
        row = {"entities": layout.num_keys, "hidden_size": hidden_size}
        row |= {"ranks": layout.world_size, "mentions": mentions}
        medians = torch.stack(taken).quantile(0.5, 0).tolist()
        row |= {f"{p}_ms": round(1e3 * s, 3) for p, s in zip(PHASES, medians, strict=True)}
        rows.append(row | {"bytes_per_rank": int(gather_vector([arm.bank.nbytes], control).max())})
    return rows


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Measures, logs a table and writes ``--json``.

    Raises:
        ConfigError: a number out of range, or a bank that does not fit.
    """
    require_folder(args.json)
    require_positive(args, "hidden_size", "mentions", "rounds", "entities")
    world = this_world()
    device = choose_device(args.device, world)
    shape = (args.hidden_size, args.mentions, args.keys)
    with process_group(world, device):
        rows = measure(args.entities, shape, args.rounds, device, stop)
    if rows is None:
        return EXIT_STOPPED
    if not world.is_main:
        return EXIT_DONE
    for row in rows:
        logger.info("  ".join(f"{name} {value}" for name, value in row.items()))
    if args.json:
        more = {"keys": args.keys, "rounds": args.rounds, "device": device.type}
        write_result(args.json, "memory", rows, **more)
    return EXIT_DONE
