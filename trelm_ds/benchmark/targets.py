"""Time to target: when a curve reaches a value, and how that compares with a baseline's run.

Curves are the raw evaluations, joined by straight lines in steps and in time. A target is reached
at the first crossing. The running best would cross in the same interval but never later, because it
replaces a low evaluation by an older, luckier one; so the raw curve is the stricter of the two, and
it is what was measured. A crossing may still be luck: ``held`` says whether the run's last
evaluation is at the target too.

In the middle of a run the learning rate is high and the held-out loss with it. So an arm may have
runs of several budgets, each with a whole schedule, and of several learning rates: its time to a
target is that of whichever run gets there first, for the baselines as for everybody.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MLM_LOSS = "eval/mlm_loss"


@dataclass(frozen=True)
class Metric:
    """A score of ``metrics.jsonl`` that targets are set for."""

    key: str
    label: str
    higher_is_better: bool = True

    @property
    def scale(self) -> int:
        """Factor for readers: accuracies are shown in percent."""
        return 100 if self.higher_is_better else 1


# P@1 of the facts that no setting was chosen by.
METRICS = (
    Metric(MLM_LOSS, "held-out MLM loss", higher_is_better=False),
    Metric("eval/report_p1", "P@1 all"),
    Metric("eval/report_p1_tail", "P@1 long tail"),
    Metric("eval/report_p1_graph_only", "P@1 graph-only"),
    Metric("eval/report_p1_text_only", "P@1 text-only"),
    Metric("eval/report_p1_template", "P@1 templates"),
    Metric("eval/report_p1_context", "P@1 held-out sentences"),
)


ACCURACIES = METRICS[1:]


def joint(metric: Metric) -> Metric:
    """The target of an accuracy with the text kept: both at the same moment."""
    return Metric(f"{metric.key}+text", f"{metric.label}, text kept")


JOINT = tuple(joint(metric) for metric in ACCURACIES)


@dataclass(frozen=True)
class Point:
    """An evaluation, or a point between two of them."""

    step: float
    time_s: float
    value: float


def curve(evaluations: Sequence[dict], key: str) -> list[Point]:
    """The evaluations that have ``key``, by step; of two at one step the later one counts."""
    found = {}
    for row in evaluations:
        value = row.get(key)
        if value is not None and math.isfinite(value):
            found[row["step"]] = Point(row["step"], row["time_s"], value)
    return [found[step] for step in sorted(found)]


def target_of(points: Sequence[Point], metric: Metric, tolerance: float) -> float:
    """A baseline's converged value less ``tolerance`` of what it gained over its start.

    Relative to the gain, one number serves losses and accuracies alike. Where the run ended worse
    than it started, the tolerance still lowers the bar.
    """
    slack = tolerance * abs(points[-1].value - points[0].value)
    return points[-1].value - slack if metric.higher_is_better else points[-1].value + slack


def reach(points: Sequence[Point], target: float, higher_is_better: bool) -> Point | None:
    """Where the curve first is at the target; None if it never is.

    A curve that starts there reaches it at its first evaluation.
    """
    return reach_all([(points, target, higher_is_better)])


def reach_all(conditions: Sequence[tuple[Sequence[Point], float, bool]]) -> Point | None:
    """Where several curves of one run are first at their targets together; None if never.

    Args:
        conditions: (curve, target, whether higher is better); only evaluations that all the curves
            have count.
    Returns:
        The point on the first curve.
    """
    steps = set.intersection(*({p.step for p in points} for points, _, _ in conditions))
    curves = [
        [(p, (p.value - target) * (1 if higher else -1)) for p in points if p.step in steps]
        for points, target, higher in conditions
    ]
    before = None
    for now in zip(*curves, strict=True):  # ((point, margin), ...): a margin >= 0 is at its target
        if before is None:
            if all(margin >= 0 for _, margin in now):
                return now[0][0]
        else:
            # Margins are linear between two evaluations, so each condition holds in one interval.
            low, high = 0.0, 1.0
            for (_, a), (_, b) in zip(before, now, strict=True):
                if a < 0 and b < 0:
                    low = math.inf
                elif a < 0:
                    low = max(low, a / (a - b))
                elif b < 0:
                    high = min(high, a / (a - b))
            if low <= high:
                return now[0][0] if low == 1.0 else between(before[0][0], now[0][0], low)
        before = now
    return None


def between(a: Point, b: Point, share: float) -> Point:
    """The point at ``share`` of the way from ``a`` to ``b``."""
    return Point(
        a.step + share * (b.step - a.step),
        a.time_s + share * (b.time_s - a.time_s),
        a.value + share * (b.value - a.value),
    )


def at_time(points: Sequence[Point], time_s: float) -> Point | None:
    """The curve at a moment of the training clock; its last point when it ended before."""
    before = None
    for point in points:
        if point.time_s >= time_s:
            if before is None or point.time_s == before.time_s:
                return point
            return between(before, point, (time_s - before.time_s) / (point.time_s - before.time_s))
        before = point
    return before


def better_baseline(
    results: Sequence[dict], baselines: Sequence[str], metric: Metric
) -> str | None:
    """The baseline with the best mean final value over seeds; None where none was measured."""
    finals: dict[str, list[float]] = {}
    for result in results:
        points = _finished_curve(result, metric)
        if result["arm"] in baselines and points:
            finals.setdefault(result["arm"], []).append(points[-1].value)
    if not finals:
        return None
    sign = 1.0 if metric.higher_is_better else -1.0
    return max(finals, key=lambda arm: sign * statistics.fmean(finals[arm]))


def full_runs(results: Sequence[dict]) -> list[dict]:
    """The runs of the largest budget at the rate that ends best, one for each arm and seed."""
    largest = max((r["budget"] for r in results), default=0)
    return [r for r in results if r["budget"] == largest and r["ends_best"]]


def _references(results: Sequence[dict]) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> the run that sets its targets; none where that diverged at every rate."""
    return {(run["arm"], run["seed"]): run for run in full_runs(results)}


