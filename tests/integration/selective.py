"""The selective update of real runs, step by step, against a plain AdamW that knows the paths.

A run trains with routing, gradient accumulation, clipping and weight decay, is stopped, and is
resumed from its checkpoint. At each optimizer step the reduced gradients of every trained
parameter are read, clipped by their common norm and given to ``Twin``: torch's own AdamW, applied
to the path's entries alone and with each entry's own number of updates. It never reads the run's
parameters again after the start, so an error at any step, or in the checkpoint, stays visible.
"""

from __future__ import annotations

import torch
from integration.runs import NO_DROPOUT, make_trainer
from torch.optim.adamw import adamw
from zero_state import full_gradient, full_state

STATE = ("param", "exp_avg", "exp_avg_sq")
STEPS, STOP_AT = 5, 3  # blocks rotate at 2 and 4
SETTINGS = {
    "train__max_steps": STEPS,
    "train__max_grad_norm": 0.05,  # far below the norm
    "train__weight_decay": 0.1,
    "train__learning_rate": 1e-2,
    "train__lr_scheduler_type": "cosine",
    "train__warmup_ratio": 0.0,
    "train__gradient_accumulation_steps": 2,
    "train__per_device_train_batch_size": 2,
    "routing__kept_fraction": 0.3,
    "routing__multiple_of": 1,
    "routing__start": 0.0,
} | {key.replace(".", "__"): value for key, value in NO_DROPOUT.items()}


class Twin:
    """torch's AdamW (single tensor, no fused kernel) on the entries of one parameter."""

    def __init__(self, param: torch.Tensor, weight_decay: float):
        self.param = param.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
        self.count = torch.zeros_like(param, dtype=torch.int64)
        self.weight_decay = weight_decay

    def step(self, gradient: torch.Tensor, on: torch.Tensor, lr: float, train) -> None:
        self.count += on
        for t in self.count[on].unique().tolist():
            here = on & (self.count == t)
            parts = [x[here] for x in (self.param, gradient, self.exp_avg, self.exp_avg_sq)]
            adamw(
                *([part] for part in parts), [], [torch.tensor(t - 1.0)],
                fused=False, foreach=False, amsgrad=False, maximize=False, lr=lr,
                beta1=train.adam_beta1, beta2=train.adam_beta2, eps=train.adam_epsilon,
                weight_decay=self.weight_decay,
            )  # fmt: skip
            self.param[here], self.exp_avg[here], self.exp_avg_sq[here] = (
                parts[0], parts[2], parts[3],
            )  # fmt: skip


