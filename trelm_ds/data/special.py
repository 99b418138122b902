"""The special tokens of a prepared folder, read once from its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import DataError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids the data layer needs.

    Attributes:
        pad, mask, cls, sep: token ids.
        all: every special id, ascending; never an MLM target, never a random replacement.
    """

    pad: int
    mask: int
    cls: int
    sep: int
    all: tuple[int, ...]

    @classmethod
    def load(cls, data_dir: str | Path, vocab_size: int) -> SpecialTokens:
        """Reads ``data_dir/tokenizer``.

        Raises:
            DataError: as ``load_tokenizer``, or an id is not below ``vocab_size``.
        """
        folder = Path(data_dir) / "tokenizer"
        tokenizer = load_tokenizer(folder)
        ids = {
            name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "cls", "sep")
        }
        every = tuple(sorted(set(tokenizer.all_special_ids)))
        if every[-1] >= vocab_size:
            raise DataError(f"{folder}: special token {every[-1]} is not below {vocab_size}")
        return cls(**ids, all=every)

    def is_special(self, vocab_size: int) -> np.ndarray:
        """bool [V]."""
        table = np.zeros(vocab_size, dtype=bool)
        table[list(self.all)] = True
        return table
