"""The noise distribution against a plain loop, and draws that never leave it."""

from collections import Counter

import numpy as np
import pytest

from trelm_ds.data.negatives import NegativeSampler, negative_distribution
from trelm_ds.errors import DataError


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_distribution_matches_a_plain_loop(corpus, graph, tables, power):
    vocabulary = {word: i for i, word in enumerate(corpus.words)}
    counts = Counter()
    for head, _, tail in corpus.triples.tolist():
        for entity in (head, tail):
            counts.update(vocabulary[word] for word in corpus.entity_names[entity].split())
    total = sum(count**power for count in counts.values())
    expected = [counts[i] ** power / total if i in counts else 0.0 for i in range(len(vocabulary))]
    found = negative_distribution(tables, graph, len(vocabulary), power)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_draws_follow_the_distribution_and_its_zeros():
    q = np.array([0, 0.5, 0, 0.3, 0.2, 0])
    draw = NegativeSampler(q, 100, seed=1)
    found = np.bincount(np.concatenate([draw(step) for step in range(400)]), minlength=6)
    assert (found[q == 0] == 0).all()
    assert (abs(found - 40_000 * q) <= 4 * np.sqrt(40_000 * q * (1 - q))).all()


def test_the_last_token_is_reached_without_rounding_beyond_it():
    """A sum of many shares may end below 1; the draw must not fall off the table's end."""
    q = np.r_[np.full(997, 1 / 3) / 997, np.zeros(3)]
    draw = NegativeSampler(q, 10, seed=0)
    assert draw._cumulative[-1] == 1.0
    assert draw._tokens[np.searchsorted(draw._cumulative, np.nextafter(1, 0), side="right")] == 996


def test_negatives_depend_on_seed_and_step_alone():
    q = np.full(1000, 1e-3)
    np.testing.assert_array_equal(NegativeSampler(q, 64, 3)(7), NegativeSampler(q, 64, 3)(7))
    assert (NegativeSampler(q, 64, 3)(7) != NegativeSampler(q, 64, 3)(8)).any()
    assert (NegativeSampler(q, 64, 3)(7) != NegativeSampler(q, 64, 4)(7)).any()


def test_nothing_to_decode_is_refused(graph, tables, monkeypatch):
    monkeypatch.setattr(tables, "entity_names", np.full_like(tables.entity_names, -1))
    with pytest.raises(DataError, match="no training triple"):
        negative_distribution(tables, graph, 100, 0.75)
