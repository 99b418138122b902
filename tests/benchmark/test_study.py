"""Studies over a stand-in for the trainer: order, choice of the rate, restarts, failures."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.benchmark import runner
from trelm_ds.benchmark.arms import Arm
from trelm_ds.benchmark.runner import RunFailed, slots
from trelm_ds.benchmark.study import MANY_STEPS, Budget, Race, Start, Study
from trelm_ds.benchmark.targets import Metric, convergence_rows, paired_ratios
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.metrics import read_metrics
from trelm_ds.stopping import StopRequest

ARMS = [Arm("a", "dkplm"), Arm("b", "mlm")]


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The stand-in takes the trainer's place; returns what was started, in order."""
    monkeypatch.setattr(runner, "SCRIPT", Path(__file__).with_name("fake_pretrain.py"))
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("FAKE_STEP_S", "0")
    folder = tmp_path / "study" / "runs"

    def read():
        lines = (tmp_path / "starts").read_text().splitlines()
        return [Path(os.path.relpath(line, folder)).as_posix() for line in lines]

    return read


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_tiny_corpus(folder, train=8, heldout=4)
    (folder / "tables" / "importance.json").write_text("{}")
    return folder


@pytest.fixture
def study(tmp_path, data, starts):
    def build(rates=(0.001, 0.002), seeds=(1, 2), arms=ARMS, steps=(4,), **settings):
        budgets = [Budget(steps=n) for n in steps]
        flat = {key.replace("__", "."): value for key, value in settings.items()}
        flat["data.data_dir"] = str(data)
        return Study(tmp_path / "study", arms, rates, seeds, budgets, flat)

    return build


def test_models_are_left_by_the_chosen_runs_of_the_largest_budget_when_asked(study):
    declared = study(steps=(4, 2))
    declared.export = True
    assert declared.run(StopRequest())
    assert all(r.config.train.export == ("budget_2" not in str(r.folder)) for r in declared.grid())
    chosen = declared.chosen()
    assert [(r.arm, r.seed, r.learning_rate) for r in chosen] == [
        (arm, seed, 0.002) for arm in "ab" for seed in (1, 2)
    ]
    assert not any(run.config.train.export for run in study().grid())


def test_the_grid_is_searched_with_one_seed_and_the_best_rate_gets_the_others(study, starts):
    declared = study()
    assert [line.split()[0] for line in declared.plan()] == ["new"] * 4 + ["then", "up"]
    assert declared.plan()[-1] == "up to 6 runs of 4 steps"
    alone = study(rates=(0.001,), seeds=(1,), steps=(4, 2)).plan()
    assert alone[0] == "new       a lr 0.001 seed 1, 4 steps"
    assert alone[2] == "new       a lr 0.001 seed 1, 2 steps"
    assert alone[4:] == ["4 runs of 4 steps and 2 steps"]
    assert declared.run(StopRequest())
    assert starts() == [
        "a/lr_0.001/seed_1",
        "b/lr_0.001/seed_1",
        "a/lr_0.002/seed_1",
        "b/lr_0.002/seed_1",
        "a/lr_0.002/seed_2",
        "b/lr_0.002/seed_2",
    ]
    chosen, grid = declared.results()
    assert [(r["arm"], r["learning_rate"], r["seed"]) for r in chosen] == [
        ("a", 0.002, 1),
        ("b", 0.002, 1),
        ("a", 0.002, 2),
        ("b", 0.002, 2),
    ]
    assert len(grid) == 4
    assert [row["step"] for row in chosen[0]["evaluations"]] == [0, 1, 2, 3, 4]
    assert (chosen[0]["steps"], chosen[0]["time_s"], chosen[0]["preset"]) == (4, 2.0, "dkplm")
    assert not list(declared.folder.rglob("checkpoints"))  # of finished runs


