"""Crossings, targets and ratios on curves made by hand."""

import pytest

from trelm_ds.benchmark.report import ratio_cell
from trelm_ds.benchmark.targets import (
    JOINT,
    METRICS,
    Metric,
    Point,
    at_time,
    better_baseline,
    convergence_rows,
    curve,
    equal_time_rows,
    other_targets,
    paired_ratios,
    reach,
    reach_all,
    target_of,
)

P1 = Metric("eval/report_p1", "P@1")
LOSS = METRICS[0]


def points(*values, step=100, seconds=10.0):
    return [Point(i * step, i * seconds, v) for i, v in enumerate(values)]


def result(arm, seed, p1, *, seconds=10.0, loss=None, rate=1e-3, step=100, budget=400):
    loss = loss or [10.0 - i for i in range(len(p1))]
    evaluations = [
        {"step": i * step, "time_s": i * seconds, "eval/report_p1": v, "eval/mlm_loss": m}
        for i, (v, m) in enumerate(zip(p1, loss, strict=True))
    ]
    row = {"arm": arm, "seed": seed, "learning_rate": rate, "status": "done", "budget": budget}
    row["ends_best"] = True
    return row | {"evaluations": evaluations}


def test_a_target_between_two_evaluations_is_interpolated_in_steps_and_time():
    found = reach(points(0.0, 0.1, 0.3), 0.2, True)
    assert (found.step, found.time_s, found.value) == pytest.approx((150, 15.0, 0.2))
    found = reach(points(8.0, 6.0, 2.0), 5.0, False)
    assert (found.step, found.time_s) == pytest.approx((125, 12.5))


def test_the_first_crossing_of_the_raw_curve_counts():
    # Up, down below the target, up again: the first time, from the evaluation just before it.
    assert reach(points(0.0, 0.3, 0.1, 0.4), 0.2, True).step == pytest.approx(200 / 3)
    # A dip just before the crossing: the running best (0.2 at 100) would cross at 150, the raw
    # curve, which has to climb from 0.1, at 200 - 100 * 0.1 / 0.3.
    assert reach(points(0.0, 0.2, 0.1, 0.4), 0.3, True).step == pytest.approx(200 + 200 / 3)


def test_never_reached_already_reached_and_exactly_reached():
    assert reach(points(0.0, 0.1, 0.19), 0.2, True) is None
    assert reach([], 0.2, True) is None
    start = reach(points(0.3, 0.1), 0.2, True)
    assert (start.step, start.time_s) == (0, 0.0)
    tie = reach(points(0.0, 0.2, 0.2, 0.3), 0.2, True)
    assert (tie.step, tie.time_s) == (100, 10.0)
    assert reach(points(0.2, 0.2), 0.2, True).step == 0


def test_the_tolerance_is_a_share_of_the_gain_and_never_raises_the_bar():
    assert target_of(points(0.0, 0.5), P1, 0.1) == pytest.approx(0.45)
    assert target_of(points(10.0, 5.0), LOSS, 0.1) == pytest.approx(5.5)
    assert target_of(points(5.0, 6.0), LOSS, 0.1) == pytest.approx(6.1)  # ended worse than it began
    assert target_of(points(0.5, 0.4), P1, 0.1) == pytest.approx(0.39)


def test_curves_skip_what_is_missing_and_keep_the_later_of_two_lines_of_a_step():
    rows = [
        {"step": 0, "time_s": 0.0, "eval/report_p1": 0.0},
        {"step": 5, "time_s": 1.0, "eval/report_p1": 0.1},
        {"step": 10, "time_s": 2.0, "eval/report_p1": None},
        {"step": 5, "time_s": 1.5, "eval/report_p1": 0.2},
        {"step": 15, "time_s": 3.0},
        {"step": 20, "time_s": 4.0, "eval/report_p1": float("nan")},
    ]
    assert curve(rows, "eval/report_p1") == [Point(0, 0.0, 0.0), Point(5, 1.5, 0.2)]


