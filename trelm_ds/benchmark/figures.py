"""The figures of a study's report, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trelm_ds.benchmark.targets import Metric, curve
from trelm_ds.files import whole_file

# `time/*` of metrics.jsonl that follow each other in a step, so that they add up.
COST_PARTS = ("forward", "backward", "optimizer", "bank", "attribution", "communication")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    _pyplot().close(figure)
    return path


def _style(number: int) -> dict:
    """Twenty colours, the strong ones first, then the same ones dashed, then dotted."""
    pairs = _pyplot().get_cmap("tab20").colors
    colours = pairs[::2] + pairs[1::2]
    return {
        "color": colours[number % len(colours)],
        "linestyle": ("-", "--", ":")[number // len(colours) % 3],
    }


def plot_curves(
    path: Path,
    results: Sequence[dict],
    arms: Sequence[str],
    metrics: Sequence[Metric],
    *,
    by: str = "time_s",
) -> Path | None:
    """One panel a metric, one line a run of each arm, against training clock or steps.

    Args:
        path: PNG to write.
        results: runs (``runner.collect``).
        arms: which of them, in this order.
        metrics: panels; one that no run has is left out.
        by: ``time_s`` (drawn in minutes) or ``step``.
    Returns:
        ``path``; None where there is nothing to draw.
    """
    lines = {
        metric: [
            (arm, number, points)
            for number, arm in enumerate(arms)
            for result in results
            if result["arm"] == arm and (points := curve(result["evaluations"], metric.key))
        ]
        for metric in metrics
    }
    lines = {metric: found for metric, found in lines.items() if found}
    if not lines:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(lines), figsize=(6.2 * len(lines), 4.4), squeeze=False, sharex=True
    )
    for axis, (metric, found) in zip(axes[0], lines.items(), strict=True):
        named = set()
        for arm, number, points in found:
            x = [p.time_s / 60 if by == "time_s" else p.step for p in points]
            label = None if arm in named else arm
            named.add(arm)
            y = [metric.scale * p.value for p in points]
            axis.plot(x, y, label=label, linewidth=1.3, alpha=0.8, **_style(number))
        axis.set_title(metric.label, fontsize=10)
        axis.set_xlabel("training clock (min)" if by == "time_s" else "step")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, path)


def plot_costs(path: Path, costs: dict[str, dict[str, float]], parts: Sequence[str]) -> Path:
    """Milliseconds per step of each arm by part, as stacked bars.

    Args:
        path: PNG to write.
        costs: arm -> {part: milliseconds}, in the order of the bars.
        parts: from left to right.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(costs) + 1.4))
    left = [0.0] * len(costs)
    for number, part in enumerate(parts):
        widths = [cost.get(part, 0.0) for cost in costs.values()]
        axis.barh(list(costs), widths, left=left, label=part, **{"color": _style(number)["color"]})
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("ms per step, training clock")
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, path)


def plot_sweep(
    path: Path, name: str, values: Sequence, rows: Sequence[dict], metrics: Sequence[Metric]
) -> Path | None:
    """Final scores against a swept value: every seed a dot, their mean a line."""
    metrics = [m for m in metrics if any(row.get(m.key) is not None for row in rows)]
    if not metrics:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.6), squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        means = []
        for place, value in enumerate(values):
            found = [
                metric.scale * row[metric.key]
                for row in rows
                if row["value"] == value and row.get(metric.key) is not None
            ]
            axis.plot([place] * len(found), found, "o", color="tab:blue", alpha=0.4, markersize=4)
            means.append(sum(found) / len(found) if found else float("nan"))
        axis.plot(range(len(values)), means, color="tab:blue")
        # Places, not a scale: values may be words, or spread over decades.
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_title(metric.label, fontsize=10)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    return _save(figure, path)
