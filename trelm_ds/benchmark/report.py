"""What a study says: REPORT.md, report.html and figures, from its JSON and the runs' curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from trelm_ds.benchmark.arms import StudyPlan
from trelm_ds.benchmark.document import Document
from trelm_ds.benchmark.figures import COST_PARTS, plot_costs, plot_curves, plot_sweep
from trelm_ds.benchmark.targets import (
    JOINT,
    METRICS,
    MLM_LOSS,
    Metric,
    full_runs,
)

LOSS = METRICS[0]
NOTHING = "–"


def write_report(folder: Path, result: dict, chosen: Sequence[dict], roles: StudyPlan) -> Path:
    """Writes the report of a ``convergence`` or ``routing`` study.

    Args:
        folder: the study's.
        result: its JSON.
        chosen: the runs at each arm's chosen learning rates, with their evaluations.
        roles: which arms make the ablation table and the modules' figure.
    Returns:
        Path of ``REPORT.md``.
    """
    study = result["study"]
    arms = [name for name in study["arms"] if any(r["arm"] == name for r in chosen)]
    document = Document(f"{result['kind'].capitalize()} study on {study['data']}")
    full = full_runs(chosen)
    _say_conditions(document, result)
    for name in study["arms"]:
        if name not in arms:
            document.text(f"{name} diverged at every learning rate, and is in no table.")
    _say_ratios(document, result, arms)
    _say_other_targets(document, result)
    _say_finals(document, chosen, arms, study)
    _say_equal_time(document, result, arms)
    _say_downstream(document, result, arms)
    if roles.ablations and roles.ablations[0] in arms:  # the whole, which the others are less of
        _say_ablations(document, full, [arm for arm in roles.ablations if arm in arms])
    figures = folder / "figures"
    document.heading("Curves")
    shown = ((LOSS,), "held-out MLM loss (after the paper's Fig. 4)", "loss")
    by_time = ((METRICS[1], METRICS[2]), "P@1 (after the paper's Fig. 5)", "p1")
    for metrics, label, name in (shown, by_time):
        for by, against in (("time_s", "training clock"), ("step", "steps")):
            path = figures / f"{name}_by_{'time' if by == 'time_s' else 'step'}.png"
            if plot_curves(path, chosen, arms, metrics, by=by):
                document.figure(path, f"{label} against {against}; one line a run")
    modules = [arm for arm in roles.modules if arm in arms]
    if set(modules) & set(roles.modules[1:-1]):  # between the baseline and the whole
        path = figures / "modules_by_time.png"
        if plot_curves(path, full, modules, (LOSS, *METRICS[1:3])):
            document.figure(path, "each module alone (after the paper's Fig. 6)")
    _say_costs(document, _done(full), arms, figures)
    _say_grid(document, result["runs"], study)
    _say_rules(document, result)
    return document.write(folder)


def write_sweep_report(folder: Path, result: dict) -> Path:
    """Writes the report of a ``sweep``: one table, one figure."""
    study = result["study"]
    name, values = result["key"], result["values"]
    document = Document(f"Sweep of {name} on {study['data']}")
    _say_conditions(document, result)
    metrics = [m for m in METRICS if any(row.get(m.key) is not None for row in result["rows"])]
    rows = []
    chosen = [row for row in _done(result["rows"]) if row["chosen"]]
    for value in values:
        found = [row for row in chosen if row["value"] == value]
        failed = sum(r["value"] == value and r["status"] != "done" for r in result["rows"])
        rows.append(
            [
                f"{value}, {failed} run(s) diverged" if failed else str(value),
                *(_spread([r.get(m.key) for r in found], _form(m)) for m in metrics),
                _spread([_ms_per_step(r) for r in found], "{:.1f}".format),
            ]
        )
    document.heading("Final scores")
    document.table([name, *(m.label for m in metrics), "ms per step"], rows)
    path = folder / "figures" / "sweep.png"
    if plot_sweep(path, name, values, chosen, metrics):
        document.figure(
            path, f"final scores against {name}; dots are seeds, the line is their mean"
        )
    document.text(
        "P@1 is of the reported facts, in percent. A value to be used as a setting is chosen by "
        "eval/select_p1, which is in the JSON, of facts that are in no column here."
    )
    return document.write(folder)


# -- parts --------------------------------------------------------------------------------------


def _say_conditions(document: Document, result: dict) -> None:
    study = result["study"]
    of_hours = study["budgets"][0]["hours"]
    lengths = [f"{budget['hours' if of_hours else 'steps']:g}" for budget in study["budgets"]]
    length = ", ".join(lengths) + (" h of training clock" if of_hours else " steps")
    rates = ", ".join(f"{rate:g}" for rate in study["learning_rates"])
    start = study.get("start")
    begun = study["settings"].get("model.model_name_or_path") or "from scratch"
    if start:
        begun = (
            f"{start['method']}, {start['steps']} steps at {start['learning_rate']:g} in "
            f"{start['time_s'] / 60:.1f} min, {begun}"
        )
    document.table(
        ["condition", "value"],
        [
            ["command", result["command"]],
            ["commit of the runs", "; ".join(_commits(result))],
            ["hardware of the runs", "; ".join(_machines(result))],
            ["data", f"{study['data']} ({study['dataset_id'][:12]})"],
            ["budget of a run" if len(lengths) == 1 else "budgets, each arm's grid", length],
            ["learning rates, each arm's grid", rates],
            ["every run begins", begun],
            ["rates chosen by", _selection(study)],
            ["seeds", ", ".join(map(str, study["seeds"]))],
            ["settings of all arms", ", ".join(f"{k}={v}" for k, v in study["settings"].items())],
        ],
    )


def _starts(result: dict) -> list[dict]:
    """Commit and hardware of every start of a run that says so; a sweep's rows are its runs."""
    runs = [r for r in result.get("runs", result["rows"]) if r.get("hardware")]
    return [start for run in runs for start in run.get("starts") or [run]] or [result]


