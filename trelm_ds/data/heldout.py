"""The fixed batches of the held-out MLM loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trelm_ds.config import Config
from trelm_ds.data import rng
from trelm_ds.data.collate import Batch, Collator, Example
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.masking import Masker
from trelm_ds.data.order import Permutation
from trelm_ds.data.sampling import no_mentions
from trelm_ds.data.shards import load_manifest
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.split import open_split
from trelm_ds.data.tables import KnowledgeTables

# Not the run's: every run is scored on the same masked positions, whatever it trains on.
_HELDOUT_SEED = 0
_HELDOUT_MLM_PROBABILITY = 0.15
HELDOUT_BATCH = 32  # sequences that `train.eval_batches` counts by


def heldout_batches(
    config: Config,
    data_dir: str | Path,
    rank: int,
    world_size: int,
    graph: KnowledgeGraph,
    tables: KnowledgeTables,
    split: str = "heldout",
) -> list[Batch]:
    """This rank's share of the fixed batches for the held-out MLM loss.

    The first ``train.eval_batches * HELDOUT_BATCH`` sequences of a fixed order of the split, masked
    the same way in every run, whatever its batch: no injection, no memory, no decoding, tokens
    masked one by one. They come in micro-batches of the run's size; micro-batch b belongs to rank b
    modulo the world size, so the lists may differ in length by one.

    Raises:
        DataError, ConfigError: as ``StepLoader``.
    """
    if load_manifest(data_dir)["splits"].get(split, {"samples": 0})["samples"] < 1:
        return []  # nothing held out: there is no held-out loss to report
    reader, manifest = open_split(config, data_dir, graph, tables, split, verify=True)
    vocab_size = manifest["tokenizer"]["vocab_size"]
    special = SpecialTokens.load(data_dir, vocab_size)
    masker = Masker(special.is_special(vocab_size), special.mask, _HELDOUT_MLM_PROBABILITY)
    collator = Collator(
        special, config.data.pad_to_multiple_of, config.data.max_seq_length, 0, tables
    )
    micro = config.train.per_device_train_batch_size
    count = min(len(reader), HELDOUT_BATCH * config.train.eval_batches)
    order = Permutation(len(reader), _HELDOUT_SEED, 0)(np.arange(count))
    nothing = np.zeros((0, 2), dtype=np.int64)
    batches = []
    for first in range(rank * micro, count, world_size * micro):
        examples = []
        for position, index in enumerate(order[first : first + micro].tolist(), first):
            ids = reader[index].ids
            stream = rng.generator(_HELDOUT_SEED, rng.HELDOUT, 0, index)
            corrupted, targets, _ = masker(ids, nothing, nothing, stream)
            examples.append(Example(position, ids, corrupted, targets, no_mentions()))
        arrays = collator(examples, np.zeros(0, dtype=np.int64))
        batches.append(Batch.from_numpy(arrays))
    reader.close()
    return batches
