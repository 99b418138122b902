"""The commands a user types: they run, and bad input is one line, exit code 2, nothing written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from multiprocess import free_port
from tiny_corpus import write_tiny_corpus

from trelm_ds.data.shards import write_manifest
from trelm_ds.errors import TrelmError
from trelm_ds.pretrain import run
from trelm_ds.stopping import StopRequest

SHAPE = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64"),
]
TINY = [
    *SHAPE,
    *("--max_seq_length", "64", "--num_workers", "0"),
    *("--per_device_train_batch_size", "4", "--logging_steps", "1", "--eval_steps", "0"),
    *("--eval_batches", "1", "--set", "decoding.num_negatives=8"),
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, repo):
    """A run completes the launcher's variables: they must not outlive the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(repo)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def shell(repo, *command, env=None) -> subprocess.CompletedProcess:
    variables = dict(os.environ, OMP_NUM_THREADS="1", **(env or {}))
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    return subprocess.run(
        [str(c) for c in command], cwd=repo, env=variables, capture_output=True, text=True
    )


def test_the_main_command_on_two_ranks_with_tensorboard(repo, data_dir, tmp_path):
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "launch/pretrain.py"]
    command += ["--deepspeed", "ds_configs/zero2.json", "--data_dir", data_dir]
    command += ["--output_dir", tmp_path / "run", "--max_steps", "3", *TINY]
    command += ["--report_to", "tensorboard"]
    result = shell(repo, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    output = tmp_path / "run"
    for name in ("config.json", "environment.json", "metrics.jsonl", "curves.png"):
        assert (output / name).is_file(), name
    backbone = json.loads((output / "environment.json").read_text())["backbone"]
    asked = json.loads((output / "config.json").read_text())["model"]
    assert backbone["hidden_size"] == asked["hidden_size"] and backbone["vocab_size"] > 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if "train/loss" in r]
    assert steps == [1, 2, 3]
    promised = "train/mlm_loss train/cka_loss train/lr train/grad_norm train/tokens_seen "
    promised += "throughput/tokens_per_s throughput/mfu data/wait_fraction memory/peak_gib "
    promised += "bank/entities bank/lambda routing/kept_fraction "
    promised += "time/forward_s time/backward_s time/bank_s time/optimizer_s time_s"
    last = next(r for r in reversed(rows) if "train/loss" in r)
    assert set(promised.split()) <= set(last)
    evaluated = [r for r in rows if "eval/mlm_loss" in r]
    assert [r["step"] for r in evaluated] == [0, 3]
    assert {"eval/probe_p1", "eval/probe_p1_tail"} <= set(evaluated[-1])
    assert list((output / "logs").rglob("events.out.tfevents*"))
    assert {p.name for p in (output / "logs").glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    AutoModelForMaskedLM.from_pretrained(output / "hf")
    AutoTokenizer.from_pretrained(output / "hf")
    # The run is complete: asking to resume it changes nothing and says so.
    again = shell(repo, *command, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already complete" in again.stdout


def test_dry_run_reports_and_writes_nothing(repo, data_dir, tmp_path):
    result = shell(
        repo,
        *("python", "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json", "--dry_run"),
        *("--data_dir", data_dir, "--output_dir", tmp_path / "run", *TINY),
    )
    assert result.returncode == 0, result.stderr
    for part in ("per step", "parameters:", "trained", "memory per rank", '"routing"'):
        assert part in result.stdout
    assert "knowledge tables" in result.stdout
    assert not (tmp_path / "run").exists()


def _corrupt_shard(folder):
    shard = next((folder / "shards").glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))


def _empty_corpus(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"].update(samples=0, shards=[])
    write_manifest(folder, manifest)


def _entity_outside(folder):
    triples = np.load(folder / "graph" / "triples.npy")
    triples[0, 2] = 10**6
    np.save(folder / "graph" / "triples.npy", triples)


def _no_shards(folder):
    for shard in (folder / "shards").glob("*"):
        shard.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_corrupt_shard, "train-00000"),
        (_empty_corpus, "empty"),
        (_entity_outside, "triples"),
        (_no_shards, "train-00000"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "prepare"),
    ],
)
def test_damaged_data_is_one_line_and_leaves_no_run(tmp_path, damage, said):
    folder = tmp_path / "data"
    write_tiny_corpus(folder)
    damage(folder)
    argv = ["--data_dir", str(folder), "--dry_run", *TINY]
    if said in ("train-00000", "empty"):
        argv.remove("--dry_run")  # found when the shards are opened
        argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    with pytest.raises(TrelmError) as error:
        run(argv, StopRequest())
    assert said in str(error.value).lower()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_exit_code_and_single_line_on_stderr(repo, tmp_path):
    result = shell(repo, "python", "launch/pretrain.py", "--learning_rat", "1")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: unknown argument '--learning_rat'; did you mean '--learning_rate'?"
    ]
    result = shell(repo, "python", "launch/pretrain.py", "--data_dir", tmp_path / "missing")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "manifest.json" in result.stderr


def test_a_backbone_of_another_vocabulary_is_refused(data_dir, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(
            vocab_size=77,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).save_pretrained(tmp_path / "bert")
    argv = ["--data_dir", str(data_dir), "--model_name_or_path", str(tmp_path / "bert")]
    with pytest.raises(TrelmError, match="vocabulary"):
        run([*argv, "--dry_run", *TINY[len(SHAPE) :]], StopRequest())


def readme_commands(repo) -> list[str]:
    text = (repo / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if "launch/" in line]


def test_readme_training_commands_resolve(repo, data_dir, tmp_path):
    """Every training command of the README parses and resolves; its folders stand in for theirs."""
    seen = 0
    for command in readme_commands(repo):
        words = shlex.split(command)
        if "launch/pretrain.py" not in words:
            continue
        argv = words[words.index("launch/pretrain.py") + 1 :]
        for flag, value in (("--data_dir", data_dir), ("--model_name_or_path", None)):
            if flag in argv:
                at = argv.index(flag)
                argv[at : at + 2] = [flag, str(value)] if value else []
        if "--data_dir" not in argv:
            argv += ["--data_dir", str(data_dir)]
        assert run([*argv, "--dry_run"], StopRequest()) == 0, command
        seen += 1
    assert seen >= 2


def test_every_script_explains_itself(repo):
    for script in ("prepare", "evaluate", "export", "lookup", "pretrain"):
        result = shell(repo, "python", f"launch/{script}.py", "--help")
        assert result.returncode == 0, result.stderr
        assert "usage" in result.stdout.lower()