def _commits(result: dict) -> list[str]:
    return sorted({str(start["commit"]) for start in _starts(result)})


def _machines(result: dict) -> list[str]:
    """Not only where the report was written: a study may have gone on elsewhere."""
    found = []
    for hardware in (start["hardware"] for start in _starts(result)):
        machine = f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
        if hardware.get("gpu"):
            machine += f", {hardware.get('gpus')} x {hardware['gpu']}"
        if "threads" in hardware:
            machine += f", {hardware['threads']} thread(s) a run"
        found.append(machine)
    return sorted(set(found))


def _selection(study: dict) -> str:
    at_end = f"{study['select_by']} at the end of the first seed's run"
    if not study.get("raced"):
        return at_end
    first = (
        f"by the first seed's time to the baselines' targets, {study['select_by']} with the text"
    )
    if not study.get("baselines_raced"):
        return f"{first} kept; the baselines' largest runs, which set them, by {at_end} alone"
    return f"{at_end}, and {first} kept: each arm has both, and the run that is there first counts"


def _say_ratios(document: Document, result: dict, arms: Sequence[str]) -> None:
    study = result["study"]
    seeds = len(study["seeds"])
    document.heading("Time to target")
    document.text(
        "Time on the training clock to a baseline's final value less "
        f"{study['tolerance']:.0%} of what it gained, over the baseline's own time to it: below 1 "
        "is faster. Median of the pairs of equal seeds (lowest to highest). Evaluated without "
        "injection and with lambda 0."
    )
    if len(study["budgets"]) > 1:
        document.text(
            "Every arm, the baseline too, has a run of each budget with a whole schedule in it. "
            "The baseline's run of the largest sets the target; the first run to get there counts."
        )
    head = {(r["method"], r["metric"]): r for r in result["ratios"] if r["headline"]}

    def table(metrics: Sequence[Metric]) -> None:
        found = [m for m in metrics if any(key == m.key for _, key in head)]
        if found:
            document.table(
                ["method", *(m.label for m in found)],
                [
                    [arm, *(against_cell(head.get((arm, m.key)), seeds, "vs {}") for m in found)]
                    for arm in arms
                ],
            )

    document.text(
        "Each cell is against the baseline that leaves the method the least gain, which it names: "
        f"of {', '.join(study['baselines'])}. The ratios to all of them are below."
    )
    document.text(
        "Facts with the text kept: the P@1 target and the baseline's final held-out MLM loss (with "
        "the same tolerance), both at the same moment."
    )
    table(JOINT)
    document.text("Each score alone.")
    table(METRICS)
    document.text(
        "Split into steps and time per step, for every baseline. `MLM loss then` is the held-out "
        "loss at the moment the target was reached, and the baseline's at its own: facts bought "
        "with text loss show here. `held`: the last evaluation is at the target too. `other "
        "seeds`: the time ratio without the seed whose runs chose the learning rates, which has "
        "luck in it."
    )
    rows = []
    for metric in (*JOINT, *METRICS):
        for ratio in result["ratios"]:
            if ratio["metric"] != metric.key or ratio["method"] == ratio["baseline"]:
                continue
            form = _form(metric)
            rows.append(
                [
                    ratio["method"],
                    metric.label,
                    ratio["baseline"] + (" *" if ratio["headline"] else ""),
                    form(ratio["target"]),
                    ratio_cell(ratio, seeds),
                    _number(ratio["other_seeds"], "{:.2f}"),
                    _number(ratio["steps_ratio"], "{:.2f}"),
                    _number(ratio["step_time_ratio"], "{:.2f}"),
                    f"{_number(ratio['mlm_loss'], '{:.3f}')} / "
                    f"{_number(ratio['baseline_mlm_loss'], '{:.3f}')}",
                    f"{ratio['reached']}/{ratio['pairs'] - ratio['at_start']}",
                    f"{ratio['held']}/{ratio['pairs'] - ratio['at_start']}",
                ]
            )
    document.table(
        [
            *("method", "metric", "baseline (* least gain)", "target", "time ratio", "other seeds"),
            *("steps ratio", "time per step ratio", "MLM loss then", "reached", "held"),
        ],
        rows,
    )


