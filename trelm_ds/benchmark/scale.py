"""``scale``: whole training steps on 1, 2, ... ranks of this machine, with an equal batch for each.

Every measurement is a short run of ``launch/pretrain.py``, one process a rank. The numbers of ranks
take turns, and efficiency is the median over the rounds of (tokens/s of R ranks) / (R x tokens/s of
one) within a round. Each rank has the same number of cores whatever the number of ranks; where
there are fewer cores than ranks they are shared, and the efficiency is the machine's limit. Within
a run time and tokens are medians over intervals of the training clock, the first one left out.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from trelm_ds.arguments import add_config_flags, add_set_flag, given_settings
from trelm_ds.benchmark import runner
from trelm_ds.benchmark.processes import run_on_ranks
from trelm_ds.benchmark.results import require_folder, require_positive, write_json, write_result
from trelm_ds.config import Config, load_config
from trelm_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.metrics import read_metrics
from trelm_ds.pretrain import data_folder
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

INTERVALS = 8  # of a run
# Beside the steps a run evaluates and saves as little as it can; none of it is on its clock.
QUIET = {
    **{"train.eval_steps": 0, "train.eval_batches": 1, "train.eval_probes": 1},
    **{"train.save_steps": 0, "train.export": False},
}
OWN = {key.removeprefix("train.") for key in QUIET} | {
    *("output_dir", "max_steps", "max_hours", "logging_steps", "save_total_limit"),
    *("resume_from_checkpoint", "report_to"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument(
        "--zero_stages", type=int, nargs="+", default=[2], choices=range(4), metavar="STAGE"
    )
    parser.add_argument("--method", default="trelm", help="preset")
    parser.add_argument("--steps", type=int, default=40, help="of every run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", type=Path, help="file for the result")
    add_set_flag(parser, "for every run")
    add_config_flags(parser, OWN)


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Measures, logs a table and writes ``--json``.

    Raises:
        ConfigError: a number out of range, or a setting that the trainer refuses.
        RunFailed: a run ended otherwise.
    """
    require_folder(args.json)
    require_positive(args, "ranks", "rounds")
    if args.steps < 2:
        raise ConfigError(f"--steps {args.steps}: must be at least 2, the first are not timed")
    settings = given_settings(args, OWN, "benchmark")
    settings["data.data_dir"] = str(data_folder(settings.get("data.data_dir")))
    settings |= QUIET | {
        "train.max_steps": args.steps,
        "train.logging_steps": max(1, args.steps // INTERVALS),
    }
    config = load_config(args.method, None, settings)
    ranks = sorted({1, *args.ranks})
    if 0 < (gpus := torch.cuda.device_count()) < ranks[-1]:
        raise ConfigError(f"--ranks {ranks[-1]}: this machine shows {gpus} GPU(s)")
    cores = runner.own_cores()
    each = max(1, len(cores) // ranks[-1])
    if len(cores) < ranks[-1]:
        logger.warning("%d ranks share %d core(s): times are theirs", ranks[-1], len(cores))
    shares = [cores[i * each : (i + 1) * each] or [cores[i % len(cores)]] for i in range(ranks[-1])]
    found = {(stage, size): [] for stage in args.zero_stages for size in ranks}
    for number in range(args.rounds):
        for (stage, size), values in found.items():
            value = measure_run(config, stage, shares[:size], stop)
            if value is None:
                return EXIT_STOPPED
            values.append(value)
            logger.info("round %d: ZeRO %d on %d rank(s): %s", number + 1, stage, size, value)
    rows = [_row(stage, size, values, found[stage, 1]) for (stage, size), values in found.items()]
    for row in rows:
        logger.info("  ".join(f"{name} {value}" for name, value in row.items()))
    if args.json:
        more = {"rounds": args.rounds, "config": config.to_dict()}
        more |= {"cores": len(cores), "cores_per_rank": each}
        write_result(args.json, "scale", rows, **more)
    return EXIT_DONE


def _row(stage: int, size: int, values: list[dict], alone: list[dict]) -> dict:
    shares = [
        v["tokens_per_s"] / one["tokens_per_s"] / size for v, one in zip(values, alone, strict=True)
    ]
    row = {"ranks": size, "zero_stage": stage}
    for name in ("tokens_per_s", "step_ms"):
        row[name] = round(statistics.median(value[name] for value in values), 1)
    row["efficiency"] = round(statistics.median(shares), 3)
    return row | {"efficiency_low": round(min(shares), 3), "efficiency_high": round(max(shares), 3)}


def measure_run(
    config: Config, zero_stage: int, shares: list[list[int]], stop: StopRequest
) -> dict | None:
    """``tokens_per_s`` (all ranks) and ``step_ms`` of one run; None when it was asked to stop.

    Args:
        shares: the cores of each rank.
    Raises:
        ConfigError: the trainer refuses its settings or its data.
        RunFailed: it ended with another error.
    """
    with tempfile.TemporaryDirectory(prefix="trelm-scale-") as folder:
        output = Path(folder)
        write_json(output / runner.REQUEST, config.to_dict())
        write_json(output / "deepspeed.json", {"zero_optimization": {"stage": zero_stage}})
        command = [sys.executable, str(runner.SCRIPT), "--config", str(output / runner.REQUEST)]
        command += ["--output_dir", str(output), "--deepspeed", str(output / "deepspeed.json")]
        code = run_on_ranks(command, shares, output / runner.CONSOLE, stop)
        if code == EXIT_STOPPED:
            return None
        if code != EXIT_DONE:
            said = runner.last_words(output / runner.CONSOLE)
            if code == EXIT_BAD_INPUT:
                raise ConfigError(said.removeprefix("error: "))
            raise runner.RunFailed(f"a run on {len(shares)} rank(s) ended with code {code}: {said}")
        history = read_metrics(output / "metrics.jsonl")
    logged = [row for row in history if "throughput/step_s" in row]
    pairs = list(zip(logged, logged[1:], strict=False))
    seconds = [after["time_s"] - before["time_s"] for before, after in pairs]
    steps = [after["step"] - before["step"] for before, after in pairs]
    tokens = [after["train/tokens_seen"] - before["train/tokens_seen"] for before, after in pairs]
    return {
        "tokens_per_s": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)),
        "step_ms": statistics.median(1e3 * s / n for s, n in zip(seconds, steps, strict=True)),
    }
