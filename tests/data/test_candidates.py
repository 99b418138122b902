"""What triples choose among, against plain loops over the graph and the names."""

import numpy as np
import pytest
from entity_names import entity_tokens

from trelm_ds.data.candidates import EntityCandidates
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.negatives import NegativeSampler, answer_distribution, entity_distribution


def questions(corpus, graph, count=40, seed=0):
    """(entities, relations, gold) of training triples, both ways round."""
    rng = np.random.default_rng(seed)
    head, relation, tail = corpus.triples[rng.integers(len(corpus.triples), size=count)].T
    back = rng.random(count) < 0.5
    return (
        np.where(back, tail, head).astype(np.int64),
        np.where(back, relation + graph.num_relations, relation).astype(np.int64),
        np.where(back, head, tail).astype(np.int64),
    )


def build(configure, graph, tables, **changes):
    settings = {"decoding__entity_weight": 0.5, "decoding__entity_negatives": 6}
    return EntityCandidates(configure(**settings | changes), graph, tables)


def name_of(tables, entity) -> tuple:
    return tuple(tables.entity_names[entity].tolist())


def names_of(fields) -> np.ndarray:
    return entity_tokens(fields["entity_words"], fields["entity_names"])


def asked_about(corpus, graph, tables, most) -> np.ndarray:
    """The answers' distribution by a loop over mentions and their triples."""
    counts = np.zeros(graph.num_entities)
    for entity, mentions in enumerate(tables.entity_frequency.tolist()):
        edges = [t for h, _, t in corpus.triples.tolist() if h == entity]
        edges += [h for h, _, t in corpus.triples.tolist() if t == entity]
        for other in edges:
            counts[other] += mentions * min(1, most / len(edges))
    return counts / counts.sum()


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_answers_against_a_loop(corpus, graph, tables, most):
    found = answer_distribution(tables, graph, most)
    np.testing.assert_allclose(found, asked_about(corpus, graph, tables, most), rtol=1e-12)


@pytest.mark.parametrize("batch", [2, 200])
def test_weighed_candidates_count_the_names(corpus, configure, graph, tables, batch):
    # Answers are listed whether drawn or not: by the draw alone rare ones weighed many times over.
    everyone = np.arange(graph.num_entities)
    make = build(configure, graph, tables, decoding__triple="all", decoding__max_triples=1000)
    rng = np.random.default_rng(1)
    a = answer_distribution(tables, graph, 1000)
    none = np.zeros(batch, dtype=np.int64)
    sums = []
    for step in range(2000):
        fields = make(step, none, none, rng.choice(everyone, batch, p=a), none[:0])
        sums.append(np.exp(-fields["entity_log_q"].astype(float)).sum())
    names = len({name_of(tables, e) for e in everyone[graph.degrees() > 0]})
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - names) < 4 * error
    assert error < names / 20


@pytest.mark.parametrize("namesakes", [False, True])
def test_fields_against_a_loop(corpus, configure, graph, tables, monkeypatch, namesakes):
    if namesakes:
        names = tables.entity_names.copy()
        names[1::3] = names[0::3]  # every third entity is called like the one before
        monkeypatch.setattr(tables, "entity_names", names)
    entities, relations, gold = questions(corpus, graph)
    make = build(configure, graph, tables)
    q = entity_distribution(tables, graph, 0.75)
    drawn = NegativeSampler(q, 6, 42, make._draw._purpose)(3)
    offered = np.array([5, 5, graph.num_entities - 1])  # the last one has no triple
    fields = make(3, entities, relations, gold, offered)

    listed = set(gold.tolist()) | set(drawn.tolist()) | {5}
    names = {name_of(tables, e) for e in listed}
    columns = {tuple(row): i for i, row in enumerate(names_of(fields).tolist())}
    assert set(columns) == names and len(names_of(fields)) == len(names)
    assert (len(names) < len(listed)) == namesakes
    a = asked_about(corpus, graph, tables, most=1)
    namesake = {name: [] for name in columns}
    for e in range(graph.num_entities):
        namesake.get(name_of(tables, e), []).append(e)
    for name, column in columns.items():
        drawn_q, asked = (sum(p[e] for e in namesake[name]) for p in (q, a))
        expected = np.log(1 - (1 - drawn_q) ** 6 * (1 - asked) ** len(gold))
        assert fields["entity_log_q"][column] == pytest.approx(expected, rel=1e-5)
    facts = set(map(tuple, corpus.triples.tolist()))
    hits = set()
    for i, (entity, via, answer) in enumerate(
        zip(entities.tolist(), relations.tolist(), gold.tolist(), strict=True)
    ):
        assert fields["entity_gold"][i] == columns[name_of(tables, answer)]
        r = graph.num_relations
        for other in listed:
            fact = (entity, via, other) if via < r else (other, via - r, entity)
            if fact in facts and name_of(tables, other) != name_of(tables, answer):
                hits.add(i * len(names) + columns[name_of(tables, other)])
    assert set(fields["entity_hits"].tolist()) == hits and hits
    assert fields["entity_log_q"].dtype == np.float32