def _say_other_targets(document: Document, result: dict) -> None:
    """What the choice of the baselines' rates makes of the first figure."""
    rows = result.get("other_targets", [])
    if all(row["chosen"] for row in rows):
        return
    document.heading("If a baseline's other rates set the target")
    document.text(
        f"{JOINT[0].label}, first seed: every rate of a baseline's grid sets a target once, and "
        "the whole grid of each arm takes part. The one in brackets sets the targets above."
    )
    body = []
    for row in rows:
        rate = f"{row['learning_rate']:g}"
        body.append(
            [
                row["method"],
                row["baseline"],
                f"[{rate}]" if row["chosen"] else rate,
                f"{100 * row['final']:.1f} / {row['final_mlm_loss']:.3f}",
                ratio_cell(row),
            ]
        )
    document.table(["method", "baseline", "its lr", "its P@1 / MLM loss", "time ratio"], body)
    for row in {(row["baseline"], row["learning_rate"]): row for row in rows}.values():
        of_study = next((r for r in rows if r["baseline"] == row["baseline"] and r["chosen"]), None)
        if of_study and not row["chosen"] and _better_in_both(row, of_study):
            document.text(
                f"**{row['baseline']} ends better in facts and in text at {row['learning_rate']:g} "
                "than at the rate that sets its targets above**, which other facts chose."
            )


def _better_in_both(row: dict, other: dict) -> bool:
    return row["final"] > other["final"] and row["final_mlm_loss"] < other["final_mlm_loss"]


def _say_finals(document, chosen, arms, study) -> None:
    document.heading("Final scores")
    metrics = [m for m in METRICS if any(_final(r, m) is not None for r in chosen)]
    rows = []
    for arm in arms:
        of_arm = [r for r in _done(chosen) if r["arm"] == arm]
        # Of each budget the rate that ends best, then the one that is first at the targets.
        kinds = {(-r["budget"], not r["ends_best"], r["learning_rate"]) for r in of_arm}
        for budget, _, rate in sorted(kinds):
            runs = [r for r in of_arm if (-r["budget"], r["learning_rate"]) == (budget, rate)]
            rows.append(
                [
                    arm,
                    f"{rate:g}",
                    *(_spread([_final(r, m) for r in runs], _form(m)) for m in metrics),
                    _spread([r["steps"] for r in runs], "{:.0f}".format),
                    _spread([r["time_s"] / 60 for r in runs], "{:.1f}".format),
                    study["arms"][arm]["about"],
                ]
            )
    document.table(
        ["method", "lr", *(m.label for m in metrics), "steps", "clock (min)", "what it is"], rows
    )
    failed = [r for r in chosen if r["status"] != "done"]
    for run in failed:
        document.text(
            f"{run['arm']} seed {run['seed']} {run['status']}, and is in no mean: {run['failure']}"
        )


def _say_equal_time(document: Document, result: dict, arms: Sequence[str]) -> None:
    rows = result["equal_time"]
    if not rows:
        return
    document.heading("At equal time")
    document.text(
        "Scores at the moment when the better baseline of that score and seed ends, of that run of "
        "the arm which is best by then by the facts that choose settings. `early`: so many runs "
        "were over, and their final values stand; one still under way had part of its "
        "learning-rate decay ahead of it. "
        "A budget in hours gives each arm a whole schedule in the same time."
    )
    metrics = [m for m in METRICS if any(r["metric"] == m.key for r in rows)]
    body = []
    for arm in arms:
        found = {
            m: [r for r in rows if r["method"] == arm and r["metric"] == m.key] for m in metrics
        }
        cells = []
        for m in metrics:
            early = sum(r["ended"] for r in found[m])
            told = f", early {early}/{len(found[m])}" if early else ""
            cells.append(_spread([r["value"] for r in found[m]], _form(m)) + told)
        body.append([arm, *cells])
    document.table(["method", *(m.label for m in metrics)], body)


