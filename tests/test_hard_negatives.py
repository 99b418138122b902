"""What a micro-batch gets from the table of neighbours."""

import multiprocessing
import time

import numpy as np
import pytest
from entity_names import entity_tokens
from tiny_corpus import write_tiny_corpus

from trelm_ds.config import build_config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.distributed import World
from trelm_ds.hard_negatives import HardNegatives
from trelm_ds.memory.index import write_table


class FullDisk:
    def save_shards(self, folder):
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")


def refreshed_every(steps, tmp_path, bank=None):
    """The negatives of a run of one process on a tiny corpus, with its tables in ``n``."""
    write_tiny_corpus(tmp_path, entities=60)
    graph, tables = KnowledgeGraph.load(tmp_path), KnowledgeTables.load(tmp_path)
    keys = {"decoding.hard_negatives": 3, "decoding.hard_negative_refresh_steps": steps}
    world, folder = World(0, 1, 0, "none"), tmp_path / "n"
    return HardNegatives(build_config(keys), bank, graph, tables, folder, world, None, lambda: 0)


def write_tables(tmp_path, *versions):
    for version in versions:
        write_table(tmp_path / "n", np.full((60, 2), -1, dtype=np.int32), version)


def test_a_full_disk_costs_a_table_and_not_the_run(tmp_path, caplog):
    hard = refreshed_every(4, tmp_path, FullDisk())
    for step in range(8):
        hard.begin_step(step)
    assert "version 4 not built" in caplog.text and "No space left" in caplog.text
    assert "version 4 not activated" in caplog.text and hard._table.table is None
    assert not list((tmp_path / "n").glob("bank-*"))


def test_a_builder_that_hangs_is_given_up(tmp_path, caplog, monkeypatch):
    hard = refreshed_every(500, tmp_path)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "0.005")  # 0.3 s: well below what is waited else
    hard._process = process = multiprocessing.get_context("spawn").Process(
        target=time.sleep, args=(600,), daemon=True
    )
    process.start()
    hard._activate(200)
    assert not process.is_alive() and hard._process is None
    assert "given up" in caplog.text and "not activated" in caplog.text


def test_a_resumed_run_takes_the_version_that_was_in_use(tmp_path):
    hard = refreshed_every(4, tmp_path)
    write_tables(tmp_path, 4)  # version 8 was not built
    hard.resume(12)
    assert hard._table.version == 4


@pytest.mark.parametrize("own", [True, False])
def test_a_resumed_run_forgets_tables_that_are_not_of_its_past(tmp_path, own):
    hard = refreshed_every(4, tmp_path)
    write_tables(tmp_path, 4, 8, 12)  # 8 and 12 by steps that the run takes again, in its own way
    hard.resume(8, own)
    left = sorted(path.name for path in (tmp_path / "n").glob("neighbours-*"))
    assert left == (["neighbours-00000004.safetensors"] if own else [])
    assert hard._table.version == (4 if own else None)


@pytest.mark.parametrize("room", [4096, 0])
def test_entity_decoding_is_offered_the_neighbours_of_its_answers(tmp_path, room):
    write_tiny_corpus(tmp_path, entities=60, triples=40, train=40)
    graph, tables = KnowledgeGraph.load(tmp_path), KnowledgeTables.load(tmp_path)
    config = build_config(
        {
            "data.num_workers": 0,
            "train.per_device_train_batch_size": 2,
            "decoding.num_negatives": 8,
            "decoding.hard_negatives": 3,
            "decoding.entity_weight": 0.5,
            "decoding.entity_negatives": 2,
            "decoding.entity_candidates": max(3, room),
        }
    )
    (batch,) = next(StepLoader(config, tmp_path, 0, 1, graph, tables).iterate(1))
    hard = HardNegatives(config, None, graph, tables, tmp_path / "n", None, None, lambda: 0)
    assert hard.apply(batch, 1) is batch  # no table yet
    table = np.full((60, 2), -1, dtype=np.int32)
    gold = np.unique(batch.decode_other.numpy())
    asked = np.flatnonzero(graph.degrees())
    table[gold] = asked[(np.arange(2 * len(gold)) * 7) % len(asked)].reshape(-1, 2)
    hard._table.table = table
    found = hard.apply(batch, 1)

    def names(tokens):
        return {tuple(row) for row in tokens.tolist()}

    listed = entity_tokens(found.entity_words, found.entity_names)
    before, after = names(entity_tokens(batch.entity_words, batch.entity_names)), names(listed)
    near = names(tables.entity_names[np.unique(table[gold])])
    assert before <= after
    assert after - before == (near - before if room else set())
    assert bool(after - before) == bool(room)
    answers = listed[found.entity_gold].tolist()
    assert answers == tables.entity_names[batch.decode_other].tolist()
