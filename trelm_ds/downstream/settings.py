"""Settings of fine-tuning, and what each task is run with unless told otherwise."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from trelm_ds.errors import ConfigError

MIN_SEQ_LENGTH = 8  # the first and last token, four markers, and something between
DEFAULTS = {
    "typing": {"epochs": 10, "batch_size": 16},
    "relation": {"epochs": 5},
    "glue": {"epochs": 3},
}


@dataclass(frozen=True)
class FineTuning:
    """How a task is learned.

    Attributes:
        epochs: passes over the training split.
        batch_size: examples of an optimizer step.
        learning_rate: its peak; linear warm-up over a tenth of the steps, then linear decay.
        seeds: independent runs (seeds 0, 1, ...): head, markers, order and dropout differ.
        max_train_samples, max_eval_samples: use this many, evenly spaced; None: all.
        max_seq_length: in tokens; None: 128, or what the model has positions for.
        eval_batch_size: examples of a forward without gradients.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-5
    seeds: int = 3
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_seq_length: int | None = None
    eval_batch_size: int = 64

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = MIN_SEQ_LENGTH if name == "max_seq_length" else 1
            if name == "learning_rate":
                if not (math.isfinite(value) and value > 0):
                    raise ConfigError(f"--{name} {value}: must be positive")
            elif value is not None and value < least:
                raise ConfigError(f"--{name} {value}: must be at least {least}")
