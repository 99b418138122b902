"""Reports from made-up runs: what a reader has to see is there, the HTML needs no other file."""

import json
import re

import pytest

from trelm_ds.benchmark import report
from trelm_ds.benchmark.arms import StudyPlan
from trelm_ds.benchmark.report import write_report, write_sweep_report
from trelm_ds.benchmark.targets import (
    METRICS,
    convergence_rows,
    equal_time_rows,
    other_targets,
    paired_ratios,
)

ROLES = StudyPlan(
    arms=(),
    baselines=("dkplm",),
    ablations=("trelm", "trelm-no-memory"),
    modules=("dkplm", "trelm-no-memory", "trelm"),
)
P1 = "eval/report_p1"
COST = {"throughput/step_s": 0.2, "time/forward_s": 0.05, "time/backward_s": 0.1}


def run(arm, seed, final, rate=0.001, status="done"):
    evaluations = []
    for i in range(5):
        share = i / 4
        row = {"step": i * 100, "time_s": i * 60.0, "eval/mlm_loss": 10 - 4 * share}
        row |= {m.key: final * share for m in METRICS[1:4]}
        evaluations.append(row | {"eval/select_p1": final * share})
    return {
        "arm": arm,
        "preset": arm,
        "learning_rate": rate,
        "seed": seed,
        "status": status,
        "failure": None if status == "done" else "TrainingError: not finite",
        "steps": 400,
        "budget": 400,
        "ends_best": True,
        "time_s": 240.0,
        "cost": COST | {"time/attribution_s": 0.01, "data/wait_fraction": 0.05},
        "peak_memory_gib": 1.5,
        "kept_fraction": 0.25 if arm == "trelm" else None,
        "commit": "abc" if seed == 1 else "def",
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "evaluations": evaluations if status == "done" else [],
    }


def header(kind):
    return {
        "kind": kind,
        "commit": "abc",
        "command": "benchmark.py x --set a|b",
        "hardware": {"cpu": "a processor", "cores": 2, "gpu": None},
        "versions": {},
    }


STUDY = {
    "arms": {
        name: {"about": f"about {name}", "preset": name, "overrides": {}}
        for name in ("trelm", "trelm-no-memory", "dkplm", "slow")
    },
    "learning_rates": [0.001, 0.5],
    "seeds": [1, 2],
    "budgets": [{"steps": 400, "hours": None}],
    "select_by": "eval/select_p1",
    "settings": {"train.eval_steps": 100},
    "data": "tiny",
    "dataset_id": "0123456789abcdef",
    "baselines": ["dkplm"],
    "tolerance": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    finals = {"trelm": 0.4, "trelm-no-memory": 0.3, "dkplm": 0.2, "slow": 0.1}
    chosen = [run(arm, seed, final) for seed in (1, 2) for arm, final in finals.items()]
    rows = convergence_rows(chosen, ["dkplm"], METRICS, 0.0)
    better = run("dkplm", 1, 0.3, 0.5) | {"ends_best": False}
    for row in better["evaluations"]:
        row["eval/mlm_loss"] -= 0.5 * row["step"] / 400
    first = [r for r in chosen if r["seed"] == 1] + [better]
    grid = [r | r["evaluations"][-1] | {"chosen": True} for r in chosen]
    grid += [run(arm, 1, 0.0, 0.5, "diverged") | {"chosen": False} for arm in finals]
    result = header("convergence") | {
        "rows": rows,
        "ratios": paired_ratios(rows),
        "equal_time": equal_time_rows(chosen, ["dkplm"]),
        "other_targets": other_targets(first, ["dkplm"], 0.0),
        "downstream": [
            {"arm": arm, "seed": seed, "task": "typing open", "measure": "dev f1", "score": score}
            for arm, scores in (("trelm", (0.5, 0.7)), ("dkplm", (0.4, 0.4)))
            for seed, score in zip((1, 2), scores, strict=True)
        ],
        "runs": grid,
        "study": STUDY,
    }
    json.dumps(result)
    path = write_report(folder, result, chosen, ROLES)
    assert path == folder / "REPORT.md"
    return folder


def table(text, heading, number=0):
    """The rows of a table under a heading, as lists of cells."""
    body = text.split(f"## {heading}")[1].split("\n## ")[0]
    block = [block for block in body.split("\n\n") if block.startswith("|")][number]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in block.splitlines()]


def test_the_headline_table_says_ratios_and_failures(folder):
    text = (folder / "REPORT.md").read_text()
    rows = {row[0]: row for row in table(text, "Time to target")}
    at = rows["method"].index("P@1 all, text kept")
    # All arms lose text alike: at half the time the loss is not yet the baseline's.
    assert rows["trelm"][at] == "1.00 vs dkplm"
    assert rows["slow"][at] == "not reached (0/2) vs dkplm"
    rows = {row[0]: row for row in table(text, "Time to target", 1)}
    at = rows["method"].index("P@1 all")
    assert rows["trelm"][at] == "0.50 vs dkplm" and rows["dkplm"][at] == "1.00 vs dkplm"
    assert rows["slow"][at] == "not reached (0/2) vs dkplm"
    # Reached in half the time: the text loss was 8 then, 6 when the baseline got there.
    assert "8.000 / 6.000" in text


def test_where_the_runs_ran_and_what_the_grid_does_not_settle(folder):
    text = (folder / "REPORT.md").read_text()
    assert "| abc; def |" in text and "| a processor, 2 cores, 1 thread(s) a run |" in text
    assert "of several commits or machines" in text and "taking turns" not in text
    assert "edge of the grid" in text and "dkplm (400: 0.001)" in text


