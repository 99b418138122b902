"""Runs of a study as processes of ``launch/pretrain.py``, some at a time, each on its own cores.

A run is finished when its ``result.json`` exists; a half-finished one goes on from its newest
checkpoint. A stop request reaches the runs as SIGTERM, upon which each writes a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trelm_ds
from trelm_ds.benchmark.results import write_json
from trelm_ds.config import Config
from trelm_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, ConfigError, TrelmError
from trelm_ds.metrics import format_duration, read_metrics
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

ROOT = Path(trelm_ds.__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "pretrain.py"
REQUEST, RESULT, CONSOLE = "request.json", "result.json", "console.log"
POLL_S = 0.5
TELL_S = 60.0  # between two lines about runs under way

# Keys a started run may go on with after they were changed: none of them alters what is reported.
# Not data.num_workers: it decides whether samples are made on the training clock.
FREE = {
    *("data.data_dir", "train.output_dir", "train.resume_from_checkpoint"),
    *("train.logging_steps", "train.save_steps", "train.save_total_limit", "train.export"),
}


class RunFailed(TrelmError):
    """A run ended in a way that another start would not mend."""

    exit_code = 1


@dataclass(frozen=True)
class Run:
    """One declared run.

    Attributes:
        arm: name of what is compared.
        learning_rate, seed: the other two coordinates.
        config: resolved; where it writes and what it resumes are the runner's.
        folder: its ``--output_dir``.
        length: what its name adds where runs of several lengths are declared.
    """

    arm: str
    learning_rate: float
    seed: int
    config: Config
    folder: Path
    length: str = ""

    @property
    def name(self) -> str:
        name = f"{self.arm} lr {self.learning_rate:g} seed {self.seed}"
        return f"{name}, {self.length}" if self.length else name

    @property
    def state(self) -> str:
        if (self.folder / RESULT).is_file():
            return "finished"
        return "started" if (self.folder / "metrics.jsonl").is_file() else "new"

    def result(self) -> dict:
        return json.loads((self.folder / RESULT).read_text(encoding="utf-8"))


def own_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def bind_to_cores(process: subprocess.Popen, cores: Sequence[int]) -> None:
    """Keeps a process that has just been started on ``cores``, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        # At once, before the interpreter has loaded anything that starts threads.
        with contextlib.suppress(ProcessLookupError):  # it ended already: its exit code says why
            os.sched_setaffinity(process.pid, cores)


def slots(parallel: int) -> list[list[int]]:
    """The cores of this process dealt out to ``parallel`` runs, equally many to each.

    Raises:
        ConfigError: fewer cores, or GPUs where there are any, than runs: they would share one, and
            their times would mean nothing.
    """
    import torch

    cores = own_cores()
    if parallel < 1:
        raise ConfigError(f"--parallel {parallel}: must be at least 1")
    if parallel > len(cores):
        raise ConfigError(f"--parallel {parallel}: only {len(cores)} core(s) here")
    gpus = torch.cuda.device_count()
    if 0 < gpus < parallel:
        raise ConfigError(f"--parallel {parallel}: only {gpus} GPU(s) here")
    each = len(cores) // parallel
    return [cores[i * each : (i + 1) * each] for i in range(parallel)]


def child_environment(slot: int, cores: Sequence[int], parallel: int) -> dict[str, str]:
    """Of a run on ``cores``: with as many threads, and one of ``parallel`` on a GPU of its own."""
    env = dict(os.environ)
    # Ranks of a job this process may be in are not the run's.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    path = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(len(cores))
    if parallel > 1:
        visible = env.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            env["CUDA_VISIBLE_DEVICES"] = str(slot)
        elif visible:  # an empty value is a study on the CPU
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot]
    return env


def declare(run: Run) -> None:
    """Writes what the run was asked to be, or checks that it still is asked the same.

    Raises:
        ConfigError: the folder holds a run of other settings; names the first that differs.
    """
    wanted = _flat(run.config.to_dict())
    path = run.folder / REQUEST
    if path.is_file():
        found = _flat(json.loads(path.read_text(encoding="utf-8")))
        for key in sorted((set(wanted) | set(found)) - FREE):
            if wanted.get(key) != found.get(key):
                raise ConfigError(
                    f"{run.folder} was run with {key} {found.get(key)!r}, and is now asked for "
                    f"{wanted.get(key)!r}: choose another --output_dir"
                )
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, run.config.to_dict())


def _flat(tree: dict) -> dict:
    return {
        f"{section}.{key}": value
        for section, body in tree.items()
        if isinstance(body, dict)
        for key, value in body.items()
    }