def test_values_at_a_moment():
    line = points(0.0, 0.1, 0.3)
    assert at_time(line, 15.0).value == pytest.approx(0.2)
    assert at_time(line, 10.0).value == pytest.approx(0.1)
    assert at_time(line, 99.0).value == 0.3  # it had ended
    assert at_time(line, 0.0).value == 0.0
    assert at_time([], 1.0) is None


def ratios_of(results, baselines, **kwargs):
    rows = convergence_rows(results, baselines, (LOSS, P1), tolerance=0.0, **kwargs)
    return rows, {(r["method"], r["metric"], r["baseline"]): r for r in paired_ratios(rows)}


def test_time_ratio_is_step_ratio_times_step_time_ratio_for_each_seed():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2, 0.3, 0.4]),
        result("dkplm", 2, [0.0, 0.1, 0.2, 0.3, 0.4]),
        result("dkplm", 3, [0.0, 0.1, 0.2, 0.3, 0.4]),
        # Half, a quarter and three quarters of the steps, at 0.8 of the time each.
        result("trelm", 1, [0.0, 0.2, 0.4, 0.5, 0.5], seconds=8.0),
        result("trelm", 2, [0.0, 0.4, 0.4, 0.5, 0.5], seconds=8.0),
        result("trelm", 3, [0.0, 0.1, 0.2, 0.4, 0.5], seconds=8.0),
    ]
    rows, ratios = ratios_of(results, ["dkplm"])
    found = ratios["trelm", "eval/report_p1", "dkplm"]
    assert found["other_seeds"] is None  # no seed chose anything
    without = [r for r in paired_ratios(rows, chosen_by=2) if r["method"] == "trelm"]
    assert next(r for r in without if r["metric"] == P1.key)["other_seeds"] == pytest.approx(0.5)
    assert found["steps_ratio"] == pytest.approx(0.5)
    assert found["step_time_ratio"] == pytest.approx(0.8)
    assert found["time_ratio"] == pytest.approx(0.4)
    assert (found["low"], found["high"]) == pytest.approx((0.2, 0.6))
    assert (found["pairs"], found["reached"], found["held"]) == (3, 3, 3)
    assert found["headline"]
    # MLM losses at those moments: 10 - 2, 10 - 1, 10 - 3 against the baseline's 10 - 4.
    assert found["mlm_loss"] == pytest.approx(8.0)
    assert found["baseline_mlm_loss"] == pytest.approx(6.0)
    own = ratios["dkplm", "eval/report_p1", "dkplm"]
    assert own["time_ratio"] == own["steps_ratio"] == own["step_time_ratio"] == 1.0
    row = next(r for r in rows if (r["method"], r["seed"], r["metric"]) == ("trelm", 2, P1.key))
    assert (row["steps"], row["time_s"], row["reached"], row["final"]) == (100, 8.0, True, 0.5)


def test_a_seed_that_never_arrives_counts_as_infinitely_slow():
    base = [result("dkplm", s, [0.0, 0.2, 0.4]) for s in (1, 2, 3)]
    fast, slow = [0.0, 0.4, 0.4], [0.0, 0.1, 0.2]
    _, ratios = ratios_of(
        base + [result("a", 1, fast), result("a", 2, fast), result("a", 3, slow)], ["dkplm"]
    )
    found = ratios["a", "eval/report_p1", "dkplm"]
    assert found["time_ratio"] == pytest.approx(0.5) and found["low"] == pytest.approx(0.5)
    assert found["high"] is None and found["reached"] == 2
    _, ratios = ratios_of(
        base + [result("a", 1, fast), result("a", 2, slow), result("a", 3, slow)], ["dkplm"]
    )
    found = ratios["a", "eval/report_p1", "dkplm"]
    assert found["time_ratio"] is None and found["steps_ratio"] is None and found["reached"] == 1
    assert found["low"] == pytest.approx(0.5)


