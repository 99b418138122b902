"""How many neurons are kept and which: counts, Eq. 12's sets, random paths, block rotation."""

import math

import pytest
import torch

from trelm_ds.routing.paths import (
    BlockRotation,
    LayerPaths,
    PathScores,
    kept_count,
    random_layer_paths,
    select_layer_paths,
)


def test_kept_count_rounds_up_to_a_multiple():
    assert kept_count(3072, 0.1, 8) == 312
    assert kept_count(3072, 0.125, 64) == 384
    assert kept_count(30, 0.1, 1) == 3  # .1 * 30 > 3 in floating point
    assert kept_count(20, 0.9, 8) == 20
    assert kept_count(8, 1e-9, 1) == 1


def test_selection_of_all_three_sets_against_a_loop():
    """Eq. 12: the best rho of each vector, positive scores only, indices ascending."""
    g = torch.Generator().manual_seed(0)
    scores = PathScores(*(torch.randn(n, generator=g) for n in (40, 16, 16)))
    paths = select_layer_paths(scores, 0.25, 2, positive_only=True)
    for values, got in ((scores.mid, paths.rows), (scores.inputs, paths.inputs)):
        ranked = sorted(range(len(values)), key=lambda j: (-float(values[j]), j))
        wanted = [j for j in ranked[: kept_count(len(values), 0.25, 2)] if values[j] > 0]
        assert got.tolist() == sorted(wanted) and got.dtype == torch.int64
    assert len(paths.outputs) == 4
    few = PathScores(torch.tensor([0.5, -1.0, 0.0, float("nan"), 0.2]))
    assert select_layer_paths(few, 1.0, 1, positive_only=True).rows.tolist() == [0, 4]
    assert select_layer_paths(few, 0.6, 1, positive_only=False).rows.tolist() == [0, 2, 4]


def test_threshold_is_a_share_of_the_largest_score():
    scores = PathScores(torch.tensor([10.0, 1.9, 2.0, 3.0]))
    got = select_layer_paths(scores, 1.0, 1, positive_only=True, threshold=0.2)
    assert got.rows.tolist() == [0, 2, 3]


def test_random_paths_depend_on_seed_and_step_alone():
    def draw(seed, step, hidden_size=None):
        return random_layer_paths(3, 64, hidden_size, 0.25, 8, seed=seed, step=step, device="cpu")

    first, again = draw(1, 5), draw(1, 5)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].rows, first[1].rows)
    assert not torch.equal(first[0].rows, draw(1, 6)[0].rows)
    assert not torch.equal(first[0].rows, draw(2, 5)[0].rows)
    for paths in draw(1, 5, 16):
        assert paths.rows.unique().tolist() == paths.rows.tolist() and len(paths.rows) == 16
        assert len(paths.inputs) == len(paths.outputs) == 8 and paths.inputs.max() < 16
    hits = torch.zeros(64)
    for step in range(200):
        hits[draw(0, step)[0].rows] += 1
    assert 25 <= hits.min() and hits.max() <= 80  # 50 expected


def test_block_views_equal_gathered_rows():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(7, 12, generator=g), torch.randn(7, 5, generator=g)
    block = LayerPaths.block(4, 3, "cpu")
    rows = LayerPaths(torch.tensor([4, 5, 6]))
    taken = block.take(left, 1)
    assert taken.data_ptr() == left[:, 4:].data_ptr() and torch.equal(taken, rows.take(left, 1))
    torch.testing.assert_close(
        block.weight_grad(taken, right, None, 12), rows.weight_grad(taken, right, None, 12)
    )
    for start in (0, 9):  # blocks at either end
        got = LayerPaths.block(start, 3, "cpu").weight_grad(left[:, :3], right, None, 12)
        want = torch.zeros(12, 5)
        want[start : start + 3] = left[:, :3].t() @ right
        torch.testing.assert_close(got, want)


def test_windows_cover_every_neuron():
    assert BlockRotation(1, 12, 4, 0.25).starts == [0, 4, 8]
    assert BlockRotation(1, 14, 4, 0.25).starts == [0, 4, 8, 10]
    assert BlockRotation(1, 8, 8, 0.25).starts == [0]


def test_rotation_takes_the_highest_positive_mass():
    blocks = BlockRotation(2, 12, 4, 0.0)
    scores = torch.zeros(2, 12)
    scores[0, 8] = 1.0
    scores[0, 0:4] = 5.0
    scores[0, 1] = -100.0  # negative attribution takes nothing away
    scores[1, 4] = 1.0
    scores[1, 9] = float("nan")
    assert blocks.rotate(scores) == [0, 4]
    assert blocks.rotate(scores) == [0, 4]


def test_the_blocks_of_the_rotation_before():
    blocks = BlockRotation(2, 12, 4, 0.0)
    scores = torch.zeros(3, 2, 12)
    for rotation, windows in enumerate([(1, 2), (1, 0), (2, 0)]):
        for layer, window in enumerate(windows):
            scores[rotation, layer, 4 * window] = 1.0
    previous = [None, [4, 8], [4, 0]]
    for made, expected in zip(scores, previous, strict=True):
        blocks.rotate(made)
        assert blocks.previous_starts() == expected
    assert blocks.current_starts() == [8, 0]


def test_rotation_without_scores_goes_round():
    blocks = BlockRotation(1, 12, 4, 0.0)
    seen = [blocks.rotate(torch.zeros(1, 12))[0] for _ in range(6)]
    assert seen == [0, 4, 8, 0, 4, 8]


@pytest.mark.parametrize("floor", [0.1, 0.25, 0.5, 1.0])
def test_floor_shows_every_window_within_a_bound(floor):
    """Scores that always favour window 0 cannot starve the others."""
    blocks = BlockRotation(2, 70, 16, floor)
    windows = len(blocks.starts)
    scores = torch.zeros(2, 70)
    scores[:, 0] = 1.0
    chosen = [blocks.rotate(scores)[0] for _ in range(400)]
    bound = math.ceil(windows / floor)
    for begin in range(400 - bound):
        assert set(chosen[begin : begin + bound]) == set(blocks.starts)
    share = sum(start != 0 for start in chosen) / 400
    assert share <= floor + 0.01
