"""Scaling over ranks: rows from a stand-in for the trainer; one short real job, slow."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.benchmark import processes, runner, scale
from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.results import read_result
from trelm_ds.stopping import StopRequest

TINY = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64", "--max_seq_length", "64", "--num_workers", "0"),
    *("--per_device_train_batch_size", "4", "--set", "decoding.num_negatives=8"),
]


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The stand-in takes the trainer's place; returns (ZeRO stage, ranks) of the runs, in order."""
    monkeypatch.setattr(runner, "SCRIPT", Path(__file__).with_name("fake_ranks.py"))
    monkeypatch.setattr(processes, "_POLL_S", 0.02)
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts"))
    monkeypatch.setattr(StopRequest, "install", lambda self: None)

    def read():
        return [tuple(map(int, s.split())) for s in (tmp_path / "starts").read_text().splitlines()]

    return read


def command(tmp_path, *more):
    argv = ["scale", "--data_dir", str(tmp_path), "--json", str(tmp_path / "scale.json")]
    return [*argv, "--rounds", "1", *more]


def test_ranks_and_stages_take_turns_and_the_first_interval_is_left_out(tmp_path, starts):
    argv = command(tmp_path, "--ranks", "3", "--zero_stages", "0", "2", "--steps", "16")
    assert main([*argv, "--rounds", "2"]) == 0
    assert starts() == 2 * [(0, 1), (0, 3), (2, 1), (2, 3)]
    result = read_result(tmp_path / "scale.json")
    rows = result["rows"]
    assert [(row["zero_stage"], row["ranks"]) for row in rows] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    for row in rows:
        size = row["ranks"]
        assert row["step_ms"] == pytest.approx(100 * (1 + size))
        assert row["tokens_per_s"] == pytest.approx(1000 * size / (1 + size))
        assert row["efficiency"] == pytest.approx(2 / (1 + size))
        assert row["efficiency_low"] <= row["efficiency"] <= row["efficiency_high"]
    assert result["cores"] == len(runner.own_cores()) and result["cores_per_rank"] >= 1
    assert result["config"]["train"]["max_steps"] == 16


def test_efficiency_is_that_of_a_round():
    alone = [{"tokens_per_s": 100.0, "step_ms": 1.0}, {"tokens_per_s": 50.0, "step_ms": 2.0}]
    two = [{"tokens_per_s": 180.0, "step_ms": 1.1}, {"tokens_per_s": 80.0, "step_ms": 2.4}]
    row = scale._row(2, 2, two, alone)
    assert (row["efficiency_low"], row["efficiency_high"]) == (0.8, 0.9)
    assert row["efficiency"] == pytest.approx(0.85) and row["tokens_per_s"] == 130.0


@pytest.mark.parametrize(
    ("rate", "code", "said"),
    [("20", 2, "error: data of another kind"), ("5", 1, "ended with code 1: boom")],
)
def test_a_rank_that_fails_ends_the_run(tmp_path, starts, monkeypatch, capsys, rate, code, said):
    monkeypatch.setattr(processes, "_GRACE_S", 2.0)
    assert main(command(tmp_path, "--ranks", "2", "--learning_rate", rate, "--rounds", "9")) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "scale.json").exists()


def test_a_stop_request_reaches_every_rank(tmp_path, starts):
    class OnceStarted:
        """Comes when the stand-in runs: before that a signal would end it at once."""

        @property
        def requested(self):
            return (tmp_path / "starts").exists()

    argv = [sys.executable, str(runner.SCRIPT), "--config", str(tmp_path / "request.json")]
    argv += ["--output_dir", str(tmp_path), "--deepspeed", str(tmp_path / "deepspeed.json")]
    (tmp_path / "request.json").write_text('{"train": {"learning_rate": 0.5}}')
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 0}}')
    shares = [runner.own_cores()] * 2
    stop = OnceStarted()
    assert processes.run_on_ranks(argv, shares, tmp_path / "console.log", stop) == 75


def test_a_stop_request_ends_the_benchmark(tmp_path, starts, monkeypatch):
    monkeypatch.setattr(StopRequest, "install", lambda self: setattr(self, "requested", True))
    monkeypatch.setattr(processes, "_GRACE_S", 5)
    assert main(command(tmp_path, "--learning_rate", "0.5")) == 75
    assert not (tmp_path / "scale.json").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--steps", "1"], "--steps 1"),
        (["--zero_stages", "4"], "--zero_stages"),
        (["--set", "train.max_steps=4"], "the benchmark decides it"),
        (["--set", "memory.decayy=4"], "memory.decay"),
        (["--hidden_size", "many"], "not int"),
        (["--method", "trellm"], "trelm"),
        (["--json", "missing/folder/x.json"], "no such folder"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, starts, capsys, argv, said):
    assert main(command(tmp_path, *argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]
    assert not (tmp_path / "starts").exists()


@pytest.mark.slow
def test_the_real_trainer_on_one_and_two_ranks(repo, tmp_path):
    write_tiny_corpus(tmp_path / "data")
    argv = [sys.executable, str(repo / "launch" / "benchmark.py"), "scale", "--ranks", "1", "2"]
    argv += ["--data_dir", str(tmp_path / "data"), "--steps", "8", "--rounds", "1", *TINY]
    done = subprocess.run(
        [*argv, "--json", str(tmp_path / "scale.json")], capture_output=True, text=True, cwd=repo
    )
    assert done.returncode == 0, done.stderr
    one, two = read_result(tmp_path / "scale.json")["rows"]
    assert (one["ranks"], two["ranks"], one["efficiency"]) == (1, 2, 1.0)
    assert all(row["tokens_per_s"] > 0 and row["step_ms"] > 0 for row in (one, two))
    assert 0 < two["efficiency"] and one["zero_stage"] == two["zero_stage"] == 2
