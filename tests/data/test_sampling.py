"""Mention selection and triple choice against plain loops written from the definitions."""

import math
from collections import Counter

import numpy as np
import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.sampling import MentionSampler
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import DataError


def selected_by_loop(sample, config, tables, num_entities) -> list[int]:
    """Sections 1 and 5 of the design, one mention at a time."""
    seen = [int(f) for f in tables.entity_frequency if f > 0]
    mean_frequency = sum(seen) / len(seen)
    mentions = []
    for number, (_, _, key) in enumerate(sample.spans.tolist()):
        if key < num_entities:
            importance = float(tables.importance[sample.first_span + number])
            frequency = int(tables.entity_frequency[key])
            klt = importance * math.log(1 + int(tables.two_hop[key]))
            klt = klt if frequency < mean_frequency else 0.0
            mentions.append((number, importance, frequency, klt))
    if not mentions:
        return []
    rule = config.injection.selection
    mean_si = sum(m[1] for m in mentions) / len(mentions)
    mean_klt = sum(m[3] for m in mentions) / len(mentions)
    if config.injection.quantile is not None:
        mean_si = float(np.quantile([m[1] for m in mentions], config.injection.quantile))
    passing = []
    for mention in mentions:
        _, importance, frequency, klt = mention
        passes = {
            "importance": importance >= mean_si,
            "klt": klt > 0 and klt >= mean_klt,
            "long_tail": frequency < mean_frequency,
            "frequent": frequency >= mean_frequency,
            "all": True,
        }[rule]
        if passes:
            passing.append(mention)
    passing.sort(key=lambda m: (-m[3] if rule == "klt" else -m[1], m[0]))
    cap = config.injection.max_per_128_tokens * math.ceil(len(sample.ids) / 128)
    return sorted(m[0] for m in passing[:cap])


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Sequences of up to 300 tokens, so that the cap is 1, 2 or 3 times K."""
    folder = tmp_path_factory.mktemp("long")
    return write_tiny_corpus(folder, train=24, heldout=2, max_seq_length=300)


@pytest.mark.parametrize("selection", ["importance", "klt", "long_tail", "frequent", "all"])
@pytest.mark.parametrize("settings", [{}, {"injection__max_per_128_tokens": 1}])
def test_selection_matches_a_plain_loop(
    corpus, long_corpus, configure, graph, tables, selection, settings
):
    config = configure(injection__selection=selection, **settings)
    long_graph, long_tables = (
        kind.load(long_corpus.folder) for kind in (KnowledgeGraph, KnowledgeTables)
    )
    chosen = mentions = 0
    for samples, g, t in (
        (corpus.samples["train"], graph, tables),
        (long_corpus.samples["train"], long_graph, long_tables),
    ):
        sampler = MentionSampler(config, g, t)
        for sample in samples:
            expected = selected_by_loop(sample, config, t, g.num_entities)
            assert sampler.select(sample).tolist() == expected
            chosen += len(expected)
            mentions += (sample.spans[:, 2] < g.num_entities).sum()
    assert 0 < chosen < mentions  # neither rule nor cap is empty here


def test_quantile_selection_matches_a_plain_loop(corpus, configure, graph, tables):
    for quantile in (0.0, 0.5, 1.0):
        config = configure(injection__quantile=quantile)
        sampler = MentionSampler(config, graph, tables)
        for sample in corpus.samples["train"]:
            expected = selected_by_loop(sample, config, tables, graph.num_entities)
            assert sampler.select(sample).tolist() == expected


def test_equal_importance_passes_everywhere(corpus, configure, graph, tables, monkeypatch):
    """>= the mean: mentions that are all alike must not fall to rounding."""
    same = np.full_like(tables.importance, np.float32(1.1))
    monkeypatch.setattr(tables, "importance", same)
    sampler = MentionSampler(configure(injection__max_per_128_tokens=99), graph, tables)
    for sample in corpus.samples["train"]:
        assert len(sampler.select(sample)) == (sample.spans[:, 2] < graph.num_entities).sum()


def everything(configure, **changes):
    """Selects all mentions, so that every branch is met often."""
    return configure(
        **{"injection__selection": "all", "injection__max_per_128_tokens": 99} | changes
    )


def sampled(corpus, config, graph, tables, epochs=range(3)):
    sampler = MentionSampler(config, graph, tables)
    for sample in corpus.samples["train"]:
        for epoch in epochs:
            yield sample, epoch, sampler(sample, epoch)


def test_injected_triples_are_training_triples_and_prefer_the_text(
    corpus, configure, graph, tables
):
    facts = set(map(tuple, corpus.triples.tolist()))
    withheld = set(map(tuple, corpus.withheld.tolist()))
    in_text = roles = 0
    config = everything(configure, injection__probability=1.0, memory__enabled=False)
    for sample, _, mentions in sampled(corpus, config, graph, tables):
        present = {k for k in sample.spans[:, 2].tolist() if k < graph.num_entities}
        for key, injected, role, relation, other in zip(
            *(
                getattr(mentions, name).tolist()
                for name in ("keys", "injected", "role", "relation", "other")
            ),
            strict=True,
        ):
            own = {f for f in facts if key in (f[0], f[2])}
            assert injected == bool(own) == (role > 0)
            if not own:
                assert (relation, other) == (0, 0)
                continue
            triple = (key, relation, other) if role == 1 else (other, relation, key)
            assert triple in facts and triple not in withheld
            near = {f for f in own if ({f[0], f[2]} - {key}) <= present}
            if near:
                assert triple in near
                in_text += 1
            roles += role == 2
    assert in_text > 50 and roles > 50


def test_triples_are_chosen_uniformly(corpus, configure, graph, tables):
    config = everything(configure, injection__probability=1.0)
    sampler = MentionSampler(config, graph, tables)
    epochs = 1500
    checked = set()
    for sample in corpus.samples["train"]:
        present = {k for k in sample.spans[:, 2].tolist() if k < graph.num_entities}
        for key in present:
            near = [e for e in graph.edges_of(key).tolist() if e[2] in present]
            options = near or graph.edges_of(key).tolist()
            kind = bool(near)
            if len(options) < 3 or kind in checked:
                continue
            checked.add(kind)
            found = Counter()
            for epoch in range(epochs):
                mentions = sampler(sample, epoch)
                i = mentions.keys.tolist().index(key)
                found[int(mentions.role[i]), int(mentions.relation[i]), int(mentions.other[i])] += 1
            expected = epochs / len(options)
            assert set(found) == set(map(tuple, options))
            chi2 = sum((n - expected) ** 2 / expected for n in found.values())
            # Mean k - 1, variance 2 (k - 1): four standard deviations and some skew.
            assert chi2 < len(options) - 1 + 5 * math.sqrt(2 * (len(options) - 1))
        if checked == {True, False}:
            return
    raise AssertionError("no mention with enough triples")


def test_probability_is_a_draw_per_mention_and_changes_nothing_else(
    corpus, configure, graph, tables
):
    runs = {}
    for probability in (0.0, 0.3, 1.0):
        for form in ("kge", "none"):
            config = everything(
                configure,
                injection__probability=probability,
                injection__form=form,
                decoding__triple="different",
            )
            runs[probability, form] = list(sampled(corpus, config, graph, tables))
    injected, eligible = np.zeros(2), np.zeros(2)  # of entities and of long-tail words
    for (sample, _, all_of), (_, _, some), (_, _, none) in zip(
        runs[1.0, "kge"], runs[0.3, "kge"], runs[0.0, "kge"], strict=True
    ):
        entities = all_of.keys < graph.num_entities
        assert all_of.injected.all() and not none.injected.any()
        assert (sample.spans[:, :2] == all_of.spans).all()
        for other in (some, none):
            for name in ("spans", "keys", "decode_mention", "decode_relation", "decode_entity"):
                np.testing.assert_array_equal(getattr(all_of, name), getattr(other, name))
        both = some.injected
        for name in ("role", "relation", "other"):
            np.testing.assert_array_equal(getattr(all_of, name)[both], getattr(some, name)[both])
            assert not getattr(some, name)[~both].any()
        injected += some.injected[entities].sum(), some.injected[~entities].sum()
        eligible += entities.sum(), (~entities).sum()
    assert (abs(injected / eligible - 0.3) < 4 * np.sqrt(0.3 * 0.7 / eligible)).all()
    assert eligible.min() > 20
    # form none: the same mentions and decoding, no triple at the input, memory mixed in.
    for (_, _, kge), (_, _, none) in zip(runs[0.3, "kge"], runs[0.3, "none"], strict=True):
        np.testing.assert_array_equal(kge.injected, none.injected)
        np.testing.assert_array_equal(kge.decode_entity, none.decode_entity)
        assert not none.role.any() and not none.other.any() and not none.relation.any()


def test_selection_before_the_draw_decides_what_is_decoded(corpus, configure, graph, tables):
    config = configure(injection__probability=0.5, decoding__triple="same")
    undrawn = 0
    for sample, _, mentions in sampled(corpus, config, graph, tables):
        expected = selected_by_loop(sample, config, tables, graph.num_entities)
        entities = np.flatnonzero(mentions.keys < graph.num_entities)
        np.testing.assert_array_equal(mentions.spans[entities], sample.spans[expected, :2])
        with_triple = [i for i in entities.tolist() if graph.degree(mentions.keys[i])]
        assert mentions.decode_mention.tolist() == with_triple
        undrawn += (~mentions.injected[with_triple]).sum()
    assert undrawn > 20


def decoded_triples(mentions, graph):
    """(mention row, (head, relation, tail)) of everything decoded."""
    for row, relation, entity in zip(
        mentions.decode_mention.tolist(),
        mentions.decode_relation.tolist(),
        mentions.decode_entity.tolist(),
        strict=True,
    ):
        key = int(mentions.keys[row])
        if relation < graph.num_relations:
            yield row, (key, relation, entity)
        else:
            yield row, (entity, relation - graph.num_relations, key)


def injected_triple(mentions, row):
    key, relation, other = (int(getattr(mentions, n)[row]) for n in ("keys", "relation", "other"))
    return (key, relation, other) if mentions.role[row] == 1 else (other, relation, key)


@pytest.mark.parametrize("which", ["same", "different", "all"])
def test_decoded_triples(corpus, configure, graph, tables, which):
    facts = set(map(tuple, corpus.triples.tolist()))
    config = everything(
        configure, injection__probability=1.0, decoding__triple=which, decoding__max_triples=5
    )
    capped = others = 0
    for _, _, mentions in sampled(corpus, config, graph, tables):
        found = {}
        for row, triple in decoded_triples(mentions, graph):
            assert triple in facts
            found.setdefault(row, []).append(triple)
        for row, key in enumerate(mentions.keys.tolist()):
            degree = graph.degree(key) if key < graph.num_entities else 0
            triples = found.get(row, [])
            assert len(set(triples)) == len(triples)
            if which == "all":
                assert len(triples) == min(degree, 5)
                capped += degree > 5
            else:
                assert len(triples) == min(degree, 1)
                if degree:
                    same = triples[0] == injected_triple(mentions, row)
                    assert same == (which == "same" or degree == 1)
                    others += not same
                if which == "different" and 1 < degree <= 8:
                    given, asked = (
                        t[2] if t[0] == key else t[0]
                        for t in (injected_triple(mentions, row), triples[0])
                    )
                    other_ends = set(graph.edges_of(key)[:, 2].tolist())
                    assert given != asked or other_ends == {given}  # the answer is not given away
    assert capped > 20 if which == "all" else (others > 20) == (which == "different")


def test_the_different_triple_is_uniform_over_the_others(corpus, configure, graph, tables):
    config = everything(configure, injection__probability=1.0, decoding__triple="different")
    sampler = MentionSampler(config, graph, tables)
    sample, row = next(
        (s, row)
        for s in corpus.samples["train"]
        for row, key in enumerate(s.spans[:, 2].tolist())
        if key < graph.num_entities
        and graph.degree(key) == 4
        and len(graph.edges_between(key, set(s.spans[:, 2].tolist()))) == 1  # a fixed first choice
    )
    found = Counter()
    for epoch in range(1500):
        mentions = sampler(sample, epoch)
        found.update(triple for r, triple in decoded_triples(mentions, graph) if r == row)
    assert len(found) == 3
    assert max(abs(n - 500) for n in found.values()) < 4 * math.sqrt(1500 * 2 / 9)


def test_long_tail_words(corpus, configure, graph, tables):
    for memory, words in ((True, True), (True, False), (False, True)):
        config = everything(configure, memory__enabled=memory, injection__long_tail_words=words)
        found = expected = 0
        for sample, _, mentions in sampled(corpus, config, graph, tables, epochs=[0]):
            is_word = mentions.keys >= graph.num_entities
            assert mentions.injected[is_word].all() and not mentions.role[is_word].any()
            assert not is_word[mentions.decode_mention].any()
            found += is_word.sum()
            expected += (sample.spans[:, 2] >= graph.num_entities).sum()
        assert expected > 20 and found == (expected if memory and words else 0)


def test_a_mention_without_triples_takes_memory_alone(corpus, configure, graph, tables):
    lonely = [e for e in range(graph.num_entities) if not graph.degree(e)]
    assert lonely
    for memory in (True, False):
        config = everything(configure, injection__probability=1.0, memory__enabled=memory)
        seen = 0
        for _, _, mentions in sampled(corpus, config, graph, tables):
            rows = np.isin(mentions.keys, lonely)
            assert (mentions.injected[rows] == memory).all() and not mentions.role[rows].any()
            assert not rows[mentions.decode_mention].any()
            seen += rows.sum()
        assert seen > 5


def test_plain_mlm_looks_at_no_mention(corpus, configure, graph, tables):
    config = everything(
        configure, injection__form="none", memory__enabled=False, decoding__enabled=False
    )
    for _, _, mentions in sampled(corpus, config, graph, tables):
        assert not len(mentions.keys) and mentions.spans.shape == (0, 2)


def test_choices_are_a_function_of_seed_sample_span_and_epoch(corpus, configure, graph, tables):
    def draw(seed):
        config = everything(configure, train__seed=seed, injection__probability=0.5)
        return [m for _, _, m in sampled(corpus, config, graph, tables, epochs=range(2))]

    first, again, other = draw(1), draw(1), draw(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.injected, b.injected)
        np.testing.assert_array_equal(a.other, b.other)
    assert any((a.injected != b.injected).any() for a, b in zip(first, other, strict=True))
    assert any(
        (a.injected != b.injected).any() for a, b in zip(first[::2], first[1::2], strict=True)
    )


def test_unscored_mentions_are_refused(configure, graph, tables, monkeypatch):
    monkeypatch.setattr(tables, "importance", None)
    with pytest.raises(DataError, match="importance.npy not found: score the mentions first"):
        MentionSampler(configure(), graph, tables)
    plain = configure(injection__form="none", memory__enabled=False, decoding__enabled=False)
    MentionSampler(plain, graph, tables)


def test_all_mentions_are_decoded_and_only_selected_ones_injected(corpus, configure, graph, tables):
    changes = {"injection__max_per_128_tokens": 1, "decoding__triple": "all"}
    selected = MentionSampler(configure(**changes), graph, tables)
    everyone = MentionSampler(configure(decoding__mentions="all", **changes), graph, tables)
    added = 0
    for sample in corpus.samples["train"]:
        few, many = selected(sample, 0), everyone(sample, 0)
        asked = {tuple(span) for span in many.spans[many.decode_mention].tolist()}
        with_triples = {
            (left, right)
            for left, right, key in sample.spans.tolist()
            if key < graph.num_entities and graph.degree(key)
        }
        assert asked == with_triples
        for row, key in enumerate(many.keys.tolist()):
            if key < graph.num_entities:
                count = (many.decode_mention == row).sum()
                assert count == min(8, graph.degree(key))
        # What was there is there unchanged, and what was added is neither injected nor without use.
        kept = [span in few.spans.tolist() for span in many.spans.tolist()]
        for name in ("spans", "keys", "injected", "role", "relation", "other"):
            np.testing.assert_array_equal(getattr(many, name)[kept], getattr(few, name))
        new = np.flatnonzero(~np.array(kept, dtype=bool))
        assert not many.injected[new].any() and not many.role[new].any()
        assert set(new) <= set(many.decode_mention.tolist())
        added += len(new)
    assert added > 50
