"""Scores of downstream tasks, as their papers and official scorers define them; 0 for 0 / 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return _ratio(2 * precision * recall, precision + recall)


def _micro(correct: int, predicted: int, gold: int) -> dict[str, float]:
    precision, recall = _ratio(correct, predicted), _ratio(correct, gold)
    return {
        "micro_precision": precision,
        "micro_recall": recall,
        "micro_f1": _f1(precision, recall),
    }


def typing_scores(predicted: Sequence[set], gold: Sequence[set]) -> dict[str, float]:
    """Micro ("loose micro") precision, recall and F1 over all (mention, type) pairs.

    ``accuracy`` counts the mentions whose set of types is exactly right.
    """
    correct = sum(len(p & g) for p, g in zip(predicted, gold, strict=True))
    scores = _micro(correct, sum(map(len, predicted)), sum(map(len, gold)))
    exact = sum(p == g for p, g in zip(predicted, gold, strict=True))
    return scores | {"accuracy": _ratio(exact, len(gold))}


def accuracy(predicted: Sequence, gold: Sequence) -> float:
    return _ratio(sum(p == g for p, g in zip(predicted, gold, strict=True)), len(gold))


def micro_without(
    predicted: Sequence[str], gold: Sequence[str], none: str | None
) -> dict[str, float]:
    """Micro precision, recall and F1 where ``none`` ("no_relation") is no answer (TACRED's)."""
    correct = sum(p == g != none for p, g in zip(predicted, gold, strict=True))
    return _micro(correct, sum(p != none for p in predicted), sum(g != none for g in gold))


def macro_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Mean F1 of the labels that occur in either."""
    correct = Counter(g for p, g in zip(predicted, gold, strict=True) if p == g)
    answered, wanted = Counter(predicted), Counter(gold)
    labels = sorted(set(answered) | set(wanted))
    scores = [
        _f1(_ratio(correct[name], answered[name]), _ratio(correct[name], wanted[name]))
        for name in labels
    ]
    return _ratio(sum(scores), len(scores))


def semeval_macro_f1(
    predicted: Sequence[str], gold: Sequence[str], relations: Sequence[str]
) -> float:
    """SemEval-2010 task 8's official score: mean F1 of the relations, directions counted.

    ``Cause-Effect(e2,e1)`` for ``Cause-Effect(e1,e2)`` is wrong, but both belong to the relation
    Cause-Effect, whose predictions and gold labels of either direction are counted together.

    Args:
        predicted, gold: labels ``NAME(e1,e2)`` or ``NAME(e2,e1)``, or another (``Other``).
        relations: the NAMEs to average over.
    """

    def base(label: str) -> str:
        return label.partition("(")[0]

    correct = Counter(base(g) for p, g in zip(predicted, gold, strict=True) if p == g)
    answered, wanted = Counter(map(base, predicted)), Counter(map(base, gold))
    scores = [
        _f1(_ratio(correct[name], answered[name]), _ratio(correct[name], wanted[name]))
        for name in relations
    ]
    return _ratio(sum(scores), len(scores))


def binary_f1(predicted: Sequence[str], gold: Sequence[str], positive: str) -> float:
    correct = sum(p == g == positive for p, g in zip(predicted, gold, strict=True))
    precision = _ratio(correct, sum(p == positive for p in predicted))
    return _f1(precision, _ratio(correct, sum(g == positive for g in gold)))


def matthews_correlation(predicted: Sequence[str], gold: Sequence[str], positive: str) -> float:
    """Matthews' correlation of two classes (CoLA)."""
    counts = Counter((p == positive, g == positive) for p, g in zip(predicted, gold, strict=True))
    tp, tn = counts[True, True], counts[False, False]
    fp, fn = counts[True, False], counts[False, True]
    return _ratio(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson_correlation(predicted: Sequence[float], gold: Sequence[float]) -> float:
    mean_p, mean_g = _ratio(sum(predicted), len(predicted)), _ratio(sum(gold), len(gold))
    pairs = [(p - mean_p, g - mean_g) for p, g in zip(predicted, gold, strict=True)]
    spread = sum(p * p for p, _ in pairs) * sum(g * g for _, g in pairs)
    return _ratio(sum(p * g for p, g in pairs), math.sqrt(spread))


def spearman_correlation(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""
    return pearson_correlation(_ranks(predicted), _ranks(gold))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for i in order[begin:end]:
            ranks[i] = (begin + end - 1) / 2
        begin = end
    return ranks
