"""A checkpoint of two ranks, resumed by one and by three, and through the conversion by two."""

from types import SimpleNamespace

import pytest
import torch
from integration.runs import NO_DROPOUT, digest, full_parameters, losses, make_trainer
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

from trelm_ds.checkpoint import Checkpointer
from trelm_ds.errors import CheckpointError
from trelm_ds.reshard import _what_is_lost

CONFIGS = ("zero0", "zero2", "zero3")
SETTINGS = {key.replace(".", "__"): value for key, value in NO_DROPOUT.items()}
# The micro-batches are the same for any number of ranks that divides 6, and so is what is drawn of
# them: only rounding differs. Step 3 is between two rotations of the block: scores are under way.
SETTINGS |= {
    "train__max_steps": 6,
    "train__per_device_train_batch_size": 2,
    "routing__rotation_steps": 2,
    "train__weight_decay": 0.5,  # of some groups alone
}


def run(rank, world_size, data_dir, output_dir, resumed=None, conversion=False):
    if conversion:  # as if the checkpoint were of another number of ranks
        loadable = Checkpointer._loadable

        def converted(self, folder, document, engine):
            return loadable(self, folder, document | {"world_size": 99}, engine)

        Checkpointer._loadable = converted
    found = {}
    for zero in CONFIGS:
        settings = SETTINGS | {"train__gradient_accumulation_steps": 6 // world_size}
        if resumed:
            path = resumed / zero / "checkpoints" / "step_00000003"
            settings["train__resume_from_checkpoint"] = str(path)
        else:
            settings["train__save_steps"] = 3
        trainer = make_trainer(data_dir, output_dir / zero, zero=zero, **settings)
        trainer.train()
        found[zero] = {
            "losses": torch.tensor(losses(trainer)[-3:]),
            "parameters": full_parameters(trainer),
            "bank": trainer.bank.digest(),
            "sampling": trainer.sampling.state_dict(),
            "left": [p.name for p in trainer.checkpoints.folder.iterdir()],
        }
        trainer.engine.destroy()
    return found


LOSSY = {
    "routing.scope": {"routing__scope": "strict"},
    "routing.paths": {"routing__paths": "full", "routing__form": "in_backward"},
    "routing.truncated_depth": {"routing__truncated_depth": 0.5, "routing__truncate_start": 0.9},
}


def refused(rank, world_size, data_dir, output_dir, resumed):
    found = {}
    for name, lossy in LOSSY.items():
        settings = SETTINGS | {
            "train__gradient_accumulation_steps": 6 // world_size,
            "train__max_steps": 1,
            **lossy,
        }
        if not resumed:
            trainer = make_trainer(data_dir, output_dir / name, **settings)
            trainer.train()
            trainer.engine.destroy()
            continue
        path = resumed / name / "checkpoints" / "step_00000001"
        settings["train__resume_from_checkpoint"] = str(path)
        with pytest.raises(CheckpointError) as error:
            make_trainer(data_dir, output_dir / name, **settings)
        found[name] = str(error.value)
    return found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run_ranks(run, 2, data_dir, folder)[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_other_ranks_go_on_as_the_same_would_but_for_rounding(data_dir, straight, tmp_path, ranks):
    folder, expected = straight
    # The converter makes patterns of the paths it writes to.
    found = run_ranks(run, ranks, data_dir, tmp_path / "a+b", folder)[0]
    for zero in CONFIGS:
        a, b = found[zero], expected[zero]
        torch.testing.assert_close(a["losses"], b["losses"], rtol=1e-6, atol=1e-6)
        for name, value in b["parameters"].items():
            torch.testing.assert_close(a["parameters"][name], value, rtol=0, atol=1e-6)
        for name, value in b["sampling"].items():
            torch.testing.assert_close(a["sampling"][name], value, rtol=1e-6, atol=1e-6)
        assert not [n for n in a["left"] if n.startswith("tmp-") or n == "latest_universal"]


@pytest.mark.slow
def test_the_conversion_itself_loses_no_bit(data_dir, straight, tmp_path):
    folder, expected = straight
    found = run_ranks(run, 2, data_dir, tmp_path, folder, True)[0]
    for zero in CONFIGS:
        a, b = found[zero], expected[zero]
        assert digest(a["parameters"]) == digest(b["parameters"]), zero
        assert a["bank"] == b["bank"]
        assert digest(a["sampling"]) == digest(b["sampling"])


def test_what_a_state_holds_beyond_the_moments_is_named():
    module = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    adam.step()
    engine = SimpleNamespace(module=module, optimizer=SimpleNamespace(optimizer=adam))
    assert _what_is_lost(engine, truncated=False) is None
    assert "truncated_depth" in _what_is_lost(engine, truncated=True)
    adam.state[module.bias]["update_count"] = torch.zeros(2)
    assert "update_count" in _what_is_lost(engine, truncated=False)
    module.bias.requires_grad_(False)
    assert "bias" in _what_is_lost(engine, truncated=False)


@pytest.mark.slow
def test_what_would_be_lost_is_refused(data_dir, tmp_path):
    run_ranks(refused, 2, data_dir, tmp_path / "saved", None)
    messages = run_ranks(refused, 1, data_dir, tmp_path / "resumed", tmp_path / "saved")[0]
    assert messages.keys() == LOSSY.keys()
    for name, message in messages.items():
        assert "its own number of ranks" in message and name in message
