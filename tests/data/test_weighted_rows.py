"""Rows drawn by entity: where they stand, how often whom, and that timing never enters."""

import errno
import itertools
import os
import threading
import time

import numpy as np
import pytest
from data.test_loader import loader, sequences, steps_of
from tiny_corpus import write_tiny_corpus

from trelm_ds.data import rng
from trelm_ds.data.entity_first import EntityFirst
from trelm_ds.data.entity_samples import EntitySamples, index_entity_samples
from trelm_ds.data.order import divide_stream, stream_position
from trelm_ds.data.weights import WeightTables, weighted_draw
from trelm_ds.errors import ConfigError, DataError

STATE = {"sampling__form": "knowledge_state", "sampling__refresh_steps": 4}


@pytest.fixture(scope="module")
def samples(corpus) -> EntitySamples:
    index_entity_samples(corpus.folder)
    return EntitySamples.load(corpus.folder)


def some_weights(seed, count=24) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 1.0, count).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.999, 1.0])
def test_a_share_of_a_stream_is_dealt_out_evenly(share):
    position = np.arange(4000)
    taken, place, rest = divide_stream(position, share)
    assert np.array_equal(place[taken], np.arange(taken.sum()))
    assert np.array_equal(rest[~taken], np.arange((~taken).sum()))
    # Never more than one row from what is due, at any point.
    assert np.abs(np.cumsum(taken) - share * (position + 1)).max() <= 1.01
    late = 3 * 10**12
    assert divide_stream(np.array([late]), share)[1][0] == late * round(share * 1e6) // 10**6


def test_draws_follow_the_weights():
    weights = np.array([1.0, 0.5, 0.05, 0.0, 0.25])
    stream = np.random.default_rng(0)
    n = 20000
    drawn = [weighted_draw(stream, 5, lambda i: weights[i]) for _ in range(n)]
    expected = weights / weights.sum()
    found = np.bincount(drawn, minlength=5) / n
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()
    assert weighted_draw(stream, 5, lambda i: np.zeros(len(i)), rounds=3) is None


def plain_draw(samples, spans_of, position, weights):
    """The sample at a position, written from the rule: candidates until one is accepted."""
    mentioned = sorted({key for keys in spans_of for key in keys})
    stream = rng.generator(42, rng.ENTITY_FIRST, index=position)
    entity = None
    if weights is None:
        entity = mentioned[stream.integers(len(mentioned))]
    while entity is None:
        candidates = stream.integers(0, len(mentioned), 64)
        luck = stream.random(64)
        for candidate, u in zip(candidates, luck, strict=True):
            if u < weights[mentioned[candidate]]:
                entity = mentioned[candidate]
                break
    having = [i for i, keys in enumerate(spans_of) if entity in keys]
    return having[stream.integers(len(having))]


def test_entity_first_equals_a_plain_loop(corpus, samples):
    spans_of = [{k for k in s.spans[:, 2].tolist() if k < 24} for s in corpus.samples["train"]]
    draw = EntityFirst(samples, 42)
    for weights in (None, some_weights(1)):
        for position in range(200):
            expected = plain_draw(samples, spans_of, position, weights)
            assert draw(position, weights) == expected


def test_the_index_holds_each_pair_once(corpus, samples, tmp_path):
    for entity in range(24):
        having = [s.id for s in corpus.samples["train"] if entity in s.spans[:, 2]]
        assert samples.of(entity).tolist() == having
        assert (entity in samples.entities) == bool(having)


def test_the_index_is_asked_for_by_its_command(tmp_path):
    write_tiny_corpus(tmp_path, train=4, heldout=0)
    with pytest.raises(DataError, match=r"prepare\.py index --output"):
        EntitySamples.load(tmp_path)
    index_entity_samples(tmp_path)
    assert len(EntitySamples.load(tmp_path).entities)
    assert not list((tmp_path / "tables").glob(".tmp*"))
    report = tmp_path / "tables" / "entity_samples.json"
    report.write_text(report.read_text().replace('"dataset_id": "', '"dataset_id": "0'))
    with pytest.raises(DataError, match=r"prepare\.py index"):  # of other data
        EntitySamples.load(tmp_path)