def test_a_run_that_diverged_reaches_nothing_and_sets_no_target():
    results = [result("dkplm", s, [0.0, 0.2, 0.4]) for s in (1, 2)]
    results += [result("a", s, [0.0, 0.4, 0.5]) for s in (1, 2)]
    results[3]["status"] = "diverged"
    _, ratios = ratios_of(results, ["dkplm"])
    found = ratios["a", "eval/report_p1", "dkplm"]
    assert (found["reached"], found["pairs"], found["high"]) == (1, 2, None)
    assert [r["seed"] for r in equal_time_rows(results, ["dkplm"], (P1,))] == [1, 2, 1]
    results[1]["status"] = "diverged"
    rows, _ = ratios_of(results, ["dkplm"])
    assert {r["seed"] for r in rows} == {1}


def test_a_spike_that_does_not_last_is_reached_but_not_held():
    rows, ratios = ratios_of(
        [result("dkplm", 1, [0.0, 0.1, 0.3]), result("a", 1, [0.0, 0.4, 0.2])], ["dkplm"]
    )
    found = ratios["a", "eval/report_p1", "dkplm"]
    assert (found["reached"], found["held"]) == (1, 0)


def test_a_baseline_that_starts_at_its_target_gives_no_ratio():
    results = [
        result("dkplm", 1, [0.0, 0.2], loss=[5.0, 6.0]),
        result("trelm", 1, [0.0, 0.2], loss=[5.0, 4.0]),
    ]
    _, ratios = ratios_of(results, ["dkplm"])
    found = ratios["trelm", "eval/mlm_loss", "dkplm"]
    assert found["time_ratio"] is None and found["at_start"] == 1
    # A method that starts there while the baseline has a way to go needs no time, and no step
    # whose time could be compared.
    results = [result("dkplm", 1, [0.0, 0.2]), result("trelm", 1, [0.3, 0.3])]
    _, ratios = ratios_of(results, ["dkplm"])
    found = ratios["trelm", "eval/report_p1", "dkplm"]
    assert (found["time_ratio"], found["steps_ratio"]) == (0.0, 0.0)
    assert found["step_time_ratio"] is None and found["at_start"] == 0


def test_the_better_baseline_is_chosen_for_each_metric_over_all_seeds():
    results = [
        result("dkplm", 1, [0.0, 0.3], loss=[9.0, 5.0]),
        result("dkplm", 2, [0.0, 0.3], loss=[9.0, 5.0]),
        result("dkplm-encoder", 1, [0.0, 0.4], loss=[9.0, 5.5]),
        result("dkplm-encoder", 2, [0.0, 0.1], loss=[9.0, 5.5]),
    ]
    both = ["dkplm", "dkplm-encoder"]
    assert better_baseline(results, both, P1) == "dkplm"
    assert better_baseline(results, both, LOSS) == "dkplm"
    assert better_baseline(results[2:], both, P1) == "dkplm-encoder"
    assert better_baseline(results, both, Metric("eval/none", "")) is None
    _, ratios = ratios_of(results, both)
    assert ratios["dkplm-encoder", P1.key, "dkplm"]["reached"] == 1


def test_the_headline_is_the_baseline_that_leaves_the_least_gain():
    results = [
        result("facts", 1, [0.0, 0.1, 0.4], loss=[9.0, 8.0, 7.0]),
        result("text", 1, [0.0, 0.1, 0.2], loss=[9.0, 8.0, 5.0]),
        result("stuck", 1, [0.2, 0.1, 0.2], loss=[5.0, 9.0, 9.0]),
        result("trelm", 1, [0.0, 0.4, 0.5], loss=[9.0, 7.0, 5.0]),
    ]
    _, ratios = ratios_of(results, ["stuck", "facts", "text"])
    kept = "eval/report_p1+text"
    named = {key[:2]: key[2] for key, row in ratios.items() if row["headline"]}
    # `facts` is the better one in P@1, and `text` is harder to beat once the text counts.
    assert ratios["trelm", kept, "facts"]["time_ratio"] == pytest.approx(0.5)
    assert ratios["trelm", kept, "text"]["time_ratio"] == pytest.approx(1.0)
    assert named["trelm", kept] == "text" and named["trelm", P1.key] == "facts"
    # Who never gets there gains least, and nobody is measured by itself or by nothing to reach.
    assert ratios["text", P1.key, "facts"]["time_ratio"] is None
    assert named["text", P1.key] == "facts" and named["facts", P1.key] == "text"
    assert len(named) == len(results) * 3


