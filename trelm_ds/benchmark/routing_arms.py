"""Forms of routing over one shared model, which take turns at training steps.

All arms share one model, one batch and one optimizer state, so that an arm differs from the next in
its routing alone.
"""

from __future__ import annotations

import collections
import functools
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist

from trelm_ds.backbone import build_backbone
from trelm_ds.benchmark.cost_model import step_flops
from trelm_ds.benchmark.synthetic import (
    RELATIONS,
    SPECIAL,
    VOCAB_SIZES,
    Shapes,
    synthetic_batch,
    synthetic_tables,
)
from trelm_ds.compact_gradients import CompactGradients
from trelm_ds.config import RoutingConfig, build_config
from trelm_ds.distributed import cpu_group, world_size
from trelm_ds.errors import ConfigError
from trelm_ds.model import Normalizers, TrelmModel, parameter_groups
from trelm_ds.optim import PathAdamW, RoutedFragment
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.scope import apply_scope
from trelm_ds.routing.truncation import BackwardTruncation
from trelm_ds.throughput import Stopwatch

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
COMPACT = "+compact"  # path rows alone travel; measured on several ranks only
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own default


class Arm:
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
        watch.start("select")
        self.routing.begin_step(self.step, 1.0)
        self.routing.before_micro_batch(bench.model, bench.batch, None, 0.0)
        watch.stop("select")
        watch.start("forward")
        output = bench.model(bench.batch, None, 0.0, bench.normalizers)
        watch.stop("forward")
        watch.start("backward")
        output.loss.backward()
        watch.stop("backward")
        watch.start("communication")
        if bench.world_size > 1 and self.compact is not None:
            self.compact.reduce()
        elif bench.world_size > 1:
            bench.buffered_allreduce_fallback([p.grad for p in self.trained if p.grad is not None])
        watch.stop("communication")
        watch.start("optimizer")
        bench.gradients_to_masters(self.trained)
        masters = [bench.master(p) for p in self.trained]
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        self.optimizer.step()
        bench.masters_to_weights(self.trained)
        for p in (*self.trained, *masters):
            p.grad = None
        self.routing.end_step(True)
        watch.stop("optimizer")
        self.step += 1
        return watch.totals()

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
        self.watch = Stopwatch(device)
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
