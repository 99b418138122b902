"""Text to tokens: character spans become token spans, long texts become windows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
BATCH_CHARACTERS = 1 << 18  # a token's encoding takes some hundred bytes
MIN_WINDOW_TOKENS = 4  # what is left over at a text's end below this is not worth a sample
# A line break; a question or exclamation mark; or a full stop before something that can begin a
# sentence ("e.g. this" does not). Closing quotes and brackets belong to the sentence. Blanks before
# a line break do not (only where a match ends counts): they would make runs of blanks quadratic.
_SENTENCE_END = re.compile(r"""\n\s*|[!?]["'”’)\]]*\s+|\.["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9])""")


@dataclass(slots=True)
class EncodedText:
    """The tokens of one text, no specials.

    Attributes:
        ids: int32 [n].
        offsets: int64 [n, 2] characters of each token, end excluded.
        starts: bool [n] True where a word begins (the tokenizer's pre-tokenization).
    """

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """bool [n]: the token is a whole word."""
        return self.starts & np.append(self.starts[1:], True)


def batched(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items that are encoded at once: each ends with the one that fills it.

    Args:
        items: texts, or what has one.
        characters: how many an item's text has.
    """
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if total > BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer, texts: list[str]) -> list[EncodedText]:
    """Tokens of each text; a special token's name inside a text is ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # A page that says "[SEP]" must not be able to end a sequence.
    backend.encode_special_tokens = True
    encoded = []
    for item in backend.encode_batch(texts, add_special_tokens=False):
        words = np.asarray([-1 if word is None else word for word in item.word_ids], np.int64)
        encoded.append(
            EncodedText(
                ids=np.asarray(item.ids, np.int32),
                offsets=np.asarray(item.offsets, np.int64).reshape(-1, 2),
                starts=np.diff(words, prepend=-2) != 0,
            )
        )
    return encoded


def encode_names(tokenizer, names: list[str], width: int) -> np.ndarray:
    """The first ``width`` token ids of each name as it reads inside a sentence.

    Returns:
        int32 [len(names), width], -1 where a name is shorter.
    """
    table = np.full((len(names), width), -1, np.int32)
    for begin in range(0, len(names), 4096):
        # The blank in front matters to byte-level tokenizers alone.
        texts = [f" {name}" for name in names[begin : begin + 4096]]
        for row, item in enumerate(encode_texts(tokenizer, texts), begin):
            ids = item.ids[:width]
            table[row, : len(ids)] = ids
    return table


def token_spans(
    encoded: EncodedText, text: str, spans: list[tuple[int, int, int]], counts: Counter
) -> np.ndarray:
    """Character spans as token spans, sorted and without overlap.

    A span must cover whole tokens; blanks at its ends do not count. Of overlapping spans the one
    with more characters stays, of equally long ones the first.

    Args:
        spans: (start, end, key) in characters of ``text``, end excluded.
        counts: gets ``span_empty``, ``span_cuts_token`` and ``span_overlap``.

    Returns:
        int32 [m, 3] rows (left, right, key) in tokens, right excluded.
    """
    if not spans:
        return np.empty((0, 3), np.int32)
    # Byte-level tokenizers emit tokens of no width; they neither begin nor end a mention.
    solid = np.flatnonzero(encoded.offsets[:, 1] > encoded.offsets[:, 0])
    begins, ends = encoded.offsets[solid, 0], encoded.offsets[solid, 1]
    found: list[tuple[int, int, int, int]] = []
    for start, end, key in spans:
        surface = text[start:end]
        start += len(surface) - len(surface.lstrip())
        end -= len(surface) - len(surface.rstrip())
        first = int(np.searchsorted(ends, start, side="right"))  # first token that ends inside
        last = int(np.searchsorted(begins, end, side="left")) - 1  # last token that begins inside
        if end <= start or last < first:
            counts["span_empty"] += 1
        elif begins[first] < start or ends[last] > end:
            counts["span_cuts_token"] += 1
        else:
            found.append((end - start, int(solid[first]), int(solid[last]) + 1, key))
    taken = np.zeros(len(encoded.ids), bool)
    kept = []
    for _, left, right, key in sorted(found, key=lambda span: -span[0]):  # stable
        if taken[left:right].any():
            counts["span_overlap"] += 1
        else:
            taken[left:right] = True
            kept.append((left, right, key))
    return np.asarray(sorted(kept), np.int32).reshape(-1, 3)


def windows(encoded: EncodedText, text: str, spans: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Cuts a text into runs of at most ``size`` tokens.

    Each run is as long as it can be: it ends at the last sentence end that fits, else at the last
    word end, and inside a mention or a word only if that alone is longer than ``size``.

    Returns:
        (begin, end) token positions, end excluded.
    """
    total = len(encoded.ids)
    if total <= size:
        return [(0, total)] if total else []
    inside = np.zeros(total + 1, bool)  # a cut before this token would split a mention
    for left, right, _ in spans:
        inside[left + 1 : right] = True
    word_cut = np.append(encoded.starts, True) & ~inside
    sentence_cut = np.zeros(total + 1, bool)
    begins = encoded.offsets[:, 0]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    sentence_cut[np.searchsorted(begins, ends, side="left")] = True
    sentence_cut &= word_cut
    runs, begin = [], 0
    while total - begin > size:
        end = begin + size
        for allowed in (sentence_cut, word_cut):
            cuts = np.flatnonzero(allowed[begin + 1 : begin + size + 1])
            if len(cuts):
                end = begin + 1 + int(cuts[-1])
                break
        runs.append((begin, end))
        begin = end
    runs.append((begin, total))
    return runs


def spans_inside(spans: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The rows of ``spans`` that lie within tokens [begin, end), counted from ``begin``."""
    rows = spans[(spans[:, 0] >= begin) & (spans[:, 1] <= end)].copy()
    rows[:, :2] -= begin
    return rows
