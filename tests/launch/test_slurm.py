"""``launch/slurm/pretrain.sbatch`` on a real SLURM of two nodes on this machine.

Skips where SLURM is not installed. To run it on Debian, as root:

    apt-get install --no-install-recommends slurmctld slurmd slurm-client \
        slurm-wlm-basic-plugins munge
    make test    # or: .venv/bin/python -m pytest tests/launch/test_slurm.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import one_machine_slurm as slurm
from tiny_corpus import write_tiny_corpus

pytestmark = [
    pytest.mark.needs_slurm,
    pytest.mark.skipif(slurm.missing() is not None, reason=slurm.missing() or ""),
]

FLAGS = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64", "--max_seq_length", "64", "--num_workers", "0"),
    *("--per_device_train_batch_size", "4", "--logging_steps", "1", "--eval_steps", "0"),
    *("--eval_batches", "1", "--set", "decoding.num_negatives=8"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        # Both nodes are this host, whose names n1 and n2 do not resolve.
        yield environment | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def submit(environment, repo, output_dir, data_dir, *flags, **more) -> str:
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT")
    variables = {k: v for k, v in environment.items() if k not in launchers} | {
        "TRELM_OUTPUT_DIR": str(output_dir),
        "TRELM_ROOT": str(repo),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TRELM_VENV": "/nonexistent",  # the PATH above already has the right Python
        **more,
    }
    log = output_dir.parent / "job-%j.log"
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]
    command += [f"--output={log}", str(repo / "launch/slurm/pretrain.sbatch")]
    command += ["--data_dir", str(data_dir), *FLAGS, *flags]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def log_of(output_dir, job) -> str:
    path = output_dir.parent / f"job-{job}.log"
    return path.read_text() if path.exists() else ""


def test_two_nodes_train_and_export(environment, repo, data_dir, tmp_path):
    output, config = tmp_path / "named", tmp_path / "run.yaml"
    config.write_text(f"train: {{output_dir: {output}, max_steps: 3}}")
    job = submit(environment, repo, tmp_path / "run", data_dir, "--config", str(config))
    state = slurm.wait_for_job(environment, job, {"COMPLETED", "FAILED"}, 150)
    assert state == "COMPLETED", log_of(tmp_path / "run", job)
    assert not (tmp_path / "run").exists()  # the configuration's folder wins over the job's
    assert (output / "hf" / "model.safetensors").is_file()
    config = json.loads((output / "checkpoints/step_00000003/state.json").read_text())
    assert config["world_size"] == 2
    assert {p.name for p in (output / "logs").glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}


def test_a_wrong_flag_ends_the_job_before_any_task(environment, repo, data_dir, tmp_path):
    job = submit(environment, repo, tmp_path / "run", data_dir, "--max_step", "3")
    assert slurm.wait_for_job(environment, job, {"COMPLETED", "FAILED"}, 60) == "FAILED"
    lines = log_of(tmp_path / "run", job).splitlines()
    assert len(lines) == 1 and "did you mean '--max_steps'" in lines[0], lines


def test_nodes_that_are_not_fit_are_named_before_training(environment, repo, data_dir, tmp_path):
    output = tmp_path / "run"
    job = submit(environment, repo, output, data_dir, MASTER_ADDR="no-such-host.invalid")
    assert slurm.wait_for_job(environment, job, {"COMPLETED", "FAILED"}, 90) == "FAILED"
    text = log_of(output, job)
    assert all(f"node {name}: MASTER_ADDR: " in text for name in ("n1", "n2")), text
    assert "submit it again with --exclude=NODE" in text
    assert [path.name for path in output.iterdir()] == ["preflight.json"]


def test_a_signalled_job_saves_and_asks_to_be_requeued(environment, repo, data_dir, tmp_path):
    output = tmp_path / "run"
    job = submit(environment, repo, output, data_dir, "--max_steps", "100000")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = output / "metrics.jsonl"
        if metrics.exists() and '"train/loss"' in metrics.read_text():
            break
        time.sleep(0.5)
    else:
        pytest.fail(f"no step was taken\n{log_of(output, job)}")
    subprocess.run(["scancel", "-s", "USR1", job], env=environment, check=True)
    # Exit 75: a checkpoint is published and the job goes back to the queue.
    state = slurm.wait_for_job(environment, job, {"PENDING", "FAILED", "COMPLETED"}, 60)
    text = log_of(output, job)
    subprocess.run(["scancel", job], env=environment)
    assert state == "PENDING", text
    assert "stopped on request at step" in text
    latest = (output / "checkpoints" / "LATEST").read_text().strip()
    assert (output / "checkpoints" / latest / "MANIFEST.json").is_file()
