"""Measurements in processes of their own: one, for its peak memory, or one for each rank."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trelm_ds.benchmark.runner import bind_to_cores, child_environment
from trelm_ds.distributed import free_port
from trelm_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, TrelmError
from trelm_ds.stopping import StopRequest

_POLL_S = 0.2
_GRACE_S = 20.0  # for the other ranks, once one has ended before its end


class ProcessDied(TrelmError):
    """The process ended without an answer, as one that is out of memory does."""

    exit_code = 1


def in_own_process(function: Callable, *args, stop: StopRequest | None = None):
    """``function(*args, stop)`` in a fresh interpreter.

    Args:
        function: module-level; its last argument is the process's own stop request, which is set
            when ``stop`` is.
        args: picklable.
        stop: passed on as a signal; the function still decides what it returns.
    Returns:
        What the function returned; None where it was stopped before it began.
    Raises:
        TrelmError: what the function raised.
        ProcessDied: there was no answer.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, args, sender))
    process.start()
    sender.close()
    told = False
    try:
        while not receiver.poll(_POLL_S):
            if stop is not None and stop.requested and not told:
                process.terminate()  # SIGTERM: the stop request over there
                told = True
        answer = receiver.recv()
    except EOFError:
        if told:
            return None
        process.join()
        raise ProcessDied(
            f"a measuring process ended with code {process.exitcode} and no answer"
        ) from None
    finally:
        process.join()
    if isinstance(answer, TrelmError):
        raise answer
    return answer


def _answer(function: Callable, args: tuple, sender) -> None:
    stop = StopRequest()
    stop.install()
    try:
        answer = function(*args, stop)
    except TrelmError as error:
        answer = error
    sender.send(answer)


def run_on_ranks(
    command: Sequence[str], shares: Sequence[Sequence[int]], console: Path, stop: StopRequest
) -> int:
    """Runs ``command`` as a job of one process a rank; returns the job's exit code.

    No launcher stands in between: the ranks get the stop request as SIGTERM, and their own exit
    codes tell bad input and a stop from a failure.

    Args:
        shares: the cores of each rank.
        console: file that the output of all of them is added to.
    """
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job |= {"WORLD_SIZE": str(len(shares)), "LOCAL_SIZE": str(len(shares))}
    processes: list[subprocess.Popen] = []
    told, until = False, float("inf")
    try:
        with console.open("ab") as output:
            for rank, cores in enumerate(shares):
                env = child_environment(0, cores, parallel=1) | job
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # Ctrl-C is for the benchmark, which passes it on
                )
                processes.append(process)
                bind_to_cores(process, cores)
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if stop.requested and not told:
                told = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if until == float("inf") and any(process.returncode for process in processes):
                until = time.monotonic() + _GRACE_S
            time.sleep(_POLL_S)
        codes = [process.poll() for process in processes]  # before what is done to the rest
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if told and any(code != EXIT_DONE for code in codes):
        return EXIT_STOPPED
    return next((code for code in (EXIT_BAD_INPUT, *codes) if code and code in codes), EXIT_DONE)
