"""What a run says and refuses before it begins."""

import contextlib
import io
import os
import platform
from types import SimpleNamespace

import pytest
import torch
from multiprocess import run_ranks

from trelm_ds import engine, pretrain
from trelm_ds.config import build_config
from trelm_ds.distributed import World, report_once
from trelm_ds.errors import ConfigError, DataError, TrelmError
from trelm_ds.stopping import StopRequest


@pytest.mark.parametrize(
    ("width", "rate", "warned"), [(768, 2e-3, True), (768, 1e-4, False), (128, 2e-3, False)]
)
def test_the_sample_s_learning_rate_is_not_for_a_large_model(caplog, width, rate, warned):
    pretrain._warn_of_the_rate(build_config({"train.learning_rate": rate}), width)
    assert ("1e-4 or less" in caplog.text) == warned


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch):
    world = World(0, 1, 0, "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    assert engine.local_device(world).type == "cpu"
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="torch sees none"):
        engine.local_device(world)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engine.local_device(world).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert engine.local_device(world).type == "cpu"


def test_deepspeeds_cpu_is_the_trainers_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    world = World(1, 2, 1, "none")
    assert engine.local_device(world) == torch.device("cuda", 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert engine.local_device(world) == torch.device("cpu")


def test_bf16_is_the_default_of_gpus_that_compute_in_it(monkeypatch):
    capabilities = {0: (7, 0), 1: (8, 0)}  # a V100, which emulates it, is the current device
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    monkeypatch.setattr(torch.version, "hip", None)
    found = [engine.use_bf16(build_config(), torch.device("cuda", i)) for i in capabilities]
    assert found == [False, True]
    assert not engine.use_bf16(build_config(), torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert engine.use_bf16(build_config(), torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("loaded", "refused"), [([True] * 3, False), ([False] * 3, False), ([True, False, True], True)]
)
def test_ranks_have_the_same_operators(monkeypatch, loaded, refused):
    monkeypatch.setattr("trelm_ds.pretrain.gather_objects", lambda mine: loaded)
    if refused:
        with pytest.raises(ConfigError, match=r"on rank\(s\) 1: "):
            pretrain._refuse_mixed_kernels(True)
    else:
        pretrain._refuse_mixed_kernels(loaded[0])


@pytest.mark.parametrize(
    ("error", "met", "said"),
    [
        (ConfigError("a"), False, ""),  # as on rank 0, which says it
        (DataError("a"), True, "error on rank 1: a"),
        (DataError("a", everywhere=True), True, ""),
        (ConfigError("a\nb", everywhere=False), False, "error on rank 1: a b"),
    ],
)
def test_an_error_is_said_once_and_by_a_rank_that_has_it(monkeypatch, capsys, error, met, said):
    monkeypatch.setattr("trelm_ds.distributed.is_initialised", lambda: met)
    monkeypatch.setenv("RANK", "1")
    report_once(error)
    assert capsys.readouterr().err.strip() == said
    monkeypatch.setenv("RANK", "0")
    report_once(error)
    assert capsys.readouterr().err.strip() == "error: " + " ".join(str(error).split())


def refused_runs(rank, world_size, folder):
    """What each rank raises, and says, of folders that do not serve, and what is left of them."""
    pretrain.SHARED_WAITS_S = (0.0,)
    (folder / f"node{rank}").mkdir()
    os.chdir(folder / f"node{rank}")
    found = {}
    for name, data, output in (
        ("unshared", "data", "run"),
        ("no data", "none", "run"),
        ("a file on the way", "data", str(folder / "data" / "manifest.json" / "run")),
    ):
        argv = ["--data_dir", str(folder / data), "--output_dir", output]
        said = io.StringIO()
        with pytest.raises(TrelmError) as caught, contextlib.redirect_stderr(said):
            try:
                pretrain.run(argv, StopRequest())
            except TrelmError as error:
                report_once(error)
                raise
        found[name] = (caught.value.exit_code, str(caught.value), said.getvalue())
    return found, sorted(str(path.relative_to(folder)) for path in folder.glob("node*/**/*"))


def test_folders_that_do_not_serve_are_refused_by_all_ranks_and_said_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    (first, left), (second, _) = run_ranks(refused_runs, 2, tmp_path)
    host = platform.node()
    for name, code, part in (
        ("unshared", 2, f"run is not shared: what {host} writes there is not seen on {host};"),
        ("no data", 2, "none: no manifest.json there"),
        ("a file on the way", 1, "manifest.json"),
    ):
        assert first[name][:2] == second[name][:2]
        assert first[name][0] == code and part in first[name][1]
        assert first[name][2].count("\n") == 1 and second[name][2] == ""
    assert left == ["node0/run", "node0/run/.lock"]


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        ({}, True),
        ({"routing.truncated_depth": 0.5}, False),
        ({"routing.form": "block", "routing.start": 0.3}, False),
    ],
)
def test_a_budget_in_hours_that_decides_what_trains_is_not_changed_on_resume(settings, free):
    from transformers import BertConfig

    from trelm_ds.trainer import Trainer  # seconds, which the ranks above do without

    def identity(hours):
        trainer = object.__new__(Trainer)
        trainer.config = build_config(settings | {"train.max_hours": hours})
        trainer.model = SimpleNamespace(backbone=SimpleNamespace(config=BertConfig()))
        trainer.manifest, trainer._tables_digest = {"dataset_id": "x"}, None
        trainer.loader = SimpleNamespace(global_batch=8)
        return trainer._identity()

    assert (identity(1.0) == identity(2.0)) == free