def test_the_cap_never_drops_an_answer_and_prefers_what_is_offered_first(
    corpus, configure, graph, tables
):
    entities, relations, gold = questions(corpus, graph, count=3)
    free = build(configure, graph, tables, decoding__entity_negatives=1)
    count = len(free(0, entities, relations, gold, np.zeros(0, np.int64))["entity_names"])
    offered = np.setdiff1d(np.flatnonzero(graph.degrees()), np.r_[gold, free._draw(0)])[::-1]
    assert len(offered) > 4
    capped = build(
        configure,
        graph,
        tables,
        decoding__entity_negatives=1,
        decoding__entity_candidates=count + 2,
    )
    fields = capped(0, entities, relations, gold, offered)
    names = set(map(tuple, names_of(fields).tolist()))
    assert len(names) == count + 2
    assert {name_of(tables, e) for e in [*gold, *offered[:2]]} <= names
    capped = build(
        configure, graph, tables, decoding__entity_negatives=1, decoding__entity_candidates=2
    )
    fields = capped(0, entities, relations, gold, offered)
    names = set(map(tuple, names_of(fields).tolist()))
    assert {name_of(tables, e) for e in gold} <= names and len(names) == count


def test_enough_draws_make_the_full_softmax(corpus, configure, graph, tables):
    many = {"decoding__entity_negatives": 100_000, "decoding__entity_candidates": 100_001}
    fields = build(configure, graph, tables, **many)(0, *questions(corpus, graph), np.zeros(0, int))
    assert len(names_of(fields)) == (graph.degrees() > 0).sum()
    assert not fields["entity_log_q"].any()


def test_no_question_leaves_the_candidates_of_the_step(configure, graph, tables):
    none = np.zeros(0, dtype=np.int64)
    fields = build(configure, graph, tables)(5, none, none, none, none)
    assert len(names_of(fields)) and not len(fields["entity_gold"])
    assert fields["entity_hits"].shape == (0,)


def test_batches_hold_their_own_answers_and_share_the_draw(corpus, configure, graph, tables):
    settings = {
        "decoding__entity_weight": 0.5,
        "decoding__entity_negatives": 6,
        "decoding__triple": "all",
        "train__gradient_accumulation_steps": 2,
    }
    loader = StepLoader(configure(**settings), corpus.folder, 0, 1, graph, tables)
    first, second = next(loader.iterate(2))
    drawn = NegativeSampler(
        entity_distribution(tables, graph, 0.75),
        6,
        42,
        EntityCandidates(configure(**settings), graph, tables)._draw._purpose,
    )(2)
    for batch in (first, second):
        assert batch.counts()["entity"] == len(batch.decode_other) > 0
        tokens = entity_tokens(batch.entity_words, batch.entity_names)
        gold = tokens[batch.entity_gold]
        assert gold.tolist() == tables.entity_names[batch.decode_other].tolist()
        names = set(map(tuple, tokens.tolist()))
        keys = batch.mention_keys[batch.mention_keys < graph.num_entities]
        asked = [e for e in keys.tolist() if graph.degree(e)]
        assert {name_of(tables, e) for e in [*drawn, *asked]} <= names
    plain = StepLoader(configure(), corpus.folder, 0, 1, graph, tables)
    (batch,) = next(plain.iterate(2))
    assert batch.entity_names.shape == (0, 0) and batch.counts()["entity"] == 0
