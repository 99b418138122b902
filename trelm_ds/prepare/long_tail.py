"""Long-tail words: the band of rare word types that are memory keys too (Fig. 2).

TRELM gives no rule. Ours: word types that are one token and one whole word and occur at least
twice in the training text, from the rarest on, as many as make the share of training samples that
hold one of them come nearest to 20%.
"""

from __future__ import annotations

import numpy as np

TARGET_SHARE = 0.2
MIN_COUNT = 2
_MIN_LETTERS = 2


def word_types(tokenizer) -> np.ndarray:
    """bool [V]: tokens that can be a whole word: letters alone, no special, no continuation."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    allowed = np.zeros(len(tokens), bool)
    for i, token in enumerate(tokens):
        letters = token.removeprefix("Ġ")  # how byte-level vocabularies write the blank before
        allowed[i] = i not in special and letters.isalpha() and len(letters) >= _MIN_LETTERS
    return allowed


def rarity_ranks(counts: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Candidates numbered from 1, the rarest first; 0 for every other token.

    Of equal counts the larger id comes first: vocabularies are in order of falling frequency.

    Args:
        counts: int64 [V] occurrences as a whole word in the training text.
        types: bool [V] tokens that can be a word.

    Returns:
        int64 [V].
    """
    candidates = np.flatnonzero(types & (counts >= MIN_COUNT))
    candidates = candidates[np.lexsort((-candidates, counts[candidates]))]
    ranks = np.zeros(len(counts), np.int64)
    ranks[candidates] = 1 + np.arange(len(candidates))
    return ranks


def free_words(
    ids: np.ndarray, whole: np.ndarray, spans: np.ndarray, types: np.ndarray
) -> np.ndarray:
    """Positions of whole words of these types outside every mention.

    Args:
        ids: int [n] tokens.
        whole: bool [n] the token is a whole word.
        spans: int [m, 3] rows (left, right, key).
        types: bool [V] word types that count.
    """
    free = whole & types[ids]
    for left, right, _ in spans:
        free[left:right] = False
    return np.flatnonzero(free)


def choose_band(samples: np.ndarray) -> int:
    """How many candidates, from the rarest on, become long-tail words.

    Args:
        samples: int [ranks + 1] training samples by the lowest rank of their candidate words
            outside mentions; in the first place those that have none.

    Returns:
        The largest rank of the band: the share of samples with a word of it is nearest to 20%.
        0: no band, since no sample has a candidate or even one candidate is in too many.
    """
    share = (np.cumsum(samples) - samples[0]) / samples.sum()
    return int(np.argmin(np.abs(share - TARGET_SHARE)))  # the first: ranks that add none are last
