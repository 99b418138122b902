"""Learning rate and memory weight as pure functions of the run's progress: nothing to restore."""

from __future__ import annotations

import math

from trelm_ds.config import MemoryConfig, TrainConfig

FEW_EPOCHS = 4  # below this many epochs, q of Eq. 8 counts virtual epochs instead


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Learning rate at ``progress`` in [0, 1]: linear warm-up, then the configured decay.

    Args:
        progress: share of the run's budget that is spent, in steps or in hours.
        config: ``learning_rate``, ``warmup_ratio``, ``lr_scheduler_type``, ``min_lr_ratio``.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (progress - config.warmup_ratio) / max(1e-12, 1.0 - config.warmup_ratio)
    if config.lr_scheduler_type == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        share = 1.0 - done
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def memory_epoch(progress: float, epoch: int, total_epochs: float | None, virtual: int) -> int:
    """q of Eq. 8: the epoch, or a virtual one in runs of fewer than four epochs.

    Args:
        progress: share of the run's budget that is spent.
        epoch: epoch of the first sample of the step's global batch.
        total_epochs: epochs the whole run makes; None: not known, the budget is in hours.
        virtual: virtual epochs of a short run, equal shares of its budget.
    """
    if total_epochs is not None and total_epochs >= FEW_EPOCHS:
        return epoch
    return math.floor(progress * virtual + 1e-9)


def memory_weight(q: int, progress: float, config: MemoryConfig) -> float:
    """lambda_q = lambda_0 / beta ** q (Eq. 8), and 0 for the last ``off_fraction`` of the run."""
    if not config.enabled or progress >= 1.0 - config.off_fraction:
        return 0.0
    return config.weight / config.decay**q
