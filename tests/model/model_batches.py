"""Tiny models and hand-made micro-batches for the tests of this folder."""

import types

import numpy as np
import torch

from trelm_ds.backbone import build_backbone
from trelm_ds.config import build_config
from trelm_ds.data.collate import Batch
from trelm_ds.data.host_sizes import distinct_texts, mention_tokens, window_tokens
from trelm_ds.memory.bank import MemoryRows
from trelm_ds.model import Normalizers, TrelmModel

VOCAB, PAD, CLS, SEP, MASK = 60, 1, 2, 3, 4
ENTITIES, RELATIONS, DIM = 7, 3, 5
HALF_WINDOW = 3
SHAPE = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 24,
    "model.max_position_embeddings": 40,
    "model.hidden_dropout_prob": 0.0,
    "model.attention_probs_dropout_prob": 0.0,
    "data.max_seq_length": 32,
    "decoding.num_negatives": 9,
    "memory.half_window": HALF_WINDOW,
}


def make_config(**overrides):
    """A tiny configuration; ``section__key=value`` overrides."""
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    return build_config(SHAPE | flat)


def make_tables(seed=0):
    rng = np.random.default_rng(seed)
    tables = types.SimpleNamespace(
        entity_embeddings=rng.normal(size=(ENTITIES + 1, DIM)).astype(np.float32),
        relation_embeddings=rng.normal(size=(RELATIONS + 1, DIM)).astype(np.float32),
    )
    tables.entity_embeddings[0] = tables.relation_embeddings[0] = 0
    return tables


def make_log_q(seed=0):
    weights = torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)) + 0.1
    return (weights / weights.sum()).log()