class Watch:
    """Compares one run with its twins over both of its halves."""

    def __init__(self):
        self.twins: dict[str, Twin] = {}
        self.last: dict[str, list[torch.Tensor]] = {}
        self.report = dict(
            steps=0, moved_off=0, off_gradient=0, off=0, on=0, unmoved_on=0, frozen=0
        )
        self.report |= dict(param_error=0.0, moment_error=0.0, norm_error=0.0)

    def attach(self, trainer) -> None:
        engine, step = trainer.engine, trainer.engine.step
        self.trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self.routed = {id(p): (layer, kind) for layer, kind, p in trainer.model.routed_parameters()}
        self.below = {id(p) for p, _ in trainer.model.truncation.parameters()}
        if not self.twins:
            decay = trainer.config.train.weight_decay
            for name, p in self.trained.items():
                value = full_state(engine, p, "param")
                self.twins[name] = Twin(value, decay if value.dim() > 1 else 0.0)
                self.last[name] = [full_state(engine, p, part) for part in STATE]

        def checked():
            if not engine.is_gradient_accumulation_boundary():
                return step()
            gradients = {name: full_gradient(p) for name, p in self.trained.items()}
            step()
            self.check(trainer, gradients)

        engine.step = checked

    def mask(self, trainer, name: str) -> torch.Tensor:
        """The entries of a parameter that this step trains, by the paths themselves (Eq. 12)."""
        shape = self.twins[name].param.shape
        if trainer.routing.cut and id(self.trained[name]) in self.below:
            return torch.zeros(shape, dtype=torch.bool)
        if id(self.trained[name]) not in self.routed:
            return torch.ones(shape, dtype=torch.bool)
        layer, kind = self.routed[id(self.trained[name])]
        paths = trainer.routing.context.paths[layer]
        on = torch.zeros(shape, dtype=torch.bool)
        if kind == "down_bias":
            on[slice(None) if paths.outputs is None else paths.outputs.cpu()] = True
        elif kind == "up_bias":
            on[paths.rows.cpu()] = True
        else:
            columns = paths.inputs if kind == "up_weight" else paths.outputs
            columns = torch.arange(shape[1]) if columns is None else columns.cpu()
            on[paths.rows.cpu()[:, None], columns[None]] = True
        return on

    def check(self, trainer, gradients) -> None:
        report, train = self.report, trainer.config.train
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
        assert norm > 2 * train.max_grad_norm, norm
        found = trainer.engine.get_global_grad_norm()
        if found is not None:  # DeepSpeed keeps none for ZeRO 0 in fp32; the clipped update shows
            error = abs(float(found) / float(norm) - 1)
            report["norm_error"] = max(report["norm_error"], error)
        scale = train.max_grad_norm / (float(norm) + 1e-6)
        report["steps"] += 1
        for name, p in self.trained.items():
            twin, on = self.twins[name], self.mask(trainer, name)
            lr = trainer.optimizer.param_groups[0]["lr"]
            twin.step(gradients[name] * scale, on, lr, train)
            now = [full_state(trainer.engine, p, part) for part in STATE]
            report["off_gradient"] += int((gradients[name][~on] != 0).sum())
            for value, old, wanted in zip(
                now, self.last[name], (twin.param, twin.exp_avg, twin.exp_avg_sq), strict=True
            ):
                bits, old_bits = value.view(torch.int32), old.view(torch.int32)
                report["moved_off"] += int((bits[~on] != old_bits[~on]).sum())
                error = (value - wanted).abs()
                if value is now[0]:
                    report["param_error"] = max(report["param_error"], float(error.max()))
                else:
                    scaled = float(error.max() / wanted.abs().max().clamp(min=1e-30))
                    report["moment_error"] = max(report["moment_error"], scaled)
            if not on.any():
                report["frozen"] += 1
            if id(p) in self.routed:
                report["off"] += int((~on).sum())
                report["on"] += int(on.sum())
                report["unmoved_on"] += int((now[0][on] == self.last[name][0][on]).sum())
            self.last[name] = now


def selective_run(rank, world_size, data_dir, output_dir, settings) -> dict:
    """Trains, stops at ``STOP_AT``, resumes, ends at ``STEPS``; returns what the watch saw."""
    settings = SETTINGS | settings
    watch = Watch()
    trainer = make_trainer(data_dir, output_dir, **settings)
    watch.attach(trainer)
    plan, taken = trainer._plan, [0]

    def stop(micro_batches):
        taken[0] += 1
        trainer.stop.requested = taken[0] > STOP_AT
        return plan(micro_batches)

    trainer._plan = stop
    assert trainer.train() is False and trainer.state.step == STOP_AT
    trainer.engine.destroy()
    trainer = make_trainer(data_dir, output_dir, train__resume_from_checkpoint="latest", **settings)
    assert trainer.state.step == STOP_AT
    watch.attach(trainer)
    trainer.train()
    trainer.engine.destroy()
    return watch.report


def assert_selective(report: dict, name: str = "") -> None:
    """What must hold of a run, in fp32 and in bf16 with fp32 masters alike."""
    assert report["steps"] == STEPS, name
    assert report["on"] > 0 and report["off"] > 0, name
    assert report["moved_off"] == 0, name
    assert report["off_gradient"] == 0, name
    assert report["norm_error"] < 1e-4, (name, report)
    # lr is 1e-2 and weights are below 1; what is left is rounding, of the norm above all
    assert report["param_error"] < 2e-6, (name, report)
    assert report["moment_error"] < 1e-4, (name, report)
