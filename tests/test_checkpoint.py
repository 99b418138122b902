"""Checkpoints under damage: what is published is complete, what is loaded has been verified."""

import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from integration.runs import full_parameters, make_trainer
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

from trelm_ds import files, pretrain
from trelm_ds.checkpoint import (
    LATEST,
    MANIFEST,
    Checkpointer,
    check_files,
    checkpoint_folders,
    load_model_state,
    read_manifest,
)
from trelm_ds.config import build_config
from trelm_ds.distributed import World
from trelm_ds.errors import CheckpointError, WriteError
from trelm_ds.metrics import read_metrics

RUNS = (("zero0", False), ("zero0", True), ("zero1", True), ("zero2", False), ("zero3", False))
TIED = {
    "backbone.cls.predictions.decoder.weight": "backbone.bert.embeddings.word_embeddings.weight",
    "backbone.cls.predictions.decoder.bias": "backbone.cls.predictions.bias",
}


def write_runs(rank, world_size, data_dir, output_dir):
    """One run per ZeRO stage with checkpoints of steps 2 and 4; returns the final weights, and what
    became of runs that cannot write."""
    weights = {}
    for name, bf16 in RUNS:
        trainer = make_trainer(
            data_dir,
            output_dir / f"{name}-bf16" if bf16 else output_dir / name,
            zero=name,
            train__max_steps=4,
            train__save_steps=2,
            train__bf16=bf16,
        )
        trainer.train()
        weights[trainer.output_dir.name] = full_parameters(trainer)
        trainer.engine.destroy()
    failing = {
        name: failing_run(rank, data_dir, output_dir / name, **settings)
        for name, settings in FAILING.items()
    }
    return weights, failing


TABLES = {"sampling__form": "knowledge_state", "sampling__refresh_steps": 4}
# What fails, on one rank, at the attempts of these numbers.
FAILING = {
    "saves": {"saves": (1, 2, 4), "train__save_steps": 2},
    "three saves": {"saves": (3, 4, 5), "train__save_steps": 1},
    "last save": {"saves": (2,), "train__save_steps": 5},
    "lines": {"lines": (1, 2, 4, 5)},
    "three lines": {"lines": (3, 4, 5)},
    "tables": {"tables": (1, 2, 3), **TABLES},
    "no table": {"tables": (2, 3, 4, 5), **TABLES},
}


def full_at(attempts, function):
    """``function`` on a disk that is full at the attempts of these numbers."""
    taken = [0]

    def call(*args):
        taken[0] += 1
        if taken[0] in attempts:
            raise OSError(28, "No space left on device")
        return function(*args)

    return call


def failing_run(rank, data_dir, folder, saves=(), lines=(), tables=(), **settings):
    """A run of ten steps: how it ends, where, its warnings, checkpoints and lines."""
    from trelm_ds import knowledge_sampling
    from trelm_ds import trainer as trainers

    trainer = make_trainer(data_dir, folder, train__max_steps=10, **settings)
    if rank == 1:
        trainer.bank.save_shards = full_at(saves, trainer.bank.save_shards)
    if rank == 0:
        trainer.log.flush = full_at(lines, trainer.log.flush)
    if rank == 0 and trainer.sampling is not None:
        write = trainer.sampling._tables.write
        trainer.sampling._tables.write = full_at(tables, write)
    knowledge_sampling.WRITE_WAITS_S = (0.0, 0.0, 0.0)
    warnings = []
    trainers.logger.handlers = [SimpleNamespace(level=logging.WARNING, handle=warnings.append)]
    found, problem = None, None
    try:
        found = trainer.train()
    except WriteError as error:
        problem = (str(error), error.exit_code, error.everywhere)
    trainers.logger.handlers = []
    trainer.engine.destroy()
    kept = sorted(p.name for p in trainer.checkpoints.folder.glob("*") if p.suffix != ".py")
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]
    failed = [(r["step"], r["checkpoint/failed_saves"]) for r in rows]
    messages = [w.getMessage() for w in warnings]
    return found, problem, trainer.state.step, messages, kept, failed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_tiny_corpus(folder / "data")
    results = run_ranks(write_runs, 2, folder / "data", folder)
    return folder, results[0][0], [failing for _, failing in results]


@pytest.fixture
def run_dir(runs, tmp_path):
    """A private copy of the ZeRO-2 run, for damage."""
    shutil.copytree(runs[0] / "zero2", tmp_path / "run")
    return tmp_path / "run"


