"""Sequences with their random choices made, padded into one micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from trelm_ds.data.candidates import no_candidates
from trelm_ds.data.host_sizes import distinct_texts, mention_tokens, window_tokens
from trelm_ds.data.sampling import SampledMentions
from trelm_ds.data.schema import ROLE_NONE
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.tables import KnowledgeTables


@dataclass
class Batch:
    """One micro-batch of CPU or device tensors; B sequences of S tokens, M mentions.

    Attributes:
        input_ids: int64 [B, S] after MLM corruption.
        original_ids: int64 [B, S] before it.
        attention_mask: int64 [B, S], 1 at real tokens.
        stream_positions: int64 [B] place in the endless sample stream: the sequence of Eq. 6.
        mlm_positions: int64 [K] targets, flat into B * S, ascending.
        mlm_labels: int64 [K] original tokens there.
        mlm_mention: int64 [K] entity whose mention was masked whole there; -1: a text token.
        mlm_mention_group: int64 [K] number in 0..G-1 of that masked mention, in text order; -1:
            a text token.
        mlm_mention_given: bool [G]; the entity is the other end of a triple that is injected into
            the same sequence: its name can be read off the input.
        mention_spans: int64 [M, 3] rows (sequence, left, right exclusive).
        mention_keys: int64 [M] rows of the memory bank.
        mention_injected: bool [M]; the span's input embeddings are replaced.
        injection_role: int64 [M]; 0: by the token's own embedding, 1: the mention is the head of
            the injected triple, 2: the tail.
        injection_relation: int64 [M], 0 where role is 0.
        injection_other: int64 [M] entity, 0 where role is 0.
        injected_positions: int64 [P] tokens of the injected mentions, flat into B * S.
        injected_mentions: int64 [I] the rows of ``mention_spans`` that are injected, ascending:
            those whose memory is looked up.
        injected_row: int64 [P] the row of ``injected_mentions`` that each token belongs to.
        text_ids: int64 [U, X] distinct names of other entities and relations with specials, padded,
            and a row of pads; [0, 0] unless the injection form is ``encoder``.
        text_mask: int64 [U, X], 1 at real tokens and at every text's first one.
        text_index: int64 [2, M] rows of ``text_ids``: the other entity's and the relation's; the
            row of pads where role is 0.
        decode_mention: int64 [D] row of ``mention_spans``.
        decode_relation: int64 [D] in [0, 2R): r decodes the tail, R + r the head.
        decode_other: int64 [D] the gold entity.
        decode_tokens: int64 [D, T] its name's tokens, padded with -1.
        decoded_positions: int64 [V] the tokens among them, flat into D * T.
        knowledge_positions: int64 [Q] tokens of the mentions that a name is decoded from, flat into
            B * S.
        knowledge_owner: int64 [Q] the row of ``mention_spans`` that each belongs to.
        negatives: int64 [N] token ids shared by the optimizer step.
        entity_words: int64 [W] distinct tokens of the names of the entities that triples choose
            among; this and the next four are empty without entity decoding.
        entity_names: int64 [C, X] those names: a token's place in ``entity_words`` plus 1, padded
            with 0.
        entity_log_q: float32 [C] log probability of being a candidate, by the draw of negatives.
        entity_gold: int64 [D] the candidate that is decode_other.
        entity_hits: int64 [H] flat into D * C: other right answers, which are no negatives.
        num_tokens: real tokens.
        decoded_width: tokens of the longest mention in ``decode_mention``; at least 1.
        window_tokens: tokens of all mentions' windows (Eq. 4).
        text_tokens: ones of ``text_mask``.
    """

    input_ids: torch.Tensor
    original_ids: torch.Tensor
    attention_mask: torch.Tensor
    stream_positions: torch.Tensor
    mlm_positions: torch.Tensor
    mlm_labels: torch.Tensor
    mlm_mention: torch.Tensor
    mlm_mention_group: torch.Tensor
    mlm_mention_given: torch.Tensor
    mention_spans: torch.Tensor
    mention_keys: torch.Tensor
    mention_injected: torch.Tensor
    injection_role: torch.Tensor
    injection_relation: torch.Tensor
    injection_other: torch.Tensor
    injected_positions: torch.Tensor
    injected_mentions: torch.Tensor
    injected_row: torch.Tensor
    text_ids: torch.Tensor
    text_mask: torch.Tensor
    text_index: torch.Tensor
    decode_mention: torch.Tensor
    decode_relation: torch.Tensor
    decode_other: torch.Tensor
    decode_tokens: torch.Tensor
    decoded_positions: torch.Tensor
    knowledge_positions: torch.Tensor
    knowledge_owner: torch.Tensor
    negatives: torch.Tensor
    entity_words: torch.Tensor
    entity_names: torch.Tensor
    entity_log_q: torch.Tensor
    entity_gold: torch.Tensor
    entity_hits: torch.Tensor
    num_tokens: int
    decoded_width: int
    window_tokens: int
    text_tokens: int

    @property
    def num_mlm_mentions(self) -> int:
        """G, mentions masked whole."""
        return len(self.mlm_mention_given)

    @classmethod
    def from_numpy(cls, arrays: dict[str, np.ndarray | int]) -> Batch:
        """Wraps ``collate``'s arrays without copying."""
        return cls(
            **{
                k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                for k, v in arrays.items()
            }
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on ``device``."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.__dict__.items()
        }
        return dataclasses.replace(self, **moved)

    def counts(self) -> dict[str, int]:
        """Loss terms and sizes: mlm targets and those of them in whole masked mentions, decoded
        tokens (cka) and triples decoded as entities, tokens, sequences, mentions.

        Reads tensors: call it before ``to`` sends the batch to a device.
        """
        return {
            "mlm": len(self.mlm_positions),
            "objects": int((self.mlm_mention >= 0).sum()),
            "cka": len(self.decoded_positions),
            "entity": len(self.entity_gold),
            "tokens": self.num_tokens,
            "sequences": len(self.input_ids),
            "mentions": len(self.mention_keys),
        }