def _by_run(results: Sequence[dict]) -> dict[tuple[str, int], list[dict]]:
    """(arm, seed) -> its runs: the largest budget first, and of that the rate that ends best."""
    found: dict[tuple[str, int], list[dict]] = {}
    for result in sorted(results, key=lambda r: (r["budget"], r["ends_best"]), reverse=True):
        found.setdefault((result["arm"], result["seed"]), []).append(result)
    return found


def convergence_rows(
    results: Sequence[dict],
    baselines: Sequence[str],
    metrics: Sequence[Metric] = METRICS,
    tolerance: float = 0.02,
) -> list[dict]:
    """One row for each method, seed, metric and baseline that has a finished run of that seed.

    A run that diverged reaches nothing, also where its curve crossed the target before.

    The target is that of the same seed's baseline in its run of the largest budget at the rate that
    ends best (``full_runs``; none where that diverged): the pair shares its data order, and the
    baseline always reaches its own target, so that every ratio has a denominator. Each accuracy has
    a second target, ``joint``: with the held-out MLM loss at the baseline's final one, too.

    Args:
        results: finished runs, with ``budget`` and ``ends_best`` (``Study.results``).
        baselines: arms that set targets.
        metrics: what targets are set for.
        tolerance: see ``target_of``.
    Returns:
        Rows with ``method``, ``seed``, ``metric``, ``baseline``, ``target``, ``reached``,
        ``time_s``, ``steps``, ``budget`` (of the run that got there first), ``held``, ``mlm_loss``
        (at that moment), ``final`` (of the first of ``_by_run``) and ``learning_rate``; where
        the target was not reached, ``time_s``, ``steps``, ``budget``, ``held`` and ``mlm_loss``
        are None.
    """
    runs = _by_run(results)
    references = _references(results)
    wanted = [(metric, [metric]) for metric in metrics]
    wanted += [(joint(m), [m, METRICS[0]]) for m in metrics if m.higher_is_better]
    rows = []
    for metric, parts in wanted:
        for baseline in baselines:
            for (arm, seed), of_arm in runs.items():
                goals = goals_of(references.get((baseline, seed)), parts, tolerance)
                full = curve(of_arm[0]["evaluations"], parts[0].key)
                if not full or not goals:
                    continue
                first, there = None, None
                for run in of_arm:
                    found = crossing(run, goals)
                    if found and (there is None or found.time_s < there.time_s):
                        first, there = run, found
                then = first and at_time(curve(first["evaluations"], MLM_LOSS), there.time_s)
                rows.append(
                    {
                        "method": arm,
                        "seed": seed,
                        "metric": metric.key,
                        "baseline": baseline,
                        "target": goals[0][1],
                        "reached": there is not None,
                        "time_s": there and there.time_s,
                        "steps": there and there.step,
                        "budget": first and first["budget"],
                        "held": first and _is_held(first, goals),
                        "mlm_loss": then and then.value,
                        "final": full[-1].value,
                        "learning_rate": (first or of_arm[0])["learning_rate"],
                    }
                )
    return rows


def goals_of(
    run: dict | None, metrics: Sequence[Metric], tolerance: float
) -> list[tuple[Metric, float]]:
    """The targets that a baseline's run sets; empty where it lacks one of the scores."""
    finals = [_finished_curve(run, metric) for metric in metrics]
    if not all(finals):
        return []
    return [(m, target_of(points, m, tolerance)) for m, points in zip(metrics, finals, strict=True)]