def _say_downstream(document: Document, result: dict, arms: Sequence[str]) -> None:
    rows = result.get("downstream")
    if not rows:
        return
    document.heading("Downstream")
    document.text(
        "Scores in percent after fine-tuning the final models, each a mean over the fine-tuning's "
        "seeds; over the study's seeds, mean (lowest to highest)."
    )
    tasks = list(dict.fromkeys((row["task"], row["measure"]) for row in rows))
    body = []
    for arm in arms:
        cells = []
        for task, _ in tasks:
            scores = [r["score"] for r in rows if (r["arm"], r["task"]) == (arm, task)]
            cells.append(_spread([100 * score for score in scores], "{:.1f}".format))
        body.append([arm, *cells])
    document.table(["method", *(f"{task}, {measure}" for task, measure in tasks)], body)


def _say_ablations(document: Document, chosen: Sequence[dict], arms: Sequence[str]) -> None:
    """The table after the paper's Table 6: the whole, and what each part's absence changes."""
    if len(arms) < 2:
        return
    document.heading("Ablations (after the paper's Table 6)")
    metrics = [m for m in METRICS if any(_final(r, m) is not None for r in chosen)]
    rows = []
    full: dict[Metric, float | None] = {}
    for arm in arms:
        runs = [r for r in _done(chosen) if r["arm"] == arm]
        means = {m: _mean([_final(r, m) for r in runs]) for m in metrics}
        full = full or means
        cells = []
        for metric in metrics:
            cell = _number(means[metric], _form(metric))
            if arm != arms[0] and None not in (means[metric], full[metric]):
                cell += f" ({metric.scale * (means[metric] - full[metric]):+.2f})"
            cells.append(cell)
        rows.append([arm, *cells])
    document.table(["method", *(m.label for m in metrics)], rows)


def _done(runs: Sequence[dict]) -> list[dict]:
    """Without those that diverged, whose last evaluation is of another length of training."""
    return [run for run in runs if run["status"] == "done"]


def _budgets(runs: Sequence[dict]) -> list[float]:
    return sorted({run["budget"] for run in runs}, reverse=True)


def _ms_per_step(run: dict) -> float | None:
    """Milliseconds of a steady step; the whole clock's mean where no interval was logged."""
    seconds = run.get("cost", {}).get("throughput/step_s")
    if seconds is None and run["steps"]:
        seconds = run["time_s"] / run["steps"]
    return None if seconds is None else 1e3 * seconds


def _say_costs(document, chosen, arms, figures: Path) -> None:
    costs, rows = {}, []
    for arm in arms:
        runs = [r for r in chosen if r["arm"] == arm and r["cost"]]
        if not runs:
            continue
        parts = {}
        for part in COST_PARTS:
            seconds = _mean([r["cost"].get(f"time/{part}_s") for r in runs])
            if seconds is not None:
                parts[part] = 1e3 * seconds
        step = _mean([_ms_per_step(r) for r in runs])
        parts["data"] = step * (_mean([r["cost"].get("data/wait_fraction") for r in runs]) or 0.0)
        parts["other"] = max(0.0, step - sum(parts.values()))
        costs[arm] = parts
        peak = _mean([r["peak_memory_gib"] for r in runs])
        kept = _mean([r["kept_fraction"] for r in runs])
        rows.append((arm, step, parts, peak, kept))
    if not costs:
        return
    document.heading("Cost of a step")
    names = [n for n in (*COST_PARTS, "data", "other") if any(n in cost for cost in costs.values())]
    document.table(
        ["method", "ms per step", *names, "peak memory (GiB)", "FFN kept"],
        [
            [
                arm,
                f"{step:.1f}",
                *(_number(parts.get(name), "{:.1f}") for name in names),
                _number(peak, "{:.2f}"),
                _number(kept, "{:.1%}"),
            ]
            for arm, step, parts, peak, kept in rows
        ],
    )
    path = figures / "costs.png"
    plot_costs(path, costs, names)
    document.figure(path, "where a step's time goes, mean over the logged intervals but the first")