class Runner:
    """Starts runs in the given order as slots become free, until all are finished.

    Args:
        parallel: runs at a time.
        stop: the study's stop request.
        deepspeed: DeepSpeed configuration file for every run; None: the trainer's default.
        keep_checkpoints: of finished runs; they are large and nothing here reads them again.
        lock: an open file whose lock the runs inherit, so that it is held while any of them lives.
    """

    def __init__(
        self,
        parallel: int,
        stop: StopRequest,
        *,
        deepspeed: Path | None = None,
        keep_checkpoints: bool = False,
        lock=None,
    ):
        self.slots = slots(parallel)
        self.stop = stop
        self.deepspeed = deepspeed
        self.keep_checkpoints = keep_checkpoints
        self.lock = lock
        self._wall: list[float] = []  # seconds of runs, resumed ones since their resumption

    def run(
        self,
        runs: Sequence[Run],
        then: Callable[[], tuple[Sequence[Run], int]] = lambda: ((), 0),
    ) -> bool:
        """Brings every run to its end.

        Args:
            runs: in the order in which they start; finished ones are passed over.
            then: asked whenever a run has ended for those that follow by now, so that no slot waits
                for the last of ``runs`` (what it has named before is passed over), and how many
                are still expected after them, for the estimate of the time left.
        Returns:
            False when it was stopped on request: the runs under way wrote checkpoints.
        Raises:
            ConfigError: a run refuses its settings or its data.
            RunFailed: a run ended with an error that is not divergence.
        """
        known: dict[Path, Run] = {}
        waiting: deque[Run] = deque()

        def add(runs: Sequence[Run]) -> None:
            new = [run for run in runs if run.folder not in known]
            for run in new:
                declare(run)
                known[run.folder] = run
            waiting.extend(run for run in new if run.state != "finished")

        add(runs)
        following, later = then()
        add(following)
        if len(waiting) < len(known):
            logger.info("%d of %d runs are already finished", len(known) - len(waiting), len(known))
        under_way: dict[int, tuple[Run, subprocess.Popen, float]] = {}
        told = time.monotonic()
        try:
            while waiting or under_way:
                free = [i for i in range(len(self.slots)) if i not in under_way]
                while waiting and free and not self.stop.requested:
                    run, slot = waiting.popleft(), free.pop(0)
                    under_way[slot] = (run, self._start(run, slot), time.monotonic())
                if not under_way:
                    return False
                if self.stop.requested:
                    logger.info("stopping: %d run(s) write a checkpoint", len(under_way))
                    return self._finish_stopped(under_way)
                time.sleep(POLL_S)
                for slot, (run, process, started) in list(under_way.items()):
                    if process.poll() is None:
                        continue
                    del under_way[slot]
                    if not self._ended(run, process.returncode, time.monotonic() - started):
                        self.stop.requested = True  # somebody stopped the run: stop the study
                    following, later = then()
                    add(following)
                    self._tell(under_way, len(waiting) + later)
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    for run, _, _ in under_way.values():
                        logger.info("  %s: %s", run.name, _progress(run))
                    self._tell(under_way, len(waiting) + later)
            return all(run.state == "finished" for run in known.values())
        finally:
            for _, process, _ in under_way.values():  # after an error or a second Ctrl-C
                process.kill()
                process.wait()

    def _start(self, run: Run, slot: int) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), "--config", str(run.folder / REQUEST)]
        command += ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest"]
        if self.deepspeed is not None:
            command += ["--deepspeed", str(self.deepspeed)]
        logger.info("%s: %s", "resuming" if run.state == "started" else "starting", run.name)
        cores = self.slots[slot]
        with (run.folder / CONSOLE).open("ab") as console:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=child_environment(slot, cores, len(self.slots)),
                pass_fds=() if self.lock is None else (self.lock.fileno(),),
                start_new_session=True,  # Ctrl-C is for the study, which passes it on
            )
        bind_to_cores(process, cores)
        return process

    def _finish_stopped(self, under_way: dict) -> bool:
        for _, process, _ in under_way.values():
            process.send_signal(signal.SIGTERM)
        for _, process, _ in under_way.values():  # all of them: an error below kills what is left
            process.wait()
        for slot, (run, process, started) in list(under_way.items()):
            del under_way[slot]
            self._ended(run, process.returncode, time.monotonic() - started)
        return False

    def _ended(self, run: Run, code: int, wall_s: float) -> bool:
        """Acts on a run's exit code; False if the run was stopped before its end."""
        # By the signal itself: it was still importing, and had nothing to save.
        if code in (EXIT_STOPPED, -signal.SIGTERM):
            logger.info("stopped: %s, at %s", run.name, _progress(run))
            return False
        said = last_words(run.folder / CONSOLE)
        if code == EXIT_DONE:
            self._wall.append(wall_s)
            result = collect(run)
            logger.info("finished: %s, %s", run.name, _summary(result))
        elif code == 1 and "TrainingError" in said:
            # The step is too large for this arm: that is a result, and a restart would repeat it.
            result = collect(run, failure=said)
            logger.warning("diverged: %s: %s", run.name, said)
        elif code == EXIT_BAD_INPUT:
            raise ConfigError(f"run {run.name}: {said.removeprefix('error: ')}")
        else:
            raise RunFailed(f"run {run.name} ended with code {code}: {said} ({run.folder}/logs)")
        write_json(run.folder / RESULT, result)
        if not self.keep_checkpoints:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return True

    def _tell(self, under_way: dict, waiting: int) -> None:
        """How many runs are left and for how long, by the runs that ended, else by those begun."""
        now = time.monotonic()
        shares = [(_share(run), now - started) for run, _, started in under_way.values()]
        means = self._wall or [elapsed / share for share, elapsed in shares if share > 0]
        if means:
            left = waiting + sum(1 - share for share, _ in shares)
            eta = format_duration(left * sum(means) / len(means) / len(self.slots))
        else:
            eta = "unknown"
        logger.info("%d run(s) left, eta %s", waiting + len(under_way), eta)


