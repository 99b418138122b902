"""``launch/preflight.py``: is every node of a SLURM job fit for it, before its ranks meet.

One node with a broken GPU, another torch or without the shared folder fails a job of many by a
hang, or by a traceback from each rank. Here it is named first: ``plan`` runs once, on
the job's first node, reads the flags and leaves in the run's folder what the others are to find;
``check`` runs once on each node and compares.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from trelm_ds.arguments import parse_arguments
from trelm_ds.config import Config
from trelm_ds.errors import (
    EXIT_BAD_NODE,
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    TrelmError,
    one_line,
    report,
)
from trelm_ds.files import write_text

PLAN = "preflight.json"
LIMIT_S = 120.0  # of each check; what takes longer hangs: a dead disk, a driver without an answer
MIN_SHARED_MEMORY = 512 << 20  # bytes: NCCL's ranks of one node exchange through it
MATRIX = 2048


class NodeError(TrelmError):
    """This node is not fit for the job; others may be."""

    exit_code = EXIT_BAD_NODE


def plan(default_folder: str, argv: list[str]) -> Path:
    """Checks the flags and the data of a run once, and leaves in its folder what all nodes need.

    Args:
        default_folder: the run's folder if neither a flag nor ``--config`` names one.
        argv: flags of ``launch/pretrain.py``.
    Returns:
        The run's folder.
    Raises:
        TrelmError: the flags or the data are wrong, on whatever node.
    """
    config, _ = parse_arguments(argv)
    folder = Path(config.train.output_dir or default_folder)
    expected = {"id": uuid.uuid4().hex, **_software()}
    if manifest := _manifest(config):
        expected["dataset_id"] = manifest["dataset_id"]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PLAN, json.dumps(expected, indent=1) + "\n")
    return folder


def check(folder: Path, argv: list[str], begin: Callable[[str], None]) -> None:
    """Runs the checks on this node.

    Args:
        folder: what ``plan`` returned.
        argv: the flags that ``plan`` had.
        begin: is told the name of each check before it begins.
    Raises:
        NodeError: the first that failed.
    """
    begin("reading the flags")
    config, _ = parse_arguments(argv)
    expected: dict = {}
    checks = {
        f"the run's folder {folder}": lambda: expected.update(_shared_folder(folder)),
        "the software": lambda: _compare(_software(), expected),
        "MASTER_ADDR": _rendezvous,
        "the data": lambda: _check_data(config, expected),
        "shared memory": lambda: _shared_memory(os.environ.get("SLURM_GPUS_ON_NODE")),
        "the GPUs": lambda: _gpus(os.environ.get("SLURM_GPUS_ON_NODE")),
    }
    for name, run in checks.items():
        begin(name)
        try:
            run()
        except (TrelmError, OSError, RuntimeError, ValueError) as error:
            raise NodeError(f"{name}: {one_line(error)}") from error


def _shared_folder(folder: Path) -> dict:
    """What ``plan`` wrote, after this node has written there too."""
    try:
        expected = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NodeError("what the first node wrote is not there: is it on a shared disk?") from None
    probe = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        write_text(probe, expected["id"])  # written, flushed and renamed, as checkpoints are
        if probe.read_text(encoding="utf-8") != expected["id"]:
            raise NodeError("a file reads back other than it was written")
    finally:
        probe.unlink(missing_ok=True)
    return expected


def _software() -> dict:
    from trelm_ds import environment

    found: dict = {"versions": environment.versions()}
    if commit := environment.commit():  # not known without git
        found["commit"] = commit.rstrip("+")  # a file may be edited while the job starts
    return found


def _manifest(config: Config) -> dict | None:
    """Of the data that the run names; the embedded corpus is written by the run itself."""
    from trelm_ds.data.shards import load_manifest

    return None if config.data.data_dir is None else load_manifest(config.data.data_dir)


def _compare(mine: dict, expected: dict) -> None:
    for name, value in mine.items():
        if value != expected.get(name, value):
            raise NodeError(f"{name} {value} here, {expected[name]} on the job's first node")


def _check_data(config: Config, expected: dict) -> None:
    """That it is the first node's, and every shard is there in its full length; contents are
    checked as they are read."""
    from trelm_ds.data.shards import SHARD_FOLDER

    if (manifest := _manifest(config)) is None:
        return
    _compare({"dataset_id": manifest["dataset_id"]}, expected)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = Path(config.data.data_dir) / SHARD_FOLDER / shard["name"]
            if (size := path.stat().st_size) != shard["bytes"]:
                raise NodeError(f"{path} has {size} bytes, the manifest says {shard['bytes']}")


def _rendezvous() -> None:
    if name := os.environ.get("MASTER_ADDR"):
        socket.getaddrinfo(name, None)


def _shared_memory(gpus: str | None) -> None:
    if gpus in ("0", "1"):  # one rank has nobody here to talk to, and gloo talks over sockets
        return
    free = shutil.disk_usage("/dev/shm").free
    if free < MIN_SHARED_MEMORY:
        raise NodeError(f"/dev/shm has {free >> 20} MiB free, {MIN_SHARED_MEMORY >> 20} are needed")


def _gpus(promised: str | None) -> None:
    """That torch sees the GPUs that SLURM gave, and each multiplies what it is given."""
    import torch

    count = torch.cuda.device_count()
    if promised not in (None, "0") and int(promised) != count:
        raise NodeError(f"SLURM gave {promised}, torch sees {count}")
    for index in range(count):
        device = torch.device("cuda", index)
        ones = torch.ones(MATRIX, MATRIX, device=device)
        if not bool((ones @ ones == MATRIX).all()):
            raise NodeError(f"{device} multiplies wrongly")
        del ones
    torch.cuda.empty_cache()


class _Deadline:
    """Ends the process where a check hangs, in a call that no signal reaches too."""

    def __init__(self, host: str):
        self._host = host
        self._timer: threading.Timer | None = None

    def begin(self, check: str) -> None:
        """``check`` has ``LIMIT_S`` from now on."""
        self.end()
        self._timer = threading.Timer(LIMIT_S, self._give_up, [check])
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self, check: str) -> None:
        print(f"node {self._host}: {check}: no answer for {LIMIT_S:.0f} s", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_BAD_NODE)


def main(argv: list[str] | None = None) -> int:
    """``plan DEFAULT_FOLDER FLAGS`` prints the run's folder, ``check FOLDER FLAGS`` nothing."""
    argv = sys.argv[1:] if argv is None else argv
    # SLURM's early warning: nothing to save yet, the job goes back to the queue.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(EXIT_STOPPED))
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        if len(argv) < 2 or argv[0] not in ("plan", "check"):
            raise ConfigError("usage: launch/preflight.py plan|check FOLDER [flags of pretrain.py]")
        if argv[0] == "plan":
            print(plan(argv[1], argv[2:]))
        else:
            deadline = _Deadline(host)
            try:
                check(Path(argv[1]), argv[2:], deadline.begin)
            finally:
                deadline.end()
    except NodeError as error:
        return report(error, f"node {host}")
    except (TrelmError, OSError) as error:
        return report(error)
    return EXIT_DONE
