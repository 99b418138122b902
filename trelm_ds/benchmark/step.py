"""What one training step costs: dense against every form of routing, interleaved in one run.

All arms share one model, one batch and one optimizer state, so that an arm differs from the next in
its routing alone, and take turns step by step, so that a slow moment of the machine meets all of
them. Ratios are medians over the rounds of (arm / dense) within a round.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import functools
import logging
import statistics
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trelm_ds.backbone import build_backbone
from trelm_ds.benchmark.cost_model import step_flops
from trelm_ds.benchmark.processes import ProcessDied, in_own_process
from trelm_ds.benchmark.ranks import choose_device, process_group, this_world
from trelm_ds.benchmark.results import require_folder, require_positive, write_result
from trelm_ds.compact_gradients import CompactGradients
from trelm_ds.config import Config, RoutingConfig, build_config
from trelm_ds.data.collate import Batch, Collator, Example
from trelm_ds.data.masking import Masker
from trelm_ds.data.sampling import SampledMentions
from trelm_ds.data.special import SpecialTokens
from trelm_ds.distributed import cpu_group, gather_vector, world_size
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.metrics import peak_flops, peak_memory_gib, training_flops
from trelm_ds.model import Normalizers, TrelmModel, parameter_groups
from trelm_ds.optim import PathAdamW, RoutedFragment
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.scope import apply_scope
from trelm_ds.routing.truncation import BackwardTruncation
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

_PATH = {"input_gradient": "path"}
_BLOCK = {"form": "block", "rotation_steps": 50}
_SENT = {"compact_gradients": True}
_TRUNCATED = {"truncated_depth": 0.5, "truncate_start": 0.0}

# Name -> keys of the routing section. ``dense`` is what the others are compared with.
ARMS: dict[str, dict] = {
    "dense": {"form": "none"},
    "frozen": {"form": "frozen"},
    "block.25": _BLOCK | {"kept_fraction": 0.25},
    "block.125": _BLOCK | {"kept_fraction": 0.125},
    "block.25+path": _BLOCK | _PATH | {"kept_fraction": 0.25},
    "block.125+path": _BLOCK | _PATH | {"kept_fraction": 0.125},
    "random.1": {"form": "random", "kept_fraction": 0.1},
    "random.25+path": _PATH | {"form": "random", "kept_fraction": 0.25},
    "in_backward.1": {"form": "in_backward", "kept_fraction": 0.1},
    "in_backward.1+abs": {
        "form": "in_backward",
        "kept_fraction": 0.1,
        "score": "abs_gradient",
    },
    "strict": _BLOCK | {"kept_fraction": 0.125, "scope": "strict"},
    "strict+path": _BLOCK | _PATH | {"kept_fraction": 0.125, "scope": "strict"},
    "block.25+path+truncated": _BLOCK | _PATH | _TRUNCATED | {"kept_fraction": 0.25},
    "block.125+path+truncated": _BLOCK | _PATH | _TRUNCATED | {"kept_fraction": 0.125},
    "strict+path+truncated": _BLOCK | _PATH | _TRUNCATED
    | {"kept_fraction": 0.125, "scope": "strict"},
    "block.25+path+compact": _BLOCK | _PATH | _SENT | {"kept_fraction": 0.25},
    "random.1+compact": _SENT | {"form": "random", "kept_fraction": 0.1},
    "strict+path+compact": _BLOCK | _PATH | _SENT | {"kept_fraction": 0.125, "scope": "strict"},
}  # fmt: skip
BASELINE = "dense"
PHASES = ("select", "forward", "backward", "communication", "optimizer")
COMPACT = "+compact"  # path rows alone travel; measured on several ranks only

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own default
VOCAB_SIZES = {"bert": 30522, "roberta": 50265}
SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3, all=(0, 1, 2, 3))
ENTITIES, RELATIONS, TRANSE_DIM = 1000, 50, 100
MENTIONS_PER_SEQUENCE = 4


@dataclass
class Shapes:
    """What is timed. Defaults: BERT-base, a batch that two CPU cores take a few seconds for."""

    model_type: str = "bert"
    num_hidden_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int | None = None
    sequence_length: int = 128
    batch_size: int = 8
    dtype: str = "fp32"
    overrides: dict[str, object] = field(default_factory=dict)  # of the configuration, flat

    def config(self) -> Config:
        """The run's configuration: injection by table vectors and decoding on, memory off."""
        names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
        names += ("intermediate_size",)
        return build_config(
            {f"model.{name}": getattr(self, name) for name in names}
            | {
                "model.max_position_embeddings": max(512, self.sequence_length),
                "data.max_seq_length": max(128, self.sequence_length),
                "memory.enabled": False,
            }
            | self.overrides
        )


