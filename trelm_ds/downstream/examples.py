"""Downstream examples: texts with marked spans become token sequences a head can read.

A span gets two marker tokens around it, ``[E1] ... [/E1]`` and ``[E2] ... [/E2]``, whose ids lie
above the model's vocabulary; the head reads the state of the opening marker (of each span), or of
the first token where there is no span. What does not fit is cut where it is farthest from a
marker, so that no example is ever left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trelm_ds.errors import DataError
from trelm_ds.prepare.encode import EncodedText, encode_texts


@dataclass(slots=True)
class TextExample:
    """One example as its file has it.

    Attributes:
        text: the sentence.
        target: set of type names (typing), one label, or a number (regression).
        spans: (start, end) in characters of the mention, or of head and tail.
        pair: the second sentence of tasks that have two.
    """

    text: str
    target: frozenset[str] | str | float
    spans: tuple[tuple[int, int], ...] = ()
    pair: str | None = None


@dataclass
class Task:
    """A data set with its measure.

    Attributes:
        name: what reports call it.
        kind: ``multilabel``, ``multiclass`` or ``regression``.
        train: examples to learn from.
        evals: examples to score, by split.
        metric: the key of ``score``'s result that the task is known by.
        score: (predictions, targets) to named scores; both as ``TextExample.target``.
        labels: every label of any split, sorted; empty for regression.
    """

    name: str
    kind: str
    train: list[TextExample]
    evals: dict[str, list[TextExample]]
    metric: str
    score: Callable[[Sequence, Sequence], dict[str, float]]
    labels: list[str] = field(init=False)

    def __post_init__(self):
        targets = [e.target for split in (self.train, *self.evals.values()) for e in split]
        if self.kind == "regression":
            self.labels = []
        elif self.kind == "multilabel":
            self.labels = sorted(frozenset().union(*targets))
        else:
            self.labels = sorted(set(targets))
        for name, split in (("train", self.train), *self.evals.items()):
            if not split:
                raise DataError(f"{self.name}: no example in its split {name}")
        if self.kind != "regression" and len(self.labels) < 2:
            raise DataError(f"{self.name}: only one label in it: {', '.join(self.labels)}")

    @property
    def spans(self) -> int:
        """Marked spans of each example."""
        return len(self.train[0].spans)


@dataclass(slots=True)
class Example:
    """One example as the model reads it.

    Attributes:
        ids: token ids; markers are vocab_size, vocab_size + 1, ...
        token_types: 0, and 1 in a second sentence.
        positions: tokens whose states the head reads.
        target: label ids (multilabel), label id, or number.
    """

    ids: list[int]
    token_types: list[int]
    positions: list[int]
    target: list[int] | int | float


def spread(items: list, limit: int | None) -> list:
    """``limit`` of the items, evenly spaced, in order; all of them without a limit."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def encode_examples(
    examples: list[TextExample],
    tokenizer,
    labels: list[str],
    vocab_size: int,
    max_seq_length: int,
    counts: Counter,
) -> list[Example]:
    """Tokens, markers and label ids of each example.

    Args:
        examples: all with spans or all without.
        tokenizer: of the model.
        labels: names in the order of their ids.
        vocab_size: rows of the model's word embeddings, the id of the first marker.
        max_seq_length: in tokens, special tokens and markers included; at least
            settings.MIN_SEQ_LENGTH.
        counts: gets ``truncated``.
    """
    number = {name: i for i, name in enumerate(labels)}
    encoded = []
    for begin in range(0, len(examples), 1024):
        chunk = examples[begin : begin + 1024]
        if chunk[0].spans:
            sequences = _marked(chunk, tokenizer, vocab_size, max_seq_length, counts)
        else:
            sequences = _plain(chunk, tokenizer, max_seq_length, counts)
        for example, sequence in zip(chunk, sequences, strict=True):
            target = example.target
            if isinstance(target, frozenset):
                target = sorted(number[name] for name in target)
            elif isinstance(target, str):
                target = number[target]
            encoded.append(Example(*sequence, target))
    return encoded


def _plain(chunk, tokenizer, max_seq_length, counts):
    """One or two sentences between the tokenizer's own special tokens."""
    settings = {"return_token_type_ids": True, "verbose": False}
    pairs = None if chunk[0].pair is None else [example.pair for example in chunk]
    batch = tokenizer([example.text for example in chunk], pairs, **settings)
    rows = zip(batch["input_ids"], batch["token_type_ids"], strict=True)
    for example, (ids, types) in zip(chunk, rows, strict=True):
        if len(ids) > max_seq_length:
            counts["truncated"] += 1
            cut = {"truncation": "longest_first", "max_length": max_seq_length}
            short = tokenizer(example.text, example.pair, **cut, **settings)
            ids, types = short["input_ids"], short["token_type_ids"]
        yield ids, types, [0]


def _marked(chunk, tokenizer, vocab_size, max_seq_length, counts):
    """One sentence with markers around its spans."""
    texts = encode_texts(tokenizer, [example.text for example in chunk])
    for example, text in zip(chunk, texts, strict=True):
        ids, opening = insert_markers(text, example.spans, vocab_size)
        counts["truncated"] += len(ids) > max_seq_length - 2
        ids, opening = cut_far_tokens(ids, opening, vocab_size, max_seq_length - 2)
        ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        yield ids, [0] * len(ids), [position + 1 for position in opening]


def insert_markers(
    encoded: EncodedText, spans: Sequence[tuple[int, int]], first_marker: int
) -> tuple[list[int], list[int]]:
    """Token ids with ``first_marker + 2 i`` and ``+ 2 i + 1`` around span i.

    A token belongs to a span if they share a character; a span without a token gets its two
    markers side by side.

    Returns:
        The ids, and the position of each span's opening marker.
    """
    begins, ends = encoded.offsets[:, 0], encoded.offsets[:, 1]
    inserted = []  # (before this token, order there, marker)
    for i, (start, end) in enumerate(spans):
        left = int(np.searchsorted(ends, start, side="right"))
        right = max(left, int(np.searchsorted(begins, end, side="left")))
        inserted.append((left, 1, first_marker + 2 * i))
        # Where two spans touch, the first is closed before the second is opened.
        inserted.append((right, 0 if right > left else 2, first_marker + 2 * i + 1))
    ids, at = [], 0
    for before, _, marker in sorted(inserted):
        ids += encoded.ids[at:before].tolist()
        ids.append(marker)
        at = before
    ids += encoded.ids[at:].tolist()
    return ids, [ids.index(first_marker + 2 * i) for i in range(len(spans))]


def cut_far_tokens(
    ids: list[int], opening: list[int], first_marker: int, budget: int
) -> tuple[list[int], list[int]]:
    """The ``budget`` tokens that are nearest to a marker, in order, and where the markers went."""
    if len(ids) <= budget:
        return ids, opening
    values = np.asarray(ids)
    markers = np.flatnonzero(values >= first_marker)
    distance = np.abs(np.arange(len(ids))[:, None] - markers).min(1)
    kept = np.sort(np.argsort(distance, kind="stable")[:budget])
    return values[kept].tolist(), np.searchsorted(kept, opening).tolist()
