"""The data path's benchmark: every stage on a prepared folder, and what stops it."""

import time

import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.benchmark import data
from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.processes import ProcessDied, in_own_process
from trelm_ds.benchmark.results import read_result
from trelm_ds.config import load_config
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.stopping import StopRequest

SMALL = ["--samples", "40", "--rounds", "2", "--batch", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def config_of(**settings):
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    fixed = {"sampling.form": "natural", "data.num_workers": 0}
    return load_config("trelm", None, fixed | settings)


def test_every_stage_has_a_row(folder, tmp_path):
    path = tmp_path / "data.json"
    assert main(["data", "--data_dir", str(folder), *SMALL, "--json", str(path)]) == 0
    result = read_result(path)
    rows = {row["stage"]: row for row in result["rows"]}
    assert list(rows) == ["decode", "read", "loader", "loader+workers"]
    for row in rows.values():
        assert set(row) == {"stage", "samples_per_s", "peak_memory_mib"}
        assert row["samples_per_s"] > 0 and row["peak_memory_mib"] > 20
    # The worker is a process with a memory of its own.
    assert rows["loader+workers"]["peak_memory_mib"] > 1.3 * rows["loader"]["peak_memory_mib"]
    assert (result["method"], result["batch"], result["num_workers"]) == ("trelm", 4, 1)


@pytest.mark.parametrize(("stage", "each"), [("decode", 10), ("read", 10), ("loader", 12)])
def test_a_round_is_as_many_samples_as_it_says(folder, monkeypatch, stage, each):
    """Counted where samples are decoded, over two rounds."""
    decoded = []
    from trelm_ds.data import shards

    for module in (data, shards):
        real = module.decode_sample
        monkeypatch.setattr(
            module, "decode_sample", lambda *a, real=real, **k: decoded.append(1) or real(*a, **k)
        )
    config = config_of(train__per_device_train_batch_size=4, sampling__knowledge_rows=0.0)
    work = data.STAGES[stage](config, folder, 10)
    assert next(work) == each
    first = len(decoded)
    assert next(work) == each
    work.close()
    assert len(decoded) - first == each


def test_a_stop_request_ends_it(folder, tmp_path, monkeypatch):
    stop = StopRequest()
    stop.requested = True
    assert data.measure_stage("read", config_of(), folder, 10, 10**9, stop) is None
    monkeypatch.setattr(StopRequest, "install", lambda self: setattr(self, "requested", True))
    path = tmp_path / "data.json"
    argv = ["data", "--data_dir", str(folder), "--rounds", "1000000000", "--json", str(path)]
    assert main(argv) == 75 and not path.exists()


class WhenThere:
    """A stop request that comes when a file does."""

    def __init__(self, path):
        self.path = path

    @property
    def requested(self):
        return self.path.exists()


def wait_for_a_stop(path, stop):
    path.write_text("begun")
    while not stop.requested:
        time.sleep(0.01)
    return "ended in order"


def test_the_measuring_process_has_the_request_as_a_signal(tmp_path):
    begun = tmp_path / "begun"
    assert in_own_process(wait_for_a_stop, begun, stop=WhenThere(begun)) == "ended in order"


def refuse(stop):
    raise ConfigError("not with these")


def die(stop):
    raise SystemExit(9)


def test_errors_of_the_measuring_process_are_the_callers():
    with pytest.raises(ConfigError, match="not with these"):
        in_own_process(refuse)
    with pytest.raises(ProcessDied, match="code 9"):
        in_own_process(die)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--method", "trellm"], "trelm"),
        (["--data_dir", "nowhere"], "not found"),
        (["--json", "missing/folder/x.json"], "no such folder"),
    ],
)
def test_bad_flags_are_one_line(folder, capsys, argv, said):
    assert main(["data", "--data_dir", str(folder), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]


def test_a_damaged_shard_is_one_line(folder, tmp_path, capsys):
    write_tiny_corpus(tmp_path / "data")
    shard = tmp_path / "data" / "shards" / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError):
        data.measure_stage("read", config_of(), tmp_path / "data", 500, 3, StopRequest())
    assert main(["data", "--data_dir", str(tmp_path / "data"), "--samples", "500"]) == 2
    assert "train-00000.tar" in capsys.readouterr().err
