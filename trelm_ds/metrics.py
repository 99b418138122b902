"""What a run reports: console lines, ``metrics.jsonl``, trackers, FLOP counts, the final plot."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import defaultdict, deque
from pathlib import Path

import torch

from trelm_ds.files import whole_file, write_text

logger = logging.getLogger(__name__)

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


class MetricLog:
    """``metrics.jsonl`` on rank 0, and the trackers of DeepSpeed's monitor when asked for."""

    def __init__(self, path: Path, enabled: bool, resume_step: int | None = None, monitor=None):
        self._path = Path(path)
        self._enabled = enabled
        self._monitor = monitor
        self._pending = b""  # lines that could not be written yet
        if enabled and resume_step is not None:
            self._drop_after(resume_step)

    def _drop_after(self, step: int) -> None:
        """Lines of steps that the resumed run will take again, and a torn last line, go."""
        if not self._path.exists():
            return
        kept = [row for row in read_metrics(self._path) if row.get("step", math.inf) <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Adds a line.

        Raises:
            OSError: it could not be written; the next call writes it too.
        """
        if not self._enabled:
            return
        clean = {k: None if v != v else v for k, v in values.items()}  # NaN is not JSON
        self._pending += json.dumps({"step": step, **clean}).encode() + b"\n"
        self.flush()
        if self._monitor is not None and self._monitor.enabled:
            events = [(k, v, step) for k, v in values.items() if isinstance(v, (int, float))]
            self._monitor.write_events(events)

    def flush(self) -> None:
        """Writes the lines that could not be written before, whole or not at all."""
        if not self._pending:
            return
        with self._path.open("ab", buffering=0) as file:
            end, rest = file.tell(), self._pending
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
        self._pending = b""


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _short(number: float) -> str:
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def console_line(step: int, total: int, values: dict, world_size: int, eta_s: float) -> str:
    """One readable line of an interval's metrics."""
    parts = [f"step {step}/{total}"]
    loss = f"loss {values['train/loss']:.3f} (mlm {values['train/mlm_loss']:.3f}"
    if "train/cka_loss" in values:
        loss += f" cka {values['train/cka_loss']:.3f}"
    parts.append(loss + ")")
    parts.append(f"lr {values['train/lr']:.1e}")
    if values.get("train/grad_norm") is not None:
        parts.append(f"grad {values['train/grad_norm']:.2f}")
    rate = values["throughput/tokens_per_s"]
    parts.append(
        f"{_short(rate)} tok/s" + (f" ({_short(rate / world_size)}/rank)" if world_size > 1 else "")
    )
    if values["throughput/mfu"] == values["throughput/mfu"]:  # not NaN
        parts.append(f"mfu {values['throughput/mfu']:.0%}")
    parts.append(f"mem {values['memory/peak_gib']:.2f} GiB")
    parts.append(f"data {values['data/wait_fraction']:.0%}")
    parts.append(f"eta {format_duration(eta_s)}")
    return " | ".join(parts)


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of ``metrics.jsonl`` that are whole: a killed or writing process leaves a torn one.

    Returns:
        One mapping a line; none without a file.
    """
    path, rows = Path(path), []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def plot_curves(metrics_path: str | Path, png_path: str | Path, title: str) -> None:
    """Training losses, held-out MLM loss and probe P@1 against steps, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics_path)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = (
        ("training loss", {"MLM": "train/mlm_loss", "CKA": "train/cka_loss"}),
        ("held-out MLM loss (no injection, lambda 0)", {"held out": "eval/mlm_loss"}),
        ("probe P@1", {"all": "eval/probe_p1", "long tail": "eval/probe_p1_tail"}),
    )
    for axis, (name, series) in zip(axes, panels, strict=True):
        for label, key in series.items():
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o" if "eval" in key else None, label=label
                )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with whole_file(png_path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
