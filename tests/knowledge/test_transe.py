"""TransE: vectors that rank true tails first, filtered negatives, table layout."""

import numpy as np
import pytest
import torch

from trelm_ds.knowledge.transe import _KnownTriples, corrupt, train_transe

PERSONS, CITIES, COUNTRIES = 300, 40, 8
ENTITIES = PERSONS + CITIES + COUNTRIES
BORN_IN, LIES_IN, CITIZEN_OF = range(3)


@pytest.fixture(scope="module")
def graph():
    """Persons born in cities, cities in countries, and citizenship that follows from the two."""
    rng = np.random.default_rng(0)
    cities = rng.integers(CITIES, size=PERSONS)
    rows = [(PERSONS + c, LIES_IN, PERSONS + CITIES + c % COUNTRIES) for c in range(CITIES)]
    for person, city in enumerate(cities.tolist()):
        rows.append((person, BORN_IN, PERSONS + city))
        rows.append((person, CITIZEN_OF, PERSONS + CITIES + city % COUNTRIES))
    return np.array(sorted(rows), np.int32)


def ranks(entities, relations, triples, known):
    found = []
    for head, relation, tail in triples.tolist():
        distance = np.abs(entities[1:] - entities[head + 1] - relations[relation + 1]).sum(1)
        others = [t for h, r, t in known if (h, r) == (head, relation) and t != tail]
        distance[others] = np.inf
        found.append(1 + int((distance < distance[tail]).sum()))
    return np.array(found)


def test_true_tails_rank_far_above_chance_on_unseen_triples(graph):
    unseen = (graph[:, 1] == CITIZEN_OF) & (graph[:, 0] % 4 == 0)
    train, test = graph[~unseen], graph[unseen]
    entities, relations = train_transe(train, ENTITIES, 3, dim=32, epochs=60, seed=1)
    known = {tuple(row) for row in graph.tolist()}
    found = ranks(entities, relations, test, known)
    assert len(found) == 75
    assert np.median(found) <= 8  # chance: 174
    assert (found <= 10).mean() > 0.7  # chance: 0.03
    untrained = train_transe(train, ENTITIES, 3, dim=32, epochs=0, seed=1)
    assert np.median(ranks(*untrained, test, known)) > 100


def test_the_tables_have_a_zero_row_and_unit_entities(graph):
    entities, relations = train_transe(graph, ENTITIES + 3, 5, dim=16, epochs=2)
    assert entities.shape == (ENTITIES + 4, 16) and relations.shape == (6, 16)
    assert entities.dtype == relations.dtype == np.float32
    assert not entities[0].any() and not relations[0].any()
    np.testing.assert_allclose(np.linalg.norm(entities[1:], axis=1), 1, rtol=1e-5)
    assert np.isfinite(relations).all()


def test_equal_seeds_give_equal_vectors(graph):
    first = train_transe(graph, ENTITIES, 3, dim=8, epochs=2, seed=5)
    torch.manual_seed(99)  # nothing is drawn from the global generator
    again = train_transe(graph, ENTITIES, 3, dim=8, epochs=2, seed=5)
    other = train_transe(graph, ENTITIES, 3, dim=8, epochs=2, seed=6)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_negatives_are_false_and_differ_in_one_end(graph):
    triples = torch.from_numpy(graph.astype(np.int64))
    known = _KnownTriples(triples, ENTITIES, 3)
    assert known.contains(triples).all()
    negatives = corrupt(triples, known, ENTITIES, torch.Generator().manual_seed(0))
    assert not known.contains(negatives).any()
    assert (negatives[:, 1] == triples[:, 1]).all()
    changed = negatives != triples
    assert (changed.sum(1) == 1).all()
    assert 0.4 < changed[:, 0].double().mean() < 0.6


def test_no_triple_is_no_error():
    entities, relations = train_transe(np.empty((0, 3), np.int32), 3, 0, dim=4)
    assert entities.shape == (4, 4) and relations.shape == (1, 4)
    assert not entities[0].any()
