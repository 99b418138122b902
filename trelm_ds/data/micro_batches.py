"""From positions of the sample stream to the arrays of a micro-batch.

A position's kind follows from its number alone (``config.sampling``): a share of them are
knowledge rows, of the others a share takes the samples in their natural order, and the rest is
drawn by entity, by the weights of the version that its step calls for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from trelm_ds.config import Config
from trelm_ds.data import rng
from trelm_ds.data.candidates import EntityCandidates
from trelm_ds.data.collate import Collator, Example
from trelm_ds.data.entity_first import EntityFirst
from trelm_ds.data.knowledge_rows import KnowledgeRows
from trelm_ds.data.masking import Masker
from trelm_ds.data.negatives import NegativeSampler
from trelm_ds.data.order import divide_stream, stream_position
from trelm_ds.data.sampling import MentionSampler, no_mentions
from trelm_ds.data.shards import DamagedSample, ShardReader
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.weights import WeightTables
from trelm_ds.errors import DataError

# A drawn sample's choices are keyed by its position, above the number of any epoch: it is masked
# anew each time it is drawn.
_DRAWN = 1 << 48


class MicroBatches(Dataset):
    """Stream positions of a micro-batch -> arrays of a ``Batch``; picklable, opens files lazily."""

    def __init__(
        self,
        config: Config,
        reader: ShardReader,
        masker: Masker,
        mentions: MentionSampler,
        collator: Collator,
        negatives: NegativeSampler | None,
        candidates: EntityCandidates | None,
        num_entities: int,
        global_batch: int,
        entity_first: EntityFirst | None,
        knowledge_rows: KnowledgeRows | None,
        weights: WeightTables | None,
        special: SpecialTokens,
    ):
        self._empty = np.array([special.cls, special.sep], dtype=np.int64)
        self._damaged: list[str] = []  # of the micro-batch being made
        self._seed = config.train.seed
        self._knowledge_share = config.sampling.knowledge_rows
        self._natural_share = config.sampling.natural_share if entity_first else 1.0
        self._entity_first = entity_first
        self._knowledge_rows = knowledge_rows
        self._weights = weights
        self._reader = reader
        self._masker = masker
        self._mentions = mentions
        self._collator = collator
        self._negatives = negatives
        self._candidates = candidates
        self._num_entities = num_entities
        self._global_batch = global_batch

    def _example(self, position: int, epoch: int, index: int) -> Example:
        try:
            sample = self._reader[index]
        except DamagedSample as error:
            if not self._reader.tolerant:
                raise
            self._damaged.append(str(error))
            nothing = np.zeros(len(self._empty), dtype=bool)
            return Example(position, self._empty, self._empty, nothing, no_mentions())
        mentions = self._mentions(sample, epoch)
        entities = sample.spans[sample.spans[:, 2] < self._num_entities]
        corrupted, targets, masked = self._masker(
            sample.ids,
            entities[:, :2],
            mentions.spans[mentions.injected],
            rng.generator(self._seed, rng.MASKING, epoch, index),
        )
        return Example(position, sample.ids, corrupted, targets, mentions, entities[masked])

    def _examples(self, positions: np.ndarray, step: int) -> Iterator[Example]:
        is_fact, _, text = divide_stream(positions, self._knowledge_share)
        is_natural, place, _ = divide_stream(text, self._natural_share)
        epochs, indices = stream_position(place, len(self._reader), self._seed)
        weights = self._weights.at_step(step) if self._weights is not None else None
        for row, position in enumerate(positions.tolist()):
            if is_fact[row]:
                yield self._knowledge_rows(position, weights)
            elif is_natural[row]:
                yield self._example(position, int(epochs[row]), int(indices[row]))
            else:
                index = self._entity_first(position, weights)
                yield self._example(position, _DRAWN + position, index)

    def natural_rows(self, rows: int) -> int:
        """How many of the stream's first rows are texts in natural order."""
        _, _, text = divide_stream(np.array([rows]), self._knowledge_share)
        return int(divide_stream(text, self._natural_share)[1][0])

    def __getitem__(self, positions: np.ndarray) -> tuple[dict, list[str]] | DataError:
        """The arrays of a ``Batch``, and what is said of the samples that an empty one replaces."""
        step = int(positions[0]) // self._global_batch
        self._damaged = []
        try:
            examples = list(self._examples(positions, step))
        except DataError as error:
            return error  # raised in the training process: one clear line, no worker traceback
        negatives = np.zeros(0, dtype=np.int64)
        if self._negatives is not None:
            negatives = self._negatives(step)
        arrays = self._collator(examples, negatives)
        if self._candidates is not None:
            keys = arrays["mention_keys"]
            arrays |= self._candidates(
                step,
                keys[arrays["decode_mention"]],
                arrays["decode_relation"],
                arrays["decode_other"],
                offered=keys[keys < self._num_entities],
            )
        return arrays, self._damaged
