"""Fine-tuning of an exported encoder on a downstream task: one small loop for all of them."""

from __future__ import annotations

import copy
import logging
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import nn

from trelm_ds.backbone import max_positions
from trelm_ds.config import TrainConfig
from trelm_ds.downstream.examples import Example, Task, encode_examples, spread
from trelm_ds.downstream.settings import FineTuning
from trelm_ds.engine import has_bf16
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.schedules import learning_rate

logger = logging.getLogger(__name__)

BUCKET_BATCHES = 32  # batches drawn at a time and sorted by length among themselves


class DownstreamModel(nn.Module):
    """An encoder with markers in its vocabulary and a head: linear, tanh, dropout, linear."""

    def __init__(self, encoder: nn.Module, spans: int, num_outputs: int):
        """
        Args:
            encoder: a Hugging Face BERT or RoBERTa without head; changed in place.
            spans: marked spans of an example: two markers each; the head reads one state of each,
                or that of the first token if there are none.
            num_outputs: labels, or 1.
        """
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.types = config.type_vocab_size
        if spans:
            encoder.set_input_embeddings(_with_markers(encoder.get_input_embeddings(), 2 * spans))
        width = max(1, spans) * config.hidden_size
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output = nn.Linear(config.hidden_size, num_outputs)
        for layer in (self.dense, self.output):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)

    def forward(self, input_ids, attention_mask, token_types, positions) -> torch.Tensor:
        """Logits [B, num_outputs] from int64 [B, S] (three times) and positions [B, P]."""
        if self.types < 2:  # RoBERTa knows one type of token
            token_types = torch.zeros_like(token_types)
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_types
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)[:, None]
        picked = self.dropout(states[rows, positions].flatten(1))
        return self.output(self.dropout(torch.tanh(self.dense(picked))))


def _with_markers(table: nn.Embedding, markers: int) -> nn.Embedding:
    """The table with rows for new tokens, drawn like its own rows: their mean and spread."""
    old = table.weight.detach()
    new = old.mean(0) + old.std(0) * torch.randn(markers, old.shape[1], device=old.device)
    larger = nn.Embedding(
        len(old) + markers, old.shape[1], table.padding_idx, device=old.device, dtype=old.dtype
    )
    with torch.no_grad():
        larger.weight.copy_(torch.cat([old, new.to(old.dtype)]))
    return larger