def _say_grid(document: Document, runs: Sequence[dict], study: dict) -> None:
    if len(study["learning_rates"]) < 2:
        return
    document.heading("Learning rates")
    key = study["select_by"]
    document.text(
        f"First seed, by {key} / held-out MLM loss at the end; the chosen one in brackets."
    )
    rows = []
    for arm in study["arms"]:
        for budget in _budgets(runs):
            cells = []
            for rate in study["learning_rates"]:
                run = next(
                    r
                    for r in runs
                    if (r["arm"], r["budget"]) == (arm, budget)
                    and (r["learning_rate"], r["seed"]) == (rate, study["seeds"][0])
                )
                cell = f"{_number(run.get(key), '{:.4f}')} / {_number(run.get(MLM_LOSS), '{:.3f}')}"
                cell = cell if run["status"] == "done" else run["status"]
                cells.append(f"[{cell}]" if run["chosen"] else cell)
            rows.append([arm, f"{budget:g}", *cells])
    document.table(["method", "budget", *(f"{rate:g}" for rate in study["learning_rates"])], rows)
    lowest, *_, highest = sorted(study["learning_rates"])
    at_edge = [
        f"{run['arm']} ({run['budget']:g}: {run['learning_rate']:g})"
        for run in runs
        if run["chosen"]
        and run["seed"] == study["seeds"][0]
        and run["learning_rate"] in (lowest, highest)
    ]
    if at_edge:
        document.text(
            "Chosen at an edge of the grid, so that a rate beyond it might be better still: "
            f"{', '.join(at_edge)}."
        )


def _say_rules(document: Document, result: dict) -> None:
    study = result["study"]
    document.heading("How to read this")
    alike = len(_commits(result)) == len(_machines(result)) == 1
    document.text(
        "Every arm: the same data order, negatives, seeds, budget, schedule and grid, through the "
        "same training loop"
        + (
            ", on one machine, runs of different arms taking turns. "
            if alike
            else ". The runs are of several commits or machines (first table), so that not every "
            "pair of them took turns. "
        )
        + "The clock holds attribution, memory bank and data loading, not evaluation, checkpoints "
        "or the scoring of mentions before training. "
        + (
            "The held-out MLM loss chose the learning rates. "
            if study["select_by"] == MLM_LOSS
            else "A quarter of the probe's facts, which is in no score here, chose the learning "
            + ("rates, with the held-out MLM loss. " if study.get("raced") else "rates. ")
        )
        + "P@1 is in percent, macro over relations. Times compare "
        "the arms of this table with each other, not with other machines."
    )


# -- cells --------------------------------------------------------------------------------------


def _form(metric: Metric) -> Callable[[float], str]:
    """Losses in nats, accuracies in percent."""
    if metric.key == MLM_LOSS:
        return "{:.3f}".format
    return lambda value: f"{100 * value:.1f}"


def _number(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return NOTHING
    return form.format(value) if isinstance(form, str) else form(value)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _spread(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    """``mean (lowest to highest)``, the bracket only where there is a spread."""
    found = [value for value in values if value is not None]
    if not found:
        return NOTHING
    low, high, mean = form(min(found)), form(max(found)), form(statistics.fmean(found))
    return mean if low == high else f"{mean} ({low} to {high})"


def ratio_cell(row: dict | None, seeds: int = 1) -> str:
    """A time ratio of ``paired_ratios`` with its spread, or why there is none.

    Of a study of so many seeds: where the baseline diverged in some, that is said.
    """
    if row is None:
        return NOTHING
    if row["at_start"] == row["pairs"]:
        return "held from the start"
    usable = row["pairs"] - row["at_start"]
    if row["time_ratio"] is None:
        cell = f"not reached ({row['reached']}/{usable})"
    else:
        cell = f"{row['time_ratio']:.2f}"
        if row["low"] != row["high"]:
            cell += f" ({row['low']:.2f} to {_number(row['high'], '{:.2f}')})"
        if row["reached"] < usable:
            cell += f", reached {row['reached']}/{usable}"
    if row["at_start"]:
        cell += f", {row['at_start']} of {row['pairs']} seeds held from the start"
    if row["pairs"] < seeds:
        cell += f", {row['pairs']} of {seeds} seeds have a pair"
    return cell


def against_cell(row: dict | None, seeds: int, named: str) -> str:
    """``ratio_cell`` and the baseline, as ``named`` says it."""
    return NOTHING if row is None else f"{ratio_cell(row, seeds)} {named.format(row['baseline'])}"


def _final(run: dict, metric: Metric) -> float | None:
    for row in reversed(run["evaluations"]):
        if row.get(metric.key) is not None:
            return row[metric.key]
    return None
