"""Rank and rendezvous from each launcher's variables."""

import os
import subprocess
import sys

import pytest

from trelm_ds.distributed import first_host, get_world, timeout
from trelm_ds.errors import ConfigError


def test_alone():
    env = {}
    world = get_world(env)
    assert (world.rank, world.size, world.local_rank, world.launcher) == (0, 1, 0, "none")
    assert env["WORLD_SIZE"] == "1" and int(env["MASTER_PORT"]) > 0


def test_a_launchers_variables_win_over_slurms():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}
    env["SLURM_STEP_NUM_TASKS"] = "9"
    world = get_world(env)
    assert (world.rank, world.size, world.local_rank, world.launcher) == (3, 4, 1, "launcher")


def test_srun():
    env = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "123456",
    }
    world = get_world(env)
    assert (world.rank, world.size, world.local_rank, world.launcher) == (9, 16, 1, "slurm")
    assert env["MASTER_ADDR"] == "gpu003"
    assert env["MASTER_PORT"] == str(20000 + 123456 % 20000)
    assert env["RANK"] == "9" and env["WORLD_SIZE"] == "16"


def test_a_batch_script_without_srun_is_one_process():
    assert get_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}).size == 1


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[7,9-12]", "gpu7"), ("a-b[01-04],c", "a-b01")],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_bad_variables_are_errors():
    with pytest.raises(ConfigError, match="RANK"):
        get_world({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="not below"):
        get_world({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("minutes", "said"), [("0.5", "0.5"), ("soon", "ConfigError")])
def test_deepspeed_is_imported_whatever_the_timeout_is(minutes, said):
    """It takes whole minutes only, and is imported once in a process."""
    script = "import os, torch; from trelm_ds.engine import quiet_deepspeed as q; "
    script += "q(torch.device('cpu')); print(os.environ['DEEPSPEED_TIMEOUT'])"
    environment = dict(os.environ, DEEPSPEED_TIMEOUT=minutes)
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert said in (result.stdout.split() or result.stderr.splitlines()[-1])


def test_the_timeout_is_in_minutes():
    assert timeout({}).total_seconds() == 1800
    assert timeout({"DEEPSPEED_TIMEOUT": "0.5"}).total_seconds() == 30
    for text in ("soon", "0", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="DEEPSPEED_TIMEOUT"):
            timeout({"DEEPSPEED_TIMEOUT": text})
