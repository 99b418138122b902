"""Masked language modelling's corruption: 80% mask, 10% random token, 10% unchanged.

The choice at a position depends on the sequence's random stream and on that position alone, so two
methods that inject different mentions of a sequence mask its other tokens alike.
"""

from __future__ import annotations

import numpy as np


class Masker:
    """Chooses MLM targets and corrupts them.

    Args:
        is_special: bool [V]; such tokens are neither targets nor random replacements.
        mask_token_id: id written over 80% of the targets.
        probability: share of text tokens that become targets.
        mention_probability: chance that an entity mention which is not injected is masked, all its
            tokens at once; None treats its tokens like any text.
    """

    def __init__(
        self,
        is_special: np.ndarray,
        mask_token_id: int,
        probability: float,
        mention_probability: float | None = None,
    ):
        self._is_special = is_special
        self._replacements = np.flatnonzero(~is_special).astype(np.int64)
        self._mask_token_id = mask_token_id
        self._probability = probability
        self._mention_probability = mention_probability

    def __call__(
        self,
        ids: np.ndarray,
        mentions: np.ndarray,
        injected: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corrupts one sequence.

        Args:
            ids: int [length] token ids with specials.
            mentions: int [m, 2] (left, right exclusive) of the entity mentions.
            injected: int [k, 2] spans whose embeddings are replaced: never targets.
            rng: the sequence's stream.
        Returns:
            (int64 [length] corrupted ids, bool [length] targets, bool [m] mentions masked whole).
            There is at least one target unless every token is special or injected.
        """
        # Always drawn for every position, so that what is injected shifts nobody's draws.
        chosen, action = rng.random((2, len(ids)))
        replacement = rng.integers(0, len(self._replacements), len(ids))
        eligible = ~self._is_special[ids]
        for left, right in injected:
            eligible[left:right] = False
        targets = eligible & (chosen < self._probability)
        whole = np.zeros(len(ids), dtype=bool)
        masked = np.zeros(len(mentions), dtype=bool)
        if self._mention_probability is not None:
            masked = rng.random(len(mentions)) < self._mention_probability
            for (left, right), mask_it in zip(mentions, masked, strict=True):
                whole[left:right] = mask_it
                targets[left:right] = mask_it
            targets &= eligible
            whole &= eligible
            masked &= np.array([whole[left:right].any() for left, right in mentions], dtype=bool)
        if not targets.any() and eligible.any():
            # The position next in line; what then happens to it is the usual 80/10/10.
            targets[np.where(eligible, chosen, 2.0).argmin()] = True
        corrupted = ids.astype(np.int64)
        corrupted[targets & (whole | (action < 0.8))] = self._mask_token_id
        random = targets & ~whole & (action >= 0.8) & (action < 0.9)
        corrupted[random] = self._replacements[replacement[random]]
        return corrupted, targets, masked
