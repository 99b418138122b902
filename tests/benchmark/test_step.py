"""The step benchmark: its cost model against counted FLOPs, its rows, its command."""

import json

import pytest
import torch
from multiprocess import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from trelm_ds.benchmark import routing_arms, step
from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.cost_model import step_flops
from trelm_ds.benchmark.synthetic import Shapes
from trelm_ds.stopping import StopRequest

SHAPES = Shapes(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=128,
    vocab_size=120,
    sequence_length=24,
    batch_size=3,
    # matrix products of the encoder and the MLM head only
    overrides={
        "injection.form": "none",
        "decoding.enabled": False,
        "model.attn_implementation": "sdpa",
    },
)


def counted_products(name: str) -> tuple[float, routing_arms.StepBenchmark]:
    """FLOPs of the matrix products of one step of an arm, attention's core left out."""
    bench = routing_arms.StepBenchmark(SHAPES, torch.device("cpu"))
    arm = routing_arms.Arm(name, bench)
    arm.run()
    with FlopCounterMode(display=False) as counter:
        arm.run()
    by_operator = counter.get_flop_counts()["Global"]
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(by_operator.get(op, 0) for op in products), bench


@pytest.mark.parametrize(
    # paths that are gathered go through an operator whose products the counter does not see
    "name",
    ["dense", "frozen", "block.25", "block.125+path", "strict+path", "block.25+path+truncated"],
)
def test_the_cost_model_counts_the_products_a_step_makes(name):
    counted, bench = counted_products(name)
    arm = routing_arms.Arm(name, bench)
    predicted = step_flops(
        *(bench.model.backbone.config, arm.config, bench.tokens, bench.masked),
        sequence_length=0,
        truncated=arm.config.truncated_depth > 0,
    ).total
    if arm.config.scope == "strict":
        # Nothing below the lowest FFN trains: its attention needs no input gradient either.
        d = SHAPES.hidden_size
        predicted -= 2.0 * bench.tokens * 4 * d * d
        kept = arm.routing.blocks.block_size
        predicted -= 2.0 * bench.tokens * d * kept
    assert counted == pytest.approx(predicted, rel=1e-9)


def test_rows_have_every_phase_and_the_baseline_comes_first(tmp_path):
    rows = step.measure(
        SHAPES,
        torch.device("cpu"),
        ["block.25+path", "in_backward.1+abs", "strict+path+truncated"],
        rounds=2,
        measure_memory=False,
    )
    assert [row["arm"] for row in rows] == [
        *("dense", "block.25+path", "in_backward.1+abs", "strict+path+truncated")
    ]
    assert rows[0]["ratio_to_dense"] == rows[0]["predicted_ratio"] == 1.0
    for row in rows:
        phases = sum(row[f"{p}_ms"] for p in step.PHASES)
        assert 0 < row["forward_ms"] < row["step_ms"] and phases > 0
        assert row["ratio_low"] <= row["ratio_to_dense"] <= row["ratio_high"]


@pytest.mark.parametrize("phase", ["Arm.run", "_peak_memory_mib"])
def test_a_stop_ends_it_after_what_is_under_way(monkeypatch, phase):
    stop, calls = StopRequest(), []
    monkeypatch.setattr(step, "_peak_memory_mib", lambda shapes, name: 1.0)
    owner, _, name = phase.rpartition(".")
    owner = getattr(step, owner) if owner else step
    real = getattr(owner, name)

    def stopping(*args):
        stop.requested = True
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(owner, name, stopping)
    arms = ["block.25+path", "strict"]
    assert step.measure(SHAPES, torch.device("cpu"), arms, rounds=2, stop=stop) is None
    assert len(calls) == (3 if phase == "Arm.run" else 1)  # a round of all arms, one process


def ranks_rows(rank, world_size):
    arms = ["block.25+path", "block.25+path+compact"]
    return step.measure(SHAPES, torch.device("cpu"), arms, rounds=2, measure_memory=False)


def test_two_ranks_measure_communication_apart():
    for rows in run_ranks(ranks_rows, 2):
        assert [row["arm"] for row in rows] == ["dense", "block.25+path", "block.25+path+compact"]
        assert all(row["ranks"] == 2 and row["communication_ms"] > 0 for row in rows)


def test_command_writes_json_and_figure(tmp_path, capsys):
    path = tmp_path / "step.json"
    shape = "--num_hidden_layers 1 --hidden_size 16 --num_attention_heads 2 --vocab_size 99"
    shape += " --intermediate_size 32 --sequence_length 16 --batch_size 2 --rounds 1"
    argv = ["step", "--json", str(path), "--device", "cpu", *shape.split()]
    assert main([*argv, "--arms", "block.25", "--no_peak_memory"]) == 0
    result = json.loads(path.read_text())
    assert result["kind"] == "step" and len(result["rows"]) == 2
    assert result["rows"][0]["peak_memory_mib"] is None
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "| block.25 |" in capsys.readouterr().out
    assert main([*argv, "--arms", "dense"]) == 0  # takes two steps in a process of its own
    assert json.loads(path.read_text())["rows"][0]["peak_memory_mib"] > 100
    assert main(["step", "--arms", "nothing"]) == 2
    assert "none of" in capsys.readouterr().err
