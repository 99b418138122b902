"""A SLURM cluster of two nodes on this machine, for tests: munge, slurmctld, two slurmd.

Needs root and Debian's ``slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "sinfo")

CONFIG = """\
ClusterName=trelmtest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
JobRequeue=1
KillWait=5
InactiveLimit=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=60:00 State=UP
"""


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing)"
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextlib.contextmanager
def cluster(base: Path):
    """Starts the cluster under ``base``; yields the environment its commands need."""
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    (base / "state").mkdir(exist_ok=True)
    for node in ("n1", "n2"):
        (base / f"spool.{node}").mkdir(exist_ok=True)
    config = base / "slurm.conf"
    config.write_text(CONFIG.format(host=host, base=base, ports=_free_ports(3)))
    environment = dict(os.environ, SLURM_CONF=str(config))
    key = base / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}"]
        + [f"--socket={base}/munge.socket", f"--log-file={base}/munged.log"]
        + [f"--pid-file={base}/munged.pid", f"--seed-file={base}/munge.seed"],
        ["slurmctld", "-c", "-D", "-f", str(config)],
        ["slurmd", "-D", "-N", "n1", "-f", str(config)],
        ["slurmd", "-D", "-N", "n2", "-f", str(config)],
    ]
    processes = []
    try:
        for number, command in enumerate(commands):
            log = (base / f"daemon{number}.out").open("w")
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
            time.sleep(1.0)
        _wait_for_nodes(environment, base)
        yield environment
    finally:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for_nodes(environment: dict, base: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    answer = ""
    while time.monotonic() < deadline:
        result = subprocess.run(
            ["sinfo", "-h", "-o", "%D %t"], env=environment, capture_output=True, text=True
        )
        answer = result.stdout + result.stderr
        if result.stdout.split() == ["2", "idle"]:
            return
        time.sleep(0.5)
    logs = "\n".join(
        f"-- {p.name}\n{p.read_text()[-1500:]}"
        for p in sorted([*base.glob("*.log"), *base.glob("*.out")])
    )
    raise RuntimeError(f"the nodes did not come up: {answer}\n{logs}")


def wait_for_job(environment: dict, job: str, states: set[str], seconds: float) -> str:
    """Waits until the job is in one of ``states``; returns the last state seen."""
    deadline = time.monotonic() + seconds
    state = ""
    while time.monotonic() < deadline:
        text = subprocess.run(
            ["scontrol", "show", "job", job], env=environment, capture_output=True, text=True
        ).stdout
        state = text.partition("JobState=")[2].partition(" ")[0]
        if state in states:
            break
        time.sleep(0.5)
    return state
