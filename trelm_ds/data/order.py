"""The order of samples as a function: position in the stream -> (epoch, sample index).

An epoch's permutation is a Feistel network over the smallest even-bit domain that holds n, and
positions that land at n or above walk along their cycle until they come back below n. That is a
bijection of 0..n-1 for every n, takes O(1) memory, and makes one integer the loader's whole state.
"""

from __future__ import annotations

import numpy as np

from trelm_ds.data import rng

_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of 0..n-1, keyed by (seed, epoch)."""

    def __init__(self, n: int, seed: int, epoch: int):
        if n < 1:
            raise ValueError(f"a permutation of {n} elements")
        self.n = n
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        stream = rng.generator(seed, rng.ORDER, epoch)
        self._keys = stream.integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return left << self._half_bits | right

    def __call__(self, position):
        """Maps positions to indices.

        Args:
            position: an int or an int64 array, each in 0..n-1.
        Returns:
            An int, or an int64 array of the same shape.
        """
        x = np.asarray(position)
        if x.size and not (0 <= x.min() and x.max() < self.n):
            raise ValueError(f"a position is outside 0..{self.n - 1}")
        shape, x = x.shape, x.astype(np.uint64).ravel()
        x = self._encrypt(x)
        outside = np.flatnonzero(x >= self.n)
        while outside.size:  # a quarter of the domain or more is inside: few rounds
            x[outside] = self._encrypt(x[outside])
            outside = outside[x[outside] >= self.n]
        return int(x[0]) if shape == () else x.astype(np.int64).reshape(shape)


SHARE_UNIT = 1_000_000  # shares of rows are whole millionths: their arithmetic is exact


def divide_stream(position: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deals the positions of a stream out to two, one of which gets ``share`` of them, evenly.

    Args:
        position: int64 [n], >= 0.
        share: in [0, 1].
    Returns:
        (bool [n] which positions the first stream gets, int64 [n] their place in it, int64 [n]
        the others' place in the second). A place is the number of earlier ones of its kind.
    """
    units = round(share * SHARE_UNIT)
    before = position * units // SHARE_UNIT
    taken = (position + 1) * units // SHARE_UNIT > before
    return taken, before, position - before


def stream_position(position, n: int, seed: int):
    """Epoch and sample index of a position of the endless stream of epoch permutations.

    Args:
        position: an int or an int64 array, >= 0.
        n: samples in the split.
        seed: the run's seed.
    Returns:
        (epoch, index), ints or int64 arrays like ``position``.
    """
    if np.ndim(position) == 0:
        epoch, offset = divmod(int(position), n)
        return epoch, Permutation(n, seed, epoch)(offset)
    position = np.asarray(position, dtype=np.int64)
    epoch, offset = np.divmod(position, n)
    index = np.empty_like(position)
    for e in np.unique(epoch):
        here = epoch == e
        index[here] = Permutation(n, seed, int(e))(offset[here])
    return epoch, index
