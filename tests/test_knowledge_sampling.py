"""Tables of weights: when they are made, what is kept, what a checkpoint carries."""

import numpy as np
import torch

from trelm_ds.config import SamplingConfig
from trelm_ds.data.weights import WeightTables
from trelm_ds.distributed import World
from trelm_ds.knowledge_sampling import KnowledgeSampling, sampling_weights
from trelm_ds.memory.knowledge_state import KnowledgeState

N = 6
FREQUENCY = np.array([9, 3, 3, 2, 1, 0])


def make(folder, **settings) -> KnowledgeSampling:
    config = SamplingConfig(form="knowledge_state", refresh_steps=2, **settings)
    tables = WeightTables(folder / "sampling", N, config.refresh_steps)
    state = KnowledgeState(N, config.discount)
    made = KnowledgeSampling(config, state, tables, FREQUENCY, World(0, 1, 0, "none"), None)
    made.start()
    return made


class Seen:
    """What ``stage`` reads of a batch: each entity masked once, of one token."""

    mlm_mention = torch.tensor([0, 2, 4])
    mlm_mention_group = torch.arange(3)
    mlm_mention_given = torch.zeros(3, dtype=torch.bool)


def take(sampling, first, last):
    """Steps in which the model grows to know entities 0 and 2."""
    for step in range(first, last + 1):
        sampling.stage(Seen, torch.tensor([min(1.0, step / 5), step / 10, 0.0]))
        sampling.end_step(True, step)


def test_the_weight_of_an_entity():
    config = SamplingConfig(floor=0.1, temperature=2.0)
    value = np.array([0.0, 0.5, 1.0], dtype=np.float32)
    expected = np.array([1.1, 0.1 + 0.25, 0.1]) / 1.1
    np.testing.assert_allclose(sampling_weights(value, config), expected, rtol=1e-6)


def test_tables_are_made_on_time_and_old_ones_go(tmp_path):
    sampling = make(tmp_path)
    folder = tmp_path / "sampling"
    take(sampling, 1, 1)
    assert not list(folder.glob("*"))
    take(sampling, 2, 5)
    assert [p.name[8:16] for p in sorted(folder.glob("*"))] == ["00000001", "00000002"]
    take(sampling, 6, 6)
    assert [p.name[8:16] for p in sorted(folder.glob("*"))] == ["00000002", "00000003"]
    reader = WeightTables(folder, N, 2)
    expected = sampling_weights(sampling.state.value, SamplingConfig())
    np.testing.assert_array_equal(reader.at_step(7), expected)
    assert reader.at_step(7)[0] < reader.at_step(7)[2] < reader.at_step(7)[4] == 1.0


def test_a_restored_run_has_the_tables_of_the_uninterrupted_one(tmp_path):
    straight, stopped = make(tmp_path / "a"), make(tmp_path / "b")
    take(straight, 1, 9)
    take(stopped, 1, 5)
    saved = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    take(stopped, 6, 7)  # a branch that is left behind: its table 3 must not survive
    elsewhere = make(tmp_path / "c")
    for resumed, name in ((stopped, "b"), (elsewhere, "c")):
        resumed.load_state_dict(saved)
        resumed.start()
        folder = tmp_path / name / "sampling"
        assert [p.name[8:16] for p in sorted(folder.glob("*"))] == ["00000001", "00000002"]
        reader = WeightTables(folder, N, 2, wait_s=0.0)
        reader.at_step(4), reader.at_step(5)  # what the next steps draw by is there
        take(resumed, 6, 9)
        for version in (3, 4):
            a, b = (WeightTables(tmp_path / f / "sampling", N, 2) for f in ("a", name))
            np.testing.assert_array_equal(a.at_step(2 * version + 1), b.at_step(2 * version + 1))
        np.testing.assert_array_equal(resumed.state.value, straight.state.value)


def test_knowledge_is_told_by_frequency_band(tmp_path):
    sampling = make(tmp_path)
    take(sampling, 1, 2)
    told = sampling.metrics()
    k = sampling.state.value
    assert told["knowledge/head"] == np.float32(k[0])
    assert told["knowledge/mid"] == np.float32(k[1])
    assert told["knowledge/tail"] == np.float32(k[[2, 3, 4]].mean())
    assert told["knowledge/seen"] == 3 / 5
