"""``unpad``: forward and backward of real batches with and without pads, interleaved.

The losses of the two arms are compared at every step: a faster arm that computes something else
is an error.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from trelm_ds.benchmark.results import require_folder, timing_rows, write_result
from trelm_ds.config import build_config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import EXIT_STOPPED, TrelmError
from trelm_ds.model import Normalizers, TrelmModel

logger = logging.getLogger(__name__)

ARMS = ("padded", "unpadded")
WARM_UP = 1  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path, required=True, help="prepared folder")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=2)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--intermediate_size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="of each arm")
    parser.add_argument("--json", type=Path, help="file for the result")


def run(args: argparse.Namespace, stop) -> int:
    """Measures, logs a table and writes ``--json``.

    Raises:
        DataError: the folder cannot be read.
        TrelmError: the two arms' losses differ by more than rounding.
    """
    require_folder(args.json)
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    common = {f"model.{name}": getattr(args, name) for name in shape} | {
        "data.data_dir": str(args.data_dir),
        "data.num_workers": 0,
        "train.per_device_train_batch_size": args.batch,
        "memory.enabled": False,
    }
    graph, tables = KnowledgeGraph.load(args.data_dir), KnowledgeTables.load(args.data_dir)
    models = {}
    for arm in ARMS:
        config = build_config(common | {"model.unpad": arm == "unpadded"})
        torch.manual_seed(0)
        models[arm] = TrelmModel.build(config, args.data_dir, graph, tables).train()
    loader = StepLoader(config, args.data_dir, rank=0, world_size=1, graph=graph, tables=tables)
    batches = loader.iterate(0)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    tokens = places = 0
    for step in range(args.steps + WARM_UP):
        if stop.requested:
            return EXIT_STOPPED
        (batch,) = next(batches)
        counts = batch.counts()
        normalizers = Normalizers(max(1, counts["mlm"]), max(1, counts["cka"]))
        losses = {}
        for arm in ARMS if step % 2 else ARMS[::-1]:
            models[arm].zero_grad()
            begin = time.perf_counter()
            loss = models[arm](batch, None, 0.0, normalizers).loss
            loss.backward()
            seconds = time.perf_counter() - begin
            losses[arm] = loss.item()
            if step >= WARM_UP:
                times[arm].append(seconds * 1e3)
        if abs(losses["unpadded"] - losses["padded"]) > 1e-4 * abs(losses["padded"]):
            raise TrelmError(f"step {step}: the losses differ: {losses}")
        if step >= WARM_UP:
            tokens, places = tokens + counts["tokens"], places + batch.input_ids.numel()
    batches.close()

    table = timing_rows(times, "padded")
    for row in table:
        logger.info("%-10s min %8.1f ms  median %8.1f ms  ratio %.3f", *row.values())
    pads = round(1 - tokens / places, 3)
    logger.info("pads: %.3f of all places", pads)
    if args.json:
        measured = {name: getattr(args, name) for name in (*shape, "batch", "steps")}
        write_result(
            args.json, "unpad", table, pads=pads, threads=torch.get_num_threads(), **measured
        )
    return 0
