"""A micro-batch drawn at random, of any model's shapes, for timing steps without a data folder."""

from __future__ import annotations

import types
from dataclasses import dataclass, field

import numpy as np

from trelm_ds.config import Config, build_config
from trelm_ds.data.collate import Batch, Collator, Example
from trelm_ds.data.masking import Masker
from trelm_ds.data.sampling import SampledMentions
from trelm_ds.data.special import SpecialTokens

VOCAB_SIZES = {"bert": 30522, "roberta": 50265}
SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3, all=(0, 1, 2, 3))
ENTITIES, RELATIONS, TRANSE_DIM = 1000, 50, 100
MENTIONS_PER_SEQUENCE = 4


@dataclass
class Shapes:
    """What is timed. Defaults: BERT-base, a batch that two CPU cores take a few seconds for."""

    model_type: str = "bert"
    num_hidden_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int | None = None
    sequence_length: int = 128
    batch_size: int = 8
    dtype: str = "fp32"
    overrides: dict[str, object] = field(default_factory=dict)  # of the configuration, flat

    def config(self) -> Config:
        """The run's configuration: injection by table vectors and decoding on, memory off."""
        names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
        names += ("intermediate_size",)
        return build_config(
            {f"model.{name}": getattr(self, name) for name in names}
            | {
                "model.max_position_embeddings": max(512, self.sequence_length),
                "data.max_seq_length": max(128, self.sequence_length),
                "memory.enabled": False,
            }
            | self.overrides
        )


def synthetic_tables(vocab_size: int) -> types.SimpleNamespace:
    """What the model and the collator read of ``KnowledgeTables``, drawn at random."""
    rng = np.random.default_rng(0)
    names = rng.integers(4, min(1000, vocab_size), (ENTITIES, 8)).astype(np.int32)
    names[:, 3:] = -1  # names of three tokens
    return types.SimpleNamespace(
        entity_embeddings=rng.normal(size=(ENTITIES + 1, TRANSE_DIM)).astype(np.float32),
        relation_embeddings=rng.normal(size=(RELATIONS + 1, TRANSE_DIM)).astype(np.float32),
        entity_names=names,
        relation_names=names[:RELATIONS],
    )


def synthetic_batch(shapes: Shapes, config: Config, vocab_size: int, tables) -> Batch:
    """A micro-batch of full-length sequences with mentions, injection, masks and triples."""
    rng = np.random.default_rng(1)
    special = SPECIAL.is_special(vocab_size)
    masker = Masker(special, SPECIAL.mask, config.data.mlm_probability)
    collator = Collator(SPECIAL, 8, shapes.sequence_length, config.decoding.max_tokens, tables)
    examples = []
    for position in range(shapes.batch_size):
        ids = rng.integers(4, vocab_size, shapes.sequence_length).astype(np.int32)
        ids[0], ids[-1] = SPECIAL.cls, SPECIAL.sep
        count = MENTIONS_PER_SEQUENCE
        left = 1 + np.arange(count) * ((shapes.sequence_length - 4) // count)
        mentions = SampledMentions(
            spans=np.stack([left, left + 3], 1),
            keys=rng.integers(0, ENTITIES, count),
            injected=np.arange(count) % 3 == 0,  # a third, as the recommended recipe has it
            role=1 + np.arange(count) % 2,
            relation=rng.integers(0, RELATIONS, count),
            other=rng.integers(0, ENTITIES, count),
            decode_mention=np.repeat(np.arange(count), 2),
            decode_relation=rng.integers(0, 2 * RELATIONS, 2 * count),
            decode_entity=rng.integers(0, ENTITIES, 2 * count),
        )
        injected = mentions.spans[mentions.injected]
        corrupted, targets, _ = masker(ids, np.zeros((0, 2), dtype=np.int64), injected, rng)
        examples.append(Example(position, ids, corrupted, targets, mentions))
    negatives = rng.integers(4, vocab_size, config.decoding.num_negatives)
    return Batch.from_numpy(collator(examples, negatives))
