"""The training loop, one for every method: load, look up, step, commit, log, evaluate, save.

A run is a function of its configuration and one integer, the step: the data order, masks,
negatives, schedules and random paths are derived from it, so a checkpoint holds the weights, the
optimizer, the memory bank, the routing state, the ranks' dropout generators and that integer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter
from pathlib import Path

import torch

from trelm_ds import engine as engines
from trelm_ds import stack_dump
from trelm_ds.checkpoint import (
    LAST_STEP,
    Checkpointer,
    TrainState,
    checkpoint_name,
    load_model_state,
)
from trelm_ds.compact_gradients import CompactGradients
from trelm_ds.config import Config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.heldout import heldout_batches
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.shards import load_manifest
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.data.weights import WeightTables
from trelm_ds.distributed import (
    World,
    agree,
    cpu_group,
    gather_vector,
    new_group,
    write_together,
)
from trelm_ds.engine import gathered
from trelm_ds.errors import DataError, LoaderError, WriteError
from trelm_ds.evaluate import evaluate_heldout, evaluate_probes, load_probes
from trelm_ds.export import export_model, last_evaluation
from trelm_ds.hard_negatives import HardNegatives
from trelm_ds.interval import Interval
from trelm_ds.knowledge_sampling import KnowledgeSampling
from trelm_ds.memory.bank import MemoryBank
from trelm_ds.memory.budget import mentions_per_step, require_memory
from trelm_ds.memory.knowledge_state import KnowledgeState
from trelm_ds.metrics import MetricLog, console_line, plot_curves
from trelm_ds.model import TrelmModel, parameter_groups
from trelm_ds.optim import WHOLE, PathAdamW
from trelm_ds.routing.controller import (
    ATTRIBUTION_FORMS,
    BACKWARD_FORMS,
    RoutingController,
    refuse_unsupported,
)
from trelm_ds.schedules import learning_rate, memory_epoch, memory_weight
from trelm_ds.start_up import (
    check_knowledge,
    check_shards,
    ensure_entity_samples,
    ensure_importance,
)
from trelm_ds.step_plan import StepCounts, StepPlan
from trelm_ds.stopping import StopRequest
from trelm_ds.throughput import wait_for
from trelm_ds.zero_layout import clear_gradients, routed_fragments

logger = logging.getLogger(__name__)

# Keys a resumed run may change: where things are, what is reported, how the work is laid out. The
# last may change rounding and which dropout is drawn; where another split of the global batch
# changes more than that, the run says so (``_warn_of_another_split``).
FREE_ON_RESUME = {
    *("data.data_dir", "data.num_workers", "data.max_damaged_samples"),
    *("model.model_name_or_path", "model.attn_implementation"),
    *("model.gradient_checkpointing", "model.unpad", "memory.device", "memory.max_gib"),
    *("routing.audit_form", "routing.compact_gradients"),
    *("routing.audit_steps", "train.output_dir", "train.logging_steps", "train.eval_steps"),
    *("train.eval_batches", "train.eval_probes", "train.save_steps", "train.save_total_limit"),
    *("train.resume_from_checkpoint", "train.report_to", "train.export", "train.bf16"),
    *("train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
}
MAX_SKIPPED_IN_A_ROW = 5  # non-finite steps before the run gives up
MAX_FAILED_WRITES = 3  # in a row, of one kind, before the run gives up


class TrainingError(Exception):
    """The run cannot go on (not the user's input): exit code 1, the last checkpoint stands."""


class Trainer:
    """Builds every part of a run and drives it.

    Args:
        config: the resolved configuration; ``data.data_dir`` and ``train.output_dir`` are set.
        ds_config: the resolved DeepSpeed configuration.
        world: this process's place in the job; the process group is initialised.
        device: this rank's accelerator.
        stop: shared flag that ends the run with a checkpoint.
    """

    def __init__(
        self, config: Config, ds_config: dict, world: World, device: torch.device, stop: StopRequest
    ):
        self.config = config
        self.world = world
        self.device = device
        self.stop = stop
        self.output_dir = Path(config.train.output_dir)
        self.data_dir = Path(config.data.data_dir)
        self.state = TrainState()
        self.control = cpu_group()
        self._skipped_in_a_row = 0
        # Whether the last step's losses and its gradients were finite, bool [2]; read a step later
        # so that a GPU is not waited for in between.
        self._finite = torch.ones(2, dtype=torch.bool)
        self._saved: int | None = None  # step of the newest checkpoint of this process
        self._failed_saves = 0
        self._failed_writes: Counter[str] = Counter()  # in a row, of each kind
        self._evaluated: int | None = None  # step of the newest evaluation
        self._truncated = False  # whether a step has been

        stage = engines.zero_stage(ds_config)
        refuse_unsupported(config, stage)
        if config.routing.form == "block" and not config.decoding.enabled and world.is_main:
            logger.info("routing.form block: without decoding nothing is scored, blocks take turns")
        with agree(self.control):
            self.manifest = load_manifest(self.data_dir)
            self.graph = KnowledgeGraph.load(self.data_dir)
            self.tables = KnowledgeTables.load(self.data_dir)
            torch.manual_seed(config.train.seed)  # equal initial weights on all ranks
            self.model = TrelmModel.build(config, self.data_dir, self.graph, self.tables)
            self.model.to(device)
        ensure_importance(self.model, config, self.data_dir, self.manifest, world, self.control)
        self.tables = KnowledgeTables.load(self.data_dir)
        self._tables_digest = check_knowledge(self.data_dir, self.manifest, world, self.control)
        weights = None
        if config.sampling.form == "knowledge_state":
            weights = WeightTables(
                KnowledgeSampling.folder(self.output_dir),
                self.graph.num_entities,
                config.sampling.refresh_steps,
            )
        entity_samples = ensure_entity_samples(
            config, self.data_dir, self.manifest, world, self.control
        )
        with agree(self.control):
            self.loader = StepLoader(
                config,
                self.data_dir,
                rank=world.rank,
                world_size=world.size,
                graph=self.graph,
                tables=self.tables,
                verify=False,
                entity_samples=entity_samples,
                weights=weights,
            )
        check_shards(self.loader.reader, world, self.control)
        self.sampling = None
        if weights is not None:
            self.sampling = KnowledgeSampling(
                config.sampling,
                KnowledgeState(
                    self.graph.num_entities, config.sampling.discount, self.control, device
                ),
                weights,
                self.tables.entity_frequency,
                world,
                self.control,
            )
        self.bank = self._build_bank()
        self.hard_negatives = None
        if config.decoding.hard_negatives:
            self.hard_negatives = HardNegatives(
                config,
                self.bank,
                self.graph,
                self.tables,
                self.output_dir / "neighbours",
                world,
                self.control,
                oldest_checkpoint=lambda: self.checkpoints.oldest_step(),
            )
        self.routing = RoutingController(
            config.routing,
            self.model.ffns,
            self.model.routing_context,
            total_steps=config.train.max_steps,
            seed=config.train.seed,
            process_group=new_group(),  # path scores travel in an order of their own
            truncation=self.model.truncation,
        )
        train = config.train
        optimizer = PathAdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
        )
        self.optimizer = optimizer
        self.engine = engines.build_engine(self.model, optimizer, ds_config)
        masked = self._masked_parameters()
        optimizer.bind(
            routed_fragments(self.engine, masked) if masked else (),
            self.routing,
            element_counts=config.routing.paths == "full",
        )
        self.compact_gradients = None
        if config.routing.compact_gradients:
            self.compact_gradients = CompactGradients(
                self.engine,
                list(self.model.routed_parameters()),
                self.routing,
                dict(self.model.truncation.parameters()),
            )
        # Dropout differs between ranks; the state travels with the checkpoint.
        torch.manual_seed(config.train.seed + 1_000_003 * (world.rank + 1))
        self.checkpoints = Checkpointer(
            self.output_dir,
            world,
            self._identity(),
            config.train.save_total_limit,
            device,
            self.control,
        )
        with agree(self.control):
            self.heldout = heldout_batches(
                config, self.data_dir, world.rank, world.size, self.graph, self.tables
            )
            self.probes = load_probes(self.data_dir, self.model, limit=config.train.eval_probes)

    # -- construction ---------------------------------------------------------------------------

    def _masked_parameters(self) -> list[tuple[torch.nn.Parameter, int, str]]:
        """(parameter, layer, kind) of the trained parameters that some steps do not update."""
        named = []
        if self.config.routing.form not in ("none", "frozen"):
            named = [(p, layer, kind) for layer, kind, p in self.model.routed_parameters()]
        listed = {id(p) for p, _, _ in named}
        cut = self.model.truncation.parameters()
        named += [(p, layer, WHOLE) for p, layer in cut if id(p) not in listed]
        return [entry for entry in named if entry[0].requires_grad]

    def _build_bank(self) -> MemoryBank | None:
        if not self.config.memory.enabled:
            return None
        with agree(self.control):
            require_memory(
                self.loader.num_keys,
                self.model.hidden_size,
                self.world.size,
                mentions_per_step(self.config),
                self.config.memory.virtual_shards,
                self.config.memory.max_gib,
            )
        on_cpu = self.config.memory.device == "cpu" or self.device.type == "cpu"
        bank = MemoryBank(
            self.loader.num_keys,
            self.model.hidden_size,
            self.config.memory,
            process_group=self.control if on_cpu else new_group(),
            device=torch.device("cpu") if on_cpu else self.device,
            control=self.control,
        )
        bank.initialise(self.model.name_embeddings(self.tables))
        return bank

    def _identity(self) -> dict:
        """What a checkpoint and the run that resumes it must share: all that decides the result."""
        flat = {
            f"{section}.{key}": value
            for section, body in self.config.to_dict().items()
            if isinstance(body, dict)
            for key, value in body.items()
            if f"{section}.{key}" not in FREE_ON_RESUME
        }
        if not (self.config.routing.truncated_depth or self.config.routing.start):
            # Else the share of the budget that is spent decides what trains: it must not fall back.
            flat.pop("train.max_hours")
        backbone = self.model.backbone.config
        shape = ("model_type", "vocab_size", "hidden_size", "intermediate_size")
        shape += ("num_hidden_layers", "num_attention_heads", "hidden_dropout_prob")
        shape += ("attention_probs_dropout_prob", "hidden_act", "layer_norm_eps")
        return {
            "dataset_id": self.manifest["dataset_id"],
            # Scores and vectors can be made anew in the folder: who is injected, and with what.
            "tables": self._tables_digest if self.config.uses_mentions else None,
            "global_batch": self.loader.global_batch,
            "backbone": {key: getattr(backbone, key) for key in shape},
            **flat,
        }

    # -- the run --------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restores the newest intact checkpoint when asked to, and opens the metrics."""
        which = self.config.train.resume_from_checkpoint
        found = self.checkpoints.find(which) if which else None
        if found is not None:
            self.state = self.checkpoints.restore(
                found, self.engine, self.bank, self.routing, self.sampling
            )
            logger.info("resumed from %s at step %d", found, self.state.step)
            self._warn_of_another_split(found)
            if self.checkpoints.is_own(found, self.state.step):
                self._saved = self.state.step  # a stop before the next step writes nothing again
        elif which:
            logger.info("no checkpoint in %s yet: starting from step 0", self.checkpoints.folder)
        own = found is None or self.checkpoints.is_beside(found)
        if self.hard_negatives is not None:
            self.hard_negatives.resume(self.state.step, own)
        if self.sampling is not None:
            self.sampling.start()
        metrics = self.output_dir / "metrics.jsonl"
        with write_together(f"{metrics} was not written", self.control):
            if not own and self.world.is_main and metrics.exists():
                aside = metrics.with_name(f"abandoned-{metrics.name}")
                logger.warning(
                    "setting %s aside: the run goes on from another's checkpoint", metrics
                )
                os.replace(metrics, aside)
            self.log = MetricLog(
                metrics,
                self.world.is_main,
                resume_step=self.state.step if found else -1,  # a start from scratch keeps no line
                monitor=getattr(self.engine, "monitor", None),
            )

    def _warn_of_another_split(self, checkpoint: Path) -> None:
        """Losses are global means, the same for any split of the global batch, but for these."""
        config = self.config
        by_micro_batch = {
            "the candidates of entity decoding": config.decoding.enabled
            and config.decoding.entity_weight > 0,
            "hard negatives": config.decoding.hard_negatives > 0,
            f"the paths of {config.routing.form}": config.routing.form
            in (*BACKWARD_FORMS, *ATTRIBUTION_FORMS),
        }
        reasons = [what for what, used in by_micro_batch.items() if used]
        saved = json.loads((checkpoint / "config.json").read_text())["train"]
        # The global batch is the same: of as many sequences, the micro-batches are the same ones.
        key = "per_device_train_batch_size"
        if reasons and saved[key] != getattr(config.train, key) and self.world.is_main:
            logger.warning(
                "%s differs from the checkpoint's: %s are taken from a micro-batch, so the run "
                "does not go on as it would have",
                key,
                " and ".join(reasons),
            )

    @property
    def done(self) -> bool:
        """Whether the restored state has nothing left to do; the same on every rank."""
        train = self.config.train
        out_of_time = train.max_hours is not None and self.state.clock_s >= train.max_hours * 3600
        return self.state.step >= train.max_steps or out_of_time

    def train(self) -> bool:
        """Runs to the end of the budget or to a stop request.

        Returns:
            True when the run is complete, False when it stopped on request; a checkpoint of the
            last step is written either way.
        Raises:
            DataError: on all ranks, after the same checkpoint: one of them cannot read its batch,
                or one sample more than ``data.max_damaged_samples`` is damaged.
            LoaderError: likewise, where a loader process of one of them has died.
            WriteError: on all ranks: the last checkpoint cannot be written, or one on the way or
                the metrics could not be for the third time in a row.
        """
        train = self.config.train
        self._interval = Interval(self.device, self.world.size)
        if self.state.step == 0:
            self.evaluate()
        batches = self.loader.iterate(self.state.step)
        plan, stopped, damage, began = None, False, None, False
        while self.state.step < train.max_steps:
            started = time.perf_counter()
            stack_dump.rearm()
            self._interval.watch.start("data")
            try:
                micro_batches = next(batches)
            except (DataError, LoaderError) as error:
                # The others hear of it in the plan: all of them save first.
                micro_batches, damage = [], error
            self._interval.watch.stop("data")
            if not began:  # the loader's processes have started: no resume is charged for it
                self._interval.watch.totals()
                started, began = time.perf_counter(), True
            # Only what the ranks agreed on in the plan decides: their own clocks differ.
            ahead, stopped = self._plan(micro_batches)
            if stopped or ahead.progress >= 1.0:
                break
            quarantined = self.state.quarantined + ahead.counts.damaged
            if ahead.counts.damaged and quarantined > self.config.data.max_damaged_samples:
                if self.loader.damaged:  # the ranks that met none hear of it below
                    damage = DataError(f"{self.loader.damaged[0]} (data.max_damaged_samples)")
                stopped = True
                break
            plan = ahead
            self._step(micro_batches, plan)
            step, last = self.state.step, self.state.step == train.max_steps
            due = [
                every and step % every == 0
                for every in (train.logging_steps, train.eval_steps, train.save_steps)
            ]
            if last or any(due):  # else the next step's plan waits for this one, on the clock
                wait_for(self.device)
            seconds = time.perf_counter() - started
            self.state.clock_s += seconds
            self._interval.seconds += seconds
            log, evaluate, save = due
            if log:
                self._log_interval(plan)
            if evaluate:
                self.evaluate()
            if save and not last:
                with self._may_fail("saves"):
                    self.save()
        batches.close()
        if self._interval.steps:
            self._log_interval(plan)
        if not stopped and self._evaluated != self.state.step:
            self.evaluate()
        self.save()
        with agree(self.control):
            if damage is not None:
                raise type(damage)(f"{damage}; step {self.state.step} is saved")
        return not stopped

    def _plan(self, micro_batches: list) -> tuple[StepPlan, bool]:
        """One small host collective: global counts, the slowest clock, stop requests, health.

        A rank without micro-batches cannot go on, and all stop.
        """
        own = StepCounts.of(micro_batches, len(self.loader.damaged))
        stop = self.stop.requested or not micro_batches
        rest = [float(stop), self.state.clock_s, *self._finite.double().tolist()]
        table = gather_vector([*map(float, own), *rest], self.control)
        counts = StepCounts(*table[:, : len(own)].long().sum(0).tolist())
        stop, clock, *_ = table[:, len(own) :].T
        self._check_health(table[:, -2:])
        self.state.clock_s = float(clock.max())
        train, state = self.config.train, self.state
        progress = state.step / train.max_steps
        if train.max_hours is not None:
            progress = max(progress, state.clock_s / (train.max_hours * 3600))
        q = memory_epoch(
            progress,
            self.loader.epoch_of_step(state.step),
            None if train.max_hours is not None else self.loader.epochs(train.max_steps),
            self.config.memory.virtual_epochs,
        )
        plan = StepPlan(
            step=state.step,
            progress=progress,
            lr=learning_rate(max(progress, 0.5 / train.max_steps), train),
            memory_weight=memory_weight(q, progress, self.config.memory),
            normalizers=counts.normalizers(self.world.size * max(1, len(micro_batches))),
            counts=counts,
        )
        return plan, bool(stop.max())

    def _check_health(self, finite: torch.Tensor) -> None:
        """Acts on the last step's losses and gradients: where they were not finite the step was
        skipped, or has poisoned ZeRO 0.

        Args:
            finite: [ranks, 2], each rank's ``_finite``.
        Raises:
            TrainingError: the weights are spoilt, or too many steps in a row were skipped.
        """
        if finite.all():
            return
        # Gradients are judged when they are the mean of all ranks': a loss alone names its rank.
        bad = [rank for rank, ok in enumerate(finite[:, 0].tolist()) if not ok]
        what = f"the loss was not finite on rank(s) {bad}" if bad else "a gradient was not finite"
        where = f"step {self.state.step}: {what}"
        if self.engine.was_step_applied():
            raise TrainingError(
                f"{where} and the update was applied; resume from the last checkpoint"
            )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(f"{where}, {self._skipped_in_a_row} steps skipped in a row")
        logger.warning("%s: update and memory commit skipped", where)

    def _step(self, micro_batches: list, plan: StepPlan) -> None:
        watch = self._interval.watch
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr
        for group in self.engine.optimizer.param_groups:
            group["lr"] = plan.lr
        self.model.train()
        self.routing.begin_step(plan.step, plan.progress)
        if self.routing.cut and not self._truncated:
            self._truncated = True
            clear_gradients(self.engine, [p for p, _ in self.model.truncation.parameters()])
        if plan.memory_weight > 0:
            with gathered(self.engine, self.model.word_embeddings.weight):
                self.model.refresh_embedding_rms()
        if self.hard_negatives is not None:
            self.hard_negatives.begin_step(plan.step)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for micro_batch in micro_batches:
            if self.hard_negatives is not None:
                micro_batch = self.hard_negatives.apply(micro_batch, plan.step)
            batch = micro_batch.to(self.device, non_blocking=True)
            watch.start("bank")
            rows = None
            if plan.memory_weight > 0:  # by the host's keys, which it need not wait for
                keys = micro_batch.mention_keys[micro_batch.injected_mentions]
                rows = self.bank.lookup(keys, self.device)
            watch.stop("bank")
            self.routing.before_micro_batch(self.model, batch, rows, plan.memory_weight)
            watch.start("forward")
            output = self.engine(batch, rows, plan.memory_weight, plan.normalizers)
            watch.stop("forward")
            watch.start("backward")
            self.engine.backward(output.loss)
            watch.stop("backward")
            if self.compact_gradients and self.engine.is_gradient_accumulation_boundary():
                watch.start("communication")
                self.compact_gradients.reduce()
                watch.stop("communication")
            watch.start("bank")
            if self.bank is not None:
                self.bank.stage(
                    micro_batch.mention_keys,
                    micro_batch.stream_positions[micro_batch.mention_spans[:, 0]],
                    output.local_memory,
                    output.cls[batch.mention_spans[:, 0]],
                )
            if self.sampling is not None:
                self.sampling.stage(batch, output.mention_probability)
            watch.stop("bank")
            finite &= torch.isfinite(output.loss.detach())
            self._interval.add(output)
            watch.start("optimizer")
            self.engine.step()
            watch.stop("optimizer")
        self.state.step += 1
        self._finish_step(plan, finite)

    def _finish_step(self, plan: StepPlan, finite: torch.Tensor) -> None:
        """Commits the memory and the paths of an applied step, drops those of a skipped one."""
        applied = self.engine.was_step_applied()
        self._grad_norm = norm = self.engine.get_global_grad_norm()
        # DeepSpeed gives a number or a tensor; a number is not sent to the device and back.
        if isinstance(norm, torch.Tensor):
            whole = norm.isfinite().reshape(()).to(finite.device) & applied
        else:
            whole = torch.full_like(finite, applied and (norm is None or math.isfinite(norm)))
        self._finite = torch.stack([finite, whole])
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.state.applied_steps += int(applied)
        self.state.tokens_seen += plan.counts.tokens
        self.state.quarantined += plan.counts.damaged
        for message in self.loader.damaged:
            logger.warning("step %d: an empty sequence replaces %s", self.state.step, message)
        self._interval.watch.start("bank")
        if self.bank is not None and applied:
            self.bank.commit(self.state.applied_steps)
        elif self.bank is not None:
            self.bank.drop()
        if self.sampling is not None:
            self.sampling.end_step(applied, self.state.step)
        self._interval.watch.stop("bank")
        self.routing.end_step(applied)
        self._interval.end_step(plan.counts)

    # -- what a run tells -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _may_fail(self, what: str):
        """A write that the run can do without, though not for ever; on all ranks alike.

        Raises:
            WriteError: it failed for the third time in a row.
        """
        try:
            yield
        except WriteError as error:
            self._failed_writes[what] += 1
            if what == "saves":
                self._failed_saves += 1
            count = f"{self._failed_writes[what]} of {MAX_FAILED_WRITES} {what} in a row failed"
            if self._failed_writes[what] == MAX_FAILED_WRITES:
                raise WriteError(f"{error}; {count}", everywhere=True) from None
            logger.warning("%s; %s, the run goes on", error, count)
        else:
            self._failed_writes[what] = 0

    def _write_metrics(self, values: dict) -> None:
        path = self.output_dir / "metrics.jsonl"
        with (
            self._may_fail("writes of metrics"),
            write_together(f"{path} was not written", self.control),
        ):
            self.log.write(self.state.step, {"time_s": self.state.clock_s, **values})

    def _log_interval(self, plan: StepPlan) -> None:
        interval = self._interval
        values = interval.metrics(self.model.backbone.config, self.control)
        values["train/lr"] = plan.lr
        values["train/grad_norm"] = None if self._grad_norm is None else float(self._grad_norm)
        if not self.config.decoding.enabled:
            values.pop("train/cka_loss")
        values["train/tokens_seen"] = self.state.tokens_seen
        values["data/quarantined_total"] = self.state.quarantined
        values["train/skipped_steps"] = self.state.step - self.state.applied_steps
        values["checkpoint/failed_saves"] = self._failed_saves
        if self._saved is not None:
            values[LAST_STEP] = self._saved
        if self.bank is not None:
            values["bank/entities"] = self.bank.visited()  # collective
            values["bank/lambda"] = plan.memory_weight
        values.update(self.routing.metrics())
        if self.sampling is not None:
            values.update(self.sampling.metrics())
        if self.compact_gradients is not None:
            values.update(self.compact_gradients.metrics())
        steps_left = self.config.train.max_steps - self.state.step
        eta = steps_left * interval.seconds / max(1, interval.steps)
        if self.config.train.max_hours is not None:
            eta = min(eta, self.config.train.max_hours * 3600 - self.state.clock_s)
        logger.info(
            console_line(
                self.state.step, self.config.train.max_steps, values, self.world.size, max(0.0, eta)
            )
        )
        self._write_metrics(values)
        interval.reset()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out MLM loss and probe P@1, without injection and with lambda = 0."""
        stack_dump.rearm()
        values = evaluate_heldout(self.engine.module, self.heldout, self.device, self.control)
        values |= evaluate_probes(
            self.engine.module,
            self.probes,
            self.device,
            rank=self.world.rank,
            world_size=self.world.size,
            group=self.control,
        )
        self._evaluated = self.state.step
        self._write_metrics(values)
        logger.info(
            "eval at step %d | %s",
            self.state.step,
            # The parts of a probe that benchmarks tell apart are for metrics.jsonl alone.
            " | ".join(
                f"{k.removeprefix('eval/')} {v:.4g}"
                for k, v in values.items()
                if not k.startswith(("eval/select", "eval/report"))
            ),
        )
        return values

    def save(self) -> Path:
        """Writes a checkpoint of this step, unless the newest one already is of this step."""
        stack_dump.rearm()
        self._check_health(gather_vector(self._finite.double().tolist(), self.control))
        final = self.checkpoints.folder / checkpoint_name(self.state.step)
        if self._saved == self.state.step:
            return final
        logger.info("saving %s", final)
        path = self.checkpoints.save(
            self.state,
            self.engine,
            self.bank,
            self.routing.state_dict(),
            {
                "config.json": json.dumps(self.config.to_dict(), indent=2) + "\n",
                "backbone.json": self.model.backbone.config.to_json_string(),
                "tokenizer": self.data_dir / "tokenizer",
            },
            None if self.sampling is None else self.sampling.state_dict(),
        )
        self._saved = self.state.step
        return path

    def finish(self) -> None:
        """Exports the last checkpoint as a Hugging Face folder and draws the curves.

        Where a run was done when it went on from another folder's, it is written here first.

        Raises:
            WriteError: on all ranks: one of them could not.
        """
        self.save()
        with write_together(f"{self.output_dir} could not be completed", self.control):
            self._write_results()

    def _write_results(self) -> None:
        checkpoint = self.checkpoints.folder / checkpoint_name(self.state.step)
        if self.world.is_main:
            self.log.flush()
            plot_curves(
                self.output_dir / "metrics.jsonl",
                self.output_dir / "curves.png",
                f"{self.config.method}, {self.manifest.get('name', self.data_dir.name)}",
            )
            if self.config.train.export:
                export_model(
                    load_model_state(checkpoint),
                    checkpoint,
                    self.output_dir / "hf",
                    metrics=last_evaluation(self.output_dir / "metrics.jsonl", self.state.step),
                    overwrite=True,
                )