def synthetic_tables(vocab_size: int) -> types.SimpleNamespace:
    """What the model and the collator read of ``KnowledgeTables``, drawn at random."""
    rng = np.random.default_rng(0)
    names = rng.integers(4, min(1000, vocab_size), (ENTITIES, 8)).astype(np.int32)
    names[:, 3:] = -1  # names of three tokens
    return types.SimpleNamespace(
        entity_embeddings=rng.normal(size=(ENTITIES + 1, TRANSE_DIM)).astype(np.float32),
        relation_embeddings=rng.normal(size=(RELATIONS + 1, TRANSE_DIM)).astype(np.float32),
        entity_names=names,
        relation_names=names[:RELATIONS],
    )


def synthetic_batch(shapes: Shapes, config: Config, vocab_size: int, tables) -> Batch:
    """A micro-batch of full-length sequences with mentions, injection, masks and triples."""
    rng = np.random.default_rng(1)
    special = SPECIAL.is_special(vocab_size)
    masker = Masker(special, SPECIAL.mask, config.data.mlm_probability)
    collator = Collator(SPECIAL, 8, shapes.sequence_length, config.decoding.max_tokens, tables)
    examples = []
    for position in range(shapes.batch_size):
        ids = rng.integers(4, vocab_size, shapes.sequence_length).astype(np.int32)
        ids[0], ids[-1] = SPECIAL.cls, SPECIAL.sep
        count = MENTIONS_PER_SEQUENCE
        left = 1 + np.arange(count) * ((shapes.sequence_length - 4) // count)
        mentions = SampledMentions(
            spans=np.stack([left, left + 3], 1),
            keys=rng.integers(0, ENTITIES, count),
            injected=np.arange(count) % 3 == 0,  # a third, as the recommended recipe has it
            role=1 + np.arange(count) % 2,
            relation=rng.integers(0, RELATIONS, count),
            other=rng.integers(0, ENTITIES, count),
            decode_mention=np.repeat(np.arange(count), 2),
            decode_relation=rng.integers(0, 2 * RELATIONS, 2 * count),
            decode_entity=rng.integers(0, ENTITIES, 2 * count),
        )
        injected = mentions.spans[mentions.injected]
        corrupted, targets, _ = masker(ids, np.zeros((0, 2), dtype=np.int64), injected, rng)
        examples.append(Example(position, ids, corrupted, targets, mentions))
    negatives = rng.integers(4, vocab_size, config.decoding.num_negatives)
    return Batch.from_numpy(collator(examples, negatives))


class _Arm:
    """One arm's routing and optimizer over the shared model."""

    def __init__(self, name: str, bench: StepBenchmark):
        self.name, self.bench = name, bench
        self.config = build_config(
            {f"routing.{key}": value for key, value in ARMS[name].items()}
        ).routing
        self.step = 0
        self.context = RoutingContext()
        apply_scope(bench.model, self.config)
        self.trains = [(p, p.requires_grad) for p in bench.model.parameters()]
        self.activate()
        self.routing = RoutingController(
            *(self.config, bench.model.ffns, self.context),
            total_steps=10**6,
            seed=0,
            truncation=bench.truncation if self.config.truncated_depth else None,
        )
        self.optimizer = PathAdamW(parameter_groups(bench.model, 0.01), lr=1e-6)
        self.optimizer.state = bench.optimizer_state  # the same weights have the same moments
        routed = self.config.form not in ("none", "frozen")
        fragments = [
            RoutedFragment(
                *(bench.master(p), 0, p.numel(), layer, kind, 0),
                row_length=p.shape[1] if p.dim() == 2 else 1,
            )
            for layer, kind, p in bench.model.routed_parameters()
            if p.requires_grad
        ]
        for group in self.optimizer.param_groups:
            group["params"] = [bench.master(p) for p in group["params"]]
        self.optimizer.bind(fragments if routed else (), self.routing)
        self.trained = [p for p, trains in self.trains if trains]
        self.compact = None
        if self.config.compact_gradients:
            routed = list(bench.model.routed_parameters())
            self.compact = CompactGradients(bench, routed, self.routing, {})

    def activate(self) -> None:
        """Makes the shared model this arm's."""
        model = self.bench.model
        for parameter, trains in self.trains:
            parameter.requires_grad_(trains)
        model.routing_context = self.context
        for ffn in model.ffns:
            ffn.context = self.context

    def run(self) -> dict[str, float]:
        """One optimizer step; seconds per phase."""
        bench = self.bench
        self.activate()
        watch = bench.watch
        watch.mark()
        self.routing.begin_step(self.step, 1.0)
        self.routing.before_micro_batch(bench.model, bench.batch, None, 0.0)
        watch.mark("select")
        output = bench.model(bench.batch, None, 0.0, bench.normalizers)
        watch.mark("forward")
        output.loss.backward()
        watch.mark("backward")
        if bench.world_size > 1 and self.compact is not None:
            self.compact.reduce()
        elif bench.world_size > 1:
            bench.buffered_allreduce_fallback([p.grad for p in self.trained if p.grad is not None])
        watch.mark("communication")
        bench.gradients_to_masters(self.trained)
        masters = [bench.master(p) for p in self.trained]
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        self.optimizer.step()
        bench.masters_to_weights(self.trained)
        for p in (*self.trained, *masters):
            p.grad = None
        self.routing.end_step(True)
        watch.mark("optimizer")
        self.step += 1
        return watch.take()

    def rotation_seconds(self) -> float:
        """Cost of one rotation of the blocks; 0 for forms that have none."""
        if self.config.form != "block" or not self.config.rotation_steps:
            return 0.0
        self.activate()
        times = []
        for _ in range(3):
            self.step += self.config.rotation_steps
            started = time.perf_counter()
            self.routing.begin_step(self.step, 1.0)
            self.bench.synchronize()
            times.append(time.perf_counter() - started)
            self.routing.end_step(True)
        return statistics.median(times)


class _Laps:
    """Seconds between marks; device events on a GPU, so that nothing waits inside a step."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, object]] = []

    def mark(self, phase: str | None = None) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self._marks.append((phase, event))

    def take(self) -> dict[str, float]:
        marks, self._marks = self._marks, []
        if self._cuda:
            torch.cuda.synchronize()
        seconds = {}
        for (_, before), (phase, after) in zip(marks, marks[1:], strict=False):
            seconds[phase] = before.elapsed_time(after) / 1e3 if self._cuda else after - before
        return seconds


class StepBenchmark:
    """The shared model, batch, master weights and moments of all arms.

    On several ranks gradients are averaged as a DeepSpeed engine without ZeRO does, whose place it
    takes for ``CompactGradients``.
    """

    optimizer = None

    def __init__(self, shapes: Shapes, device: torch.device):
        self.shapes, self.device = shapes, device
        if shapes.dtype not in ("fp32", "bf16"):
            raise ConfigError(f"--dtype {shapes.dtype}: known are fp32 and bf16")
        config = shapes.config()
        vocab_size = shapes.vocab_size or VOCAB_SIZES[shapes.model_type]
        tables = synthetic_tables(vocab_size)
        torch.manual_seed(0)
        backbone = build_backbone(config, vocab_size, SPECIAL.pad)
        log_q = torch.full((vocab_size,), -float(np.log(vocab_size)))
        self.model = TrelmModel(backbone, config, tables, RELATIONS, log_q)
        dtype = torch.bfloat16 if shapes.dtype == "bf16" else torch.float32
        self.module = self.model.to(device=device, dtype=dtype).train()
        self.communication_data_type = dtype
        self.world_size = world_size()
        self.control = cpu_group()
        batch = synthetic_batch(shapes, config, vocab_size, tables)
        counts = batch.counts()
        self.tokens, self.masked = counts["tokens"], counts["mlm"]
        self.normalizers = Normalizers(float(counts["mlm"]), float(counts["cka"]))
        self.batch = batch.to(device)
        self.watch = _Laps(device)
        self.optimizer_state: dict = collections.defaultdict(dict)
        self._masters = {}
        if dtype != torch.float32:  # fp32 copies that the optimizer steps, as DeepSpeed has them
            for p in self.model.parameters():
                self._masters[p] = p.detach().float()

    @functools.cached_property
    def truncation(self) -> BackwardTruncation:
        """The cut that truncated arms share: its hooks nest by module, not by arm."""
        self.model.truncation = BackwardTruncation(self.model, RoutingConfig(**_TRUNCATED))
        return self.model.truncation

    def master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return self._masters.get(parameter, parameter)

    def gradients_to_masters(self, parameters) -> None:
        for p in parameters if self._masters else ():
            self._masters[p].grad = None if p.grad is None else p.grad.float()

    @torch.no_grad()
    def masters_to_weights(self, parameters) -> None:
        if self._masters:
            torch._foreach_copy_(list(parameters), [self._masters[p] for p in parameters])

    def buffered_allreduce_fallback(self, grads: list[torch.Tensor]) -> None:
        """Averages ``grads`` over the ranks in place, flattened into buckets."""
        bucket: list[torch.Tensor] = []
        for i, grad in enumerate(grads):
            bucket.append(grad)
            if i + 1 < len(grads) and sum(g.numel() for g in bucket) < BUCKET_ELEMENTS:
                continue
            flat = torch._utils._flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat.div_(self.world_size)
            parts = torch._utils._unflatten_dense_tensors(flat, bucket)
            torch._foreach_copy_(bucket, list(parts))
            bucket = []

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self, routing: RoutingConfig):
        return step_flops(
            self.model.backbone.config,
            routing,
            self.tokens,
            self.masked,
            self.shapes.sequence_length,
            truncated=routing.truncated_depth > 0,
        )


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
    states = [_Arm(name, bench) for name in arms]
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
    arm = _Arm(name, bench)
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
