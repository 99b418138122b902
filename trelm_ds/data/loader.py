"""Micro-batches of every optimizer step, as a function of the step alone.

The global batch of step t is positions [t G, (t+1) G) of the sample stream, and micro-batch a of
rank r is ``micro`` of them from (a W + r) micro on. Order, masking, mention choices and negatives
are keyed by what they belong to, so the only state is the step: a run resumes anywhere, with any
number of ranks, loader processes or accumulation steps that makes the same G.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from trelm_ds.config import Config
from trelm_ds.data.candidates import EntityCandidates
from trelm_ds.data.collate import Batch, Collator
from trelm_ds.data.entity_first import EntityFirst
from trelm_ds.data.entity_samples import EntitySamples
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.knowledge_rows import KnowledgeRows
from trelm_ds.data.masking import Masker
from trelm_ds.data.micro_batches import MicroBatches
from trelm_ds.data.negatives import NegativeSampler, negative_distribution
from trelm_ds.data.sampling import MentionSampler
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.split import open_split
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.data.weights import WeightTables
from trelm_ds.errors import ConfigError, DataError, LoaderError, one_line

_HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # the training process acts on these
_PREFETCHED_MICRO_BATCHES = 4  # per loader process


class _Positions(Sampler):
    """Stream positions of one rank's micro-batches, from a step on, without end."""

    def __init__(self, start_step: int, micro: int, accumulation: int, rank: int, world: int):
        self._start = start_step
        self._micro = micro
        self._accumulation = accumulation
        self._rank = rank
        self._world = world

    def __iter__(self) -> Iterator[np.ndarray]:
        stride = self._micro * self._world
        first = self._start * self._accumulation * stride + self._rank * self._micro
        while True:
            yield np.arange(first, first + self._micro, dtype=np.int64)
            first += stride


def _as_is(arrays):
    return arrays


