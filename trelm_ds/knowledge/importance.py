"""Semantic importance of every entity mention (Eq. 1), scored once before training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.distributed import barrier, gather_objects
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.files import own_suffix, write_text
from trelm_ds.knowledge.graph import save_array

logger = logging.getLogger(__name__)

MIN_COSINE = 1e-3
WINDOW_SAMPLES = 1024  # scored together, so that their rows can be batched by length
LOG_EVERY_S = 30.0
POOLINGS = ("mean", "first")
REPLACEMENTS = ("unk", "mask")

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def semantic_importance(original: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
    """SI(e) = |h_o| |h_rep| / (h_o . h_rep) (Eq. 1), the cosine clamped to at least 1e-3.

    Args:
        original: float [n, hidden], sentence vectors h_o.
        replaced: float [n, hidden], of the sentences without the mention.
    Returns:
        float64 [n], at least 1 and at most 1000.
    """
    # float64: sentences with and without a mention are so alike that 1 - cosine is often 1e-4.
    cosine = torch.nn.functional.cosine_similarity(original.double(), replaced.double(), dim=1)
    return 1.0 / cosine.clamp(MIN_COSINE, 1.0)


def pool(states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Sentence vectors float32 [n, hidden]: the mean over real tokens, or the first state."""
    states = states.float()
    if pooling == "first":
        return states[:, 0]
    mask = attention_mask[..., None].float()
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def sentence_vectors(
    rows: list[np.ndarray],
    encoder: Encoder,
    pad_token_id: int,
    pooling: str,
    batch_tokens: int,
    device: torch.device,
) -> torch.Tensor:
    """Vectors float32 [len(rows), hidden] on the CPU; rows of like length go together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors, start = None, 0
    while start < len(order):
        # Sorted by length, so the last row of a batch is its width.
        end = start + 1
        while end < len(order) and len(rows[order[end]]) * (end + 1 - start) <= batch_tokens:
            end += 1
        picked = order[start:end]
        width = len(rows[picked[-1]])
        ids = torch.full((len(picked), width), pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(picked), width, dtype=torch.int64)
        for i, index in enumerate(picked):
            ids[i, : len(rows[index])] = torch.from_numpy(rows[index].astype(np.int64))
            mask[i, : len(rows[index])] = 1
        ids, mask = ids.to(device), mask.to(device)
        pooled = pool(encoder(ids, mask), mask, pooling).cpu()
        if vectors is None:
            vectors = torch.empty(len(rows), pooled.shape[1])
        vectors[picked] = pooled
        start = end
    return vectors


def score_samples(
    samples: Iterable,
    encoder: Encoder,
    *,
    num_entities: int,
    replacement_id: int,
    pad_token_id: int,
    pooling: str = "mean",
    batch_tokens: int = 4096,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """SI of every span of some samples, in order.

    Args:
        samples: ``Sample`` objects.
        encoder: (input_ids, attention_mask), both int64 [n, S], to last states [n, S, hidden];
            the frozen initial checkpoint in evaluation mode.
        num_entities: spans whose key is not below it are words and score 1.
        replacement_id: what a mention's tokens become: the unknown or the mask token.
        pad_token_id: fills short rows.
        pooling: mean | first.
        batch_tokens: most tokens of one forward, padding included.
        device: where the encoder is.
    Returns:
        float32 [spans].
    """
    device = torch.device(device)
    scores: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    pairs: list[tuple[int, int, int]] = []  # original row, replaced row, index into `scores`
    count = 0
    for sample in samples:
        scores.append(np.ones(len(sample.spans), np.float32))
        original = None
        for i, (left, right, key) in enumerate(sample.spans):
            if key >= num_entities:
                continue
            if original is None:
                original = len(rows)
                rows.append(sample.ids)
            replaced = sample.ids.copy()
            replaced[left:right] = replacement_id
            pairs.append((original, len(rows), count + i))
            rows.append(replaced)
        count += len(sample.spans)
    result = np.concatenate(scores) if scores else np.ones(0, np.float32)
    if pairs:
        vectors = sentence_vectors(rows, encoder, pad_token_id, pooling, batch_tokens, device)
        original, replaced, span = (np.array(column) for column in zip(*pairs, strict=True))
        result[span] = semantic_importance(vectors[original], vectors[replaced]).numpy()
    return result


def score_importance(
    model,
    data_dir: str | Path,
    *,
    replacement: str = "unk",
    pooling: str = "mean",
    batch_tokens: int = 4096,
    rank: int = 0,
    world_size: int = 1,
    group=None,
    keep: bool = False,
) -> dict | None:
    """Scores the train split of a prepared folder and replaces ``tables/importance.npy``.

    Written under a temporary name and renamed. ``importance.json`` beside it says which model
    scored; it is not part of the data set's identity.

    Args:
        model: the initial checkpoint: ``last_hidden_states(input_ids, attention_mask)`` and
            ``fingerprint()``, see ``trelm_ds.model.MaskedLanguageModel``.
        data_dir: the prepared folder, shared by the ranks.
        replacement: what a mention's tokens become: unk | mask.
        pooling: sentence vector: mean | first.
        batch_tokens: most tokens of one forward, padding included.
        rank, world_size: each rank scores a contiguous share; all have to call.
        group: host-side process group; used with more than one rank only.
        keep: scores that somebody else has written by the end stay; the result is not theirs.
    Returns:
        The contents of ``importance.json``; None on ranks above 0.
    Raises:
        ConfigError: unknown replacement or pooling.
        DataError: the folder cannot be read.
    """
    if replacement not in REPLACEMENTS or pooling not in POOLINGS:
        raise ConfigError(
            f"importance: replacement {replacement!r} must be {' or '.join(REPLACEMENTS)} and "
            f"pooling {pooling!r} must be {' or '.join(POOLINGS)}"
        )
    data_dir = Path(data_dir)
    manifest = load_manifest(data_dir)
    reader = ShardReader(data_dir, manifest, "train")
    if len(reader) < 1:
        raise DataError(f"{data_dir}: empty corpus: split 'train' holds no sample")
    token_ids = _token_ids(data_dir, replacement)
    first, last = (len(reader) * r // world_size for r in (rank, rank + 1))
    training = model.training
    model.eval()
    try:
        scores = _score_share(
            reader,
            range(first, last),
            model.last_hidden_states,
            num_entities=manifest["graph"]["entities"],
            replacement_id=token_ids[0],
            pad_token_id=token_ids[1],
            pooling=pooling,
            batch_tokens=batch_tokens,
            device=next(model.parameters()).device,
        )
    finally:
        model.train(training)
    tables = data_dir / "tables"
    # Runs that begin at once on one folder score it side by side: each job in files of its own.
    job = gather_objects(own_suffix(), group)[0]
    parts = [tables / f".tmp-importance-{job}-{r:05d}.npy" for r in range(world_size)]
    report = None
    try:
        np.save(parts[rank], scores)
        barrier(group)
        if rank == 0:
            scores = np.concatenate([np.load(part) for part in parts])
            report = {
                "model_sha256": model.fingerprint(),
                "replacement": replacement,
                "pooling": pooling,
                "spans": len(scores),
                "mean": float(scores.mean()) if len(scores) else 1.0,
            }
            if keep and (tables / "importance.json").exists():
                logger.info("another run has scored %s meanwhile: its scores are kept", data_dir)
            else:
                save_array(tables / "importance.npy", scores)
                write_text(tables / "importance.json", json.dumps(report, indent=2) + "\n")
        barrier(group)
    finally:
        parts[rank].unlink(missing_ok=True)
    return report


def _token_ids(data_dir: Path, replacement: str) -> tuple[int, int]:
    """The replacement's and the pad token's id in the folder's tokenizer."""
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    return getattr(tokenizer, f"{replacement}_token_id"), tokenizer.pad_token_id


def _score_share(reader, indices: range, encoder: Encoder, **settings) -> np.ndarray:
    """``score_samples`` over windows of the samples in ``indices``, with progress."""
    started = logged = time.monotonic()
    scores = [np.ones(0, np.float32)]
    for start in range(indices.start, indices.stop, WINDOW_SAMPLES):
        stop = min(start + WINDOW_SAMPLES, indices.stop)
        samples = (reader[i] for i in range(start, stop))
        scores.append(score_samples(samples, encoder, **settings))
        now = time.monotonic()
        if now - logged > LOG_EVERY_S:
            logged = now
            rate = (stop - indices.start) / (now - started)
            logger.info(
                "importance: %d of %d samples | %.0f samples/s | eta %.0f s",
                stop - indices.start,
                len(indices),
                rate,
                (indices.stop - stop) / rate,
            )
    return np.concatenate(scores)
