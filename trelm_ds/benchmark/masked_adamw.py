"""``masked-adamw``: the masked AdamW against torch's fused AdamW on one flat partition.

Arms, interleaved: torch's fused AdamW on everything; the masked one with every row on the path
(one count for all; a count that changes from row to row), with a block of a quarter and of an
eighth of the rows, and with a scattered tenth. Reported are milliseconds, minimum and median, and
the median of the ratio to torch's time in the same round: the arms of a round share whatever else
the machine does.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from torch.optim.adamw import adamw

from trelm_ds.benchmark.results import require_folder, timing_rows, write_result
from trelm_ds.errors import EXIT_STOPPED
from trelm_ds.ops import load_kernels, masked_adamw_

logger = logging.getLogger(__name__)

NUMBERS = dict(lr=1e-4, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01)
FUSED = "torch fused"
WARM_UP = 2  # rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--elements", type=int, default=10_000_000, help="of the partition")
    parser.add_argument("--row", type=int, default=768, help="elements of a row")
    parser.add_argument("--repeats", type=int, default=40, help="rounds of all arms")
    parser.add_argument("--json", type=Path, help="file for the result")


def row_counts(rows: int) -> dict[str, torch.Tensor]:
    """int64 [rows] per arm: 0 off the path, else the row's number of updates."""

    def block(size: int) -> torch.Tensor:
        counts = torch.zeros(rows, dtype=torch.int64)
        counts[rows // 3 : rows // 3 + size] = 100
        return counts

    generator = torch.Generator().manual_seed(0)
    scattered = torch.rand(rows, generator=generator) < 0.1
    return {
        "masked, every row": torch.full((rows,), 100),
        "masked, every row, own counts": 100 + torch.arange(rows) % 50,
        "masked, block of 1/4": block(rows // 4),
        "masked, block of 1/8": block(rows // 8),
        "masked, scattered 1/10": scattered.long() * 100,
    }


def run(args: argparse.Namespace, stop) -> int:
    """Measures, logs a table and writes ``--json``."""
    require_folder(args.json)
    kernels = load_kernels()
    rows = max(1, args.elements // args.row)
    size = rows * args.row
    param, grad, exp_avg = (torch.randn(size) for _ in range(3))
    exp_avg_sq, step = torch.rand(size), torch.tensor(100.0)
    state = (param, grad, exp_avg, exp_avg_sq)

    def fused() -> None:
        step.fill_(99.0)
        lists = [[t] for t in state]
        adamw(*lists, [], [step], fused=True, amsgrad=False, maximize=False, **NUMBERS)

    arms = {FUSED: fused}
    for name, counts in row_counts(rows).items():
        place = (0, args.row, counts)
        arms[name] = lambda place=place: masked_adamw_(*state, *place, **NUMBERS)
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(args.repeats + WARM_UP):
        if stop.requested:
            return EXIT_STOPPED
        shift = turn % len(names)  # no arm always runs after the same neighbour
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            arms[name]()
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - begin) * 1e3)

    table = timing_rows(times, FUSED)
    for row in table:
        logger.info("%-30s min %8.3f ms  median %8.3f ms  ratio %.3f", *row.values())
    if args.json:
        write_result(
            *(args.json, "masked-adamw", table),
            elements=size, row=args.row, threads=torch.get_num_threads(), kernels=kernels,
        )  # fmt: skip
    return 0
