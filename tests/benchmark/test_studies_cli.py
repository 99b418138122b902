"""The study commands: plans and one-line errors here; whole studies on a tiny corpus, slow."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.results import read_result
from trelm_ds.benchmark.sweep import named_sweep
from trelm_ds.errors import ConfigError
from trelm_ds.metrics import read_metrics
from trelm_ds.stopping import StopRequest

TINY = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64", "--max_seq_length", "64", "--num_workers", "0"),
    *("--per_device_train_batch_size", "4", "--eval_batches", "1"),
    *("--set", "decoding.num_negatives=8"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    monkeypatch.setattr(StopRequest, "install", lambda self: None)


def test_a_plan_lists_the_runs_and_writes_nothing(data, tmp_path, capsys):
    argv = ["convergence", "--plan", "--data", str(data), "--output_dir", str(tmp_path / "s")]
    argv += ["--methods", "trelm", "dkplm", "--learning_rates", "1e-3", "2e-3", *TINY]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "new       trelm lr 0.001 seed 1" and len(lines) == 6
    assert lines[-2] == "then up to 4 more: each arm's best rate with seeds [2, 3]"
    assert not (tmp_path / "s").exists()


def test_a_plan_does_not_write_the_sample_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["routing", "--plan"]) == 2
    assert "write the sample corpus first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_globs_choose_routing_arms(data, tmp_path, capsys):
    argv = ["routing", "--plan", "--data", str(data), "--output_dir", str(tmp_path), "--seeds", "1"]
    argv += ["--arms", "dense", "block.25*R50", "--learning_rates", "1e-3"]
    assert main(argv) == 0
    named = [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert named == ["dense", "block.25+path-R50", "block.25-R50"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--methods", "trelm"], "baseline 'dkplm' is not among --methods"),
        (["--methods", "trelmm", "dkplm"], "'trelm'"),
        (["--baselines", "mlm", "--methods", "trelm"], "'mlm' is not among"),
        (["--budget", "soon"], "--budget soon"),
        (["--budjet", "9"], "did you mean '--budget'?"),
        (["--seed", "4"], "did you mean '--seeds'?"),
        (["--max_steps", "4"], "did you mean '--budget'?"),
        (["--kept_fraction", "1"], "did you mean '--set routing.kept_fraction=...'?"),
        (["--seeds", "0"], "--seeds 0"),
        (["--learning_rates", "1e-3", "0.001"], "twice"),
        (["--set", "train.seed=4"], "the study decides"),
        (["--set", "memory.decayy=4"], "memory.decay"),
        (["--hidden_size", "many"], "not int"),
        (["--tolerance", "1"], "--tolerance"),
        (["--json", "missing/folder/x.json"], "no such folder"),
        (["--parallel", "many"], "invalid int"),
        (["--select_by", "eval/report_p1"], "facts that are not reported"),
    ],
)
def test_bad_flags_are_one_line(data, tmp_path, capsys, argv, said):
    common = ["convergence", "--plan", "--data", str(data), "--output_dir", str(tmp_path / "s")]
    assert main([*common, *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]
    assert not (tmp_path / "s").exists()


def test_sweeps_by_short_name_and_by_key(data, tmp_path, capsys):
    assert named_sweep("theta", None).key == "decoding.loss_weight"
    assert named_sweep("theta", ["0.2"]).values == ("0.2",)
    assert named_sweep("memory.decay", ["1", "2"]).key == "memory.decay"
    for key, values in (("memory.deca", ["1"]), ("memory.decay", None), ("method", ["mlm"])):
        with pytest.raises(ConfigError, match="--key"):
            named_sweep(key, values)
    with pytest.raises(ConfigError, match="'theta'"):
        named_sweep("thetta", None)
    argv = ["sweep", "--plan", "--data", str(data), "--output_dir", str(tmp_path), "--seeds", "2"]
    assert main([*argv, "--key", "rho", "--values", ".25", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1] == "routing.kept_fraction=.25" and len(lines) == 4
    assert main([*argv, "--key", "rho", "--values", ".5", "0.5"]) == 2
    assert "twice" in capsys.readouterr().err
    assert main([*argv, "--key", "rho", "--select_by", "time"]) == 2
    assert "no baseline here" in capsys.readouterr().err
    assert main([*argv, "--key", "rho", "--values", "3"]) == 2
    assert "routing.kept_fraction" in capsys.readouterr().err
    for key in ("train.learning_rate", "train.seed", "train.max_steps", "train.eval_steps"):
        assert main([*argv, "--key", key, "--values", "1", "2"]) == 2
        assert f"--key {key}: the study decides" in capsys.readouterr().err


def command(repo, *argv):
    return [sys.executable, str(repo / "launch" / "benchmark.py"), *map(str, argv)]


def environment(repo):
    return dict(os.environ, PYTHONPATH=str(repo), OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_a_whole_study_stopped_once(repo, data, tmp_path):
    """Two methods, two rates, two seeds through the real trainer, interrupted in the third run."""
    folder = tmp_path / "study"
    argv = ["convergence", "--data", data, "--output_dir", folder, "--methods", "dkplm", "trelm"]
    argv += ["--learning_rates", "1e-3", "4e-3", "--seeds", "2", "--budget", "150", *TINY]
    argv += ["--eval_steps", "50", "--save_steps", "25", "--logging_steps", "5"]
    argv = command(repo, *argv)
    process = subprocess.Popen(argv, env=environment(repo), stderr=subprocess.PIPE, text=True)
    third = folder / "runs" / "dkplm" / "lr_0.004" / "seed_1"
    while process.poll() is None and len(read_metrics(third / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert not (folder / "convergence.json").exists()
    first = folder / "runs" / "dkplm" / "lr_0.001" / "seed_1" / "result.json"
    before = first.stat().st_mtime_ns
    done = subprocess.run(argv, env=environment(repo), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming: dkplm lr 0.004 seed 1" in done.stderr
    assert first.stat().st_mtime_ns == before
    result = read_result(folder / "convergence.json")
    methods = {(row["method"], row["seed"]) for row in result["rows"]}
    assert methods == {(m, s) for m in ("dkplm", "trelm") for s in (1, 2)}
    assert {row["metric"] for row in result["rows"]} >= {"eval/mlm_loss", "eval/report_p1"}
    own = [r for r in result["ratios"] if r["method"] == "dkplm"]
    assert own and all(r["time_ratio"] in (1.0, None) for r in own)
    assert len(result["runs"]) == 6 and all(r["steps"] == 150 for r in result["runs"])
    assert sum(r["chosen"] for r in result["runs"]) == 4
    for run in (folder / "runs").glob("[dt]*/*/*"):
        steps = [
            row["step"] for row in read_metrics(run / "metrics.jsonl") if "eval/mlm_loss" in row
        ]
        assert steps == [0, 50, 100, 150]
    assert (folder / "report.html").is_file()
    # Everything is there: a third start only writes the report again.
    again = subprocess.run(argv, env=environment(repo), stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0 and "starting" not in again.stderr


@pytest.mark.slow
def test_a_sweep_within_a_time_budget(repo, data, tmp_path):
    argv = ["sweep", "--data", data, "--output_dir", tmp_path / "sweep", "--key", "theta"]
    argv += [
        "--values",
        "0.3",
        "0.7",
        "--seeds",
        "1",
        "--budget",
        "2s",
        "--eval_steps",
        "10",
        *TINY,
    ]
    done = subprocess.run(
        command(repo, *argv), env=environment(repo), stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "sweep" / "sweep.json")
    assert [row["value"] for row in result["rows"]] == [0.3, 0.7]
    assert all(row["chosen"] for row in result["rows"])
    assert all(row["time_s"] >= 2.0 and row["steps"] > 0 for row in result["rows"])
    config = json.loads(
        next((tmp_path / "sweep").rglob("decoding.loss_weight=0.7/*/*/config.json")).read_text()
    )
    assert config["decoding"]["loss_weight"] == 0.7
    assert (tmp_path / "sweep" / "figures" / "sweep.png").is_file()
