"""What one training step costs: dense against every form of routing, interleaved in one run.

The arms take turns step by step, so that a slow moment of the machine meets all of them. Ratios are
medians over the rounds of (arm / dense) within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import logging
import statistics
from pathlib import Path

import torch

from trelm_ds.benchmark.processes import ProcessDied, in_own_process
from trelm_ds.benchmark.ranks import choose_device, process_group, this_world
from trelm_ds.benchmark.results import require_folder, require_positive, write_result
from trelm_ds.benchmark.routing_arms import ARMS, BASELINE, COMPACT, Arm, StepBenchmark
from trelm_ds.benchmark.synthetic import VOCAB_SIZES, Shapes
from trelm_ds.distributed import gather_vector
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.stopping import StopRequest
from trelm_ds.throughput import peak_flops, peak_memory_gib, training_flops

logger = logging.getLogger(__name__)

PHASES = ("select", "forward", "backward", "communication", "optimizer")


def measure(
    shapes: Shapes,
    device: torch.device,
    arms: list[str],
    rounds: int,
    warmup: int = 1,
    measure_memory: bool = True,
    stop: StopRequest | None = None,
) -> list[dict] | None:
    """Times the arms and returns one row for each; None when it was asked to stop.

    Args:
        arms: names out of ``ARMS``; the baseline is added where it is missing.
        rounds: timed rounds; in each, every arm takes one step.
        warmup: rounds before them that are not timed.
        measure_memory: take each arm's peak memory, on a CPU in a process of its own.
    """
    arms = [BASELINE, *(a for a in arms if a != BASELINE)]
    bench = StepBenchmark(shapes, device)
    states = [Arm(name, bench) for name in arms]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    memory: dict[str, float] = {}

    def stopping() -> bool:
        # each rank has the signal, but one may not have seen it yet
        return stop is not None and bool(gather_vector([stop.requested], bench.control).any())

    for number in range(warmup + rounds):
        shift = number % len(states)
        for arm in states[shift:] + states[:shift]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = arm.run()
            if device.type == "cuda":
                memory[arm.name] = 1024 * peak_memory_gib(device)
            if number >= warmup:
                samples[arm.name].append(seconds)
        logger.info("round %d of %d", number + 1, warmup + rounds)
        if stopping():
            return None
    rotation = {arm.name: arm.rotation_seconds() for arm in states}
    configs = {arm.name: arm.config for arm in states}
    flops = {name: bench.flops(config).total for name, config in configs.items()}
    peak = peak_flops(device)
    model_flops = training_flops(
        bench.model.backbone.config, bench.tokens, bench.masked, shapes.sequence_length
    )
    del states
    if measure_memory and device.type == "cpu":
        del bench.model, bench.module, bench.optimizer_state  # room for the other processes
        for name in arms:
            if stopping():
                return None
            memory[name] = _peak_memory_mib(shapes, name)

    def total(name: str, number: int) -> float:
        sample = samples[name][number]
        per_step = rotation[name] / max(1, configs[name].rotation_steps)
        return sum(sample[phase] for phase in PHASES) + per_step

    rows = []
    for name in arms:
        ratios = sorted(total(name, i) / total(BASELINE, i) for i in range(rounds))
        step = statistics.median(total(name, i) for i in range(rounds))
        medians = {
            f"{phase}_ms": 1e3 * statistics.median(s[phase] for s in samples[name])
            for phase in PHASES
        }
        rows.append(
            {
                "arm": name,
                "device": device.type,
                "dtype": shapes.dtype,
                "sequence_length": shapes.sequence_length,
                "batch_size": shapes.batch_size,
                "layers": shapes.num_hidden_layers,
                **medians,
                "rotation_ms": 1e3 * rotation[name],
                "ranks": bench.world_size,
                "step_ms": 1e3 * step,
                "ratio_to_dense": statistics.median(ratios),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
                "predicted_ratio": flops[name] / flops[BASELINE],
                "peak_memory_mib": memory.get(name),
                # of the dense step's arithmetic, whatever the arm leaves out
                "mfu": model_flops / step / peak,
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Shapes()
    parser.add_argument("--json", type=Path, help="file for the rows; the figure goes beside it")
    parser.add_argument(
        "--arms", nargs="+", default=["*"], metavar="GLOB", help=f"out of {', '.join(ARMS)}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every arm")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--model_type", choices=tuple(VOCAB_SIZES), default=defaults.model_type)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--vocab_size", type=int, help="default: the model type's own")
    parser.add_argument("--sequence_length", type=int, default=defaults.sequence_length)
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size)
    parser.add_argument(
        "--no_peak_memory", action="store_true", help="CPU: skip the process per arm it takes"
    )


def run(args: argparse.Namespace, stop) -> int:
    """``benchmark.py step``: the table on stdout, JSON and PNG where ``--json`` says."""
    require_folder(args.json)
    world = this_world()
    arms = [a for a in ARMS if any(fnmatch.fnmatch(a, glob) for glob in args.arms)]
    if world.size == 1:
        arms = [a for a in arms if not a.endswith(COMPACT)]
    if not arms:
        raise ConfigError(f"--arms {' '.join(args.arms)}: none of {', '.join(ARMS)}")
    require_positive(args, "rounds")
    device = choose_device(args.device, world)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [f.name for f in dataclasses.fields(Shapes) if hasattr(args, f.name)]
    shapes = Shapes(**{name: getattr(args, name) for name in names})
    shapes.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    with process_group(world, device):
        rows = measure(
            shapes, device, arms, args.rounds, measure_memory=not args.no_peak_memory, stop=stop
        )
    if rows is None:
        return EXIT_STOPPED
    if not world.is_main:
        return EXIT_DONE
    print(table(rows))
    if args.json:
        write_result(args.json, "step", rows)
        title = f"{shapes.num_hidden_layers} layers of {shapes.hidden_size}, {device.type}"
        plot(rows, args.json.with_suffix(".png"), f"{title} {shapes.dtype}")
    return EXIT_DONE


def _peak_memory_mib(shapes: Shapes, name: str) -> float:
    """Peak resident memory of a fresh process that takes two steps of one arm."""
    try:
        return in_own_process(_two_steps, shapes, name)
    except ProcessDied:
        logger.warning("arm %s: its memory could not be measured", name)
        return float("nan")


def _two_steps(shapes: Shapes, name: str, stop) -> float:
    device = torch.device("cpu")
    bench = StepBenchmark(shapes, device)
    arm = Arm(name, bench)
    for _ in range(2):
        arm.run()
    return 1024 * peak_memory_gib(device)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = (
        ("arm", "arm", "{}"),
        ("forward_ms", "forward ms", "{:.0f}"),
        ("backward_ms", "backward ms", "{:.0f}"),
        ("communication_ms", "communication ms", "{:.0f}"),
        ("optimizer_ms", "optimizer ms", "{:.0f}"),
        ("step_ms", "step ms", "{:.0f}"),
        ("ratio_to_dense", "ratio", "{:.3f}"),
        ("predicted_ratio", "arithmetic", "{:.3f}"),
        ("peak_memory_mib", "peak MiB", "{:.0f}"),
        ("mfu", "dense MFU", "{:.1%}"),
    )
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = ("-" if row[key] is None else form.format(row[key]) for key, _, form in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: str | Path, title: str) -> None:
    """Stacked phases per arm beside the arithmetic's prediction, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.6))
    base = rows[0]["step_ms"]
    places = range(len(rows))
    left = [0.0] * len(rows)
    for phase in ("forward", "backward", "communication", "optimizer"):
        widths = [row[f"{phase}_ms"] / base for row in rows]
        axis.barh(places, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    predicted = [row["predicted_ratio"] for row in rows]
    axis.plot(predicted, places, "k|", markersize=14, label="matrix products alone")
    axis.set_yticks(places, [row["arm"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("step time, dense = 1")
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