def test_an_index_that_the_disk_has_no_room_for_is_an_error_and_leaves_nothing(
    tmp_path, monkeypatch
):
    """Without blocks reserved first, a write to the mapped file ends the process (SIGBUS)."""
    write_tiny_corpus(tmp_path, train=4, heldout=0)
    before = sorted((tmp_path / "tables").iterdir())
    asked = []

    def full_disk(file, start, size):
        asked.append((start, size, os.fstat(file).st_size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trelm_ds.data.entity_samples.os.posix_fallocate", full_disk)
    with pytest.raises(OSError, match="No space left"):
        index_entity_samples(tmp_path)
    [(start, size, whole)] = asked
    assert start == 0 and size == whole > 128  # header and all
    assert sorted((tmp_path / "tables").iterdir()) == before


# --- in the loader ----------------------------------------------------------------------------


def test_shares_of_the_rows(corpus, graph, tables, samples, configure):
    """Kinds stand where the number says, natural rows walk the epoch, drawn rows equal the draw."""
    config = configure(
        train__per_device_train_batch_size=8,
        sampling__form="static",
        sampling__natural_share=0.3,
        sampling__knowledge_rows=0.25,
    )
    steps = steps_of(loader(corpus, graph, tables, config, entity_samples=samples), 0, 40)
    content = sequences(itertools.chain(*steps))
    ids_of = {tuple(s.ids.tolist()): s.id for s in corpus.samples["train"]}
    draw = EntityFirst(samples, config.train.seed)
    facts = natural = text = 0
    for position in range(320):
        found = ids_of.get(tuple(content[position][0]))
        if (position + 1) * 250_000 // 10**6 > position * 250_000 // 10**6:
            assert found is None and not content[position][3]  # no mentions in a knowledge row
            facts += 1
            continue
        if (text + 1) * 300_000 // 10**6 > natural:
            assert found == stream_position(natural, 96, config.train.seed)[1]
            natural += 1
        else:
            assert found == draw(position, None)
        text += 1
    assert (facts, text, natural) == (80, 240, 72)


def test_natural_rows_are_those_of_no_sampling(corpus, graph, tables, samples, configure):
    """The n-th natural row is bit for bit row n of the natural form, mentions and masks too."""
    plain = configure(train__per_device_train_batch_size=8)
    expected = sequences(itertools.chain(*steps_of(loader(corpus, graph, tables, plain), 0, 8)))
    settings = {"train__per_device_train_batch_size": 8, "sampling__form": "static"}
    everything = loader(
        corpus,
        graph,
        tables,
        configure(**settings, sampling__natural_share=1.0),
        entity_samples=samples,
    )
    assert sequences(itertools.chain(*steps_of(everything, 0, 8))) == expected
    half = loader(
        corpus,
        graph,
        tables,
        configure(**settings, sampling__natural_share=0.5),
        entity_samples=samples,
    )
    found = sequences(itertools.chain(*steps_of(half, 0, 16)))
    assert [found[2 * n + 1] for n in range(64)] == [expected[n] for n in range(64)]


def test_a_sample_drawn_again_is_masked_anew(corpus, graph, tables, samples, configure):
    config = configure(
        train__per_device_train_batch_size=8,
        sampling__form="static",
        sampling__natural_share=0.0,
    )
    made = loader(corpus, graph, tables, config, entity_samples=samples)
    rows = sequences(itertools.chain(*steps_of(made, 0, 60))).values()
    masks: dict = {}
    for ids, _, targets, _ in rows:
        masks.setdefault(tuple(ids), []).append(tuple(targets))
    pairs = [pair for found in masks.values() for pair in itertools.combinations(found, 2)]
    assert len(pairs) > 500 and sum(a != b for a, b in pairs) > 0.8 * len(pairs)


def test_no_split_of_the_global_batch_and_no_loader_process_changes_a_row(
    corpus, graph, tables, samples, configure, tmp_path
):
    versions = WeightTables(tmp_path, 24, 4)
    for version in (1, 2):
        versions.write(version, some_weights(version))
    expected = None
    # The process reads on to version 3, which nobody writes: closing must not wait for it.
    for world, accumulation, micro, workers in ((1, 1, 8, 0), (1, 1, 8, 1), (2, 2, 2, 0)):
        config = configure(
            train__per_device_train_batch_size=micro,
            train__gradient_accumulation_steps=accumulation,
            data__num_workers=workers,
            sampling__knowledge_rows=0.125,
            **STATE,
        )
        found: dict = {}
        for rank in range(world):
            made = loader(
                corpus,
                graph,
                tables,
                config,
                rank,
                world,
                entity_samples=samples,
                weights=WeightTables(tmp_path, 24, 4),
            )
            found |= sequences(itertools.chain(*steps_of(made, 4, 8)))
            made.close()
        assert sorted(found) == list(range(32, 96))
        assert expected is None or found == expected
        expected = found
    # Steps 6 to 9 draw by version 1, 10 and 11 by version 2.
    ids_of = {tuple(s.ids.tolist()): s.id for s in corpus.samples["train"]}
    draw = EntityFirst(samples, config.train.seed)
    positions = np.arange(32, 96)
    is_fact, _, text = divide_stream(positions, 0.125)
    drawn = positions[~is_fact & ~divide_stream(text, 0.25)[0]]
    assert len(drawn) == 42
    for position in drawn.tolist():
        version = {4: 0, 5: 0, 10: 2, 11: 2}.get(position // 8, 1)
        weights = some_weights(version) if version else None
        assert ids_of[tuple(expected[position][0])] == draw(position, weights)


def test_a_pass_over_the_data_counts_texts_in_natural_order_alone(
    corpus, graph, tables, samples, configure
):
    config = configure(
        train__per_device_train_batch_size=16,
        sampling__form="static",
        sampling__natural_share=0.75,
        sampling__knowledge_rows=0.25,
    )
    made = loader(corpus, graph, tables, config, entity_samples=samples)
    assert made.epochs(32) == 32 * 16 * 0.75 * 0.75 / made.num_samples == 3.0
    assert [made.epoch_of_step(step) for step in (10, 11, 21, 22)] == [0, 1, 1, 2]


# --- versions ---------------------------------------------------------------------------------


def test_a_version_is_used_half_an_interval_after_it_was_made(tmp_path):
    versions = WeightTables(tmp_path, 24, 200)
    assert [versions.version_at(s) for s in (0, 199, 299, 300, 499, 500)] == [0, 0, 0, 1, 1, 2]


def test_a_reader_waits_for_a_version_and_refuses_a_damaged_one(tmp_path):
    versions = WeightTables(tmp_path, 24, 4, wait_s=30)
    writer = threading.Timer(0.2, lambda: WeightTables(tmp_path, 24, 4).write(1, some_weights(1)))
    writer.start()
    started = time.monotonic()
    np.testing.assert_array_equal(versions.at_step(6), some_weights(1))
    assert time.monotonic() - started > 0.1
    assert versions.at_step(5) is None and versions.at_step(0) is None
    writer.join()
    with pytest.raises(DataError, match="not written in time"):
        WeightTables(tmp_path, 24, 4, wait_s=0.1).at_step(10)
    with pytest.raises(DataError, match="expected float32"):
        WeightTables(tmp_path, 23, 4).at_step(6)
    path = versions.path(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="sha256"):
        WeightTables(tmp_path, 24, 4).at_step(6)


def test_what_the_form_needs(corpus, graph, tables, samples, configure):
    for form, parts in (("static", {}), ("knowledge_state", {"entity_samples": samples})):
        with pytest.raises(ConfigError, match=f"sampling.form {form}"):
            loader(corpus, graph, tables, configure(sampling__form=form), **parts)
    with pytest.raises(ConfigError, match="measures masked mentions"):
        configure(sampling__form="knowledge_state", data__mention_mask_probability=None)
    configure(
        sampling__form="knowledge_state",
        data__mention_mask_probability=None,
        sampling__knowledge_rows=0.1,
    )