def test_seeds_with_nothing_to_reach_count_as_no_success():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2]),
        result("dkplm", 2, [0.3, 0.2, 0.2]),
        result("trelm", 1, [0.0, 0.2, 0.3]),
        result("trelm", 2, [0.3, 0.4, 0.4]),
    ]
    _, ratios = ratios_of(results, ["dkplm"])
    row = ratios["trelm", P1.key, "dkplm"]
    assert row["time_ratio"] == row["low"] == row["high"] == pytest.approx(0.5)
    assert (row["pairs"], row["at_start"], row["reached"], row["held"]) == (2, 1, 1, 1)
    assert ratio_cell(row) == "0.50, 1 of 2 seeds held from the start"
    row |= {"time_ratio": None, "reached": 0}
    assert ratio_cell(row) == "not reached (0/1), 1 of 2 seeds held from the start"


def test_a_seed_without_its_baseline_has_no_row():
    results = [result("dkplm", 1, [0.0, 0.2]), result("trelm", 2, [0.0, 0.2])]
    rows, ratios = ratios_of(results, ["dkplm"])
    assert {(r["method"], r["seed"]) for r in rows} == {("dkplm", 1)}
    assert ("trelm", P1.key, "dkplm") not in ratios


def test_equal_time_reads_every_arm_at_the_moment_the_baseline_ends():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2], seconds=10.0),
        result("fast", 1, [0.0, 0.2, 0.3], seconds=5.0),
        result("slow", 1, [0.0, 0.2, 0.4], seconds=16.0),
    ]
    rows = {r["method"]: r for r in equal_time_rows(results, ["dkplm"], (P1,))}
    assert rows["fast"]["value"] == 0.3 and rows["fast"]["ended"]
    assert rows["slow"]["value"] == pytest.approx(0.25) and not rows["slow"]["ended"]
    assert rows["dkplm"]["value"] == rows["dkplm"]["baseline_value"] == 0.2
    assert rows["slow"]["time_s"] == 20.0


def test_two_conditions_are_met_where_both_hold_and_not_where_each_did_once():
    p1 = points(0.0, 0.4, 0.4, 0.1, 0.4)
    loss = points(8.0, 8.0, 6.0, 5.0, 5.0)
    # P@1 from 50 on, the loss from 150 on, P@1 lost again from 267 to 333.
    found = reach_all([(p1, 0.2, True), (loss, 7.0, False)])
    assert (found.step, found.time_s, found.value) == pytest.approx((150, 15.0, 0.4))
    # The loss is there when P@1 has gone: both only at 333, on P@1's way back.
    found = reach_all([(p1, 0.2, True), (loss, 5.2, False)])
    assert (found.step, found.value) == pytest.approx((300 + 100 / 3, 0.2))
    assert reach_all([(p1, 0.2, True), (loss, 4.9, False)]) is None
    # Within one interval each holds for a while, never both: P@1 falls below before the loss does.
    apart = [(points(0.3, 0.0), 0.2, True), (points(8.0, 6.0), 6.5, False)]
    assert reach_all(apart) is None
    assert reach_all([apart[0], (points(8.0, 6.0), 7.5, False)]).step == pytest.approx(25)
    # Evaluations that only one of the curves has do not count.
    assert reach_all([(p1, 0.2, True), (loss[:1] + loss[4:], 7.0, False)]).step == pytest.approx(
        200
    )


