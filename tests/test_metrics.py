"""What a run reports: lines, the log's resume, the plot."""

import json
import math
import resource

import pytest

from trelm_ds.metrics import MetricLog, console_line, format_duration, plot_curves, read_metrics


def values(**more):
    return {
        "train/loss": 2.5,
        "train/mlm_loss": 2.1,
        "train/cka_loss": 2.9,
        "train/lr": 3.1e-4,
        "train/grad_norm": 0.84,
        "throughput/tokens_per_s": 412_345.0,
        "throughput/mfu": 0.38,
        "memory/peak_gib": 61.2,
        "data/wait_fraction": 0.02,
        **more,
    }


def test_console_line():
    line = console_line(1200, 50000, values(), 8, 18_720)
    assert line == (
        "step 1200/50000 | loss 2.500 (mlm 2.100 cka 2.900) | lr 3.1e-04 | grad 0.84 | "
        "412k tok/s (51.5k/rank) | mfu 38% | mem 61.20 GiB | data 2% | eta 5h12m"
    )
    plain = values()
    del plain["train/cka_loss"]
    plain |= {"throughput/mfu": math.nan, "train/grad_norm": None}
    line = console_line(1, 2, plain, 1, 61)
    assert "cka" not in line and "mfu" not in line and "grad" not in line and "/rank" not in line
    assert line.endswith("eta 1m01s")


def test_durations():
    assert [format_duration(s) for s in (0, 59.9, 61, 3600)] == ["0m00s", "0m59s", "1m01s", "1h00m"]


def test_a_resumed_log_drops_the_steps_it_takes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, enabled=True)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "tra')  # the process died here
    MetricLog(path, enabled=True, resume_step=2).write(3, {"train/loss": 30.0})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 30)]


def test_only_rank_0_writes(tmp_path):
    MetricLog(tmp_path / "metrics.jsonl", enabled=False).write(1, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_plot(tmp_path):
    rows = [
        {"step": 0, "eval/mlm_loss": 5.0, "eval/probe_p1": 0.0, "eval/probe_p1_tail": 0.0},
        {"step": 1, "train/mlm_loss": 5.0, "train/cka_loss": 3.0},
        {"step": 2, "eval/mlm_loss": 4.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot_curves(path, tmp_path / "curves.png", "run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_line_is_written_whole_or_with_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, enabled=True)
    log.write(1, {"a": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))  # five bytes of the next
    try:
        with pytest.raises(OSError):
            log.write(2, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    log.write(3, {"a": 3})
    assert [(r["step"], r["a"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 3)]
