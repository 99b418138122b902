"""Semantic importance of every entity mention (Eq. 1), scored once before training."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.table_files import load_array, save_array
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.distributed import ALONE, World, gather_objects, together
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.evaluation_mode import evaluation_mode
from trelm_ds.files import write_text

logger = logging.getLogger(__name__)

MIN_COSINE = 1e-3
WINDOW_SAMPLES = 1024  # scored together, so that their rows can be batched by length
MAX_PARTS = 4096  # of a corpus: each is a file while the rest is scored
LOG_EVERY_S = 30.0
POOLINGS = ("mean", "first")
REPLACEMENTS = ("unk", "mask")
_PARTS = ".scores-"  # begins the name of a folder of parts

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
    bf16: bool = False,
    world: World = ALONE,
    group=None,
    keep: bool = False,
    resumable: bool = False,
) -> dict | None:
    """Scores the train split of a prepared folder and replaces ``tables/importance.npy``.

    The ranks go through the corpus in rounds, a part each, and every machine's first one gathers
    the scores and writes the table, because the folder may be a copy on its disk. What a batch
    holds follows from the corpus alone: the scores are the same for any number of ranks.

    Files are written under a temporary name and renamed. ``importance.json`` beside the table says
    which model scored; it is not part of the data set's identity.

    Args:
        model: the initial checkpoint: ``last_hidden_states(input_ids, attention_mask)`` and
            ``fingerprint()``, see ``trelm_ds.backbone.MaskedLanguageModel``.
        data_dir: the prepared folder, shared by the ranks or a copy on each machine.
        replacement: what a mention's tokens become: unk | mask.
        pooling: sentence vector: mean | first.
        batch_tokens: most tokens of one forward, padding included.
        bf16: the encoder computes by autocast.
        world: this process's place among the ranks; all have to call.
        group: host-side process group; used with more than one rank only.
        keep: scores that somebody else has written by the end stay; the result is not theirs.
        resumable: parts that are done wait in files, so that a call with the same corpus, model
            and settings goes on after a kill, on any number of ranks. One such job at a time.
    Returns:
        The contents of ``importance.json``; None on ranks above 0.
    Raises:
        ConfigError: unknown replacement or pooling, or the ranks' models differ.
        DataError: the folder cannot be read or written; on all ranks alike.
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
    identity = {
        "dataset_id": manifest["dataset_id"],
        "model_sha256": model.fingerprint(),
        "replacement": replacement,
        "pooling": pooling,
        "batch_tokens": batch_tokens,
        "bf16": bf16,
    }
    identities = gather_objects(identity, group)
    if any(other != identities[0] for other in identities):
        raise ConfigError("importance: the ranks' models, data or settings differ", everywhere=True)
    token_ids = _token_ids(data_dir, replacement)
    device = next(model.parameters()).device

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model.last_hidden_states(ids, mask)

    settings = {
        "num_entities": manifest["graph"]["entities"],
        "replacement_id": token_ids[0],
        "pad_token_id": token_ids[1],
        "pooling": pooling,
        "batch_tokens": batch_tokens,
        "device": device,
    }
    # Named by all that the scores depend on: another model's parts are never taken for these.
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    tables = data_dir / "tables"
    folder = tables / f"{_PARTS}{digest[:32]}" if resumable else None
    with evaluation_mode(model):
        scores = _score_parts(reader, encode, settings, folder, world, group)

    def write() -> dict | None:
        if world.local_rank != 0:
            return None
        table = np.concatenate([scores[part] for part in sorted(scores)])
        if len(table) != manifest["splits"]["train"]["spans"]:
            raise DataError(f"{data_dir}: the training shards hold {len(table)} spans")
        report = {key: identity[key] for key in ("model_sha256", "replacement", "pooling", "bf16")}
        report |= {"spans": len(table), "mean": float(table.mean()) if len(table) else 1.0}
        if keep and (tables / "importance.json").exists():
            logger.info("another run has scored %s meanwhile: its scores are kept", data_dir)
        else:
            save_array(tables / "importance.npy", table)
            write_text(tables / "importance.json", json.dumps(report, indent=2) + "\n")
        return report

    report = together(write, group)[0]
    if resumable and world.local_rank == 0:  # no machine needs a part any more, nor those of others
        for left in tables.glob(f"{_PARTS}*"):
            shutil.rmtree(left, ignore_errors=True)
    return report if world.is_main else None