def test_facts_bought_with_text_count_from_when_the_text_is_back():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.0]),
        result("sooner", 1, [0.0, 0.3, 0.4], loss=[8.0, 7.0, 5.0]),
        result("never", 1, [0.0, 0.3, 0.4], loss=[8.0, 9.0, 6.1]),
    ]
    rows = convergence_rows(results, ["dkplm"], [P1], 0.0)
    rows = {(r["method"], r["metric"]): r for r in rows}
    assert rows["sooner", P1.key]["steps"] == pytest.approx(200 / 3)
    kept = rows["sooner", "eval/report_p1+text"]
    assert kept["steps"] == pytest.approx(150) and kept["mlm_loss"] == pytest.approx(6.0)
    assert kept["held"] and kept["target"] == pytest.approx(0.2)
    assert rows["never", P1.key]["reached"]
    assert not rows["never", "eval/report_p1+text"]["reached"]
    own = rows["dkplm", "eval/report_p1+text"]
    assert own["reached"] and own["steps"] == 200


def test_of_several_budgets_the_first_to_get_there_counts_for_the_baseline_too():
    long, short = dict(budget=400, loss=[8.0, 8.0, 8.0, 8.0, 6.0]), dict(budget=200)
    results = [
        result("dkplm", 1, [0.0, 0.0, 0.0, 0.1, 0.2], **long),
        result("dkplm", 1, [0.0, 0.1, 0.2], loss=[8.0, 7.5, 7.0], **short),
        result("fast", 1, [0.0, 0.0, 0.1, 0.2, 0.3], **long),
        result("fast", 1, [0.0, 0.1, 0.4], loss=[8.0, 7.0, 5.0], **short),
    ]
    rows = convergence_rows(results, ["dkplm"], [LOSS, P1], 0.0)
    rows = {(r["method"], r["metric"]): r for r in rows}
    # The baseline reaches its long run's P@1 at the end of its short one.
    own = rows["dkplm", P1.key]
    assert (own["steps"], own["budget"], own["final"]) == (200, 200, 0.2)
    assert rows["fast", P1.key]["steps"] == pytest.approx(100 + 100 / 3)
    assert rows["fast", P1.key]["final"] == 0.3  # of the long run
    # With the text kept only the long run of the baseline does.
    assert rows["dkplm", "eval/report_p1+text"]["budget"] == 400
    kept = rows["fast", "eval/report_p1+text"]
    assert (kept["budget"], kept["steps"]) == (200, pytest.approx(150))
    ratios = {(r["method"], r["metric"]): r for r in paired_ratios(list(rows.values()))}
    assert ratios["fast", "eval/report_p1+text"]["time_ratio"] == pytest.approx(150 / 400)
    # A run that diverged at one budget leaves the other's crossing.
    results[3]["status"] = "diverged"
    rows = convergence_rows(results, ["dkplm"], [P1], 0.0)
    found = next(r for r in rows if (r["method"], r["metric"]) == ("fast", P1.key))
    assert (found["budget"], found["steps"]) == (400, 300)


def test_of_several_rates_the_one_that_ends_best_sets_the_target_and_each_may_be_first():
    quick = {"rate": 4e-3, "loss": [8.0, 6.0, 6.0]}
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.0]),
        result("dkplm", 1, [0.0, 0.2, 0.2], **quick) | {"ends_best": False},
        result("same", 1, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.0]),
        result("same", 1, [0.0, 0.2, 0.2], **quick) | {"ends_best": False},
    ]
    rows, ratios = ratios_of(results, ["dkplm"])
    assert {(r["steps"], r["learning_rate"]) for r in rows if r["metric"] == P1.key} == {
        (100, 4e-3)
    }
    assert all(ratio["time_ratio"] == 1.0 for ratio in ratios.values())


def test_a_baseline_that_diverged_at_the_largest_budget_sets_no_target():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2], budget=200),
        result("trelm", 1, [0.0, 0.1, 0.2, 0.3, 0.4], budget=400),
    ]
    assert not convergence_rows(results, ["dkplm"], [P1])
    results.append(result("dkplm", 1, [0.0, 0.1], budget=400) | {"status": "diverged"})
    assert not convergence_rows(results, ["dkplm"], [P1])
    assert not equal_time_rows(results, ["dkplm"], [P1])


