import math

import pytest
import torch

from trelm_ds.ops import reference, select_paths_padded


def _select(ops, scores, k, positive_only=True, threshold=0.0):
    return ops.select_paths(torch.as_tensor(scores), k, positive_only, threshold).tolist()


def test_keeps_the_best_in_ascending_order(ops):
    scores = torch.tensor([0.1, 5.0, -7.0, 3.0, 4.0])
    rows = ops.select_paths(scores, 3, True, 0.0)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [1, 3, 4]


def test_of_equal_scores_the_lower_index_wins(ops):
    assert _select(ops, [1.0, 2.0, 1.0, 2.0, 1.0, 1.0], 4) == [0, 1, 2, 3]
    assert _select(ops, torch.ones(1000), 7) == list(range(7))


def test_positive_only(ops):
    assert _select(ops, [0.0, -1.0, 1.0, -0.0], 4) == [2]
    assert _select(ops, [0.0, -1.0, 1.0, -2.0], 3, positive_only=False) == [0, 1, 2]


def test_nan_is_never_selected_and_infinities_rank(ops):
    scores = [math.nan, 1.0, math.inf, -math.inf, math.nan, 1e38]
    assert _select(ops, scores, 2) == [2, 5]
    assert _select(ops, scores, 6, positive_only=False) == [1, 2, 3, 5]
    assert _select(ops, [math.nan] * 4, 2, positive_only=False) == []


def test_threshold_is_a_share_of_the_largest(ops):
    scores = [10.0, 2.0, 1.9, -3.0, 5.0]
    assert _select(ops, scores, 5, threshold=0.2) == [0, 1, 4]
    assert _select(ops, scores, 5, positive_only=False, threshold=1.0) == [0]
    assert _select(ops, [-1.0, -2.0], 2, positive_only=False, threshold=0.5) == []


def test_ties_of_infinities_and_of_both_zeros(ops):
    """Infinities are scores like others; of equal ones the lower index wins, 0.0 equals -0.0."""
    assert _select(ops, [math.inf, 1.0, math.inf, math.inf], 2) == [0, 2]
    assert _select(ops, [1.0, math.inf, math.inf], 3, threshold=0.1) == [1, 2]
    assert _select(ops, [-0.0, 0.0, -0.0, 0.0], 3, positive_only=False) == [0, 1, 2]
    assert _select(ops, [3.0], 1) == [0] and _select(ops, [math.nan], 1) == []


def test_scores_that_are_not_contiguous(ops):
    scores = torch.tensor([[1.0, 9], [3, 8], [2, 7]])
    assert _select(ops, scores[:, 0], 2) == [1, 2]


def test_none_wanted_and_none_there(ops):
    assert _select(ops, [1.0, 2.0], 0) == []
    assert _select(ops, torch.zeros(0), 3) == []
    assert _select(ops, torch.zeros(0), 3, threshold=0.2) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equals_the_reference_on_scores_with_many_ties(kernels, dtype):
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        scores = torch.randint(-5, 20, (257,), generator=generator).to(dtype)
        scores[torch.randint(257, (9,), generator=generator)] = torch.nan
        k = int(torch.randint(0, 258, (), generator=generator))
        arguments = (scores, k, trial % 2 == 0, 0.3 * (trial % 3))
        expected = reference.select_paths(*arguments)
        assert torch.equal(kernels.select_paths(*arguments), expected)


@pytest.mark.parametrize("positive_only", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_padded_lists_the_same_and_fills_up_with_others(ops, positive_only, threshold):
    generator = torch.Generator().manual_seed(2)
    for k in (0, 1, 5, 40, 64, 99):
        scores = torch.randint(-9, 9, (64,), generator=generator).double()
        scores[::7] = torch.nan
        scores[1::9] = -torch.inf
        rows, used = select_paths_padded(scores, k, positive_only, threshold)
        assert rows.shape == used.shape == (min(k, 64),)
        assert (rows.diff() > 0).all() and rows.dtype == torch.int64  # ascending, hence distinct
        assert rows[used].tolist() == _select(ops, scores, k, positive_only, threshold)


def test_padded_without_scores_that_count():
    rows, used = select_paths_padded(torch.tensor([-1.0, math.nan, 0.0]), 2)
    assert len(rows) == 2 and not used.any()
    assert [len(t) for t in select_paths_padded(torch.zeros(0), 3, threshold=0.2)] == [0, 0]


@pytest.mark.parametrize("k", [0, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kernels, dtype, k):
    scores = torch.randn(64).to(dtype)
    torch.library.opcheck(torch.ops.trelm.select_paths.default, (scores, k, True, 0.1))