@dataclass
class Example:
    """One sequence with its random choices made.

    Attributes:
        position: in the sample stream.
        ids: int [length] original tokens.
        corrupted: int64 [length] after masking.
        targets: bool [length].
        mentions: which get knowledge, and how.
        masked_mentions: int [g, 3] rows (left, right exclusive, entity) of the mentions masked
            whole, sorted by left; each holds at least one target.
    """

    position: int
    ids: np.ndarray
    corrupted: np.ndarray
    targets: np.ndarray
    mentions: SampledMentions
    masked_mentions: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))


class Collator:
    """Pads examples into the arrays of a ``Batch``.

    Args:
        special: ids of the padding and of the specials around a text.
        pad_to_multiple_of: S is rounded up to a multiple of this, but not above ``max_length``.
        max_length: longest sequence allowed.
        max_decoded: T, longest name decoded; the rest of a longer one is not asked for.
        tables: names of entities and relations.
        text_length: X, tokens of a name with its specials, for the injection form ``encoder``;
            0: none is encoded.
        half_window: k of Eq. 4, for ``window_tokens``.
    """

    def __init__(
        self,
        special: SpecialTokens,
        pad_to_multiple_of: int,
        max_length: int,
        max_decoded: int,
        tables: KnowledgeTables,
        text_length: int = 0,
        half_window: int = 0,
    ):
        self._special = special
        self._multiple = pad_to_multiple_of
        self._max_length = max_length
        self._max_decoded = max_decoded
        self._tables = tables
        self._text_length = text_length
        self._half_window = half_window

    def __call__(self, examples: list[Example], negatives: np.ndarray) -> dict:
        """Arrays for ``Batch.from_numpy``; arrays travel between processes better than tensors.

        The fields of entity decoding are empty: ``EntityCandidates`` fills them.

        Args:
            examples: the micro-batch.
            negatives: int64 [N].
        """
        lengths = np.array([len(example.ids) for example in examples])
        size = -(-int(lengths.max()) // self._multiple) * self._multiple
        size = max(int(lengths.max()), min(size, self._max_length))
        shape = (len(examples), size)
        original = np.full(shape, self._special.pad, dtype=np.int64)
        corrupted = original.copy()
        targets = np.zeros(shape, dtype=bool)
        group = np.full(shape, -1, dtype=np.int64)
        masked_keys, given = [], [np.zeros(0, dtype=bool)]
        for row, example in enumerate(examples):
            original[row, : len(example.ids)] = example.ids
            corrupted[row, : len(example.ids)] = example.corrupted
            targets[row, : len(example.ids)] = example.targets
            for left, right, key in example.masked_mentions.tolist():
                group[row, left:right] = len(masked_keys)
                masked_keys.append(key)
            told = example.mentions.other[example.mentions.injected & (example.mentions.role > 0)]
            given.append(np.isin(example.masked_mentions[:, 2], told))
        positions = np.flatnonzero(targets)
        group = group.ravel()[positions]
        # The last entry is what group -1 reads.
        masked_key = np.array([*masked_keys, -1], dtype=np.int64)

        found = [example.mentions for example in examples]
        row_of = np.repeat(np.arange(len(found)), [len(m.keys) for m in found])
        first = np.cumsum([0] + [len(m.keys) for m in found])

        def joined(name):
            return np.concatenate([getattr(m, name) for m in found])

        role, other, relation = joined("role"), joined("other"), joined("relation")
        spans, injected = np.column_stack([row_of, joined("spans")]), joined("injected")
        decode_mention = np.concatenate([m.decode_mention + first[i] for i, m in enumerate(found)])
        decode_tokens = self._gold_tokens(joined("decode_entity"))
        other_text = self._text(self._tables.entity_names, other, role)
        relation_text = self._text(self._tables.relation_names, relation, role)
        return {
            "input_ids": corrupted,
            "original_ids": original,
            "attention_mask": (np.arange(size) < lengths[:, None]).astype(np.int64),
            "stream_positions": np.array([e.position for e in examples], dtype=np.int64),
            "mlm_positions": positions,
            "mlm_labels": original.ravel()[positions],
            "mlm_mention": masked_key[group],
            "mlm_mention_group": group,
            "mlm_mention_given": np.concatenate(given),
            "mention_spans": spans,
            "mention_keys": joined("keys"),
            "mention_injected": injected,
            "injection_role": role,
            "injection_relation": relation,
            "injection_other": other,
            **distinct_texts(other_text, relation_text, self._special.pad),
            "decode_mention": decode_mention,
            "decode_relation": joined("decode_relation"),
            "decode_other": joined("decode_entity"),
            "decode_tokens": decode_tokens,
            "decoded_positions": np.flatnonzero(decode_tokens >= 0),
            **mention_tokens(spans, injected, decode_mention, decode_tokens, size),
            "negatives": negatives,
            **no_candidates(),
            "num_tokens": int(lengths.sum()),
            "window_tokens": window_tokens(spans, lengths, self._half_window),
        }

    def _gold_tokens(self, entities: np.ndarray) -> np.ndarray:
        """int64 [D, T] name tokens; T is the longest name of the batch."""
        tokens = self._tables.entity_names[entities, : self._max_decoded].astype(np.int64)
        return np.ascontiguousarray(tokens[:, (tokens >= 0).any(0)])

    def _text(self, names: np.ndarray, rows: np.ndarray, role: np.ndarray) -> np.ndarray:
        """int64 [M, X]: [CLS] name [SEP] of each row that has a triple."""
        text = np.full((len(rows), self._text_length), self._special.pad, dtype=np.int64)
        if text.size:
            name = names[rows, : self._text_length - 2]
            length = (name >= 0).sum(1)
            text[:, 0] = self._special.cls
            text[:, 1 : 1 + name.shape[1]] = np.where(name >= 0, name, self._special.pad)
            text[np.arange(len(rows)), 1 + length] = self._special.sep
            text[role == ROLE_NONE] = self._special.pad
        return text
