"""Equation 8 and the learning-rate schedules against values worked out by hand."""

import pytest

from trelm_ds.config import MemoryConfig, TrainConfig
from trelm_ds.schedules import learning_rate, memory_epoch, memory_weight


def test_memory_weight_is_equation_8():
    config = MemoryConfig(weight=0.5, decay=2.0, off_fraction=0.05)
    assert [memory_weight(q, 0.0, config) for q in range(4)] == [0.5, 0.25, 0.125, 0.0625]
    config = MemoryConfig(weight=0.8, decay=3.0)
    assert memory_weight(2, 0.5, config) == pytest.approx(0.8 / 9)


def test_memory_weight_is_zero_at_the_end_and_without_a_bank():
    config = MemoryConfig(off_fraction=0.05)
    assert memory_weight(0, 0.949, config) > 0
    assert memory_weight(0, 0.95, config) == 0.0
    assert memory_weight(0, 0.0, MemoryConfig(enabled=False)) == 0.0


def test_short_runs_count_virtual_epochs():
    assert [memory_epoch(s / 80, 0, 1.5, 8) for s in (0, 9, 10, 79)] == [0, 0, 1, 7]
    assert [memory_epoch(s / 600, 0, 1.5, 8) for s in range(0, 600, 75)] == list(range(8))
    assert memory_epoch(79 / 80, 5, 6.0, 8) == 5  # enough real epochs: those count
    assert memory_epoch(0.5, 5, None, 8) == 4  # a budget in hours: nobody knows the epochs


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 1.0: 0.1}),
        ("cosine", {0.1: 1.0, 0.55: 0.55, 1.0: 0.1}),
        ("constant", {0.05: 0.5, 0.1: 1.0, 1.0: 1.0}),
    ],
)
def test_learning_rate(kind, values):
    config = TrainConfig(
        learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type=kind, min_lr_ratio=0.1
    )
    for progress, expected in values.items():
        assert learning_rate(progress, config) == pytest.approx(expected)
