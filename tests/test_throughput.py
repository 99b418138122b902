"""FLOP counts, memory, seconds by phase and rates."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from trelm_ds.throughput import RollingRate, Stopwatch, training_flops


def test_flops_are_those_of_the_matrix_products():
    """Three times a forward pass, counted by torch's own FLOP counter."""
    from torch.utils.flop_counter import FlopCounterMode

    config = BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config).eval()
    rows, length = 3, 16
    ids = torch.randint(5, 90, (rows, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = counter.get_total_flops()  # the stock head runs on every position
    ours = training_flops(config, rows * length, rows * length, length) / 3
    assert ours == pytest.approx(counted, rel=1e-6)


def test_the_paper_sized_model_costs_what_the_cost_model_says():
    base = BertConfig(vocab_size=50265)  # RoBERTa-base shapes
    per_sequence = training_flops(base, 128, 0.15 * 128, 128)
    assert per_sequence == pytest.approx(71.6e9, rel=0.02)


def test_rolling_rate_forgets():
    rate = RollingRate(window=2)
    assert rate.rate == 0.0
    for amount, seconds in ((1000, 1), (10, 1), (30, 1)):
        rate.add(amount, seconds)
    assert rate.rate == 20.0


def test_stopwatch_sums_by_phase_and_starts_again():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        watch.start("forward")
        watch.stop("forward")
    totals = watch.totals()
    assert set(totals) == {"forward"} and totals["forward"] >= 0
    assert watch.totals() == {}
