"""The promise of the first screen: the main command with no other flag, start to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_main_command_with_no_other_flag_learns_the_sample(repo, tmp_path):
    variables = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for folder in ("launch", "ds_configs"):
        (tmp_path / folder).symlink_to(repo / folder)
    command = ["deepspeed", "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json"]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    run = tmp_path / "outputs" / "trelm"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in rows if "eval/mlm_loss" in r]
    assert evaluated[-1]["eval/mlm_loss"] < evaluated[0]["eval/mlm_loss"] - 2
    assert evaluated[-1]["eval/probe_p1"] > evaluated[0]["eval/probe_p1"] + 0.02
    assert (run / "hf" / "model.safetensors").is_file() and (run / "curves.png").is_file()
