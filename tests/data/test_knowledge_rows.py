"""A knowledge row says training triples, hides one name of each, and nothing else."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from data.test_loader import loader, steps_of

from trelm_ds.data.knowledge_rows import KnowledgeRows, asks_for_tail
from trelm_ds.data.special import SpecialTokens
from trelm_ds.errors import DataError


@pytest.fixture(scope="module")
def special(corpus):
    return SpecialTokens.load(corpus.folder, len(corpus.words))


@pytest.fixture
def make(corpus, graph, tables, special):
    def rows(max_length=32, triples=4, seed=42, graph=graph, tables=tables):
        return KnowledgeRows(graph, tables, special, len(corpus.words), max_length, triples, seed)

    return rows


def facts_of(corpus, graph, example):
    """(triple, end asked) of each part of a row, read back from its words."""
    names = {name: e for e, name in enumerate(corpus.entity_names)}
    relations = {name: r for r, name in enumerate(graph.relation_names)}
    words = [corpus.words[i] for i in example.ids]
    assert words[0] == "[CLS]" and words[-1] == "[SEP]"
    start, found = 1, []
    for left, right, answer in example.masked_mentions.tolist():
        end = words.index("[SEP]", start)
        assert example.targets[left:right].all()
        assert corpus.entity_names[answer] == " ".join(words[left:right])
        is_tail = right == end
        assert is_tail or left == start
        part = words[start:end]
        for a, b in itertools.combinations(range(1, len(part)), 2):
            head, via, tail = (" ".join(p) for p in (part[:a], part[a:b], part[b:]))
            if head in names and via in relations and tail in names:
                triple = (names[head], relations[via], names[tail])
                break
        else:
            raise AssertionError(f"{part} says no triple")
        assert triple[2 if is_tail else 0] == answer
        found.append((triple, int(is_tail)))
        start = end + 1
    assert start == len(words)
    return found


def test_rows_say_training_triples_and_hide_one_whole_name_of_each(corpus, graph, special, make):
    known = {tuple(t) for t in corpus.triples.tolist()}
    withheld = {tuple(t) for t in corpus.withheld.tolist()}
    rows = make()
    for position in range(300):
        example = rows(position, None)
        found = facts_of(corpus, graph, example)
        assert 1 <= len(found) <= 4 and len(example.ids) <= 32
        triples = [triple for triple, _ in found]
        assert len(set(triples)) == len(triples)  # asked twice, a fact answers itself
        assert set(triples) <= known and not set(triples) & withheld
        inside = np.zeros(len(example.ids), dtype=bool)
        for left, right, _ in example.masked_mentions.tolist():
            inside[left:right] = True
        assert np.array_equal(example.targets, inside)
        assert (example.corrupted[inside] == special.mask).all()
        assert np.array_equal(example.corrupted[~inside], example.ids[~inside])
        assert not len(example.mentions.keys) and example.position == position
    again = make()(7, None)
    assert again.ids.tolist() == rows(7, None).ids.tolist() != make(seed=1)(7, None).ids.tolist()


@pytest.mark.parametrize("backwards", [False, True])
def test_triples_are_drawn_by_the_weight_of_the_answer(corpus, graph, make, backwards):
    weights = np.random.default_rng(3).uniform(0.05, 1.0, 24).astype(np.float32)
    triples = np.array(sorted(corpus.triples[:, :: -1 if backwards else 1].tolist()))
    rows = make(
        triples=1, graph=SimpleNamespace(triples=triples, num_relations=4, folder=graph.folder)
    )
    of_tail = asks_for_tail(triples, 4)
    assert of_tail.all() or (backwards and not of_tail.all())
    for given in (None, weights):
        n = 2000
        drawn = Counter(facts_of(corpus, graph, rows(p, given))[0] for p in range(n))
        expected = {}
        for head, relation, tail in triples.tolist():
            answer = tail if of_tail[relation] else head
            key = ((head, relation, tail), int(of_tail[relation]))
            expected[key] = 1.0 if given is None else given[answer]
        total = sum(expected.values())
        assert set(drawn) <= set(expected)
        for key, weight in expected.items():
            p = weight / total
            assert abs(drawn[key] / n - p) < 5 * np.sqrt(p * (1 - p) / n), key


def test_a_relation_is_asked_for_the_end_it_determines():
    born = [(person, 0, person % 2) for person in range(2, 20)]  # 18 people, 2 places
    twins = [(0, 1, 1), (1, 1, 0)]
    holds = [(place, 2, person) for person, _, place in born]
    triples = np.array(sorted(born + twins + holds), dtype=np.int32)
    assert asks_for_tail(triples, 4).tolist() == [True, True, False, True]


def test_short_rows_hold_what_fits_and_no_room_at_all_is_an_error(corpus, graph, make):
    for position in range(50):
        example = make(max_length=9)(position, None)
        assert len(example.ids) <= 9 and facts_of(corpus, graph, example)
    with pytest.raises(DataError, match="sampling.knowledge_rows"):
        make(max_length=4)


def test_entities_without_a_name_are_left_out(corpus, graph, tables, make):
    class Unnamed:
        entity_names = np.array(tables.entity_names)
        relation_names = tables.relation_names

    hub = int(np.bincount(corpus.triples[:, [0, 2]].ravel()).argmax())
    Unnamed.entity_names[hub] = -1
    rows = make(tables=Unnamed)
    for position in range(100):
        for (head, _, tail), _ in facts_of(corpus, graph, rows(position, None)):
            assert hub not in (head, tail)


def test_the_loader_gives_them_their_share(corpus, graph, tables, configure):
    """With the natural form the text rows stay those of the corpus's order."""
    config = configure(train__per_device_train_batch_size=8, sampling__knowledge_rows=0.25)
    plain = configure(train__per_device_train_batch_size=6)
    text = steps_of(loader(corpus, graph, tables, plain), 0, 6)
    for (mixed,), (only_text,) in zip(
        steps_of(loader(corpus, graph, tables, config), 0, 6), text, strict=True
    ):
        kept = [0, 1, 2, 4, 5, 6]
        lengths = mixed.attention_mask.sum(1)
        for row, text_row in zip(kept, range(6), strict=True):
            length = int(lengths[row])
            for name in ("input_ids", "original_ids"):
                a, b = getattr(mixed, name)[row], getattr(only_text, name)[text_row]
                assert a[:length].tolist() == b[:length].tolist()
        assert set(mixed.mention_spans[:, 0].tolist()) <= set(kept)
        width = mixed.input_ids.shape[1]
        rows = mixed.mlm_positions // width
        in_fact = (rows == 3) | (rows == 7)
        assert in_fact.any() and (mixed.mlm_mention[in_fact] >= 0).all()
        assert mixed.counts()["sequences"] == 8 and mixed.num_tokens == int(lengths.sum())
