"""BERT's 80/10/10 corruption, with injected spans and specials left alone."""

import numpy as np
import pytest

from trelm_ds.data import rng
from trelm_ds.data.masking import Masker

V, MASK, NONE = 1000, 4, np.zeros((0, 2), dtype=np.int64)
SPECIAL = np.arange(V) < 5


def masker(probability=0.15, mention_probability=None) -> Masker:
    return Masker(SPECIAL, MASK, probability, mention_probability)


def sequence(seed, length=128) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(5, V, length).astype(np.int32)
    ids[0], ids[-1] = 2, 3
    return ids


def stream(index):
    return rng.generator(0, rng.MASKING, 0, index)


def test_shares_of_targets_and_of_what_happens_to_them():
    counts = np.zeros(4)
    eligible = 0
    for i in range(1500):
        ids = sequence(i)
        corrupted, targets, _ = masker()(ids, NONE, NONE, stream(i))
        assert corrupted.dtype == np.int64 and targets.dtype == bool
        assert not targets[[0, -1]].any()
        assert (corrupted == ids)[~targets].all()
        new = corrupted[targets]
        assert not (SPECIAL[new] & (new != MASK)).any()  # no special as a random replacement
        same, masked = new == ids[targets], new == MASK
        counts += [targets.sum(), masked.sum(), same.sum(), (~same & ~masked).sum()]
        eligible += len(ids) - 2
    n = counts[0]
    assert abs(n / eligible - 0.15) < 4 * np.sqrt(0.15 * 0.85 / eligible)
    # A random replacement is the original token once in 995.
    for share, expected in zip(
        counts[1:] / n, (0.8, 0.1 + 0.1 / 995, 0.1 - 0.1 / 995), strict=True
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_replacements_are_uniform_over_the_ordinary_tokens():
    small = Masker(np.arange(12) < 5, MASK, 1.0)
    found = np.zeros(12)
    ids = np.full(2000, 11, dtype=np.int32)
    for i in range(50):
        corrupted, targets, _ = small(ids, NONE, NONE, stream(i))
        assert targets.all()
        found += np.bincount(corrupted, minlength=12)
    assert (found[[0, 1, 2, 3]] == 0).all()
    drawn = found[5:11]  # 10,000 draws over 7 tokens; 11 also stands for "unchanged"
    assert abs(drawn - 100_000 * 0.1 / 7).max() < 4 * np.sqrt(100_000 * 0.1 / 7)


def test_injected_spans_are_never_targets_and_do_not_move_the_others():
    injected = np.array([[1, 30], [60, 100]])
    inside = np.zeros(128, dtype=bool)
    for left, right in injected:
        inside[left:right] = True
    for i in range(300):
        ids = sequence(i)
        free, free_targets, _ = masker(0.5)(ids, NONE, NONE, stream(i))
        corrupted, targets, _ = masker(0.5)(ids, injected, injected, stream(i))
        assert not targets[inside].any() and (corrupted == ids)[inside].all()
        np.testing.assert_array_equal(targets[~inside], free_targets[~inside])
        np.testing.assert_array_equal(corrupted[~inside], free[~inside])


def test_at_least_one_target_when_there_is_an_eligible_token():
    for i in range(200):
        ids = sequence(i, length=8)
        injected = np.array([[1, 4]])
        _, targets, _ = masker(0.01)(ids, NONE, injected, stream(i))
        assert targets.sum() >= 1 and not targets[[0, 1, 2, 3, 7]].any()
        _, targets, _ = masker(0.9)(ids, NONE, np.array([[1, 7]]), stream(i))
        assert not targets.any()
    corrupted, targets, _ = masker()(np.array([2, 1, 3]), NONE, NONE, stream(0))  # only specials
    assert not targets.any() and corrupted.tolist() == [2, 1, 3]


def test_whole_mentions():
    mentions = np.array([[5, 8], [20, 21], [40, 44], [90, 95]])
    injected = mentions[3:]
    masked = np.zeros(4)
    text_targets = text = 0
    for i in range(2000):
        ids = sequence(i)
        corrupted, targets, found = masker(0.15, 0.3)(ids, mentions, injected, stream(i))
        outside = ~SPECIAL[ids]
        for number, (left, right) in enumerate(mentions):
            whole = targets[left:right]
            assert whole.all() or not whole.any()
            assert not whole.any() or (corrupted[left:right] == MASK).all()
            assert found[number] == whole.all()
            masked[number] += whole.all()
            outside[left:right] = False
        text_targets += targets[outside].sum()
        text += outside.sum()
    assert masked[3] == 0
    assert abs(masked[:3] / 2000 - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / 2000)
    assert abs(text_targets / text - 0.15) < 4 * np.sqrt(0.15 * 0.85 / text)


def test_a_mention_counts_as_masked_only_with_a_target_in_it():
    ids = np.array([2, 1, 1, 50, 1, 60, 3])  # 1: special, as an unknown token in a name
    mentions = np.array([[1, 3], [3, 5], [5, 6]])
    corrupted, targets, masked = masker(0.15, 1.0)(ids, mentions, mentions[2:], stream(0))
    assert masked.tolist() == [False, True, False]
    assert np.flatnonzero(targets).tolist() == [3] and corrupted.tolist() == [2, 1, 1, 4, 1, 60, 3]
    _, _, masked = masker(1.0)(ids, mentions, NONE, stream(0))  # tokens, not mentions
    assert not masked.any()


def test_a_stream_is_named_by_all_its_parts():
    parts = [(0, 1, 0, 0, 0), (1, 1, 0, 0, 0), (0, 2, 0, 0, 0)]
    parts += [(0, 1, 1, 0, 0), (0, 1, 0, 1, 0), (0, 1, 0, 0, 1), (-1, 1, 0, 0, 0)]
    draws = [tuple(rng.generator(*p).random(4)) for p in parts]
    assert len(set(draws)) == len(parts)
    assert draws == [tuple(rng.generator(*p).random(4)) for p in parts]


@pytest.mark.parametrize("seed", [0, 42, 2**63, 2**64 + 42])
def test_any_integer_is_a_seed(seed):
    same = rng.generator(seed % 2**64, 1).random(3)
    np.testing.assert_array_equal(rng.generator(seed, 1).random(3), same)
