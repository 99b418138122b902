"""Small training runs for tests: a configuration, a trainer, and what the run left behind."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch

from trelm_ds import engine as engines
from trelm_ds.config import load_config
from trelm_ds.distributed import get_world
from trelm_ds.stopping import StopRequest

REPO = Path(__file__).resolve().parents[2]

TINY = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.hidden_dropout_prob": 0.1,
    "model.attention_probs_dropout_prob": 0.1,
    "data.max_seq_length": 64,
    "data.num_workers": 0,
    "train.per_device_train_batch_size": 4,
    "train.max_steps": 6,
    "train.logging_steps": 1,
    "train.eval_steps": 0,
    "train.eval_batches": 1,
    "train.save_steps": 0,
    "train.export": False,
    "train.learning_rate": 1e-3,
    "train.bf16": False,
    "memory.half_window": 4,
    "decoding.num_negatives": 8,
    "routing.rotation_steps": 2,
}

# Dropout draws differ between ranks, so comparisons across world sizes run without it.
NO_DROPOUT = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0}


def make_trainer(data_dir, output_dir, method="trelm", zero="zero2", device=None, **overrides):
    """A trainer on the already initialised process group; keys of ``overrides`` use ``__``."""
    from trelm_ds.trainer import Trainer

    world = get_world()
    flat = dict(TINY) | {key.replace("__", "."): value for key, value in overrides.items()}
    flat |= {"data.data_dir": str(data_dir), "train.output_dir": str(output_dir)}
    config = load_config(method, overrides=flat)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    device = device or torch.device("cpu")
    engines.quiet_deepspeed(device)
    given = engines.read_deepspeed_config(REPO / "ds_configs" / f"{zero}.json")
    resolved = engines.resolve_deepspeed_config(
        copy.deepcopy(given), config, world.size, config.train.bf16
    )
    engines.init_distributed(world, device)
    trainer = Trainer(config, resolved, world, device, StopRequest())
    trainer.resume()
    return trainer


def full_parameters(trainer) -> dict[str, torch.Tensor]:
    """Every parameter in full and float32, whatever the ZeRO stage; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = {}
    for name, parameter in trainer.engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        full[name] = (parameter if value is None else value).detach().float().cpu().clone()
    return full


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def losses(trainer) -> list[tuple[int, float, float, float]]:
    from trelm_ds.metrics import read_metrics

    rows = read_metrics(trainer.output_dir / "metrics.jsonl")
    return [
        (r["step"], r["train/loss"], r["train/mlm_loss"], r.get("train/cka_loss"))
        for r in rows
        if "train/loss" in r
    ]