def _token_ids(data_dir: Path, replacement: str) -> tuple[int, int]:
    """The replacement's and the pad token's id in the folder's tokenizer."""
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    return getattr(tokenizer, f"{replacement}_token_id"), tokenizer.pad_token_id


def _score_parts(
    reader: ShardReader, encoder: Encoder, settings: dict, folder: Path | None, world: World, group
) -> dict[int, np.ndarray]:
    """Scores of every part of the corpus, on the first rank of each machine; progress on rank 0.

    Args:
        settings: of ``score_samples``.
        folder: where parts wait; None: nowhere.
    """
    windows = -(-len(reader) // WINDOW_SAMPLES)
    size = WINDOW_SAMPLES * -(-windows // MAX_PARTS)  # samples of a part
    count = -(-len(reader) // size)
    scores: dict[int, np.ndarray] = {}

    def look() -> list[int] | None:
        if world.local_rank != 0:
            return None
        for part in range(count) if folder is not None and folder.is_dir() else ():
            if (path := _part_path(folder, part)).exists():
                # A copy: a mapped file would keep its folder from going on a network file system.
                scores[part] = np.array(load_array(path, "float32", (None,)))
        return sorted(scores)

    def score(todo: list[int]) -> np.ndarray | None:
        if world.rank >= len(todo):
            return None
        first = todo[world.rank] * size
        return _score_range(reader, range(first, min(first + size, len(reader))), encoder, settings)

    def keep(fresh: dict[int, np.ndarray]) -> None:
        if world.local_rank == 0:
            scores.update(fresh)
            for part in fresh if folder is not None else ():
                save_array(_part_path(folder, part), fresh[part])

    # What only some machines have is scored again.
    done = set.intersection(*(set(has) for has in together(look, group) if has is not None))
    missing = [part for part in range(count) if part not in done]
    if done and world.is_main:
        logger.info("importance: %d of %d parts are done already", len(done), count)
    started = logged = time.monotonic()
    # In rounds: no rank waits for another for longer than a part takes, which a timeout allows.
    for begin in range(0, len(missing), world.size):
        todo = missing[begin : begin + world.size]
        gathered = together(partial(score, todo), group)
        together(partial(keep, dict(zip(todo, gathered, strict=False))), group)
        now = time.monotonic()
        if now - logged > LOG_EVERY_S and world.is_main:
            logged = now
            rate = (begin + len(todo)) / (now - started)
            logger.info(
                "importance: %d of %d samples | %.0f samples/s | eta %.0f s",
                min((len(done) + begin + len(todo)) * size, len(reader)),
                len(reader),
                rate * size,
                (len(missing) - begin - len(todo)) / rate,
            )
    return scores


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.npy"


def _score_range(
    reader: ShardReader, indices: range, encoder: Encoder, settings: dict
) -> np.ndarray:
    """``score_samples`` over windows of the samples in ``indices``."""
    scores = []
    for start in range(indices.start, indices.stop, WINDOW_SAMPLES):
        stop = min(start + WINDOW_SAMPLES, indices.stop)
        samples = (reader[i] for i in range(start, stop))
        try:
            scores.append(score_samples(samples, encoder, **settings))
        except torch.OutOfMemoryError:
            raise DataError(
                f"out of GPU memory at {settings['batch_tokens']} tokens a forward: lower "
                "--batch_tokens"
            ) from None
    return np.concatenate(scores)
