"""The stream order is an exact bijection of every size, and a function of the position."""

import numpy as np
import pytest

from trelm_ds.data.order import Permutation, stream_position


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 4096, 65537])
def test_permutation_is_a_bijection(n):
    permutation = Permutation(n, seed=3, epoch=1)
    mapped = permutation(np.arange(n))
    assert mapped.dtype == np.int64
    np.testing.assert_array_equal(np.sort(mapped), np.arange(n))
    for position in {0, n // 2, n - 1}:  # one by one as all at once
        one = permutation(position)
        assert type(one) is int and one == mapped[position]


def test_permutation_matches_a_scalar_feistel_network():
    """Brute force in Python integers, from the definition."""
    n, mask64 = 1000, (1 << 64) - 1
    permutation = Permutation(n, seed=11, epoch=4)
    keys = [int(k) for k in permutation._keys]

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask64
        return x ^ (x >> 31)

    def walk(x):
        while True:
            left, right = x >> 5, x & 31  # 1000 needs 10 bits
            for key in keys:
                left, right = right, left ^ (mix((right + key) & mask64) & 31)
            x = left << 5 | right
            if x < n:
                return x

    np.testing.assert_array_equal(permutation(np.arange(n)), [walk(x) for x in range(n)])


def test_epochs_and_seeds_give_unrelated_orders():
    n = 2000
    orders = [Permutation(n, s, e)(np.arange(n)) for s, e in ((0, 0), (0, 1), (1, 0), (-1, 0))]
    for i, a in enumerate(orders):
        for b in [*orders[:i], np.arange(n)]:
            assert (a == b).sum() < 10  # one match expected by chance
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.1  # 4.5 standard deviations


def test_small_permutations_reach_every_order():
    found = {tuple(Permutation(3, seed, 0)(np.arange(3))) for seed in range(200)}
    assert len(found) == 6


@pytest.mark.parametrize("position", [-1, 5, np.array([0, 5]), np.array([-1])])
def test_positions_outside_are_refused(position):
    with pytest.raises(ValueError, match="outside"):
        Permutation(5, 0, 0)(position)
    with pytest.raises(ValueError):
        Permutation(0, 0, 0)


def test_stream_is_the_concatenation_of_epoch_permutations():
    n, seed = 13, 5
    epochs, indices = stream_position(np.arange(4 * n), n, seed)
    np.testing.assert_array_equal(epochs, np.repeat(range(4), n))
    for epoch in range(4):
        expected = Permutation(n, seed, epoch)(np.arange(n))
        np.testing.assert_array_equal(indices[epoch * n : (epoch + 1) * n], expected)
    assert stream_position(2 * n + 3, n, seed) == (2, int(indices[2 * n + 3]))
    big = 26_000_000 * 5 + 17  # no array of the corpus's size is made
    epoch, index = stream_position(big, 26_000_000, seed)
    assert epoch == 5 and 0 <= index < 26_000_000