def _ignore_signals(worker: int) -> None:
    # A scheduler signals the whole process group; the training process decides what it means,
    # and needs its batches to reach the next step boundary.
    for number in _HELD:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_held():
    """Blocks the scheduler's signals in processes started inside, until they ignore them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        # multiprocessing starts this helper with its first process, and unblocks SIGTERM then.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


class StepLoader:
    """Yields, step after step, this rank's micro-batches.

    Args:
        config: the run's configuration.
        data_dir: a prepared data folder.
        rank: of this process.
        world_size: ranks of the job.
        graph: the folder's graph.
        tables: the folder's tables.
        split: whose samples; its mentions must be the ones scored in ``tables.importance``.
        verify: check every shard's sha256 now. The ranks of a job deal them out among themselves
            instead (``start_up.check_shards``); samples are checked by their crc32 in any case.
        entity_samples: needed unless ``sampling.form`` is natural.
        weights: needed by ``sampling.form`` knowledge_state.
    Attributes:
        global_batch: G, sequences of an optimizer step.
        num_keys: rows of the memory bank.
        num_samples: samples of the split, an epoch.
        manifest: of the data folder.
        reader: of the split.
        damaged: of the step last yielded, what is said of this rank's samples that are damaged, and
            an empty sequence instead (``data.max_damaged_samples``).
    Raises:
        DataError: the folder is empty, damaged, or its parts do not belong together.
        ConfigError: the configuration cannot be met with this folder.
    """

    def __init__(
        self,
        config: Config,
        data_dir: str | Path,
        rank: int,
        world_size: int,
        graph: KnowledgeGraph,
        tables: KnowledgeTables,
        split: str = "train",
        verify: bool = True,
        entity_samples: EntitySamples | None = None,
        weights: WeightTables | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not below the world size {world_size}")
        self._rank = rank
        self._world_size = world_size
        self._micro = config.train.per_device_train_batch_size
        self._accumulation = config.train.gradient_accumulation_steps
        self._num_workers = config.data.num_workers
        self.global_batch = self._micro * self._accumulation * world_size

        self.damaged: list[str] = []

        tolerant = config.data.max_damaged_samples > 0
        self.reader, self.manifest = open_split(
            config, data_dir, graph, tables, split, verify, tolerant
        )
        if verify:
            self.reader.verify_all()
        self.num_samples = len(self.reader)
        self.num_keys = tables.num_keys
        spans = self.manifest["splits"][split]["spans"]
        if tables.importance is not None and len(tables.importance) != spans:
            raise DataError(f"{data_dir}: importance.npy does not score the spans of {split!r}")
        vocab_size = self.manifest["tokenizer"]["vocab_size"]
        special = SpecialTokens.load(data_dir, vocab_size)
        negatives = candidates = None
        if config.decoding.enabled and config.decoding.entity_weight:
            candidates = EntityCandidates(config, graph, tables)
        if config.decoding.enabled:
            distribution = negative_distribution(
                tables, graph, vocab_size, config.decoding.unigram_power
            )
            negatives = NegativeSampler(
                distribution, config.decoding.num_negatives, config.train.seed
            )
        sampling, seed = config.sampling, config.train.seed
        needs = {"static": [entity_samples], "knowledge_state": [entity_samples, weights]}
        if any(part is None for part in needs.get(sampling.form, [])):
            raise ConfigError(
                f"sampling.form {sampling.form}: the loader was given no entity index or weights"
            )
        entity_first = knowledge_rows = None
        if sampling.form != "natural":
            entity_first = EntityFirst(entity_samples, seed)
        if sampling.knowledge_rows:
            knowledge_rows = KnowledgeRows(
                graph,
                tables,
                special,
                vocab_size,
                config.data.max_seq_length,
                sampling.knowledge_row_triples,
                seed,
            )
        self._dataset = MicroBatches(
            config,
            self.reader,
            Masker(
                special.is_special(vocab_size),
                special.mask,
                config.data.mlm_probability,
                config.data.mention_mask_probability,
            ),
            MentionSampler(config, graph, tables),
            Collator(
                special,
                config.data.pad_to_multiple_of,
                config.data.max_seq_length,
                config.decoding.max_tokens,
                tables,
                config.injection.text_length if config.injection.form == "encoder" else 0,
                config.memory.half_window,
            ),
            negatives,
            candidates,
            graph.num_entities,
            self.global_batch,
            entity_first,
            knowledge_rows,
            weights if sampling.form == "knowledge_state" else None,
            special,
        )
        self._weights = weights
        self._batches: Iterator | None = None
        self._processes: list = []

    def epoch_of_step(self, step: int) -> int:
        """Epoch of the first text of a step's global batch (q of Eq. 8)."""
        return int(self.epochs(step))

    def epochs(self, steps: int) -> float:
        """Passes over the data that so many steps make: of the texts in natural order, neither
        those drawn by entity nor rows of triples, which know no passes."""
        return self._dataset.natural_rows(steps * self.global_batch) / self.num_samples

    def iterate(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields each step's micro-batches (a list of the accumulation length), without end.

        One iteration at a time: starting another ends the loader processes of the last.

        Raises:
            DataError: a shard cannot be read, or a sample is damaged and
                ``data.max_damaged_samples`` is 0; names shard and key.
        """
        self.close()
        if self._weights is not None:
            self._weights.open()
        loader = DataLoader(
            self._dataset,
            sampler=_Positions(
                start_step, self._micro, self._accumulation, self._rank, self._world_size
            ),
            batch_size=None,  # the sampler's items are whole micro-batches
            collate_fn=_as_is,
            num_workers=self._num_workers,
            # Never fork: threads of the training process (OpenMP, FAISS) do not survive it.
            # Not forkserver: a signal to the process group would end the server and with it the
            # workers. The stream has no end, so the processes live as long as the iteration.
            multiprocessing_context="spawn" if self._num_workers else None,
            prefetch_factor=_PREFETCHED_MICRO_BATCHES if self._num_workers else None,
            worker_init_fn=_ignore_signals,
            # Its own, so that a resumed run's dropout draws from where the first one stopped.
            generator=torch.Generator(),
        )
        before = set(multiprocessing.active_children())
        with _signals_held():
            self._batches = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        # Before multiprocessing's own clean-up, which would wait for SIGTERM to end them.
        atexit.register(self.close)
        return self._steps(self._batches)

    def _steps(self, batches: Iterator) -> Iterator[list[Batch]]:
        try:
            while True:
                step, damaged = [], []
                for _ in range(self._accumulation):
                    try:
                        made = next(batches)
                    except RuntimeError as error:
                        if not self._num_workers:
                            raise
                        raise LoaderError(f"a loader process: {one_line(error)}") from None
                    if isinstance(made, DataError):
                        raise made
                    step.append(Batch.from_numpy(made[0]))
                    damaged += made[1]
                self.damaged = damaged
                yield step
        finally:
            if batches is self._batches:
                self.close()

    def close(self) -> None:
        """Ends the loader processes, if any."""
        atexit.unregister(self.close)
        if self._weights is not None:
            self._weights.close()
        batches, self._batches = self._batches, None
        if self._processes:
            # By name, and not by dropping the last reference: a traceback may hold another.
            batches._shutdown_workers()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._processes = []
