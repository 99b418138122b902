"""Fine-tuning the models of a study: what is kept, refused and reported."""

import json

import pytest
from downstream.downstream_models import save_tiny_model, write_glue, write_typing

from trelm_ds.benchmark.downstream import DownstreamTask, score_runs
from trelm_ds.benchmark.runner import Run
from trelm_ds.downstream.settings import FineTuning
from trelm_ds.downstream.tasks import fine_tune, headline
from trelm_ds.errors import ConfigError
from trelm_ds.stopping import StopRequest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_typing(folder / "toy", sizes=(16, 8))
    write_glue(folder / "glue", sizes=(16, 8))
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "trelm" / "seed_1"
    folder.mkdir(parents=True)
    save_tiny_model(folder / "hf")
    return Run("trelm", 1e-3, 1, None, folder)


def test_scores_are_those_of_the_task_and_kept_for_the_next_start(data, run, monkeypatch):
    task = DownstreamTask.parse(f"typing={data / 'toy'}", seeds=1, max_train_samples=8)
    assert task.settings.epochs == 10 and task.settings.max_train_samples == 8
    (row,) = score_runs([run], [task], StopRequest())
    again = fine_tune("typing", run.folder / "hf", data / "toy", task.settings, "cpu")
    measure, score = headline(again)
    assert (row["measure"], row["score"]) == (measure, score) and measure.startswith("dev ")
    assert (row["arm"], row["seed"], row["task"]) == ("trelm", 1, "typing toy")

    monkeypatch.setattr("trelm_ds.downstream.tasks.fine_tune", None)  # not asked for again
    assert score_runs([run], [task], StopRequest()) == [row]
    other = DownstreamTask.parse(f"typing={data / 'toy'}", seeds=2, max_train_samples=8)
    with pytest.raises(TypeError):  # asked for other settings it is
        score_runs([run], [other], StopRequest())
    write_typing(data / "elsewhere" / "toy", sizes=(8, 8))
    other = DownstreamTask("typing", data / "elsewhere" / "toy", task.settings)
    with pytest.raises(TypeError):  # nor are other data of that name the same
        score_runs([run], [other], StopRequest())


def test_glue_is_quoted_by_its_average(data, run):
    task = DownstreamTask("glue", data / "glue", FineTuning(epochs=1, seeds=1))
    (row,) = score_runs([run], [task], StopRequest())
    assert row["measure"] == "dev average" and row["score"] == row["result"]["average"]


def test_a_stop_request_and_a_run_without_a_model(data, run):
    task = DownstreamTask.parse(f"typing={data / 'toy'}")
    stop = StopRequest()
    stop.requested = True
    assert score_runs([run], [task], stop) is None
    bare = Run("mlm", 1e-3, 1, None, run.folder.parent)
    with pytest.raises(ConfigError, match="run without --downstream"):
        score_runs([bare], [task], StopRequest())
    assert not list(run.folder.glob("downstream/*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cooking=.", "tasks are typing, relation, glue"),
        ("typing", "expected TASK=DIR"),
        ("typing=nowhere", "no folder nowhere"),
    ],
)
def test_what_is_no_task_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        DownstreamTask.parse(text)


def test_settings_are_checked_before_anything_runs(data):
    with pytest.raises(ConfigError, match="--seeds 0"):
        DownstreamTask.parse(f"typing={data / 'toy'}", seeds=0)


def test_rows_are_json(data, run):
    task = DownstreamTask.parse(f"typing={data / 'toy'}", seeds=1, max_train_samples=4)
    json.dumps(score_runs([run], [task], StopRequest()), allow_nan=False)
