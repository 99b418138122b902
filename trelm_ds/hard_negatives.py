"""Hard negatives of Eq. 2: name tokens of entities near the gold one in memory space.

Every ``decoding.hard_negative_refresh_steps`` steps the memory bank is written out, a process of
its own builds the table of neighbours with FAISS, and half an interval later every rank switches
to it at the same step, whether or not it was ready before. So the table in use is a function of
the step, and a resumed run has the one it would have had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from trelm_ds.config import Config
from trelm_ds.data.candidates import EntityCandidates
from trelm_ds.data.collate import Batch
from trelm_ds.data.rng import HARD_NEGATIVES, generator
from trelm_ds.distributed import (
    World,
    barrier,
    first_problem,
    gather_objects,
    timeout,
    write_together,
)
from trelm_ds.errors import TrelmError
from trelm_ds.memory.bank import MemoryBank
from trelm_ds.memory.index import NeighbourTable, build_table, hard_negative_tokens, table_path

logger = logging.getLogger(__name__)

NEIGHBOURS = 16  # per entity


BUILD_WAIT_S = 600.0  # for a build that is late, beside the half interval it had


class HardNegatives:
    """Replaces the last ``decoding.hard_negatives`` of a micro-batch's negatives.

    They depend on the micro-batch's gold entities, so with them the loss is no longer independent
    of how the global batch is split. Each keeps the unigram log Q of Eq. 2. Entity decoding is
    offered the neighbours themselves.

    Args:
        config: the run's configuration.
        bank: the memory bank.
        graph: its ``contains`` says which neighbours are right answers too.
        tables: entity names as tokens.
        folder: for snapshots and tables; shared by the ranks, kept between starts of a run.
        world, group: this process's place, and a host-side group.
        oldest_checkpoint: step of the oldest checkpoint kept: its table must be kept too.
    """

    def __init__(
        self,
        config: Config,
        bank: MemoryBank,
        graph,
        tables,
        folder: Path,
        world: World,
        group,
        oldest_checkpoint: Callable[[], int],
    ):
        self._oldest_checkpoint = oldest_checkpoint
        self._count = config.decoding.hard_negatives
        self._interval = config.decoding.hard_negative_refresh_steps
        self._delay = max(1, self._interval // 2)
        self._seed = config.train.seed
        self._bank, self._graph, self._tables = bank, graph, tables
        self._folder, self._world, self._group = folder, world, group
        self._table = NeighbourTable(folder, graph.num_entities)
        self._process = None
        self._candidates = None
        if config.decoding.entity_weight:
            self._candidates = EntityCandidates(config, graph, tables)

    def _snapshot(self, version: int) -> Path:
        return self._folder / f"bank-{version:08d}"

    def resume(self, step: int, own: bool = True) -> None:
        """Takes up the table in use at ``step`` and a build that was under way. Collective.

        What another run left in the folder is forgotten, and so is what this one made after
        ``step``: it goes on from there in its own way. A table that is gone (a run resumed in
        another folder) is warned about and done without.

        Args:
            step: steps taken.
            own: whether they were taken in this folder.
        """
        with write_together(f"{self._folder} cannot be cleared", self._group):
            if self._world.is_main and self._folder.is_dir():
                if step == 0 or not own:
                    shutil.rmtree(self._folder)
                for path in self._folder.glob("neighbours-*"):
                    if path.name >= table_path(self._folder, step).name:
                        path.unlink()
        if step == 0:
            return
        last = (step - 1) // self._interval * self._interval  # newest version begun before
        if last >= self._interval and step <= last + self._delay:
            self._start_build(last)
            last -= self._interval
        # A version that could not be built was done without then, and the one before it kept.
        while last >= self._interval and not self._activate(last):
            last -= self._interval

    def begin_step(self, step: int) -> None:
        """Starts or activates a table where the schedule says so. Collective on those steps."""
        if step >= self._interval and step % self._interval == 0 and self._write_snapshot(step):
            self._start_build(step)
        version = step - self._delay
        if version >= self._interval and version % self._interval == 0:
            self._activate(version)

    def _write_snapshot(self, version: int) -> bool:
        """False where a rank could not write its part: this version is done without."""
        folder = self._snapshot(version)

        def make_folder():
            if self._world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)

        for part in (make_folder, lambda: self._bank.save_shards(folder)):
            problem = None
            try:
                part()
            except (OSError, SafetensorError) as error:
                problem = str(error)
            if problem := first_problem(problem, self._group):
                if self._world.is_main:
                    logger.warning("hard negatives: version %d not built: %s", version, problem)
                    shutil.rmtree(folder, ignore_errors=True)
                return False
        return True

    def _start_build(self, version: int) -> None:
        if not self._world.is_main or table_path(self._folder, version).exists():
            return
        # Spawned: FAISS hangs in a fork of a process that has run it, or torch, with threads.
        self._process = multiprocessing.get_context("spawn").Process(
            target=_build,
            args=(self._snapshot(version), self._folder, version, self._graph.num_entities),
            daemon=True,
        )
        self._process.start()

    def _activate(self, version: int) -> bool:
        if self._process is not None:
            # The other ranks wait in the barrier below, and not longer than a collective does.
            self._process.join(min(BUILD_WAIT_S, timeout().total_seconds() / 2))
            if self._process.is_alive():  # stuck on its disk: the ranks wait for rank 0 meanwhile
                logger.warning(
                    "hard negatives: version %d is given up, not built in time: raise "
                    "decoding.hard_negative_refresh_steps",
                    version,
                )
                self._process.kill()
                self._process.join(1.0)  # a process that waits for a disk does not even die
            self._process = None
        barrier(self._group)
        active = self._table.activate(
            version, lambda ready: all(gather_objects(ready, self._group))
        )
        if self._world.is_main:
            shutil.rmtree(self._snapshot(version), ignore_errors=True)
            first = max(0, self._oldest_checkpoint() - 2 * self._interval)
            oldest = table_path(self._folder, first)
            for path in self._folder.glob("neighbours-*"):
                if path.name < oldest.name:
                    with contextlib.suppress(OSError):  # a table too many does no harm
                        path.unlink()
        return active

    def apply(self, batch: Batch, step: int) -> Batch:
        """The micro-batch with its hard negatives; unchanged while there is no table."""
        table = self._table.table
        if table is None or not len(batch.decode_other):
            return batch
        gold = batch.decode_other.numpy()
        entity = batch.mention_keys[batch.decode_mention].numpy()
        relation = batch.decode_relation.numpy()

        def is_true(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
            backwards = relation[rows] >= self._graph.num_relations
            head = np.where(backwards, candidates, entity[rows])
            tail = np.where(backwards, entity[rows], candidates)
            return self._graph.contains(head, relation[rows] % self._graph.num_relations, tail)

        if self._candidates is not None:
            keys = batch.mention_keys.numpy()
            nearest_first = table[np.unique(gold)].T.ravel()
            fields = self._candidates(
                step,
                entity,
                relation,
                gold,
                offered=np.r_[
                    keys[keys < self._graph.num_entities], nearest_first[nearest_first >= 0]
                ],
            )
            tensors = {name: torch.from_numpy(array) for name, array in fields.items()}
            batch = dataclasses.replace(batch, **tensors)
        rng = generator(self._seed, HARD_NEGATIVES, step, int(batch.stream_positions[0]))
        names = self._tables.entity_names
        tokens = hard_negative_tokens(table, gold, names, self._count, rng, is_true)
        if not len(tokens):
            return batch
        negatives = batch.negatives.clone()
        negatives[-len(tokens) :] = torch.from_numpy(tokens)
        return dataclasses.replace(batch, negatives=negatives)


def _build(snapshot: Path, folder: Path, version: int, num_entities: int) -> None:
    """The builder process: a failure leaves no table, and the ranks keep the one they have."""
    try:
        build_table(snapshot, folder, version, num_entities, min(NEIGHBOURS, num_entities - 1))
    except (TrelmError, OSError) as error:
        logging.basicConfig(level=logging.WARNING)
        logger.warning("hard negatives: version %d not built: %s", version, error)
