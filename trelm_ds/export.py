"""A checkpoint as a Hugging Face folder that ``AutoModelForMaskedLM.from_pretrained`` loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, BertConfig, RobertaConfig

from trelm_ds.backbone import max_positions, no_progress_bar
from trelm_ds.errors import CheckpointError, ConfigError, one_line
from trelm_ds.files import fsync, fsync_tree
from trelm_ds.metrics import read_metrics
from trelm_ds.routing.ffn import to_hf_state_dict

BACKBONE = "backbone."
EXTRAS = "trelm_extras.safetensors"
_CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig}


def backbone_from_state(state: dict[str, torch.Tensor], hf_config) -> torch.nn.Module:
    """BertForMaskedLM or RobertaForMaskedLM with the weights of a ``TrelmModel`` state.

    Args:
        state: ``TrelmModel.state_dict()``.
        hf_config: the backbone's Hugging Face configuration.
    Raises:
        CheckpointError: the state lacks a weight of the backbone, or has others or other shapes.
    """
    weights = {k[len(BACKBONE) :]: v for k, v in state.items() if k.startswith(BACKBONE)}
    backbone = AutoModelForMaskedLM.from_config(hf_config)
    try:
        report = backbone.load_state_dict(to_hf_state_dict(weights), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"not the weights of this backbone: {one_line(error)}") from None
    # One of two tied names is enough: both are the same parameter.
    loaded = {
        id(p)
        for name, p in backbone.named_parameters(remove_duplicate=False)
        if name not in report.missing_keys
    }
    every = dict(backbone.named_parameters(remove_duplicate=False))
    missing = [name for name in report.missing_keys if id(every.get(name)) not in loaded]
    if missing or report.unexpected_keys:
        raise CheckpointError(
            f"not the weights of this backbone: missing {missing or 'nothing'}, "
            f"unexpected {report.unexpected_keys or 'nothing'}"
        )
    return backbone


def export_model(
    state: dict[str, torch.Tensor],
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    metrics: dict[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the Hugging Face folder, all of it or nothing.

    It holds ``config.json``, ``model.safetensors``, the tokenizer, a model card and, in
    ``trelm_extras.safetensors``, what training had besides the backbone (injection, decoder):
    using the model needs none of that.

    Args:
        state: float32 ``TrelmModel.state_dict()``, see ``checkpoint.load_model_state``.
        checkpoint: folder with ``config.json`` (the run's), ``backbone.json`` and ``tokenizer/``.
        output_dir: written under a temporary name beside it, then renamed.
        metrics: held-out scores for the card.
        overwrite: replace an earlier export.
    Returns:
        ``output_dir``.
    Raises:
        CheckpointError: the checkpoint lacks one of these, or its weights do not fit.
        ConfigError: ``output_dir`` exists and may not be replaced.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists() and not _is_export(output_dir):
        raise ConfigError(f"{output_dir} exists: choose another folder or remove it first")
    if output_dir.exists() and not overwrite:
        raise ConfigError(
            f"{output_dir} exists: choose another folder, or replace that export with --overwrite"
        )
    run = _read_json(checkpoint / "config.json")
    hf_config = _backbone_config(checkpoint / "backbone.json")
    if not (checkpoint / "tokenizer").is_dir():
        raise CheckpointError(f"{checkpoint}: no tokenizer folder in it")
    backbone = backbone_from_state(state, hf_config)
    extras = {
        k: v.contiguous()
        for k, v in state.items()
        if not k.startswith(BACKBONE) and isinstance(v, torch.Tensor)
    }
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".tmp-{output_dir.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with no_progress_bar():
            backbone.save_pretrained(temporary, safe_serialization=True)
        for file in sorted((checkpoint / "tokenizer").iterdir()):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        _limit_length(temporary / "tokenizer_config.json", max_positions(hf_config))
        save_file(extras, temporary / EXTRAS)
        (temporary / "README.md").write_text(model_card(run, hf_config, checkpoint, metrics or {}))
        fsync_tree(temporary)
        _publish(temporary, output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output_dir


def _limit_length(path: Path, length: int) -> None:
    """Has the exported tokenizer know the model's longest sequence, at which it then truncates.

    A prepared folder's tokenizer is for any model, and has no limit.
    """
    content = _read_json(path) if path.is_file() else {}
    content["model_max_length"] = length
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_export(folder: Path) -> bool:
    """Only what looks like a model folder is ever replaced."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / EXTRAS).is_file())


def _publish(temporary: Path, output_dir: Path) -> None:
    old = output_dir.with_name(f".old-{output_dir.name}-{os.getpid()}")
    if output_dir.exists():
        os.rename(output_dir, old)
    os.rename(temporary, output_dir)
    fsync(output_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _backbone_config(path: Path):
    content = _read_json(path)
    kind = content.get("model_type")
    if kind not in _CONFIGS:
        raise CheckpointError(f"{path}: model_type {kind!r} is not one of {', '.join(_CONFIGS)}")
    return _CONFIGS[kind].from_dict(content)


def model_card(run: dict, hf_config, checkpoint: Path, metrics: dict[str, float]) -> str:
    """The README.md of an exported model: what it is, what it was trained with, how it scores."""
    method, train = run.get("method", "unknown"), run.get("train", {})
    start = run.get("model", {}).get("model_name_or_path")
    batch = train.get("per_device_train_batch_size"), train.get("gradient_accumulation_steps")
    rows = [
        ("Method", f"`{method}`"),
        ("Architecture", f"{hf_config.model_type}, {hf_config.num_hidden_layers} layers, "
         f"hidden {hf_config.hidden_size}, vocabulary {hf_config.vocab_size}"),
        ("Start", f"`{Path(start).name}`" if start else "from scratch"),
        ("Data", f"`{Path(run.get('data', {}).get('data_dir') or 'sample').name}`"),
        ("Checkpoint", f"`{checkpoint.name}`"),
        ("Sequences per rank and step", f"{batch[0]} x {batch[1]} accumulated"),
        ("Learning rate", str(train.get("learning_rate"))),
        ("Seed", str(train.get("seed"))),
    ]  # fmt: skip
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [trelm, knowledge-enhanced]",
        "---",
        "",
        f"# {hf_config.model_type.upper()} pre-trained with `{method}`",
        "",
        "A masked language model whose pre-training used a knowledge graph (TRELM, "
        "arXiv 2403.11203). Nothing of the graph is needed to use it:",
        "",
        "```python",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForMaskedLM.from_pretrained("FOLDER")',
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    if metrics:
        lines += [
            "",
            "## Held-out scores",
            "",
            "Without injection and memory: MLM loss in nats per masked token, P@1 of the cloze "
            "probe as macro average over relations.",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| `{name}` | {value:.4f} |" for name, value in sorted(metrics.items())),
        ]
    lines += [
        "",
        f"`{EXTRAS}` holds the knowledge injection and the relational decoder of the training "
        "run; `transformers` does not read it.",
        "",
    ]
    return "\n".join(lines)


def last_evaluation(metrics_file: str | Path, step: int) -> dict[str, float]:
    """The ``eval/*`` values of a run's ``metrics.jsonl`` at a step; empty if there are none."""
    return {
        key: value
        for row in read_metrics(metrics_file)
        if row.get("step") == step
        for key, value in row.items()
        if key.startswith("eval/") and isinstance(value, (int, float))
    }
