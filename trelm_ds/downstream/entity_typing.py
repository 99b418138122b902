"""Entity typing (Open Entity): ERNIE's 9-class form, or the crowd-sourced form reduced to it.

Files are ``train``, ``dev`` and, if there, ``test``; ``.json``, ``.jsonl`` or
``_general9_linked.json``, also gzipped; a JSON list, or an object a line::

    {"sent": "He went to Rome .", "start": 11, "end": 15, "labels": ["place"]}
    {"left_context_token": ["He", "went", "to"], "mention_span": "Rome",
     "right_context_token": ["."], "y_str": ["city", "place"]}

``start`` and ``end`` are characters. Of ``y_str`` the nine general types count, as in ERNIE's data.
A type is predicted where its logit is above 0 (probability above a half): ERNIE's rule, so a
mention may get no type. The measure is micro-F1.
"""

from __future__ import annotations

from pathlib import Path

from trelm_ds.downstream.examples import Task, TextExample
from trelm_ds.downstream.metrics import typing_scores
from trelm_ds.downstream.records import find_splits, iter_records, strings
from trelm_ds.errors import DataError
from trelm_ds.prepare.files import check_span, get

GENERAL_TYPES = frozenset(
    ("entity", "event", "group", "location", "object", "organization", "person", "place", "time")
)
FILES = ("{}_general9_linked.json", "{}.json", "{}.jsonl")


def read_typing(folder: Path) -> Task:
    """Reads the splits of a folder.

    Raises:
        DataError: a file is missing or a record is not one of the two forms.
    """
    splits = {
        split: [_example(record, where) for where, record in iter_records(path)]
        for split, path in find_splits(folder, FILES).items()
    }
    train = splits.pop("train")
    return Task(folder.name, "multilabel", train, splits, "micro_f1", typing_scores)


def _example(record: dict, where: str) -> TextExample:
    if "sent" in record:
        text = get(record, "sent", str, where)
        span = check_span(record.get("start"), record.get("end"), text, where)
        return TextExample(text, frozenset(strings(record, "labels", where)), (span,))
    if "mention_span" not in record:
        raise DataError(f"{where}: neither 'sent' nor 'mention_span' in it")
    mention = get(record, "mention_span", str, where)
    left = "".join(f"{token} " for token in strings(record, "left_context_token", where))
    right = "".join(f" {token}" for token in strings(record, "right_context_token", where))
    text = left + mention + right
    span = check_span(len(left), len(left) + len(mention), text, where)
    return TextExample(text, GENERAL_TYPES.intersection(strings(record, "y_str", where)), (span,))
