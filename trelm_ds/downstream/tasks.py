"""Fine-tuning tasks by name: a model folder and a data folder in, scores out."""

from __future__ import annotations

import statistics
from pathlib import Path

from trelm_ds.backbone import load_pretrained
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.downstream.entity_typing import read_typing
from trelm_ds.downstream.finetune import finetune
from trelm_ds.downstream.glue import read_glue
from trelm_ds.downstream.relations import read_relation
from trelm_ds.downstream.settings import FineTuning

READERS = {"typing": read_typing, "relation": read_relation, "glue": read_glue}


def fine_tune(task: str, model: Path, data: Path, settings: FineTuning, device) -> dict:
    """Scores of a task after fine-tuning; of ``glue`` by task, and their average.

    Args:
        task: a name of ``READERS``.
        model: Hugging Face folder.
        data: the task's folder.
        settings, device: see ``finetune``.
    Raises:
        ConfigError: the model cannot be used.
        DataError: the data cannot.
    """
    found = READERS[task](data)
    backbone, tokenizer = load_pretrained(model), load_tokenizer(model)
    if task != "glue":
        return finetune(backbone, tokenizer, found, settings, device)
    results = [finetune(backbone, tokenizer, each, settings, device) for each in found]
    # MNLI's two sets count as one task.
    means = [
        statistics.fmean(scores[result["metric"]]["mean"] for scores in result["scores"].values())
        for result in results
    ]
    return {"average": statistics.fmean(means), "tasks": {r["name"]: r for r in results}}


def headline(result: dict) -> tuple[str, float]:
    """What a result is quoted by: (split and metric, value); ``test`` where there is one."""
    if "average" in result:
        return "dev average", result["average"]
    split = "test" if "test" in result["scores"] else next(iter(result["scores"]))
    return f"{split} {result['metric']}", result["scores"][split][result["metric"]]["mean"]
