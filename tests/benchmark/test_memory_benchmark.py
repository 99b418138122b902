"""The memory bank's benchmark: its rows on one rank and on two, its keys, its refusals."""

import json

import pytest
import torch
from multiprocess import run_ranks

from trelm_ds.benchmark import memory
from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.results import read_result
from trelm_ds.stopping import StopRequest

CPU = torch.device("cpu")
PROMISED = "entities hidden_size ranks mentions lookup_ms commit_ms bytes_per_rank".split()


def test_a_row_for_every_size(tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    argv = ["memory", "--entities", "2000", "5000", "--hidden_size", "8", "--mentions", "40"]
    argv += ["--rounds", "2", "--keys", "uniform", "--device", "cpu", "--json", str(path)]
    assert main(argv) == 0
    result = read_result(path)
    assert result["keys"] == "uniform" and result["rounds"] == 2
    for row, entities in zip(result["rows"], (2000, 5000), strict=True):
        assert set(PROMISED) <= set(row)
        assert (row["entities"], row["hidden_size"]) == (entities, 8)
        assert (row["ranks"], row["mentions"]) == (1, 40)
        # two float32 vectors and an int64 count of every key
        assert row["bytes_per_rank"] == entities * (2 * 4 * 8 + 8)
        assert row["lookup_ms"] > 0 and row["commit_ms"] > 0
    # Where the banks do not fit together they are measured one after the other.
    needed = sum(memory.required_bytes(5000, 8, 1, 40, 1024).values())
    free = type("Free", (), {"available": needed})
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    rows = memory.measure([2000, 5000], (8, 40, "zipf"), 1, CPU, StopRequest())
    assert [row["entities"] for row in rows] == [2000, 5000]


def test_a_step_goes_through_the_bank():
    arm = memory._Arm(300, 4, 32, "zipf", CPU, None)
    before = arm.bank.digest()
    for number in range(3):
        arm.run(number)
    assert arm.bank.version == 3 and arm.bank.digest() != before
    keys = memory.draw_keys(300, 32, "zipf", torch.Generator().manual_seed(1))
    rows = arm.bank.lookup(keys)
    assert not torch.equal(rows.global_, rows.local)  # contexts have come in
    assert arm.bank.visited() > 12


def rows_of_a_rank(rank, world_size):
    return memory.measure([3000], (8, 64, "zipf"), 2, CPU, StopRequest())


def test_two_ranks_share_the_bank():
    mine, other = run_ranks(rows_of_a_rank, 2)
    assert mine == other  # times are those of the slowest rank
    (row,) = mine
    assert row["ranks"] == 2 and row["mentions"] == 64
    whole = 3000 * (2 * 4 * 8 + 8)
    assert whole / 2 <= row["bytes_per_rank"] < whole * 0.51


def stopped_on_one_rank(rank, world_size):
    stop = StopRequest()
    stop.requested = rank == 1
    return memory.measure([500], (8, 16, "zipf"), 10**6, CPU, stop)


def test_a_stop_that_one_rank_has_seen_stops_all():
    assert run_ranks(stopped_on_one_rank, 2) == [None, None]


@pytest.mark.parametrize("how", memory.KEYS)
def test_keys_are_in_range_and_fall_as_said(how):
    keys = memory.draw_keys(1000, 20_000, how, torch.Generator().manual_seed(0))
    assert keys.dtype == torch.int64 and keys.min() >= 0 and keys.max() < 1000
    share = (keys < 10).double().mean().item()
    expected = {
        "uniform": 0.01,
        "zipf": torch.log(torch.tensor(11 / 1)) / torch.tensor(1001.0).log(),
    }
    assert share == pytest.approx(float(expected[how]), rel=0.2)


def test_a_stop_request_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "install", lambda self: setattr(self, "requested", True))
    path = tmp_path / "memory.json"
    argv = ["memory", "--entities", "100", "--hidden_size", "4", "--device", "cpu"]
    assert main([*argv, "--json", str(path)]) == 75
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--entities", "0"], "--entities 0"),
        (["--mentions", "-1"], "--mentions -1"),
        (["--rounds", "0"], "--rounds 0"),
        (["--entities", "2000000000", "--hidden_size", "8192"], "GiB are free"),
        (["--keys", "sorted"], "--keys"),
        (["--json", "missing/folder/x.json"], "no such folder"),
    ],
)
def test_bad_flags_are_one_line(capsys, argv, said):
    assert main(["memory", "--device", "cpu", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]


def test_the_flag_of_the_deepspeed_launcher_is_taken(tmp_path):
    path = tmp_path / "memory.json"
    argv = ["--local_rank=0", "memory", "--entities", "100", "--hidden_size", "4", "--rounds", "1"]
    assert main([*argv, "--device", "cpu", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["kind"] == "memory"