def make_model(seed=0, **overrides):
    """A model whose weights are far from zero, so that every term is visible in its outputs."""
    torch.manual_seed(seed)
    config = make_config(**overrides)
    backbone = build_backbone(config, VOCAB, PAD)
    model = TrelmModel(backbone, config, make_tables(), RELATIONS, make_log_q())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(("injection", "decoder")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_candidates(decode, seed=0):
    """The fields of entity decoding: twelve names, row i's answer is name i, and some hits."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCAB, (12, 3))
    tokens[::2, 2] = tokens[::3, 1] = -1
    tokens[:, 2][tokens[:, 1] < 0] = -1
    words, places = np.unique(tokens, return_inverse=True)  # the first is -1
    hits = [row * 12 + column for row in range(0, len(decode), 2) for column in (7, 9)]
    return {
        "entity_words": torch.as_tensor(words[1:]),
        "entity_names": torch.as_tensor(places.reshape(tokens.shape)),
        "entity_log_q": torch.as_tensor(np.log(rng.random(12)), dtype=torch.float32),
        "entity_gold": torch.arange(len(decode)),
        "entity_hits": torch.tensor(hits, dtype=torch.int64),
    }


def make_batch(lengths=(14, 9, 20), mentions=None, decode=None, text_length=0, seed=0):
    """A micro-batch.

    Args:
        mentions: rows (row, left, right, key, injected, role, relation, other).
        decode: rows (mention, relation in [0, 2R), gold tokens).
    """
    rng = np.random.default_rng(seed)
    mentions = MENTIONS if mentions is None else mentions
    decode = DECODE if decode is None else decode
    size = max(lengths)
    ids = np.full((len(lengths), size), PAD)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(5, VOCAB, length)
        ids[row, 0], ids[row, length - 1], mask[row, :length] = CLS, SEP, 1
    taken = {(m[0], c) for m in mentions for c in range(m[1], m[2]) if m[4]}
    targets = [
        (row, column)
        for row, length in enumerate(lengths)
        for column in range(1, length - 1)
        if (row, column) not in taken and rng.random() < 0.5
    ]
    original = ids.copy()
    for row, column in targets:
        ids[row, column] = MASK
    columns = np.array(mentions, dtype=np.int64).reshape(-1, 8)
    width = max((len(tokens) for _, _, tokens in decode), default=0)
    gold = np.full((len(decode), width), -1)
    for i, (_, _, tokens) in enumerate(decode):
        gold[i, : len(tokens)] = tokens
    texts = [np.full((len(columns), text_length), PAD) for _ in range(2)]
    if text_length:
        for i, mention in enumerate(columns):
            if mention[5]:
                # A function of entity and relation, as in the real tables.
                for text, key in zip(texts, (mention[7], 20 + mention[6]), strict=True):
                    count = 1 + key % (text_length - 2)
                    text[i, : count + 2] = [CLS, *(5 + (key + np.arange(count)) % 50), SEP]
    positions = [row * size + column for row, column in targets]
    decoded = np.array([d[0] for d in decode], dtype=np.int64)
    host = distinct_texts(*texts, PAD)
    host |= mention_tokens(columns[:, :3], columns[:, 4] > 0, decoded, gold, size)
    host["window_tokens"] = window_tokens(columns[:, :3], np.array(lengths), HALF_WINDOW)

    def tensor(values, shape=None):
        array = torch.as_tensor(np.array(values), dtype=torch.int64)
        return array if shape is None else array.reshape(shape)

    return Batch(
        input_ids=tensor(ids),
        original_ids=tensor(original),
        attention_mask=tensor(mask),
        stream_positions=torch.arange(len(lengths)),
        mlm_positions=tensor(positions),
        mlm_labels=tensor([original[t] for t in targets]),
        mlm_mention=tensor([-1] * len(targets)),
        mlm_mention_group=tensor([-1] * len(targets)),
        mlm_mention_given=tensor([]).bool(),
        mention_spans=tensor(columns[:, :3]),
        mention_keys=tensor(columns[:, 3]),
        mention_injected=tensor(columns[:, 4]).bool(),
        injection_role=tensor(columns[:, 5]),
        injection_relation=tensor(columns[:, 6]),
        injection_other=tensor(columns[:, 7]),
        decode_mention=tensor(decoded),
        decode_relation=tensor([d[1] for d in decode]),
        decode_other=tensor([0] * len(decode)),
        decode_tokens=tensor(gold, (len(decode), width)),
        decoded_positions=tensor(np.flatnonzero(np.array(gold).ravel() >= 0)),
        negatives=tensor(rng.integers(5, VOCAB, 9)),
        **make_candidates(decode),
        num_tokens=sum(lengths),
        **{k: v if isinstance(v, int) else torch.from_numpy(v) for k, v in host.items()},
    )


# (row, left, right, key, injected, role, relation, other): a head, a tail, a word without triple,
# and a mention that is decoded but not injected.
MENTIONS = [
    (0, 2, 5, 3, 1, 1, 2, 6),
    (0, 7, 8, 1, 1, 2, 0, 4),
    (1, 1, 4, 8, 1, 0, 0, 0),
    (2, 10, 12, 5, 0, 1, 1, 2),
]
DECODE = [(0, 2, [11, 12, 13]), (1, RELATIONS + 0, [14]), (3, 1, [15, 16]), (0, 1, [17, 18])]


def make_memory(batch, hidden_size=16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    count = len(batch.injected_mentions)
    local = torch.randn(count, hidden_size, generator=generator)
    global_ = torch.randn(count, hidden_size, generator=generator)
    return MemoryRows(local, global_)


ONES = Normalizers(mlm=1.0, cka=1.0, entity=1.0, text=1.0, objects=1.0)


def sample_batch_without(batch, *, mentions=False, targets=False):
    """The batch with its mentions and decoding, or its MLM targets, taken out."""
    lengths = batch.attention_mask.sum(1).tolist()
    text = batch.text_ids.shape[1]
    smaller = make_batch(lengths, [], [], text) if mentions else batch
    if targets:
        smaller = smaller.to("cpu")
        smaller.mlm_positions = smaller.mlm_positions[:0]
        smaller.mlm_labels = smaller.mlm_labels[:0]
        smaller.mlm_mention = smaller.mlm_mention[:0]
    return smaller
