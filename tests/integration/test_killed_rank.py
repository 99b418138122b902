"""A rank that dies or hangs in the midst of a run, under a real launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from integration.runs import REPO, TINY, digest, full_parameters, losses, make_trainer
from multiprocess import free_port, run_ranks
from tiny_corpus import write_tiny_corpus

from trelm_ds.checkpoint import LATEST, check_files, read_manifest
from trelm_ds.config import load_config

SETTINGS = {"train.max_steps": 8, "train.save_steps": 2}
WAIT_S = 120


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def launch(data_dir, output_dir, log, **environment) -> subprocess.Popen:
    """The runs' configuration on two ranks of torchrun."""
    flat = TINY | SETTINGS | {"data.data_dir": str(data_dir), "train.output_dir": str(output_dir)}
    load_config("trelm", overrides=flat).save(log.with_suffix(".json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "launch/pretrain.py"]
    command += ["--deepspeed", "ds_configs/zero2.json", "--config", log.with_suffix(".json")]
    variables = dict(os.environ, OMP_NUM_THREADS="1", **environment)
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=REPO, env=variables, stdout=file, stderr=file)


def wait_for(what, launcher, log):
    """Until ``what()`` is true; its value."""
    until = time.monotonic() + WAIT_S
    while not (found := what()):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.001)
    return found


def process_of_rank(launcher, rank) -> int:
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def straight_and_resumed(rank, world_size, data_dir, straight, killed):
    found = []
    settings = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    for folder, which in ((straight, None), (killed, "latest")):
        settings["train__resume_from_checkpoint"] = which
        settings["train__save_steps"] = 0  # which no run's result depends on
        trainer = make_trainer(data_dir, folder, **settings)
        begun = trainer.state.step
        assert trainer.train()
        parameters = digest(full_parameters(trainer))
        found.append((begun, losses(trainer), parameters, trainer.bank.digest()))
        trainer.engine.destroy()
    return found


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_goes_on_after_a_rank_was_killed_as_if_it_had_not_been(data_dir, tmp_path, rank):
    log, folder = tmp_path / "log", tmp_path / "killed" / "checkpoints"
    launcher = launch(data_dir, tmp_path / "killed", log)
    try:
        wait_for(lambda: any(folder.glob("step_*")), launcher, log)
        wait_for(lambda: any(folder.glob("tmp-*")), launcher, log)  # in the midst of the next save
        os.kill(process_of_rank(launcher, rank), signal.SIGKILL)
        assert launcher.wait(WAIT_S) not in (0, 2, 75), log.read_text()
    finally:
        launcher.kill()
    published = sorted(folder.glob("step_*"))
    assert published and published[-1].name < "step_00000008"
    for checkpoint in published:
        assert check_files(checkpoint, read_manifest(checkpoint)) is None
    assert (folder / (folder / LATEST).read_text().strip()).is_dir()
    results = run_ranks(
        straight_and_resumed, 2, data_dir, tmp_path / "straight", tmp_path / "killed"
    )
    for (_, *straight), (begun, *resumed) in results:
        assert f"step_{begun:08d}" == published[-1].name
        assert resumed == straight and len(straight[0]) == 8
    assert not list(folder.glob("tmp-*"))


@pytest.mark.slow
def test_the_ranks_tell_where_they_stand_when_one_hangs(data_dir, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "hung"
    launcher = launch(data_dir, folder, log, DEEPSPEED_TIMEOUT="0.5")
    try:
        wait_for(lambda: any(folder.glob("checkpoints/step_*")), launcher, log)
        hung = process_of_rank(launcher, 1)
        os.kill(hung, signal.SIGSTOP)
        stacks = folder / "logs" / "rank_0.log"
        wait_for(lambda: "Timeout (0:00:27)" in stacks.read_text(), launcher, log)
        waits = stacks.read_text().partition("Timeout (0:00:27)")[2]
        assert "distributed_c10d.py" in waits and "trainer.py" in waits
        os.kill(hung, signal.SIGKILL)
        assert launcher.wait(WAIT_S) not in (0, 2, 75)
    finally:
        launcher.kill()
