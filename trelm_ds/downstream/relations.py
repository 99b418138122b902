"""Relation classification between two marked entities: SemEval/OpenNRE, TACRED and FewRel files.

``train``, ``dev`` or ``val``, ``test``; ``.json``, ``.jsonl`` or ``.txt``, also gzipped; a JSON
list, or an object a line; spans in tokens::

    {"token": [...], "h": {"pos": [2, 3]}, "t": {"pos": [8, 9]}, "relation": "Other"}   end excluded
    {"token": [...], "subj_start": 2, "subj_end": 2, "obj_start": 8, "obj_end": 8,
     "relation": "no_relation"}                                              TACRED: end included

or FewRel's ``train_wiki.json`` and/or ``val_wiki.json``: an object, relation -> list of
``{"tokens": [...], "h": [name, id, [[2]]], "t": [name, id, [[8]]]}``. FewRel has no supervised
split of its own; as in ERNIE, each relation gives 100 instances to train and 200 each to dev and
test (a fifth and two fifths where it has fewer than 500), here in the order of their SHA-256.

The measure follows the labels: SemEval-2010 task 8's official macro-F1 (relations with directions
and ``Other``), micro-F1 without ``no_relation`` or ``NA`` (TACRED), else accuracy (FewRel).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from trelm_ds.downstream import metrics
from trelm_ds.downstream.examples import Task, TextExample
from trelm_ds.downstream.records import find_splits, iter_records, join_tokens, strings
from trelm_ds.errors import DataError
from trelm_ds.prepare.files import find_file, get, read_json

FILES = ("{}.json", "{}.jsonl", "{}.txt")
FEWREL_FILES = ("train_wiki.json", "val_wiki.json")
FEWREL_TRAIN, FEWREL_EVAL = 100, 200  # instances of a relation
NO_RELATION = ("no_relation", "NA", "Other")
_DIRECTED = re.compile(r"[^(]+\((e1,e2|e2,e1)\)")


def read_relation(folder: Path) -> Task:
    """Reads the splits of a folder.

    Raises:
        DataError: a file is missing or a record has none of the forms.
    """
    if any(find_file(folder, name) for name in FEWREL_FILES):
        splits = _read_fewrel(folder)
    else:
        splits = {
            split: [_example(record, where) for where, record in iter_records(path)]
            for split, path in find_splits(folder, FILES).items()
        }
    train = splits.pop("train")
    labels = {e.target for split in (train, *splits.values()) for e in split}
    metric, score = choose_measure(labels)
    return Task(folder.name, "multiclass", train, splits, metric, score)


def choose_measure(labels: set[str]):
    """The key of the measure, and the function of (predicted, gold) that gives every score."""
    none = next((name for name in NO_RELATION if name in labels), None)
    relations = sorted({name.partition("(")[0] for name in labels - {none}})
    semeval = none == "Other" and all(_DIRECTED.fullmatch(name) for name in labels - {none})

    def score(predicted, gold):
        scores = {"accuracy": metrics.accuracy(predicted, gold)}
        if none is None:
            scores["macro_f1"] = metrics.macro_f1(predicted, gold)
        else:
            scores |= metrics.micro_without(predicted, gold, none)
        if semeval:
            scores["official_macro_f1"] = metrics.semeval_macro_f1(predicted, gold, relations)
        return scores

    if semeval:
        return "official_macro_f1", score
    return "accuracy" if none is None else "micro_f1", score


def _example(record: dict, where: str) -> TextExample:
    tokens = strings(record, "token", where)
    if "subj_start" in record:
        spans = []
        for name in ("subj", "obj"):
            last = get(record, f"{name}_end", int, where)
            spans.append((get(record, f"{name}_start", int, where), last + 1))
    else:
        spans = []
        for name in ("h", "t"):
            place = get(record, name, dict, where).get("pos")
            if not isinstance(place, list) or len(place) != 2:
                raise DataError(f"{where}: 'pos' of {name!r} is not [start, end]")
            spans.append(tuple(place))
    text, spans = join_tokens(tokens, spans, where)
    return TextExample(text, _label(get(record, "relation", str, where), where), spans)


def _label(name: str, where: str) -> str:
    if not name.strip():
        raise DataError(f"{where}: the relation has no name")
    return name


def _read_fewrel(folder: Path) -> dict[str, list[TextExample]]:
    splits: dict[str, list[TextExample]] = {"train": [], "dev": [], "test": []}
    for name in FEWREL_FILES:
        path = find_file(folder, name)
        if path is None:
            continue
        for relation, records in read_json(path).items():
            where = f"{path}: {relation[:40]}"
            if not isinstance(records, list):
                raise DataError(f"{where}: expected a list of instances")
            examples = [
                _fewrel_example(record, _label(relation, where), f"{where}: instance {number}")
                for number, record in enumerate(records, 1)
            ]
            examples.sort(key=_digest)
            train = min(FEWREL_TRAIN, len(examples) // 5)
            evaluate = min(FEWREL_EVAL, 2 * len(examples) // 5)
            splits["train"] += examples[:train]
            splits["dev"] += examples[train : train + evaluate]
            splits["test"] += examples[train + evaluate : train + 2 * evaluate]
    return splits


def _digest(example: TextExample) -> bytes:
    return hashlib.sha256(f"{example.spans} {example.text}".encode()).digest()


def _fewrel_example(record: object, relation: str, where: str) -> TextExample:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    spans = []
    for name in ("h", "t"):
        entity = get(record, name, list, where)
        mentions = entity[2] if len(entity) == 3 else None
        first = mentions[0] if isinstance(mentions, list) and mentions else None
        if not isinstance(first, list) or not first or any(type(i) is not int for i in first):
            raise DataError(f"{where}: {name!r} is not [name, id, [[token positions], ...]]")
        spans.append((min(first), max(first) + 1))
    text, spans = join_tokens(strings(record, "tokens", where), spans, where)
    return TextExample(text, relation, spans)
