"""What a forward needs to know of a batch's values, worked out before they go to the device.

The number of tokens in some spans, or which texts are equal, decides the sizes of tensors: asked of
a GPU, the host would have to wait until it has caught up.
"""

from __future__ import annotations

import numpy as np


def span_positions(spans: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Every token of every span.

    Args:
        spans: int64 [M, 3] rows (row, left, right exclusive).
        length: S.
    Returns:
        int64 [P] flat positions into B * S, and int64 [P] the span each belongs to.
    """
    row, left, right = spans.T
    width = right - left
    owner = np.repeat(np.arange(len(spans)), width)
    within = np.arange(len(owner)) - (np.cumsum(width) - width)[owner]
    return (row * length + left)[owner] + within, owner


def mention_tokens(
    spans: np.ndarray,
    injected: np.ndarray,
    decode_mention: np.ndarray,
    decode_tokens: np.ndarray,
    length: int,
) -> dict[str, np.ndarray | int]:
    """Tokens of the injected and of the decoded mentions, and the longest decoded mention.

    Args:
        spans: int64 [M, 3] rows (row, left, right exclusive).
        injected: bool [M].
        decode_mention: int64 [D] rows of ``spans``.
        decode_tokens: int64 [D, T], padded with -1.
        length: S.
    Returns:
        Fields of ``Batch``: ``injected_positions``, ``injected_mentions``, ``injected_row``,
        ``knowledge_positions``, ``knowledge_owner``, ``decoded_width``.
    """
    positions, owner = span_positions(spans, length)
    decoded = np.zeros(len(spans), dtype=bool)
    decoded[decode_mention[(decode_tokens >= 0).any(1)]] = True
    width = (spans[:, 2] - spans[:, 1])[decode_mention]
    return {
        "injected_positions": positions[injected[owner]],
        "injected_mentions": np.flatnonzero(injected),
        "injected_row": (np.cumsum(injected) - 1)[owner[injected[owner]]],
        "knowledge_positions": positions[decoded[owner]],
        "knowledge_owner": owner[decoded[owner]],
        "decoded_width": int(width.max(initial=1)),
    }


def window_tokens(spans: np.ndarray, lengths: np.ndarray, half_window: int) -> int:
    """Tokens of all mentions' windows [left - k, right + k), clipped to the text (Eq. 4).

    Args:
        spans: int64 [M, 3] rows (row, left, right exclusive).
        lengths: int64 [B] real tokens.
        half_window: k.
    """
    row, left, right = spans.T
    high = np.minimum(right + half_window, lengths[row])
    return int((high - np.maximum(left - half_window, 0)).sum())


def distinct_texts(others: np.ndarray, relations: np.ndarray, pad: int) -> dict:
    """The texts of the injection form ``encoder``, each once.

    A row of pads is always among them, so that the encoder runs on every rank, also where no
    mention is. Its first token counts as real: a text without any has no mean.

    Args:
        others, relations: int64 [M, X], of each mention's other entity and relation; rows of pads
            where it has none. X is 0 where texts are not encoded.
        pad: its id.
    Returns:
        Fields of ``Batch``: ``text_ids``, ``text_mask``, ``text_index``, ``text_tokens``.
    """
    count, width = others.shape
    index = np.zeros((2, count), dtype=np.int64)
    ids = np.zeros((0, 0), dtype=np.int64)
    if width:
        rows = np.concatenate([others, relations, np.full((1, width), pad, dtype=np.int64)])
        ids, inverse = np.unique(rows, axis=0, return_inverse=True)
        index = inverse.reshape(-1)[:-1].reshape(2, count)
    mask = (ids != pad).astype(np.int64)
    mask[:, :1] = 1
    return {
        "text_ids": ids,
        "text_mask": mask,
        "text_index": index,
        "text_tokens": int(mask.sum()),
    }
