"""What a step costs: FLOPs, and the device's most of them, memory, seconds by phase, rates."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from pathlib import Path

import torch

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; matched against the device name. MFU is
# quoted against them in float32 runs too.
GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40": 181e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of ``device`` for MFU: a data-sheet figure for GPUs, measured for a CPU.

    The CPU's figure is the best of a few float32 matrix products with the threads of this
    process, so that MFU means the share of what its GEMM library reaches here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in GPU_PEAK_FLOPS.items():
            if key in name:
                return value
        return float("nan")
    size = 1280
    own = torch.Generator()  # the global one belongs to the run's dropout
    a, b = (torch.rand(size, size, generator=own) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def training_flops(model_config, tokens: float, masked: float, sequence_length: float) -> float:
    """FLOPs of a dense forward and backward pass (what MFU is quoted against, routed or not).

    Args:
        model_config: Hugging Face config (hidden, intermediate and vocabulary sizes, layers).
        tokens: real tokens, padding not counted.
        masked: positions the MLM head runs on.
        sequence_length: mean real length, for the attention core.
    """
    d, f = model_config.hidden_size, model_config.intermediate_size
    per_token = model_config.num_hidden_layers * (
        2 * (4 * d * d + 2 * d * f) + 4 * sequence_length * d
    )
    head = 2 * (d * d + d * model_config.vocab_size)
    return 3.0 * (tokens * per_token + masked * head)


def peak_memory_gib(device: torch.device) -> float:
    """Peak device memory, or this process's peak resident set on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()


def peak_resident_gib(pid: int | None = None) -> float:
    """Peak resident set of a living process in GiB; None: of this one. NaN where it is unknown."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():  # not ru_maxrss where it can be had: that counts the parent's size too
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # KiB
    if pid is not None:
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds per phase of a step, without a device synchronisation inside the step.

    On a GPU phases are pairs of events, read when ``totals`` is called at the logging interval.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._host = defaultdict(float)
        self._events = defaultdict(list)
        self._open: dict[str, object] = {}

    def start(self, phase: str) -> None:
        self._open[phase] = self._mark()

    def stop(self, phase: str) -> None:
        begin = self._open.pop(phase)
        if self._cuda:
            self._events[phase].append((begin, self._mark()))
        else:
            self._host[phase] += time.perf_counter() - begin

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def totals(self) -> dict[str, float]:
        """Seconds per phase since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            for phase, pairs in self._events.items():
                self._host[phase] += sum(a.elapsed_time(b) for a, b in pairs) / 1e3
            self._events.clear()
        totals, self._host = dict(self._host), defaultdict(float)
        return totals


class RollingRate:
    """Units per second over the last intervals."""

    def __init__(self, window: int = 20):
        self._samples: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, amount: float, seconds: float) -> None:
        self._samples.append((amount, seconds))

    @property
    def rate(self) -> float:
        seconds = sum(s for _, s in self._samples)
        return sum(a for a, _ in self._samples) / seconds if seconds > 0 else 0.0
