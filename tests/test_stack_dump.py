"""The stacks of a rank that hangs: told in time, and only of one that does."""

import faulthandler
import time

import pytest

from trelm_ds import stack_dump


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "rank_0.log").open("w") as file:
        yield file
        stack_dump.disable()


def test_a_rank_that_does_not_get_on_tells_where_it_stands(log, monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", str(0.3 / 60))
    stack_dump.enable(log)
    until = time.monotonic() + 60
    text = ""
    while "Timeout" not in text and time.monotonic() < until:
        time.sleep(0.01)
        text = open(log.name).read()
    assert "test_a_rank_that_does_not_get_on" in text


def test_the_timer_starts_anew_with_every_step_and_ends_with_the_run(log, monkeypatch):
    timers = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, file: timers.append((seconds, file))
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append("off"))
    stack_dump.rearm()
    assert timers == []  # a trainer without a log
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "30")
    stack_dump.enable(log)
    stack_dump.rearm()
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1")
    stack_dump.rearm()
    stack_dump.disable()
    stack_dump.rearm()
    assert timers == [(1740.0, log), (1740.0, log), (54.0, log), "off"]