def test_no_core_waits_for_the_last_run_of_the_grid(study, starts, monkeypatch):
    monkeypatch.setenv("FAKE_WAITS_FOR", "b/lr_0.002/seed_1:a/lr_0.002/seed_3")
    begun, start = [], runner.Runner._start  # in this order: processes write theirs when they can

    def note(self, run, slot):
        begun.append(f"{run.arm}/lr_{run.learning_rate:g}/seed_{run.seed}")
        return start(self, run, slot)

    monkeypatch.setattr(runner.Runner, "_start", note)
    declared = study(seeds=(1, 2, 3))
    declared.race = Race(["a"], 0.1)
    assert declared.run(StopRequest(), parallel=2)
    assert sorted(begun) == sorted(starts())
    assert set(begun[:4]) == {f"{arm}/lr_{r}/seed_1" for arm in "ab" for r in (0.001, 0.002)}
    # `a` is through its grid, and the rate that ends best is its own whatever `b` does.
    assert begun[4:6] == ["a/lr_0.002/seed_2", "a/lr_0.002/seed_3"]
    assert sorted(begun[6:]) == ["b/lr_0.002/seed_2", "b/lr_0.002/seed_3"]
    assert [run.state for run in declared.rest()] == ["finished"] * 4


def test_a_race_adds_the_rate_that_is_first_at_the_target(study, starts):
    """`a` sets the target with the rate that ends best; `b` is there first with another one."""
    rates = (0.001, 0.002, 0.004, 1.0)
    declared = study(rates=rates, steps=(4, 2))
    assert declared.run(StopRequest())
    assert declared.best_rates() == dict.fromkeys([(n, s) for n in "ab" for s in (4, 2)], (0.002,))
    _rewrite(declared, "b", 0.004, 4, [0.0, 0.95, 0.95, 0.95, 0.95], [9.0, 7.0, 7.0, 8.1, 8.1])
    _rewrite(declared, "b", 0.002, 4, [0.0, 0.5, 0.9, 1.0, 1.0], [9.0, 9.0, 9.0, 8.0, 8.0])
    _rewrite(declared, "a", 0.001, 2, [0.0, 1.0, 1.0], [9.0, 8.0, 8.0])
    declared.race = Race(["a"], 0.1)
    # `b` at 0.004 has facts and text after two steps and loses the text again: first is first.
    assert declared.best_rates() == {
        ("a", 4): (0.002,), ("b", 4): (0.002, 0.004), ("a", 2): (0.001,), ("b", 2): (0.002,),
    }  # fmt: skip
    assert [r.learning_rate for r in declared.chosen() if r.seed == 1] == [0.002, 0.002]
    # Nobody gets there: the end decides.
    _rewrite(declared, "a", 0.002, 4, [0.0, 2.0, 2.0, 2.0, 2.0], [9.0, 1.0, 1.0, 1.0, 1.0])
    assert declared.best_rates()["b", 2] == (0.002,)


def test_an_arm_gains_nothing_in_a_race_over_its_own_copy(study):
    """The rate that ends best is late at the target: the quick one is the baseline's too."""
    late = [0.0, 0.1, 0.2, 0.9, 1.0], [9.0, 9.0, 9.0, 8.5, 8.0]
    quick = [0.0, 0.95, 0.95, 0.95, 0.95], [9.0, 8.0, 8.0, 8.0, 8.0]
    for seed in (1, 2):
        declared = study(seeds=(1, 2)[:seed])
        declared.race = Race(["a"], 0.1)
        assert declared.run(StopRequest())
        for name in "ab":
            _rewrite(declared, name, 0.001, 4, *quick, seed=seed)
            _rewrite(declared, name, 0.002, 4, *late, seed=seed)
    results, _ = declared.results()
    assert {(r["arm"], r["learning_rate"], r["seed"]) for r in results} == {
        (name, rate, seed) for name in "ab" for rate in (0.001, 0.002) for seed in (1, 2)
    }
    rows = convergence_rows(results, ["a"], (Metric("eval/select_p1", "P@1"),), 0.1)
    assert {row["target"] for row in rows if row["metric"] == "eval/select_p1"} == {0.9}
    assert {row["method"]: row["time_ratio"] for row in paired_ratios(rows)} == {"a": 1.0, "b": 1.0}