def test_every_commit_and_machine_that_took_a_run_up_is_told():
    first, last = ({"commit": c, "hardware": {"cpu": c, "cores": 2}} for c in "ab")
    result = {"rows": [], "runs": [last | {"starts": [first, last]}, last]}
    assert report._commits(result) == ["a", "b"]
    assert report._machines(result) == ["a, 2 cores", "b, 2 cores"]


def test_a_rate_of_the_baseline_that_would_have_been_harder_is_named(folder):
    text = (folder / "REPORT.md").read_text()
    rows = table(text, "If a baseline's other rates set the target")
    assert ["trelm", "dkplm", "[0.001]", "20.0 / 6.000", "1.12"] in rows, rows
    assert ["trelm", "dkplm", "0.5", "30.0 / 5.500", "not reached (0/1)"] in rows, rows
    assert "dkplm ends better in facts and in text at 0.5" in text


def test_an_arm_that_diverged_at_every_rate_is_named(tmp_path):
    chosen = [run("dkplm", seed, 0.2) for seed in (1, 2)]
    result = header("convergence") | {"rows": [], "ratios": [], "equal_time": [], "runs": []}
    write_report(tmp_path, result | {"study": STUDY | {"learning_rates": [0.001]}}, chosen, ROLES)
    text = (tmp_path / "REPORT.md").read_text()
    assert "trelm diverged at every learning rate, and is in no table" in text


def test_runs_that_diverged_are_in_no_mean(tmp_path):
    chosen = [run("trelm", 1, 0.4), run("dkplm", 1, 0.2), run("dkplm", 2, 0.4)]
    cut = run("trelm", 2, 0.9)
    chosen.append(cut | {"status": "diverged", "failure": "not finite"})
    result = header("convergence") | {"rows": [], "ratios": [], "equal_time": []}
    study = STUDY | {"learning_rates": [0.001]}
    result |= {"runs": [r | {"chosen": True} for r in chosen], "study": study}
    write_report(tmp_path, result, chosen, ROLES)
    text = (tmp_path / "REPORT.md").read_text()
    finals = {row[0]: row for row in table(text, "Final scores")}
    assert finals["trelm"][3] == "40.0" and finals["dkplm"][3] == "30.0 (20.0 to 40.0)"
    assert "trelm seed 2 diverged, and is in no mean: not finite" in text
    rows = [
        {"value": v, "status": s, "cost": COST, "steps": 1, "time_s": 1.0, P1: p, "seed": 1}
        | {"chosen": chosen}
        for v, s, p, chosen in (
            (1, "done", 0.2, True),
            (1, "done", 0.1, False),  # another rate
            (2, "done", 0.3, True),
            (2, "diverged", 0.9, True),
            (3, "diverged", 0.9, False),  # at every rate
        )
    ]
    result = header("sweep") | {"rows": rows, "key": "k", "values": [1, 2, 3], "study": STUDY}
    write_sweep_report(tmp_path, result)
    text = (tmp_path / "REPORT.md").read_text()
    assert table(text, "Final scores")[2:] == [
        ["1", "20.0", "200.0"],
        ["2, 1 run(s) diverged", "30.0", "200.0"],
        ["3, 1 run(s) diverged", "–", "–"],
    ]


def test_the_other_tables(folder):
    text = (folder / "REPORT.md").read_text()
    ablation = {row[0]: row for row in table(text, "Ablations (after the paper's Table 6)")}
    assert ablation["trelm"][2] == "40.0" and ablation["trelm-no-memory"][2] == "30.0 (-10.00)"
    grid = {row[0]: row for row in table(text, "Learning rates")}
    assert grid["dkplm"][1:] == ["400", "[0.2000 / 6.000]", "diverged"]
    costs = {row[0]: row for row in table(text, "Cost of a step")}
    named = dict(zip(costs["method"], costs["trelm"], strict=True))
    assert named["ms per step"] == "200.0" and named["backward"] == "100.0"
    assert named["data"] == "10.0" and named["other"] == "30.0" and named["FFN kept"] == "25.0%"
    assert "benchmark.py x --set a\\|b" in text  # a bar in a cell does not split it


def test_downstream_scores_of_the_arms_that_have_them(folder):
    rows = table((folder / "REPORT.md").read_text(), "Downstream")
    assert rows[0] == ["method", "typing open, dev f1"]
    assert ["trelm", "60.0 (50.0 to 70.0)"] in rows and ["dkplm", "40.0"] in rows


def test_figures_exist_and_the_html_stands_alone(folder):
    text, page = (folder / "REPORT.md").read_text(), (folder / "report.html").read_text()
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == 6 and "figures/modules_by_time.png" in linked
    for name in linked:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    sources = re.findall(r'src="([^"]{12})', page)
    assert len(sources) == 6 and set(sources) == {"data:image/p"}
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert not list(folder.rglob("*tmp*"))


def test_a_sweep_has_one_table_and_one_figure(tmp_path):
    rows = [
        {
            "method": "trelm",
            "value": value,
            "chosen": True,
            "seed": seed,
            "status": "done",
            "cost": COST,
            "steps": 10,
            "time_s": 2.0,
            "eval/mlm_loss": 5.0 + seed,
            "eval/report_p1": value,
        }
        for value in (0.25, 0.5)
        for seed in (1, 2)
    ]
    result = header("sweep") | {
        "rows": rows,
        "key": "routing.kept_fraction",
        "values": [0.25, 0.5],
        "study": STUDY,
    }
    write_sweep_report(tmp_path, result)
    text = (tmp_path / "REPORT.md").read_text()
    found = {row[0]: row for row in table(text, "Final scores")}
    assert found["0.25"] == ["0.25", "6.500 (6.000 to 7.000)", "25.0", "200.0"]
    assert text.count("![") == 1 and (tmp_path / "figures" / "sweep.png").is_file()