def length_bucketed(
    examples: list[Example], batch_size: int, rng: random.Random
) -> Iterator[list[Example]]:
    """One epoch in random order, in batches of similar lengths (little padding)."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    batches = []
    for begin in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = order[begin : begin + batch_size * BUCKET_BATCHES]
        bucket.sort(key=lambda i: len(examples[i].ids))
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        yield [examples[i] for i in batch]


def collate(batch: list[Example], pad: int, device) -> dict[str, torch.Tensor]:
    """Padded int64 inputs of ``DownstreamModel.forward``."""
    width = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), width), pad, dtype=torch.int64)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        types[row, : len(example.ids)] = torch.tensor(example.token_types)
    positions = torch.tensor([example.positions for example in batch])
    tensors = {
        "input_ids": ids, "attention_mask": mask, "token_types": types, "positions": positions,
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def task_loss(logits: torch.Tensor, batch: list[Example], kind: str) -> torch.Tensor:
    """Mean loss in float32: sigmoid cross-entropy, softmax cross-entropy, or squared error."""
    logits = logits.float()
    if kind == "multilabel":
        target = torch.zeros_like(logits)
        for row, example in enumerate(batch):
            target[row, example.target] = 1
        return nn.functional.binary_cross_entropy_with_logits(logits, target)
    target = torch.tensor([example.target for example in batch], device=logits.device)
    if kind == "regression":
        return nn.functional.mse_loss(logits[:, 0], target.float())
    return nn.functional.cross_entropy(logits, target)


def train(
    model: DownstreamModel,
    examples: list[Example],
    kind: str,
    settings: FineTuning,
    pad: int,
    seed: int,
) -> float:
    """Fine-tunes in place by AdamW; returns the mean loss of the last epoch.

    Raises:
        ConfigError: the loss is not finite any more.
    """
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    schedule = TrainConfig(learning_rate=settings.learning_rate)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    steps = settings.epochs * math.ceil(len(examples) / settings.batch_size)
    rng, step = random.Random(seed), 0
    model.train()
    for epoch in range(settings.epochs):
        total = 0.0
        for batch in length_bucketed(examples, settings.batch_size, rng):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / (steps + 1), schedule)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                logits = model(**collate(batch, pad, device))
            loss = task_loss(logits, batch, kind)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
            optimizer.step()
            total += loss.item() * len(batch)
            if not math.isfinite(total):
                raise ConfigError(
                    f"the loss is not finite at step {step} of seed {seed}: lower --learning_rate"
                )
        logger.info(
            "seed %d epoch %d/%d | loss %.4f", seed, epoch + 1, settings.epochs,
            total / len(examples),
        )  # fmt: skip
    return total / len(examples)


@torch.no_grad()
def predict(
    model: DownstreamModel, examples: list[Example], task: Task, pad: int, batch_size: int
) -> list:
    """What the model answers, in the order of ``examples``: sets of names, names or numbers."""
    device = next(model.parameters()).device
    answers: list = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    model.eval()
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            logits = model(**collate([examples[i] for i in chosen], pad, device))
        for i, row in zip(chosen, logits.float().cpu(), strict=True):
            answers[i] = _answer(row, task)
    return answers


def _answer(logits: torch.Tensor, task: Task):
    if task.kind == "regression":
        return logits.item()
    if task.kind == "multiclass":
        return task.labels[int(logits.argmax())]
    return {name for name, value in zip(task.labels, logits.tolist(), strict=True) if value > 0}


def finetune(
    backbone: nn.Module,
    tokenizer,
    task: Task,
    settings: FineTuning,
    device: torch.device | str = "cpu",
) -> dict:
    """Fine-tunes a copy of the encoder once per seed and scores it; the backbone stays as it is.

    The last epoch's model is scored on every split: none is used to choose anything.

    Args:
        backbone: Hugging Face BERT or RoBERTa for masked language modelling.
        tokenizer: its tokenizer.
        task: what to learn.
        settings: how.
        device: where to train; the caller's random state is restored afterwards.
    Returns:
        ``name``, ``metric``, ``scores``: {split: {score: {mean, std, seeds}}} (std: None for one
        seed), ``counts``, ``labels``, ``settings`` (as resolved), ``time_s``.
    Raises:
        ConfigError: more tokens than the model has positions for, or a loss that is not finite.
        DataError: the tokenizer is not the model's.
    """
    device = torch.device(device)
    vocab_size = backbone.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise DataError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}")
    positions = max_positions(backbone.config)
    length = settings.max_seq_length or min(128, positions)
    if length > positions:
        raise ConfigError(f"--max_seq_length {length} is above the model's {positions} positions")
    start, counts, encoded = time.perf_counter(), Counter(truncated=0), {}
    chosen = {"train": spread(task.train, settings.max_train_samples)}
    chosen |= {name: spread(e, settings.max_eval_samples) for name, e in task.evals.items()}
    for split, examples in chosen.items():
        encoded[split] = encode_examples(
            examples, tokenizer, task.labels, vocab_size, length, counts
        )
        counts[split] = len(examples)
    logger.info("%s: %s", task.name, ", ".join(f"{k} {v}" for k, v in counts.items()))

    scores: dict[str, dict[str, list[float]]] = {}
    cuda = [device] if device.type == "cuda" else []
    for seed in range(settings.seeds):
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            # On the CPU and then moved, so that a seed means the same on every device.
            encoder = copy.deepcopy(backbone.base_model).cpu()
            model = DownstreamModel(encoder, task.spans, len(task.labels) or 1).to(device)
            pad = tokenizer.pad_token_id
            train(model, encoded["train"], task.kind, settings, pad, seed)
            for split in task.evals:
                answers = predict(model, encoded[split], task, pad, settings.eval_batch_size)
                found = task.score(answers, [example.target for example in chosen[split]])
                for name, value in found.items():
                    scores.setdefault(split, {}).setdefault(name, []).append(value)
                logger.info(
                    "%s seed %d %s | %s %.4f", task.name, seed, split, task.metric,
                    found[task.metric],
                )  # fmt: skip
    return {
        "name": task.name,
        "metric": task.metric,
        "scores": {
            split: {name: _summary(values) for name, values in by_name.items()}
            for split, by_name in scores.items()
        },
        "counts": dict(counts),
        "labels": len(task.labels),
        "settings": asdict(settings)
        | {"max_seq_length": length, "dtype": "bfloat16" if has_bf16(device) else "float32"},
        "time_s": time.perf_counter() - start,
    }


def _summary(values: list[float]) -> dict:
    """Mean, sample standard deviation over seeds (None for one seed), and each seed's value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "seeds": values}
