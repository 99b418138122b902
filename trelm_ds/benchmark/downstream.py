"""Downstream scores of a study's models: fine-tuned after the runs, on nobody's clock."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trelm_ds.benchmark.results import write_json
from trelm_ds.benchmark.runner import Run
from trelm_ds.downstream.settings import DEFAULTS, FineTuning
from trelm_ds.errors import ConfigError
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownstreamTask:
    """A task on a folder of data; ``DEFAULTS`` of the task but for the settings given."""

    name: str
    data: Path
    settings: FineTuning

    @classmethod
    def parse(cls, text: str, **given) -> DownstreamTask:
        """``typing=DIR``.

        Args:
            text: name of a task and its folder.
            given: fields of ``FineTuning``; None: the task's default.
        Raises:
            ConfigError: another task, or no such folder.
        """
        name, _, data = text.partition("=")
        if name not in DEFAULTS or not data:
            raise ConfigError(
                f"--downstream {text}: expected TASK=DIR, tasks are {', '.join(DEFAULTS)}"
            )
        if not Path(data).is_dir():
            raise ConfigError(f"--downstream {text}: no folder {data}")
        known = {key: value for key, value in given.items() if value is not None}
        return cls(name, Path(data), FineTuning(**DEFAULTS[name] | known))

    @property
    def label(self) -> str:
        return f"{self.name} {self.data.name}"


def score_runs(
    runs: Sequence[Run], tasks: Sequence[DownstreamTask], stop: StopRequest
) -> list[dict] | None:
    """Fine-tunes every run's exported model on every task; what is there already is kept.

    Returns:
        One row a run and task: ``arm``, ``seed``, ``task``, ``measure``, ``score``, ``result``;
        None when it was stopped on request, between two fine-tunings.
    Raises:
        ConfigError: a run left no model, or a model or its data cannot be used.
    """
    import torch

    from trelm_ds.downstream.tasks import fine_tune, headline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, left = [], len(runs) * len(tasks)
    for run in runs:
        for task in tasks:
            if stop.requested:
                return None
            path = run.folder / "downstream" / f"{task.name}-{task.data.name}.json"
            asked = asdict(task.settings) | {"data": str(task.data.resolve())}
            result = _kept(path, asked)
            if result is None:
                model = run.folder / "hf"
                if not model.is_dir():
                    raise ConfigError(
                        f"{run.folder} has no model: it was run without --downstream; delete the "
                        "folder to run it again"
                    )
                logger.info("fine-tuning on %s: %s, %d left", task.label, run.name, left)
                result = fine_tune(task.name, model, task.data, task.settings, device)
                result["asked"] = asked
                path.parent.mkdir(exist_ok=True)
                write_json(path, result)
            left -= 1
            measure, score = headline(result)
            row = {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}
            told = {key: value for key, value in result.items() if key != "asked"}
            row |= {"task": task.label, "measure": measure, "score": score, "result": told}
            rows.append(row)
    return rows


def _kept(path: Path, asked: dict) -> dict | None:
    """The result of an earlier start of the study, if it was asked the same."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("asked") == asked else None
