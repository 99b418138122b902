"""The checks of ``launch/preflight.py`` on a node that is fit, and on nodes that are not."""

import json
import os
import subprocess
import sys
import threading

import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds import preflight
from trelm_ds.errors import EXIT_BAD_INPUT, EXIT_BAD_NODE, EXIT_DONE


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


@pytest.fixture
def flags(data_dir, tmp_path):
    return ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def run_folder(flags):
    return preflight.plan("unused", flags)


def refused(capsys, folder, flags) -> str:
    """The one line that ``check`` ends with."""
    assert preflight.main(["check", str(folder), *flags]) == EXIT_BAD_NODE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # one left would end this process
    return lines[0]


def test_a_fit_node_says_nothing_and_leaves_nothing(flags, run_folder, capsys):
    assert preflight.main(["check", str(run_folder), *flags]) == EXIT_DONE
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in run_folder.iterdir()] == [preflight.PLAN]


def test_the_folder_is_the_flags_or_the_default_one(flags, tmp_path):
    assert preflight.plan("unused", flags) == tmp_path / "run"
    assert preflight.plan(str(tmp_path / "default"), flags[:2]) == tmp_path / "default"


def test_wrong_flags_and_data_are_told_by_the_first_node(tmp_path, capsys):
    for wrong in (["--max_step", "3"], ["--data_dir", str(tmp_path / "none")]):
        assert preflight.main(["plan", str(tmp_path / "run"), *wrong]) == EXIT_BAD_INPUT
    assert not (tmp_path / "run").exists()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_folder_that_is_not_shared(flags, run_folder, capsys, monkeypatch):
    (run_folder / preflight.PLAN).unlink()
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    line = refused(capsys, run_folder, flags)
    assert line.startswith("node n7: the run's folder") and "shared" in line


def test_other_software(flags, run_folder, capsys):
    path = run_folder / preflight.PLAN
    expected = json.loads(path.read_text())
    expected["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(expected))
    assert "the software: versions" in refused(capsys, run_folder, flags)


def test_a_shard_that_was_not_copied_whole(tmp_path, capsys):
    data_dir = tmp_path / "data"
    write_tiny_corpus(data_dir)
    flags = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")]
    folder = preflight.plan("unused", flags)
    shard = sorted((data_dir / "shards").glob("*.tar"))[0]
    os.truncate(shard, 512)
    assert f"{shard} has 512 bytes" in refused(capsys, folder, flags)


def test_software_that_is_not_known_or_being_edited_is_no_reason(
    flags, run_folder, capsys, monkeypatch
):
    for known in (None, "abc+"):
        monkeypatch.setattr("trelm_ds.environment.commit", lambda known=known: known)
        path = run_folder / preflight.PLAN
        path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "abc"}))
        assert preflight.main(["check", str(run_folder), *flags]) == EXIT_DONE
    monkeypatch.setattr("trelm_ds.environment.commit", lambda: "def")
    assert "the software: commit def here, abc" in refused(capsys, run_folder, flags)


def test_another_corpus_under_the_same_path(flags, run_folder, capsys):
    path = run_folder / preflight.PLAN
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset_id": "another"}))
    assert "the data: dataset_id" in refused(capsys, run_folder, flags)


def test_a_host_that_no_one_knows(flags, run_folder, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert "MASTER_ADDR: " in refused(capsys, run_folder, flags)


def test_gpus_that_torch_does_not_see(flags, run_folder, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "64")
    assert "the GPUs: SLURM gave 64" in refused(capsys, run_folder, flags)


def test_little_shared_memory(flags, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "MIN_SHARED_MEMORY", 1 << 60)
    assert "shared memory: /dev/shm has" in refused(capsys, run_folder, flags)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")  # a rank alone needs none
    assert "the GPUs: " in refused(capsys, run_folder, flags)


def test_a_check_that_hangs_is_named(flags, run_folder):
    # In a process of its own: the deadline ends it, also inside a call that does not come back.
    code = (
        "import socket, sys, time\nfrom trelm_ds import preflight\n"
        "preflight.LIMIT_S, preflight._software = 2.0, dict\n"
        "socket.getaddrinfo = lambda *_: time.sleep(60)\n"
        f"sys.exit(preflight.main({['check', str(run_folder), *flags]!r}))"
    )
    environment = os.environ | {"MASTER_ADDR": "somewhere", "SLURMD_NODENAME": "n3"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == EXIT_BAD_NODE
    assert ended.stderr == "node n3: MASTER_ADDR: no answer for 2 s\n"