def crossing(run: dict, goals: Sequence[tuple[Metric, float]]) -> Point | None:
    """Where a run that came to its end first is at all the goals."""
    curves = [(_finished_curve(run, m), target, m.higher_is_better) for m, target in goals]
    return reach_all(curves)


def _is_held(run: dict, goals: Sequence[tuple[Metric, float]]) -> bool:
    """Whether the run's last evaluation is at the goals."""
    return all(
        (curve(run["evaluations"], m.key)[-1].value - target) * (1 if m.higher_is_better else -1)
        >= 0
        for m, target in goals
    )


def _finished_curve(result: dict | None, metric: Metric) -> list[Point]:
    """The curve of a run that came to its end; empty for one that diverged or is not there."""
    if result is None or result["status"] != "done":
        return []
    return curve(result["evaluations"], metric.key)


def paired_ratios(rows: Sequence[dict], chosen_by: int | None = None) -> list[dict]:
    """Ratios of a method's time and steps to target to the baseline's of the same seed.

    ``time_ratio = steps_ratio * step_time_ratio`` holds for each pair. The median over seeds counts
    a seed that did not reach the target as infinitely slow: leaving it out would make a method
    better by failing. None is "not reached by half of the seeds or more" (``high``: by at least
    one), or, where ``at_start`` is ``pairs``, that the baseline has nothing to reach: it starts at
    its target. Seeds where it does are in no ratio and no count but ``pairs`` and ``at_start``.

    Args:
        rows: of ``convergence_rows``.
        chosen_by: the seed whose runs chose the learning rates, if they did: the best of several
            runs by its scores is partly a lucky one, so ``other_seeds`` is the ratio without it.
    Returns:
        Rows with ``method``, ``baseline``, ``metric``, ``target``, ``time_ratio``, ``low``,
        ``high``, ``other_seeds``, ``steps_ratio``, ``step_time_ratio``, ``mlm_loss``,
        ``baseline_mlm_loss``, ``pairs``, ``reached``, ``held``, ``at_start``, ``headline``
        (``least_gains``).
    """
    by_key = {(r["method"], r["seed"], r["metric"], r["baseline"]): r for r in rows}
    groups: dict[tuple, list[tuple[dict, dict]]] = {}
    for row in rows:
        own = by_key.get((row["baseline"], row["seed"], row["metric"], row["baseline"]))
        if own is not None:
            key = (row["metric"], row["baseline"], row["method"])
            groups.setdefault(key, []).append((row, own))
    found = []
    for (metric, baseline, method), pairs in groups.items():
        ratios = [_pair(row, own) for row, own in pairs]
        usable = [ratio for ratio in ratios if ratio is not None]
        counted = [row for (row, _), ratio in zip(pairs, ratios, strict=True) if ratio is not None]
        times = [ratio[0] for ratio in usable]
        others = [
            ratio[0]
            for (row, _), ratio in zip(pairs, ratios, strict=True)
            if ratio is not None and chosen_by not in (None, row["seed"])
        ]
        read = [pair for pair in pairs if None not in (pair[0]["mlm_loss"], pair[1]["mlm_loss"])]
        found.append(
            {
                "method": method,
                "baseline": baseline,
                "metric": metric,
                "target": statistics.median(row["target"] for row, _ in pairs),
                "time_ratio": _median(times),
                "low": _finite(min(times, default=math.inf)),
                "high": _finite(max(times, default=math.inf)),
                "other_seeds": _median(others),
                "steps_ratio": _median([ratio[1] for ratio in usable]),
                "step_time_ratio": _median([r[2] for r in usable if r[2] is not None]),
                # Of the same pairs: those that were reached are not the median seeds.
                "mlm_loss": _median([row["mlm_loss"] for row, _ in read]),
                "baseline_mlm_loss": _median([own["mlm_loss"] for _, own in read]),
                "pairs": len(pairs),
                "reached": sum(row["reached"] for row in counted),
                "held": sum(bool(row["held"]) for row in counted),
                "at_start": sum(ratio is None for ratio in ratios),
            }
        )
    headline = least_gains(found)
    return [row | {"headline": row is headline[row["method"], row["metric"]]} for row in found]


def least_gains(ratios: Sequence[dict]) -> dict[tuple[str, str], dict]:
    """(method, metric) -> its ratio to the baseline against which it gains least.

    That one is the headline: which baseline is the better one, by facts, by text or by the time it
    takes, is then nobody's choice. One that is not reached is the least gain of all; a method's
    ratio to itself, and to a baseline with nothing to reach, count where there is no other.
    """

    def rank(row: dict) -> tuple:
        empty = row["at_start"] == row["pairs"]
        time_ratio = math.inf if row["time_ratio"] is None else row["time_ratio"]
        return row["method"] != row["baseline"], not empty, time_ratio

    found: dict[tuple[str, str], dict] = {}
    for row in ratios:
        key = row["method"], row["metric"]
        if key not in found or rank(row) > rank(found[key]):
            found[key] = row
    return found


