"""What a run adds up between two lines of its log."""

from __future__ import annotations

import torch

from trelm_ds.distributed import gather_vector
from trelm_ds.step_plan import StepCounts
from trelm_ds.throughput import RollingRate, Stopwatch, peak_flops, peak_memory_gib, training_flops


class Interval:
    """Sums between two log lines; losses stay on the device until they are asked for."""

    def __init__(self, device: torch.device, world_size: int):
        self._device = device
        self._world_size = world_size
        self._peak = peak_flops(device)
        self.watch = Stopwatch(device)
        self._rate = RollingRate()
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.counts = StepCounts()
        self.seconds = 0.0
        self._losses = torch.zeros(8, device=self._device, dtype=torch.float64)

    def add(self, output) -> None:
        losses = (output.loss, output.mlm_loss, output.cka_loss)
        self._losses[:3] += torch.stack([x.detach().double() for x in losses])
        self._losses[3] += 1.0
        self._losses[4:6] += output.entity_sums
        self._losses[6:] += output.mlm_sums

    def end_step(self, counts: StepCounts) -> None:
        """Counts a step, of all ranks."""
        self.steps += 1
        self.counts = self.counts.plus(counts)

    def metrics(self, model_config, group) -> dict[str, float]:
        """Means over the interval, all ranks and micro-batches; times are this rank's."""
        table = gather_vector(self._losses.tolist(), group).sum(0)
        loss, mlm, cka = (table[:3] / table[3].clamp(min=1)).tolist()
        times = self.watch.totals()
        seconds = max(self.seconds, 1e-9)
        counts = self.counts
        self._rate.add(counts.tokens, seconds)
        length = counts.tokens / max(1, counts.sequences)
        flops = training_flops(model_config, counts.tokens, counts.masked, length)
        steps = max(1, self.steps)
        values = {
            "train/loss": loss,
            "train/mlm_loss": mlm,
            "train/cka_loss": cka,
            "throughput/tokens_per_s": self._rate.rate,
            "throughput/step_s": seconds / steps,
            "throughput/mfu": flops / seconds / self._peak / self._world_size,
            "data/wait_fraction": times.get("data", 0.0) / seconds,
            "memory/peak_gib": peak_memory_gib(self._device),
        }
        if counts.entities:
            values["train/entity_loss"], values["train/entity_accuracy"] = (
                table[4:6] / counts.entities
            ).tolist()
        text, objects = table[6:].tolist()  # zeros unless train.object_loss_share is set
        if text:
            values["train/mlm_text_loss"] = text / (counts.masked - counts.objects)
        if objects:
            values["train/mlm_object_loss"] = objects / counts.objects
        for phase in ("forward", "backward", "bank", "optimizer"):
            values[f"time/{phase}_s"] = times.get(phase, 0.0) / steps
        if "communication" in times:  # else it is the engine's, inside the backward
            values["time/communication_s"] = times["communication"] / steps
        return values