def checkpointer(run_dir) -> Checkpointer:
    return Checkpointer(run_dir, World(0, 1, 0, "none"), {}, 2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["zero0", "zero0-bf16", "zero1-bf16", "zero2", "zero3"])
def test_the_full_model_is_read_from_any_stage(runs, name):
    folder, weights, _ = runs
    state = load_model_state(folder / name / "checkpoints" / "step_00000004")
    for key, value in weights[name].items():
        assert state[key].dtype == torch.float32
        mine = state[key]
        if name == "zero0-bf16":  # DeepSpeed hands out the rounded copy only
            mine = mine.bfloat16().float()
            assert not torch.equal(state[key], mine), key
        assert torch.equal(mine, value), key
    for key, other in TIED.items():
        assert torch.equal(state[key], state[other]), key


def test_every_file_is_in_the_manifest_and_latest_names_the_last(run_dir):
    folder = run_dir / "checkpoints"
    assert (folder / LATEST).read_text() == "step_00000004\n"
    assert not list(folder.glob("tmp-*"))
    manifest = read_manifest(folder / "step_00000004")
    names = set(manifest["files"])
    assert {"state.json", "config.json", "backbone.json", "routing.safetensors"} <= names
    assert sum(name.startswith("rng_") for name in names) == 2
    assert sum(name.startswith("bank/") for name in names) >= 2
    assert sum("optim_states" in name for name in names) == 2
    assert check_files(folder / "step_00000004", manifest) is None


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def _first(folder, pattern):
    return sorted(folder.rglob(pattern))[0]