def _pair(row: dict, own: dict) -> tuple[float, float, float | None] | None:
    """(time, steps, time per step) of a run over those of its baseline.

    None where the baseline has nothing to reach; infinite where the run never does; the last is
    None where the run starts at the target or never reaches it: there is no step to time.
    """
    if not own["reached"] or own["steps"] == 0 or own["time_s"] == 0:
        return None
    if not row["reached"]:
        return math.inf, math.inf, None
    time_ratio, steps_ratio = row["time_s"] / own["time_s"], row["steps"] / own["steps"]
    return time_ratio, steps_ratio, time_ratio / steps_ratio if steps_ratio > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Sequence[float]) -> float | None:
    """The median; None without values, or where an infinite one takes part in it."""
    return _finite(statistics.median(values)) if values else None


def other_targets(
    grid: Sequence[dict], baselines: Sequence[str], tolerance: float = 0.02
) -> list[dict]:
    """The first seed's ratios, facts with the text kept, to what each baseline is at each rate.

    The rate whose run sets the targets was chosen by facts alone, and by a quarter of them: another
    may end with more text, or with both. Here every rate of a baseline sets a target once, and the
    whole grid of each arm takes part.

    Args:
        grid: the first seed's runs at all rates, with ``budget`` and ``ends_best``.
        baselines: arms that set targets.
        tolerance: see ``target_of``.
    Returns:
        Rows of ``paired_ratios`` with ``learning_rate``, ``final_mlm_loss`` and ``final`` (P@1)
        of the run that sets the target, and ``chosen``: whether it sets the study's.
    """
    found = []
    largest = max((run["budget"] for run in grid), default=0)
    for own in grid:
        goals = goals_of(own, METRICS[:2], tolerance)
        if own["arm"] not in baselines or own["budget"] != largest or not goals:
            continue
        results = [r | {"ends_best": r is own} if r["arm"] == own["arm"] else r for r in grid]
        rows = convergence_rows(results, [own["arm"]], METRICS[:2], tolerance)
        loss, facts = (_finished_curve(own, metric)[-1].value for metric in METRICS[:2])
        about = {"learning_rate": own["learning_rate"], "chosen": own["ends_best"]}
        about |= {"final_mlm_loss": loss, "final": facts}
        found += [
            ratio | about
            for ratio in paired_ratios(rows)
            if ratio["metric"] == JOINT[0].key and ratio["method"] != own["arm"]
        ]
    return found


def equal_time_rows(
    results: Sequence[dict],
    baselines: Sequence[str],
    metrics: Sequence[Metric] = METRICS,
    select_by: str = MLM_LOSS,
) -> list[dict]:
    """Every arm's scores at the moment when the same seed's better baseline ends.

    Of an arm's runs the one that is best by ``select_by`` at that moment speaks for it in every
    score, whether it was over or still under way: what a user would have in hand then, chosen by
    facts that are not reported.

    Returns:
        Rows with ``method``, ``seed``, ``metric``, ``baseline``, ``time_s``, ``value``,
        ``baseline_value``, ``budget``, ``ended`` (the run was over by then; one that was cut off
        there had part of its decay ahead of it).
    """
    runs = _by_run(results)
    references = _references(results)
    rows = []
    sign = -1.0 if select_by == MLM_LOSS else 1.0

    def standing(run: dict, moment: float) -> tuple[float, float]:
        """Sort key of a run, best last; the larger budget where it does not say."""
        points = curve(run["evaluations"], select_by)
        value = sign * at_time(points, moment).value if points else -math.inf
        return value, run["budget"]

    for metric in metrics:
        baseline = better_baseline(full_runs(results), baselines, metric)
        for (arm, seed), of_arm in runs.items():
            reference = _finished_curve(references.get((baseline, seed)), metric)
            curves = [(run, points) for run in of_arm if (points := _finished_curve(run, metric))]
            if not curves or not reference:
                continue
            moment = reference[-1].time_s
            run, points = max(curves, key=lambda pair: standing(pair[0], moment))
            rows.append(
                {
                    "method": arm,
                    "seed": seed,
                    "metric": metric.key,
                    "baseline": baseline,
                    "time_s": moment,
                    "value": at_time(points, moment).value,
                    "baseline_value": reference[-1].value,
                    "budget": run["budget"],
                    "ended": points[-1].time_s <= moment,
                }
            )
    return rows