def _rewrite(study, arm, rate, steps, p1, loss, seed=1):
    """Puts other curves into a finished run."""
    (arm,) = (a for a in study.arms if a.name == arm)
    path = study.declare(arm, rate, seed, Budget(steps=steps)).folder / "result.json"
    result = json.loads(path.read_text())
    result["evaluations"] = [
        {"step": i, "time_s": i / 2, "eval/select_p1": p, "eval/mlm_loss": m}
        for i, (p, m) in enumerate(zip(p1, loss, strict=True))
    ]
    path.write_text(json.dumps(result))


def test_a_finished_study_starts_nothing_and_a_larger_one_only_what_is_new(study, starts):
    assert study().run(StopRequest())
    before = len(starts())
    assert study().run(StopRequest())
    assert len(starts()) == before
    assert all(line.startswith("finished") for line in study().plan())
    assert study(seeds=(1, 2, 3), arms=[*ARMS, Arm("c", "trelm")]).run(StopRequest())
    new = starts()[before:]
    assert sorted(new) == sorted(
        ["a/lr_0.002/seed_3", "b/lr_0.002/seed_3", "c/lr_0.001/seed_1", "c/lr_0.002/seed_1"]
        + ["c/lr_0.002/seed_2", "c/lr_0.002/seed_3"]
    )


def run_file(study, name):
    return study.folder / "runs" / name