def collect(run: Run, failure: str | None = None) -> dict:
    """What a report needs to know of a finished run; the folder's ``result.json``.

    ``cost`` is the mean over the logged intervals but the first, which holds warm-up; seconds per
    step of the training clock. ``starts`` has every commit and machine that a run was taken up by.
    """
    history = read_metrics(run.folder / "metrics.jsonl")
    evaluations = [
        {key: row[key] for key in row if key in ("step", "time_s") or key.startswith("eval/")}
        for row in history
        if any(key.startswith("eval/") for key in row)
    ]
    logged = [row for row in history if "throughput/step_s" in row]
    steady = logged[1:] or logged
    last = max(history, key=lambda row: row["step"], default={"step": 0, "time_s": 0.0})
    cost = {}
    if steady:
        keys = [key for key in steady[0] if key.startswith("time/")]
        keys += ["throughput/step_s", "data/wait_fraction"]
        for key in keys:
            values = [row[key] for row in steady if row.get(key) is not None]
            cost[key] = sum(values) / len(values) if values else None
    record = {}
    if (run.folder / "environment.json").is_file():
        record = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    starts = [{k: s[k] for k in ("commit", "hardware")} for s in record.get("starts", ())]
    return {
        "arm": run.arm,
        "preset": run.config.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": "done" if failure is None else "diverged",
        "failure": failure,
        "steps": last["step"],
        "time_s": last["time_s"],
        "cost": cost,
        "tokens_seen": logged[-1].get("train/tokens_seen") if logged else None,
        "peak_memory_gib": logged[-1].get("memory/peak_gib") if logged else None,
        "kept_fraction": logged[-1].get("routing/kept_fraction") if logged else None,
        "evaluations": evaluations,
        "commit": record.get("commit"),
        "hardware": record.get("hardware"),
        "starts": [s for i, s in enumerate(starts) if s not in starts[:i]],
    }


def _progress(run: Run) -> str:
    history = read_metrics(run.folder / "metrics.jsonl")
    train = run.config.train
    if not history:
        return "starting"
    if train.max_hours is not None:
        return f"step {history[-1]['step']}, {history[-1]['time_s'] / 3600:.2f}/{train.max_hours} h"
    return f"step {history[-1]['step']}/{train.max_steps}"


def _share(run: Run) -> float:
    """How much of a run's budget is spent, in [0, 1]."""
    last = next(reversed(read_metrics(run.folder / "metrics.jsonl")), {"step": 0, "time_s": 0.0})
    train = run.config.train
    by_clock = 0.0 if train.max_hours is None else last["time_s"] / (train.max_hours * 3600)
    return min(1.0, max(last["step"] / train.max_steps, by_clock))


def _summary(result: dict) -> str:
    parts = [f"{result['steps']} steps in {format_duration(result['time_s'])} of training clock"]
    if result["evaluations"]:
        last = result["evaluations"][-1]
        for key in ("eval/mlm_loss", "eval/report_p1"):
            if last.get(key) is not None:
                parts.append(f"{key.removeprefix('eval/')} {last[key]:.4g}")
    return ", ".join(parts)


def last_words(console: Path) -> str:
    """The line of a run's output that says why it ended."""
    text = console.read_text(encoding="utf-8", errors="replace") if console.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error") or "Error:" in line]
    return (named or lines or ["it said nothing"])[-1]
