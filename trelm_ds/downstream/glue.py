"""GLUE: the tasks whose folder is there, from the benchmark's own tab-separated files.

A folder is ``GLUE/RTE`` with ``train.tsv`` and ``dev.tsv`` (MNLI: ``dev_matched.tsv`` and
``dev_mismatched.tsv``), also gzipped, without quoting; or the folder that holds such folders.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trelm_ds.downstream import metrics
from trelm_ds.downstream.examples import Task, TextExample
from trelm_ds.errors import DataError
from trelm_ds.prepare.files import iter_lines, need_file

logger = logging.getLogger(__name__)

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueFormat:
    """Where a task's files keep what is needed.

    Attributes:
        columns: of the sentences, by their names in the header, or by number without a header.
        label: the column of the label.
        labels: those allowed; None: a number (STS-B).
        metric: what the task is known by.
        dev: the files scored, without ``.tsv``.
        broken_lines: the published file has questions with a line end in them; what is not a whole
            line is left out, as elsewhere.
    """

    columns: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...] | None
    metric: str = "accuracy"
    dev: tuple[str, ...] = ("dev",)
    broken_lines: bool = False


FORMATS = {
    "CoLA": GlueFormat((3,), 1, BINARY, "matthews_correlation"),
    "SST-2": GlueFormat(("sentence",), "label", BINARY),
    "MRPC": GlueFormat(("#1 String", "#2 String"), "Quality", BINARY),
    "STS-B": GlueFormat(("sentence1", "sentence2"), "score", None, "pearson_spearman"),
    "QQP": GlueFormat(("question1", "question2"), "is_duplicate", BINARY, broken_lines=True),
    "MNLI": GlueFormat(
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "entailment", "neutral"),
        dev=("dev_matched", "dev_mismatched"),
    ),
    "QNLI": GlueFormat(("question", "sentence"), "label", ENTAILMENT),
    "RTE": GlueFormat(("sentence1", "sentence2"), "label", ENTAILMENT),
}


def read_glue(folder: Path) -> list[Task]:
    """The task whose folder this is, or every task that has a folder in it.

    Raises:
        DataError: no task's folder, a file is missing, or a line has not the task's form.
    """
    if folder.name in FORMATS and folder.is_dir():
        return [_read_task(folder)]
    folders = [folder / name for name in FORMATS if (folder / name).is_dir()]
    if not folders:
        raise DataError(f"{folder}: no folder of a GLUE task in it ({', '.join(FORMATS)})")
    return [_read_task(found) for found in folders]


def _read_task(folder: Path) -> Task:
    form = FORMATS[folder.name]
    splits = {
        split: list(_examples(need_file(folder, f"{split}.tsv"), form))
        for split in ("train", *form.dev)
    }
    train = splits.pop("train")
    kind = "regression" if form.labels is None else "multiclass"
    return Task(folder.name, kind, train, splits, form.metric, _SCORES.get(folder.name, _accuracy))


def _examples(path: Path, form: GlueFormat) -> Iterator[TextExample]:
    wanted = (*form.columns, form.label)
    places = list(wanted) if isinstance(form.label, int) else None
    width = broken = 0
    for where, line in iter_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if places is None:
            if absent := [name for name in wanted if name not in columns]:
                raise DataError(f"{where}: no column {', '.join(map(repr, absent))} in the header")
            places, width = [columns.index(name) for name in wanted], len(columns)
            continue
        if form.broken_lines and len(columns) != width:
            broken += 1
            continue
        if len(columns) <= max(places):
            raise DataError(
                f"{where}: expected {max(places) + 1} tab-separated columns, got {len(columns)}"
            )
        *texts, label = (columns[place] for place in places)
        if form.labels is None:
            target: float | str = _number(label, where)
        elif label in form.labels:
            target = label
        else:
            raise DataError(f"{where}: label {label[:40]!r} is not one of {', '.join(form.labels)}")
        yield TextExample(texts[0], target, (), texts[1] if len(texts) > 1 else None)
    if broken:
        logger.warning("%s: %d lines that are not of %d columns are left out", path, broken, width)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: score {text[:40]!r} is not a number")
    return value


def _accuracy(predicted, gold) -> dict[str, float]:
    return {"accuracy": metrics.accuracy(predicted, gold)}


def _accuracy_and_f1(predicted, gold) -> dict[str, float]:
    return _accuracy(predicted, gold) | {"f1": metrics.binary_f1(predicted, gold, "1")}


def _matthews(predicted, gold) -> dict[str, float]:
    value = metrics.matthews_correlation(predicted, gold, "1")
    return _accuracy(predicted, gold) | {"matthews_correlation": value}


def _correlations(predicted, gold) -> dict[str, float]:
    pearson = metrics.pearson_correlation(predicted, gold)
    spearman = metrics.spearman_correlation(predicted, gold)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
    }


_SCORES = {
    "CoLA": _matthews,
    "MRPC": _accuracy_and_f1,
    "QQP": _accuracy_and_f1,
    "STS-B": _correlations,
}