def test_a_stopped_study_resumes_its_half_finished_run(study, starts, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    declared = study(steps=(200,))
    stop = StopRequest()
    metrics = run_file(declared, "a/lr_0.001/seed_1/metrics.jsonl")

    def stop_when_under_way():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
                break
            time.sleep(0.02)
        stop.requested = True

    thread = threading.Thread(target=stop_when_under_way)
    thread.start()
    assert not declared.run(stop)
    thread.join()
    assert starts() == ["a/lr_0.001/seed_1"]
    assert declared.plan()[0].startswith("started")
    reached = int(run_file(declared, "a/lr_0.001/seed_1/checkpoints/state").read_text())
    assert 3 <= reached < 200
    monkeypatch.setenv("FAKE_STEP_S", "0")
    assert study(steps=(200,)).run(StopRequest())
    assert starts()[:2] == ["a/lr_0.001/seed_1"] * 2 and len(starts()) == 7
    rows = read_metrics(metrics)
    assert len(rows) == 201 + 1  # went on at the step it had reached, not at the start
    assert rows[reached + 1]["step"] == reached


def test_a_run_that_has_not_got_to_its_handler_is_stopped_too(study, starts, monkeypatch, tmp_path):
    """Another one may be writing its checkpoint: it must not be killed for that."""
    monkeypatch.setenv("FAKE_IMPORTS_S", "60")
    stop = StopRequest()

    def stop_after_the_start():
        deadline = time.monotonic() + 30
        while not (tmp_path / "starts").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        stop.requested = True

    thread = threading.Thread(target=stop_after_the_start)
    thread.start()
    assert not study().run(stop)
    thread.join()
    monkeypatch.setenv("FAKE_IMPORTS_S", "0")
    assert study().run(StopRequest())


def test_a_run_that_somebody_stops_stops_the_study(study, starts, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    started = []
    start = runner.Runner._start

    def start_and_terminate(self, run, slot):
        process = start(self, run, slot)
        started.append(run.name)
        metrics = run.folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.02)
        process.terminate()
        return process

    monkeypatch.setattr(runner.Runner, "_start", start_and_terminate)
    assert not study(steps=(200,)).run(StopRequest())
    assert len(started) == 1
    only = study(rates=(0.001,), seeds=(1,), arms=[Arm("last", "mlm")], steps=(200,))
    assert not only.run(StopRequest())  # also where no run would have followed


def test_divergence_is_a_result_and_is_not_chosen(study, starts):
    declared = study(rates=(0.5, 0.002))
    assert declared.run(StopRequest())
    grid = {(r["arm"], r["learning_rate"]): r for r in declared.results()[1]}
    assert grid["a", 0.5]["status"] == "diverged" and "not finite" in grid["a", 0.5]["failure"]
    assert declared.best_rates() == {("a", 4): (0.002,), ("b", 4): (0.002,)}
    before = len(starts())
    assert study(rates=(0.5, 0.002)).run(StopRequest())  # nor is it tried again
    assert len(starts()) == before
    assert study(rates=(0.5,), seeds=(1, 2)).best_rates() == {}
    assert study(rates=(0.5,), seeds=(1, 2)).rest() == []


def test_refused_input_and_crashes_end_the_study_in_one_line(study):
    with pytest.raises(ConfigError) as error:
        study(rates=(20.0,)).run(StopRequest())
    assert str(error.value) == "run a lr 20 seed 1: data of another kind"
    with pytest.raises(RunFailed, match="code 1: boom"):
        study(rates=(200.0,)).run(StopRequest())


def test_other_settings_or_other_data_are_refused(study, data):
    assert study().run(StopRequest())
    with pytest.raises(ConfigError, match=r"memory.half_window 16, and is now asked for 3"):
        study(memory__half_window=3).run(StopRequest())
    assert study(train__logging_steps=7).run(StopRequest())  # changes nothing that is reported
    with pytest.raises(ConfigError, match="data.num_workers 1, and is now asked for 0"):
        study(data__num_workers=0).run(StopRequest())  # samples made on the training clock
    config = data.parent / "ds.json"
    config.write_text("{}")
    with pytest.raises(ConfigError, match="another --deepspeed"):
        study(seeds=(1, 2, 3)).run(StopRequest(), deepspeed=config)
    with pytest.raises(ConfigError, match="another --deepspeed"):
        study(arms=[Arm("c", "mlm")]).run(StopRequest(), deepspeed=config)  # of new arms alone, too
    write_tiny_corpus(data, train=9, heldout=4)
    with pytest.raises(ConfigError, match="other data"):
        study().run(StopRequest())


def test_runs_of_one_study_have_as_many_cores_each(study, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)
    assert study().run(StopRequest())
    assert study().run(StopRequest(), parallel=2)  # a report again: nothing runs
    with pytest.raises(ConfigError, match="another number of cores"):
        study(seeds=(1, 2, 3)).run(StopRequest(), parallel=2)
    assert study(seeds=(1, 2, 3)).run(StopRequest())


def test_one_study_at_a_time_works_in_a_folder(study):
    import fcntl

    declared = study()
    declared.folder.mkdir()
    with (declared.folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use"):
            declared.run(StopRequest())


def test_mentions_are_scored_once_before_the_first_run(study, starts, data):
    (data / "tables" / "importance.json").unlink()
    assert study().run(StopRequest())
    assert starts()[0] == "scoring/lr_0.001/seed_1" and len(starts()) == 7


def test_without_probes_another_selection_is_asked_for(study, data):
    for file in (data / "probe").glob("*.jsonl"):
        file.unlink()
    with pytest.raises(DataError, match="--select_by eval/mlm_loss"):
        study()


def test_cores_are_dealt_out_without_overlap(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 4, 7, 9}, raising=False)
    assert slots(2) == [[1, 3], [4, 7]]
    assert slots(1) == [[1, 3, 4, 7, 9]]
    with pytest.raises(ConfigError, match="only 5 core"):
        slots(6)


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, ["0", "1"]), ("4,7", ["4", "7"]), ("", ["", ""])]
)
def test_gpus_are_dealt_out_and_a_study_on_the_cpu_stays_there(monkeypatch, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [runner.child_environment(slot, [slot], 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert found == seen


def test_budgets_are_steps_or_hours():
    assert Budget.parse("1200").keys() == {"train.max_steps": 1200, "train.eval_steps": 50}
    assert Budget.parse("0.5h").keys() == {"train.max_hours": 0.5, "train.max_steps": MANY_STEPS}
    assert Budget.parse("90m").hours == pytest.approx(1.5)
    assert Budget.parse("1800s").hours == pytest.approx(0.5)
    for text in ("soon", "0", "-3", "h", "", "infh", "1.5"):
        with pytest.raises(ConfigError, match="--budget"):
            Budget.parse(text)


def test_collecting_reads_costs_and_skips_a_torn_line(study):
    run = study().grid()[0]
    run.folder.mkdir(parents=True)
    rows = [
        {"step": 0, "time_s": 0.0, "eval/mlm_loss": 9.0},
        {"step": 5, "time_s": 9.0, "throughput/step_s": 1.8, "time/forward_s": 1.0},
        {"step": 10, "time_s": 10.0, "throughput/step_s": 0.2, "time/forward_s": 0.1},
        {"step": 15, "time_s": 12.0, "throughput/step_s": 0.4, "time/forward_s": 0.3},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 15, "tim'
    (run.folder / "metrics.jsonl").write_text(text)
    begun = [{"step": n, "commit": c, "hardware": {"cpu": c}} for n, c in ((0, "a"), (5, "b"))]
    begun.append(begun[0] | {"step": 9})
    record = {"commit": "a", "hardware": {"cpu": "a"}, "starts": begun}
    (run.folder / "environment.json").write_text(json.dumps(record))
    result = runner.collect(run)
    assert result["starts"] == [{"commit": c, "hardware": {"cpu": c}} for c in "ab"]
    assert result["cost"]["throughput/step_s"] == pytest.approx(0.3)  # the first holds warm-up
    assert result["cost"]["time/forward_s"] == pytest.approx(0.2)
    assert (result["steps"], result["time_s"]) == (15, 12.0)
    assert result["evaluations"] == rows[:1]


def test_every_run_goes_on_from_a_start_that_is_trained_once(study, starts, tmp_path):
    def begun():
        declared = study(seeds=(1,), model__model_name_or_path="encoder")
        declared.start = Start(Arm("text", "mlm", {"data.mlm_probability": 0.3}), 3, 0.004)
        return declared

    assert begun().plan()[0] == "new       start text lr 0.004 seed 1"
    assert begun().run(StopRequest())
    assert starts()[0] == "../start" and len(starts()) == 5
    assert begun().run(StopRequest()) and len(starts()) == 5
    folder = tmp_path / "study"
    asked = json.loads((folder / "start" / "request.json").read_text())
    assert asked["model"]["model_name_or_path"] == "encoder" and asked["train"]["export"]
    assert (asked["train"]["max_steps"], asked["data"]["mlm_probability"]) == (3, 0.3)
    for path in folder.glob("runs/*/*/*/request.json"):
        asked = json.loads(path.read_text())
        assert asked["model"]["model_name_or_path"] == str(folder / "start" / "hf")
        assert asked["train"]["max_steps"] == 4 and not asked["train"]["export"]
    other = begun()
    other.start = Start(other.start.arm, 2, 0.004)
    with pytest.raises(ConfigError, match="max_steps"):
        other.run(StopRequest())


def test_a_budget_that_is_added_runs_alone_with_rates_of_its_own(study, starts):
    assert study(seeds=(1,)).run(StopRequest())
    before = starts()
    both = study(seeds=(1, 2), steps=(2, 4))
    assert both.budgets[0].steps == 4
    assert both.run(StopRequest())
    assert starts()[len(before) :] == [
        "a/budget_2/lr_0.001/seed_1",
        "b/budget_2/lr_0.001/seed_1",
        "a/budget_2/lr_0.002/seed_1",
        "b/budget_2/lr_0.002/seed_1",
        "a/lr_0.002/seed_2",
        "b/lr_0.002/seed_2",
        "a/budget_2/lr_0.002/seed_2",
        "b/budget_2/lr_0.002/seed_2",
    ]
    chosen, grid = both.results()
    assert {(r["budget"], r["steps"]) for r in chosen} == {(4, 4), (2, 2)}
    assert len(chosen) == 8 and len(grid) == 8


def test_budgets_of_two_kinds_or_named_twice_are_refused(study):
    with pytest.raises(ConfigError, match="twice"):
        study(steps=(4, 4))
    with pytest.raises(ConfigError, match="do not compare"):
        declared = study()
        Study(
            *(declared.folder, ARMS, (0.001,), (1,)),
            [Budget(steps=4), Budget(hours=0.1)],
            declared.settings,
        )
