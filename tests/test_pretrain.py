"""What a run says and refuses before it begins."""

import pytest
import torch

from trelm_ds import engine, pretrain
from trelm_ds.config import build_config
from trelm_ds.distributed import World
from trelm_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("width", "rate", "warned"), [(768, 2e-3, True), (768, 1e-4, False), (128, 2e-3, False)]
)
def test_the_sample_s_learning_rate_is_not_for_a_large_model(caplog, width, rate, warned):
    settings = {"model.hidden_size": width, "model.num_attention_heads": 4}
    pretrain._warn_of_the_rate(build_config(settings | {"train.learning_rate": rate}))
    assert ("1e-4 or less" in caplog.text) == warned


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch):
    world = World(0, 1, 0, "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    assert engine.local_device(world).type == "cpu"
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ConfigError, match="torch sees none"):
        engine.local_device(world)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert engine.local_device(world).type == "cpu"


@pytest.mark.parametrize(
    ("loaded", "refused"), [([True] * 3, False), ([False] * 3, False), ([True, False, True], True)]
)
def test_ranks_have_the_same_operators(monkeypatch, loaded, refused):
    monkeypatch.setattr("trelm_ds.distributed.gather_objects", lambda mine: loaded)
    if refused:
        with pytest.raises(ConfigError, match=r"on rank\(s\) 1: "):
            pretrain._refuse_mixed_kernels(True)
    else:
        pretrain._refuse_mixed_kernels(loaded[0])