def _without_sizes(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": {name: {} for name in manifest["files"]}}))


DAMAGE = {
    "a flipped bit in a ZeRO shard": lambda f: _flip(_first(f, "*optim_states.pt")),
    "a flipped bit in the memory bank": lambda f: _flip(_first(f, "bank/*")),
    "a missing rank's shard": lambda f: _first(f, "zero_pp_rank_1*").unlink(),
    "a missing random state": lambda f: _first(f, "rng_00001*").unlink(),
    "a truncated state": lambda f: _first(f, "state.json").write_text("{"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "an unreadable manifest": lambda f: (f / MANIFEST).write_text("[]"),
    "a manifest without sizes": lambda f: _without_sizes(f / MANIFEST),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(run_dir, damage, caplog):
    newest = run_dir / "checkpoints" / "step_00000004"
    DAMAGE[damage](newest)
    assert checkpointer(run_dir).find("latest").name == "step_00000002"
    with pytest.raises(CheckpointError, match="step_00000004"):
        checkpointer(run_dir).find(str(newest))
    with pytest.raises(CheckpointError, match="step_00000004"):
        load_model_state(newest)  # refused before anything is unpickled
    DAMAGE[damage](run_dir / "checkpoints" / "step_00000002")
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        checkpointer(run_dir).find("latest")
    assert caught.value.everywhere


def test_a_file_nobody_saved_is_named_and_costs_no_steps(run_dir):
    stray = run_dir / "checkpoints" / "step_00000004" / "extra.pt"
    stray.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{stray} is no file of this checkpoint"):
        checkpointer(run_dir).find("latest")
    with pytest.raises(CheckpointError, match="extra.pt"):
        load_model_state(stray.parent)
    stray.unlink()
    assert checkpointer(run_dir).find("latest").name == "step_00000004"


def test_another_runs_checkpoint_is_refused_by_all_ranks_at_once(run_dir):
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, bfloat16_enabled=lambda: False)
    with pytest.raises(CheckpointError, match="different run: bf16 was None") as caught:
        checkpointer(run_dir)._check_identity(run_dir, {"zero_stage": 2}, engine)
    assert caught.value.everywhere


@pytest.mark.parametrize("content", [None, "", "step_99999999\n"])
def test_latest_is_only_a_hint(run_dir, content):
    latest = run_dir / "checkpoints" / LATEST
    latest.unlink() if content is None else latest.write_text(content)
    assert checkpointer(run_dir).find("latest").name == "step_00000004"


def test_an_evil_pickle_is_refused_before_it_is_opened(tmp_path):
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save(Evil(), folder / "mp_rank_00_model_states.pt")
    (folder / "state.json").write_text(json.dumps({"zero_stage": 0, "bf16": False}))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_model_state(folder)
    with pytest.raises(CheckpointError, match=MANIFEST):
        checkpointer(tmp_path).find("latest")
    assert not (tmp_path / "owned").exists()


def test_a_manifest_cannot_point_outside_its_folder(run_dir):
    folder = run_dir / "checkpoints" / "step_00000004"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../step_00000002/state.json"] = manifest["files"]["state.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "missing" in check_files(folder, read_manifest(folder))


def test_an_empty_run_folder_has_nothing_to_resume(tmp_path):
    assert checkpointer(tmp_path).find("latest") is None
    with pytest.raises(CheckpointError):
        checkpointer(tmp_path).find(str(tmp_path / "step_00000001"))


def test_checkpoints_that_are_gone_are_not_begun_anew(run_dir):
    folder, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    for step in folder.glob("step_*"):
        shutil.rmtree(step)
    with pytest.raises(CheckpointError) as caught:
        checkpointer(run_dir).find("latest")
    assert f"{folder / LATEST} names 'step_00000004' and {metrics} tells of" in str(caught.value)
    assert "another --output_dir" in str(caught.value) and caught.value.exit_code == 2
    shutil.rmtree(folder)
    with metrics.open("a") as file:
        file.write('{"step": 5, "tra')  # a torn line hides none of the others
    with pytest.raises(CheckpointError, match="metrics.jsonl tells of one of step 2, but no step_"):
        checkpointer(run_dir).find("latest")
    before_the_first = metrics.read_text().splitlines(keepends=True)[:2]
    metrics.write_text("".join(before_the_first))
    assert checkpointer(run_dir).find("latest") is None


def test_a_users_copy_beside_the_checkpoints_is_not_the_runs(run_dir):
    folder, mine = run_dir / "checkpoints", checkpointer(run_dir)
    newest = folder / "step_00000004"
    copies = [folder / name for name in ("step_00000002.keep", "step_00000004.bak", "step_final")]
    for copy in copies:
        shutil.copytree(newest, copy)
    assert mine.oldest_step() == 2
    assert mine.find("latest") == newest
    assert [mine.is_own(path, 4) for path in (newest, copies[1])] == [True, False]
    mine._set_aside_after(newest, 4)
    assert (folder / LATEST).read_text() == "step_00000004\n"
    (folder / "tmp-step_100000000").mkdir()  # a step of more digits is the newest all the same
    mine._publish(folder / "tmp-step_100000000", folder / "step_100000000", {})
    kept = [path.name for path in checkpoint_folders(folder).values()]
    assert kept == ["step_00000004", "step_100000000"]  # of two
    assert all(copy.is_dir() for copy in copies)
    mine._set_aside_after(copies[1], 4)  # the run goes on from a copy of its own
    assert not newest.exists() and all(copy.is_dir() for copy in copies)
    pretrain._refuse_other_run(run_dir, build_config())  # nothing but copies


def save_again(rank, world_size, data_dir, output_dir):
    """Leftovers of a killed save at the same step, and a rank that cannot write."""
    trainer = make_trainer(data_dir, output_dir, train__max_steps=2)
    leftover = trainer.checkpoints.folder
    if rank == 0:
        for name in ("tmp-step_00000002", "step_00000002"):
            (leftover / name).mkdir(parents=True)
            (leftover / name / "half.pt").write_bytes(b"half")
    trainer.train()
    problems = []
    trainer.state.step, trainer._saved = 3, None
    bank_save = trainer.bank.save_shards

    def full_disk(folder):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return bank_save(folder)

    def full_disk_here(*args, **kwargs):
        if rank == 1:
            raise OSError(28, "No space left on device")

    def full_disk_on_main(*args, **kwargs):
        if rank == 0:
            raise OSError(28, "No space left on device")

    # Where each part of a save writes: DeepSpeed before its barrier, on any rank and on rank 0
    # alone, the bank, rank 0's end of it.
    for owner, name, fails in (
        (type(trainer.engine), "_copy_recovery_script", full_disk_on_main),
        (type(trainer.engine.checkpoint_engine), "save", full_disk_here),
        (trainer.bank, "save_shards", full_disk),
        (trainer.checkpoints, "_publish", lambda *args: os.stat("/no/such/file")),
    ):
        intact = vars(owner).get(name)
        setattr(owner, name, fails)
        try:
            trainer.save()
        except WriteError as error:
            problems.append(str(error))
        if intact is None:
            delattr(owner, name)
        else:
            setattr(owner, name, intact)
    folders = sorted(p.name for p in leftover.iterdir() if p.is_dir())
    saved = trainer.save().stat().st_ino
    # Stopped before the first new step: the checkpoint it came from is not written again.
    resumed = make_trainer(
        data_dir, output_dir, train__max_steps=2, train__resume_from_checkpoint="latest"
    )
    is_kept = resumed.save().stat().st_ino == saved
    elsewhere = make_trainer(
        data_dir,
        output_dir / "elsewhere",
        train__max_steps=2,
        train__export=True,
        train__resume_from_checkpoint=str(output_dir / "checkpoints" / "step_00000003"),
    )
    assert elsewhere.done
    elsewhere.finish()
    return problems, folders, is_kept


@pytest.fixture(scope="module")
def saved_again(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("again") / "run"
    return folder, run_ranks(save_again, 2, runs[0] / "data", folder)


def test_leftovers_are_replaced_and_a_failed_save_leaves_the_last_one(saved_again):
    folder, results = saved_again
    for problems, folders, is_kept in results:
        assert is_kept
        assert len(problems) == 4 and all("was not written" in problem for problem in problems)
        assert ["rank 1" in problem for problem in problems] == [False, True, True, False]
        assert ["No space" in problem for problem in problems] == [True, True, True, False]
        assert folders == ["step_00000002"]
    assert checkpointer(folder).find("latest").name == "step_00000003"


def test_a_finished_run_that_goes_on_in_another_folder_is_complete_there(saved_again):
    run, _ = saved_again
    here, there = (
        load_model_state(folder / "checkpoints" / "step_00000003")
        for folder in (run, run / "elsewhere")
    )
    assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert (run / "elsewhere" / "hf" / "model.safetensors").is_file()


FULL = "OSError: [Errno 28] No space left on device"


def test_a_failed_save_on_the_way_is_warned_of_and_counted(runs):
    for failing in runs[2]:
        found, problem, step, warnings, kept, failed = failing["saves"]
        folder = runs[0] / "saves" / "checkpoints"
        assert (found, problem, step) == (True, None, 10)
        assert warnings == [
            f"checkpoint {folder / name} was not written: rank 1: {FULL}; "
            f"{count} of 3 saves in a row failed, the run goes on"
            for name, count in (("step_00000002", 1), ("step_00000004", 2), ("step_00000008", 1))
        ]
        assert kept == [LATEST, "step_00000006", "step_00000010"]
        assert failed == list(zip(range(1, 11), [0, 0, 1, 1, 2, 2, 2, 2, 3, 3], strict=True))


def test_the_third_failed_save_in_a_row_and_a_failed_last_one_end_the_run(runs):
    for failing in runs[2]:
        found, (message, code, everywhere), step, warnings, kept, _ = failing["three saves"]
        assert message.endswith(f"rank 1: {FULL}; 3 of 3 saves in a row failed")
        assert (found, code, everywhere, step, len(warnings)) == (None, 1, True, 5, 2)
        assert kept == [LATEST, "step_00000001", "step_00000002"]
        found, (message, code, everywhere), step, warnings, kept, _ = failing["last save"]
        assert "step_00000010 was not written: rank 1" in message and message.endswith(FULL)
        assert (found, code, everywhere, step, warnings) == (None, 1, True, 10, [])
        assert kept == [LATEST, "step_00000005"]


def test_lines_of_the_metrics_that_cannot_be_written_are_written_later(runs):
    for failing in runs[2]:
        found, problem, step, warnings, _, failed = failing["lines"]
        assert (found, problem, len(warnings)) == (True, None, 4)
        assert [step for step, _ in failed] == list(range(1, 11))
        found, (message, code, everywhere), step, warnings, _, failed = failing["three lines"]
        assert "metrics.jsonl was not written: rank 0: OSError" in message
        assert (found, code, everywhere, step) == (None, 1, True, 4)  # a line of step 0 came first


def test_a_table_of_weights_is_tried_again_before_all_ranks_end(runs):
    for failing in runs[2]:
        assert failing["tables"][:4] == (True, None, 10, [])
        found, (message, code, everywhere), step, *_ = failing["no table"]
        assert f"sampling was not written: rank 0: {FULL}" in message
        assert (found, code, everywhere, step) == (None, 1, True, 8)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(run_dir, monkeypatch):
    import trelm_ds.checkpoint as checkpoint

    whole = checkpoint.file_sha256

    waited, moments = [], 2

    def bad_moment(path):
        if "step_00000004" in str(path) and len(waited) < moments:
            raise OSError(116, "Stale file handle")
        return whole(path)

    monkeypatch.setattr(checkpoint, "file_sha256", bad_moment)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    assert checkpointer(run_dir).find("latest").name == "step_00000004"
    assert waited == list(files.READ_WAITS_S[:2])
    waited.clear()
    moments = 99  # a bad sector
    assert checkpointer(run_dir).find("latest").name == "step_00000002"
    assert waited == list(files.READ_WAITS_S)
