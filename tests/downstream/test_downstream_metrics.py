"""Scores against values worked out by hand and plain loops."""

import random

import pytest

from trelm_ds.downstream.metrics import (
    accuracy,
    binary_f1,
    macro_f1,
    matthews_correlation,
    micro_without,
    pearson_correlation,
    semeval_macro_f1,
    spearman_correlation,
    typing_scores,
)


def test_typing():
    gold = [{"person", "group"}, {"place"}, set(), {"time"}]
    predicted = [{"person"}, {"place", "location"}, {"event"}, set()]
    # 2 right of 4 predicted and 4 wanted; no mention is exactly right
    assert typing_scores(predicted, gold) == {
        "micro_precision": 0.5, "micro_recall": 0.5, "micro_f1": 0.5, "accuracy": 0.0,
    }  # fmt: skip
    found = typing_scores([{"person", "group"}, {"time"}, set(), set()], gold)
    assert found["micro_precision"] == pytest.approx(2 / 3)
    assert found["micro_recall"] == pytest.approx(2 / 4)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert typing_scores([set()], [set()])["micro_f1"] == 0.0


def test_micro_f1_leaves_no_relation_out():
    none = "no_relation"
    gold = ["a", "a", "b", none, none, "b"]
    predicted = ["a", none, "a", "b", none, "b"]
    # right and a relation: 2; predicted relations: 4; gold relations: 4
    found = micro_without(predicted, gold, none)
    assert found == {"micro_precision": 0.5, "micro_recall": 0.5, "micro_f1": 0.5}
    every = micro_without(predicted, gold, None)
    assert every["micro_f1"] == pytest.approx(accuracy(predicted, gold)) == pytest.approx(3 / 6)
    assert micro_without([none], [none], none)["micro_f1"] == 0.0


def test_macro_f1():
    gold, predicted = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    # a: P 1, R 1/2; b: P 1/3, R 1; c: 0
    assert macro_f1(predicted, gold) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_semeval_counts_directions_and_leaves_other_out():
    gold = ["A(e1,e2)", "A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "Other", "B(e2,e1)"]
    predicted = ["A(e1,e2)", "A(e2,e1)", "A(e2,e1)", "Other", "B(e1,e2)", "B(e2,e1)"]
    # A: 2 right of 3 predicted and 3 gold; B: 1 right of 2 and 2; C never occurs
    assert semeval_macro_f1(predicted, gold, ["A", "B"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert semeval_macro_f1(predicted, gold, ["A", "B", "C"]) == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_binary_scores():
    gold, predicted = list("11110000"), list("11100001")
    assert binary_f1(predicted, gold, "1") == pytest.approx(3 / 4)
    # TP 3, TN 3, FP 1, FN 1: (9 - 1) / sqrt(4 * 4 * 4 * 4)
    assert matthews_correlation(predicted, gold, "1") == pytest.approx(8 / 16)
    assert matthews_correlation(gold, gold, "1") == 1.0
    assert matthews_correlation(["1"] * 8, gold, "1") == 0.0


def test_correlations():
    assert pearson_correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    # deviations (-1, 0, 1) and (0, -1, 1): 1 / sqrt(2 * 2)
    assert pearson_correlation([1, 2, 3], [2, 1, 3]) == pytest.approx(1 / 2)
    assert pearson_correlation([1, 1], [1, 2]) == 0.0
    assert spearman_correlation([1, 10, 100], [1, 2, 3]) == pytest.approx(1)
    # ranks (0, 1.5, 1.5, 3) and (0, 1, 2, 3): 4.5 / sqrt(4.5 * 5)
    assert spearman_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5**0.5)


def test_against_plain_loops_on_random_answers():
    rng = random.Random(0)
    labels = ["x", "y", "z"]
    gold = [rng.choice(labels) for _ in range(200)]
    predicted = [g if rng.random() < 0.5 else rng.choice(labels) for g in gold]
    total = 0.0
    for label in labels:
        tp = fp = fn = 0
        for p, g in zip(predicted, gold, strict=True):
            tp += p == label and g == label
            fp += p == label and g != label
            fn += p != label and g == label
        total += 2 * tp / (2 * tp + fp + fn)
        if label == "x":
            assert binary_f1(predicted, gold, "x") == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert macro_f1(predicted, gold) == pytest.approx(total / 3)
