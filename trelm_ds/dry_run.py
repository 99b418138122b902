"""The report of ``--dry_run``."""

from __future__ import annotations

import json
import math

from trelm_ds import engine as engines
from trelm_ds.config import Config
from trelm_ds.memory.budget import mentions_per_step, required_bytes


def describe_run(config: Config, ds_config: dict, world_size: int, model, num_keys: int) -> str:
    """The report of ``--dry_run``: configuration, batch arithmetic, parameters, memory estimate."""
    train = config.train
    bf16 = ds_config["bf16"]["enabled"]
    stage = engines.zero_stage(ds_config)
    counts = model.parameter_counts()
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    estimate = estimate_memory(config, counts, stage, world_size, bf16, model, num_keys)
    lines = [
        json.dumps(config.to_dict(), indent=2),
        f"batch: {micro} sequences x {accumulation} accumulation x {world_size} ranks = "
        f"{micro * accumulation * world_size} per step, {train.max_steps} steps",
        f"parameters: {counts['total']:,} total, {counts['trained']:,} trained, "
        f"{counts['routed']:,} in routed FFNs (of which {config.routing.kept_fraction:.1%} a step)"
        if config.routing.form not in ("none", "frozen")
        else f"parameters: {counts['total']:,} total, {counts['trained']:,} trained, 0 routed",
        f"memory per rank (ZeRO {stage}, {'bf16' if bf16 else 'fp32'}): "
        + ", ".join(f"{name} {value / 2**20:,.1f} MiB" for name, value in estimate.items())
        + f"; sum {sum(estimate.values()) / 2**30:.2f} GiB",
    ]
    return "\n".join(lines)


def estimate_memory(
    config: Config, counts: dict, stage: int, world_size: int, bf16: bool, model, num_keys: int
) -> dict[str, float]:
    """Bytes per rank by part; activations are an upper estimate of the stored tensors."""
    width = 2 if bf16 else 4
    total, trained = counts["total"], counts["trained"]
    hf = model.backbone.config
    tokens = config.train.per_device_train_batch_size * config.data.max_seq_length
    per_token_layer = 12 * hf.hidden_size + 2 * hf.intermediate_size
    layers = hf.num_hidden_layers
    if config.model.gradient_checkpointing:
        stored = tokens * (layers * hf.hidden_size + per_token_layer)
    else:
        stored = tokens * layers * per_token_layer
    masked = math.ceil(tokens * config.data.mlm_probability)
    bank = 0
    if config.memory.enabled:
        parts = required_bytes(
            num_keys,
            hf.hidden_size,
            world_size,
            mentions_per_step(config),
            config.memory.virtual_shards,
        )
        bank = sum(parts.values())
    master = 4 * trained if (bf16 or stage > 0) else 0
    return {
        "weights": width * total / (world_size if stage == 3 else 1),
        "gradients": width * trained / (world_size if stage >= 2 else 1),
        "optimizer": (8 * trained + master) / (world_size if stage >= 1 else 1),
        "activations": width * stored + 4 * masked * hf.vocab_size * 2,
        "memory bank": bank,
        # On every rank: vectors and frequencies of all entities, above all.
        "knowledge tables": sum(b.numel() * b.element_size() for b in model.buffers()),
    }
