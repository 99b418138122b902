"""What a run reports: console lines, ``metrics.jsonl``, trackers, the final plot."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path

from trelm_ds.files import whole_file, write_text

logger = logging.getLogger(__name__)


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