def test_text_losses_at_the_target_are_those_of_the_same_seeds():
    results = [
        result("dkplm", 1, [0.0, 0.1, 0.2], loss=[8.0, 6.0, 4.0]),
        result("dkplm", 2, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.0]),
        result("dkplm", 3, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.0]),
        result("trelm", 1, [0.0, 0.2, 0.2], loss=[8.0, 4.5, 4.5]),
        result("trelm", 2, [0.0, 0.0, 0.1]),
        result("trelm", 3, [0.0, 0.0, 0.1]),
    ]
    _, ratios = ratios_of(results, ["dkplm"])
    found = ratios["trelm", P1.key, "dkplm"]
    assert (found["mlm_loss"], found["baseline_mlm_loss"]) == (4.5, 4.0)


def test_every_rate_of_a_baseline_sets_a_target_once():
    grid = [
        result("dkplm", 1, [0.0, 0.1, 0.2], loss=[8.0, 7.0, 6.5]),
        result("dkplm", 1, [0.0, 0.1, 0.4], rate=4e-3, loss=[8.0, 7.0, 6.0]) | {"ends_best": False},
        result("trelm", 1, [0.0, 0.2, 0.4], loss=[8.0, 6.5, 6.0]),
        result("trelm", 1, [0.0, 0.0, 0.0], rate=4e-3, loss=[8.0, 8.0, 8.0]),
    ]
    found = {row["learning_rate"]: row for row in other_targets(grid, ["dkplm"], 0.0)}
    assert [(r["method"], r["metric"]) for r in found.values()] == [("trelm", JOINT[0].key)] * 2
    chosen, other = found[1e-3], found[4e-3]
    assert (chosen["chosen"], chosen["final"], chosen["final_mlm_loss"]) == (True, 0.2, 6.5)
    # At 6.5 the baseline's other rate has half of its second hundred steps.
    assert chosen["time_ratio"] == pytest.approx(100 / 150)
    assert (other["chosen"], other["final"], other["final_mlm_loss"]) == (False, 0.4, 6.0)
    assert other["time_ratio"] == pytest.approx(1.0)


def test_at_equal_time_the_run_that_stands_best_by_other_facts_speaks():
    def chosen(run, *select):
        for row, value in zip(run["evaluations"], select, strict=True):
            row["eval/select_p1"] = value
        return run

    results = [
        chosen(result("dkplm", 1, [0.0, 0.1, 0.4], budget=200, seconds=20.0), 0.0, 0.1, 0.4),
        chosen(result("dkplm", 1, [0.0, 0.9], budget=100, seconds=20.0), 0.0, 0.2),
        # Under way at 40 s and ahead of the one that is over, or behind it.
        chosen(result("a", 1, [0.0, 0.2, 0.6], budget=200, seconds=40.0), 0.0, 0.3, 0.7),
        chosen(result("a", 1, [0.0, 0.5], budget=100, seconds=40.0), 0.0, 0.2),
        chosen(result("b", 1, [0.0, 0.2, 0.6], budget=200, seconds=40.0), 0.0, 0.3, 0.7),
        chosen(result("b", 1, [0.0, 0.1], budget=100, seconds=40.0), 0.0, 0.4),
    ]
    rows = equal_time_rows(results, ["dkplm"], [P1], select_by="eval/select_p1")
    found = {r["method"]: (r["value"], r["budget"], r["ended"]) for r in rows}
    assert found == {"dkplm": (0.4, 200, True), "a": (0.2, 200, False), "b": (0.1, 100, True)}
    # Nothing to choose by: the largest budget.
    for run in results:
        for row in run["evaluations"]:
            del row["eval/select_p1"]
    rows = equal_time_rows(results, ["dkplm"], [P1], select_by="eval/select_p1")
    assert {r["budget"] for r in rows} == {200}
