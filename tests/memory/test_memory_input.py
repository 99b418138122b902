"""Local memory of a mention (Eq. 4) and the memory term (Eq. 7) against plain loops."""

import math

import pytest
import torch

from trelm_ds.memory.bank import MemoryRows
from trelm_ds.memory.mixing import memory_input
from trelm_ds.memory.window import local_memory

BATCH, LENGTH, HIDDEN = 3, 40, 6


@pytest.fixture
def states():
    torch.manual_seed(0)
    hidden_states = torch.randn(BATCH, LENGTH, HIDDEN)
    lengths = torch.tensor([40, 25, 9])
    attention_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    hidden_states[1, 25:] = 1e6  # padding must not leak in
    spans = torch.tensor(
        [[0, 1, 3], [0, 20, 21], [0, 36, 39], [1, 10, 14], [1, 23, 24], [2, 1, 8], [2, 3, 4]]
    )
    return hidden_states, attention_mask, spans


@pytest.mark.parametrize("half_window", [0, 3, 16])
@pytest.mark.parametrize("paper_norm", [False, True])
def test_local_memory_equals_plain_loops(states, half_window, paper_norm):
    hidden_states, attention_mask, spans = states
    got = local_memory(*states, half_window, paper_norm)
    for row, (b, left, right) in zip(got, spans.tolist(), strict=True):
        window = [
            i
            for i in range(left - half_window, right + half_window)
            if 0 <= i < LENGTH and attention_mask[b, i] == 1
        ]
        norm = 2 * half_window + right - left if paper_norm else len(window)
        for j in range(HIDDEN):
            mean = math.fsum(hidden_states[b, i, j].item() for i in window) / norm
            assert row[j].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)


def test_local_memory_counts_as_printed_inside_the_text():
    """An interior window has exactly the 2k + r - l tokens that Eq. 4 divides by."""
    hidden_states, mask = torch.randn(1, 64, HIDDEN), torch.ones(1, 64, dtype=torch.long)
    spans = torch.tensor([[0, 30, 33]])
    ours = local_memory(hidden_states, mask, spans, 8)
    assert torch.equal(ours, local_memory(hidden_states, mask, spans, 8, paper_norm=True))
    torch.testing.assert_close(ours[0], hidden_states[0, 22:41].mean(0), rtol=1e-5, atol=1e-6)


def test_local_memory_is_float32_without_gradient(states):
    hidden_states, attention_mask, spans = states
    half = hidden_states.bfloat16().requires_grad_()
    got = local_memory(half, attention_mask, spans, 4)
    assert got.dtype == torch.float32 and not got.requires_grad
    # Summed in float32: only the states themselves are rounded to bfloat16.
    assert torch.equal(got, local_memory(half.detach().float(), attention_mask, spans, 4))


def test_local_memory_of_no_mention(states):
    hidden_states, attention_mask, spans = states
    assert local_memory(hidden_states, attention_mask, spans[:0], 4).shape == (0, HIDDEN)


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return MemoryRows(torch.randn(4, HIDDEN) * 7, torch.randn(4, HIDDEN) * 3)


def test_literal_rows_are_the_memory_term_of_eq7_as_printed(rows):
    weight = 0.25
    got = memory_input(rows, weight, 0.05, rescale="literal")
    for i in range(4):
        for j in range(HIDDEN):
            memory = rows.local[i, j].item() + rows.global_[i, j].item()
            assert got[i, j].item() == pytest.approx(weight / 2 * memory, rel=1e-5, abs=1e-6)


def test_memory_rows_get_the_rms_of_the_embeddings(rows):
    weight, rms = 0.5, 0.05
    got = memory_input(rows, weight, torch.tensor(rms), "rms")
    for i in range(4):
        for j in range(HIDDEN):
            total = 0.0
            for table in (rows.local, rows.global_):
                own = math.sqrt(math.fsum(x**2 for x in table[i].tolist()) / HIDDEN)
                total += table[i, j].item() * rms / own
            assert got[i, j].item() == pytest.approx(weight / 2 * total, rel=1e-5, abs=1e-7)


def test_a_zero_row_stays_zero(rows):
    rows.local[2] = rows.global_[2] = 0
    assert torch.equal(memory_input(rows, 0.5, 0.05)[2], torch.zeros(HIDDEN))
