"""``data``: how fast a prepared folder becomes batches, stage by stage, and what memory that takes.

| stage | what it does to a sample |
|---|---|
| ``decode`` | msgpack bytes in memory to checked arrays |
| ``read`` | the same from the shards at random places: index, ``pread``, crc32, decoding |
| ``loader`` | all of it in one process: reading, choice of mentions, masking, collating |
| ``loader+workers`` | the loader with ``--num_workers`` processes |

Each contains the one above it. Samples come in training's order, a round after the other without a
break, and rates are medians over the rounds. Every stage has a process of its own, for its peak
memory; that of ``loader+workers`` is the sum over its processes, so pages they share count in each.
The first round, which brings the files into the page cache, is not timed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trelm_ds.benchmark.processes import in_own_process
from trelm_ds.benchmark.results import require_folder, require_positive, write_result
from trelm_ds.config import Config, load_config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.order import stream_position
from trelm_ds.data.schema import decode_sample, encode_sample
from trelm_ds.data.shards import ShardReader, load_manifest, sample_limits
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DataError
from trelm_ds.pretrain import data_folder
from trelm_ds.stopping import StopRequest
from trelm_ds.throughput import peak_resident_gib

logger = logging.getLogger(__name__)

WARM_UP = 1  # rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path, help="prepared folder; default the sample")
    parser.add_argument("--method", default="trelm", help="preset that says what a batch holds")
    parser.add_argument("--samples", type=int, default=2000, help="of a round, at least")
    parser.add_argument("--rounds", type=int, default=5, help="timed, of each stage")
    parser.add_argument("--batch", type=int, default=24, help="sequences of a micro-batch")
    parser.add_argument("--num_workers", type=int, default=1, help="0: without that stage")
    parser.add_argument("--json", type=Path, help="file for the result")


def _picked(folder: Path, samples: int, seed: int) -> tuple[ShardReader, Iterator[list[int]]]:
    reader = ShardReader(folder, load_manifest(folder), "train", verify=False)
    if not len(reader):
        raise DataError(f"{folder}: empty corpus: split 'train' holds no sample")
    positions = (np.arange(samples) + first for first in range(0, 1 << 62, samples))
    return reader, (stream_position(p, len(reader), seed)[1].tolist() for p in positions)


def _decode(config: Config, folder: Path, samples: int) -> Iterator[int]:
    reader, rounds = _picked(folder, samples, config.train.seed)
    limits = sample_limits(load_manifest(folder))
    payloads = [encode_sample(reader[i]) for i in next(rounds)]  # the bytes that the shards hold
    while True:
        for payload in payloads:
            decode_sample(payload, **limits)
        yield samples


def _read(config: Config, folder: Path, samples: int) -> Iterator[int]:
    reader, rounds = _picked(folder, samples, config.train.seed)
    for picked in rounds:
        for i in picked:
            reader[i]
        yield samples


def _load(config: Config, folder: Path, samples: int) -> Iterator[int]:
    graph, tables = KnowledgeGraph.load(folder), KnowledgeTables.load(folder)
    loader = StepLoader(config, folder, 0, 1, graph, tables, verify=False)
    steps = -(-samples // loader.global_batch)
    batches = loader.iterate(0)
    while True:
        for _ in range(steps):
            next(batches)
        yield steps * loader.global_batch


STAGES = {"decode": _decode, "read": _read, "loader": _load, "loader+workers": _load}


def measure_stage(
    stage: str, config: Config, folder: Path, samples: int, rounds: int, stop: StopRequest
) -> dict | None:
    """The row of a stage, measured in this process; None when it was asked to stop.

    Raises:
        DataError, ConfigError: the folder cannot be read, or not with this configuration.
    """
    work = STAGES[stage](config, folder, samples)
    rates = []
    for number in range(WARM_UP + rounds):
        began = time.perf_counter()
        done = next(work)
        if number >= WARM_UP:
            rates.append(done / (time.perf_counter() - began))
        if stop.requested:
            return None
    processes = [None, *(child.pid for child in multiprocessing.active_children())]
    peak = 1024 * sum(map(peak_resident_gib, processes))
    work.close()
    return {
        "stage": stage,
        "samples_per_s": round(statistics.median(rates), 1),
        "peak_memory_mib": round(peak, 1),
    }


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Measures, logs a table and writes ``--json``.

    Raises:
        ConfigError, DataError: a number out of range, an unknown preset, a folder of no use.
    """
    require_folder(args.json)
    require_positive(args, "samples", "rounds", "batch")
    if args.num_workers < 0:
        raise ConfigError(f"--num_workers {args.num_workers}: must not be negative")
    # Drawing by the knowledge state needs a run that has one: texts come in natural order.
    settings = {"sampling.form": "natural", "train.per_device_train_batch_size": args.batch}
    folder = data_folder(args.data_dir)
    settings["data.max_seq_length"] = load_manifest(folder)["max_seq_length"]
    rows = []
    for stage in STAGES if args.num_workers else list(STAGES)[:-1]:
        workers = args.num_workers if stage.endswith("workers") else 0
        config = load_config(args.method, None, settings | {"data.num_workers": workers})
        measured = (stage, config, folder, args.samples, args.rounds)
        row = in_own_process(measure_stage, *measured, stop=stop)
        if row is None:
            return EXIT_STOPPED
        logger.info("%-15s %10.1f samples/s  peak %8.1f MiB", *row.values())
        rows.append(row)
    if args.json:
        names = ("method", "samples", "rounds", "batch", "num_workers")
        write_result(args.json, "data", rows, **{name: getattr(args, name) for name in names})
    return EXIT_DONE
