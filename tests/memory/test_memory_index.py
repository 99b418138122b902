"""Nearest entities in memory space: FAISS against brute force, the versioned table, negatives."""

import builtins
import multiprocessing

import numpy as np
import pytest
import torch

from trelm_ds.config import MemoryConfig
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.memory import index as index_module
from trelm_ds.memory.bank import MemoryBank
from trelm_ds.memory.index import (
    MemoryIndex,
    NeighbourTable,
    build_table,
    hard_negative_tokens,
    read_table,
    table_path,
    write_table,
)

NUM_ENTITIES, DIM = 300, 24


def clustered(count, dim, clusters, seed=0):
    """Vectors around cluster centres, with the large common part that real states have."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    rows = centres[rng.integers(clusters, size=count)] + 0.3 * rng.standard_normal((count, dim))
    return (rows + 20).astype(np.float32)


def brute_force(keys, rows, k):
    """Neighbours by cosine after centring, one entity at a time."""
    rows = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = {}
    for i, key in enumerate(keys):
        similarity = rows @ rows[i]
        similarity[i] = -np.inf
        table[key] = keys[np.argsort(-similarity)[:k]]
    return table


def test_flat_neighbours_equal_brute_force():
    rng = np.random.default_rng(1)
    keys = rng.permutation(NUM_ENTITIES)[:200]  # the other entities were never visited
    rows = clustered(200, DIM, 12)
    chunks = [(keys[:90], rows[:90]), (torch.from_numpy(keys[90:]), torch.from_numpy(rows[90:]))]
    table = MemoryIndex.build(chunks, NUM_ENTITIES).neighbours(8)
    assert table.shape == (NUM_ENTITIES, 8) and table.dtype == np.int32
    expected = brute_force(keys, rows, 8)
    for entity in range(NUM_ENTITIES):
        if entity in expected:
            assert table[entity].tolist() == expected[entity].tolist()
        else:
            assert (table[entity] == -1).all()


def test_words_are_left_out_and_few_entities_are_padded():
    keys, rows = np.array([2, 900, 0, 7]), clustered(4, DIM, 4)
    table = MemoryIndex.build([(keys, rows)], 8).neighbours(5)
    assert (table[:, 2:] == -1).all()
    assert [sorted(table[e, :2]) for e in (0, 2, 7)] == [[2, 7], [0, 7], [0, 2]]
    assert (table[[1, 3, 4, 5, 6]] == -1).all()


def test_an_entity_is_not_its_own_neighbour_among_equal_vectors():
    rows = np.repeat(clustered(10, DIM, 10), 6, axis=0)
    table = MemoryIndex.build([(np.arange(60), rows)], 60).neighbours(5)
    assert (table != np.arange(60)[:, None]).all()
    assert all(set(row) <= set(range(e // 6 * 6, e // 6 * 6 + 6)) for e, row in enumerate(table))


def test_projection_is_fixed_orthonormal_and_keeps_neighbours():
    projection = index_module._orthogonal(768, 128, seed=0)
    np.testing.assert_allclose(projection.T @ projection, np.eye(128), atol=1e-5)
    assert np.array_equal(projection, index_module._orthogonal(768, 128, seed=0))
    keys, rows = np.arange(300), clustered(300, 768, 30)
    index = MemoryIndex.build([(keys, rows)], 300)
    assert index.vectors.shape == (300, 128)
    exact = brute_force(keys, rows, 5)
    found = index.neighbours(5)
    recall = np.mean([len(set(found[e]) & set(exact[e])) / 5 for e in keys])
    assert recall > 0.5  # noise within a cluster is projected away; clusters stay together
    near = brute_force(keys, rows @ projection, 5)
    assert all(found[e].tolist() == near[e].tolist() for e in keys)


def test_large_index_uses_inverted_lists(monkeypatch):
    monkeypatch.setattr(index_module, "FLAT_LIMIT", 1000)
    keys, rows = np.arange(6000), clustered(6000, 32, 200)
    index = MemoryIndex.build([(keys, rows)], 6000)
    assert "IVF" in type(index._index).__name__
    found = index.neighbours(10)
    similarity = index.vectors[:300] @ index.vectors.T
    similarity[np.arange(300), np.arange(300)] = -np.inf
    best = np.argsort(-similarity, axis=1)[:, :10]
    recall = np.mean([len(set(found[e]) & set(best[e])) / 10 for e in range(300)])
    assert recall > 0.9


def test_missing_faiss_and_empty_bank_are_clear_errors(monkeypatch):
    with pytest.raises(DataError, match="no visited entity"):
        MemoryIndex.build([], 5)
    real_import = builtins.__import__

    def no_faiss(name, *args):
        if name == "faiss":
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    chunk = np.arange(5), np.eye(5, DIM, dtype=np.float32)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        MemoryIndex.build([chunk], 5)


def test_a_spawned_process_builds_the_table_from_a_snapshot(tmp_path):
    bank = MemoryBank(NUM_ENTITIES + 20, DIM, MemoryConfig(virtual_shards=16))
    bank.initialise(lambda keys: torch.zeros(len(keys), DIM))
    keys = torch.arange(0, NUM_ENTITIES + 20, 2)
    rows = torch.from_numpy(clustered(len(keys), DIM, 12))
    bank.stage(keys, torch.arange(len(keys)), rows, rows)
    bank.commit(1)
    (tmp_path / "bank").mkdir()
    bank.save_shards(tmp_path / "bank")
    process = multiprocessing.get_context("spawn").Process(
        target=build_table, args=(tmp_path / "bank", tmp_path / "tables", 7, NUM_ENTITIES, 6)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    entities = keys[keys < NUM_ENTITIES]
    expected = brute_force(entities.numpy(), bank.lookup(entities).local.numpy(), 6)
    table = read_table(tmp_path / "tables", 7, NUM_ENTITIES)
    for entity in range(NUM_ENTITIES):
        assert table[entity].tolist() == list(expected.get(entity, [-1] * 6))


def table_of(value):
    return np.full((50, 4), value, dtype=np.int32)


def test_a_new_version_is_activated(tmp_path):
    write_table(tmp_path, table_of(3), 100)
    tables = NeighbourTable(tmp_path, 50)
    assert tables.table is None and tables.version is None
    assert tables.activate(100)
    assert np.array_equal(tables.table, table_of(3)) and tables.version == 100
    assert [path.name for path in tmp_path.iterdir()] == [table_path(tmp_path, 100).name]


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def replace_by_older(path):
    path.write_bytes(table_path(path.parent, 1).read_bytes())


def resize(path):
    write_table(path.parent, table_of(1)[:49], 2)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "sha256": flip_bit,
    "not version 2": replace_by_older,
    "expected int32": resize,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_version_keeps_the_previous_one(tmp_path, caplog, kind):
    write_table(tmp_path, table_of(1), 1)
    tables = NeighbourTable(tmp_path, 50)
    tables.activate(1)
    DAMAGES[kind](write_table(tmp_path, table_of(2), 2))
    assert not tables.activate(2)
    assert (tables.version, tables.failures) == (1, 1)
    assert np.array_equal(tables.table, table_of(1))
    assert "version 2 not activated" in caplog.text and "keeping version 1" in caplog.text
    assert (kind if " " in kind or kind == "sha256" else "unreadable") in caplog.text


def test_no_rank_switches_unless_all_can(tmp_path, caplog):
    write_table(tmp_path, table_of(1), 1)
    tables = NeighbourTable(tmp_path, 50)
    assert not tables.activate(1, all_ranks=lambda ok: False)
    assert tables.table is None
    assert "another rank could not read it" in caplog.text and "keeping none" in caplog.text


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("trelm_ds.files.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_table(tmp_path, table_of(1), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def names():
    """Ten entities: entity e has tokens 10 e and 10 e + 1, and all share token 999."""
    e = np.arange(10)
    return np.stack([10 * e, 10 * e + 1, np.full(10, 999), np.full(10, -1)], 1).astype(np.int32)


def draw(table, gold, names, count=100, is_true=None, seed=0):
    rng = np.random.Generator(np.random.Philox(key=seed))
    return hard_negative_tokens(table, np.array(gold), names, count, rng, is_true)


def test_hard_negatives_are_tokens_of_the_neighbours(names):
    table = np.full((10, 3), -1, dtype=np.int32)
    table[4] = [5, 6, 7]
    table[8] = [4, 9, -1]
    tokens = draw(table, [4, 8, 2], names)
    # Entity 4 is near 8, but is gold itself; 999 is in a gold name; 2 has no neighbours.
    assert sorted(tokens.tolist()) == [50, 51, 60, 61, 70, 71, 90, 91]
    assert tokens.dtype == np.int64
    some = draw(table, [4, 8, 2], names, count=3)
    assert len(set(some.tolist())) == 3 and set(some) <= set(tokens)
    assert np.array_equal(some, draw(table, [4, 8, 2], names, count=3))
    assert not np.array_equal(some, draw(table, [4, 8, 2], names, count=3, seed=1))
    assert len(draw(table, [0, 1], names)) == 0


def test_known_true_tails_are_not_negatives(names):
    table = np.full((10, 2), -1, dtype=np.int32)
    table[4], table[8] = [5, 6], [5, 7]
    known = {(0, 5), (1, 7)}  # 5 also answers the first question, 7 the second

    def is_true(rows, candidates):
        return np.array([pair in known for pair in zip(rows, candidates, strict=True)])

    # 5 stays a negative of the second question.
    assert sorted(draw(table, [4, 8], names, is_true=is_true)) == [50, 51, 60, 61]
