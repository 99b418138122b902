"""The special tokens of a prepared folder, read once from its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
            DataError: no loadable tokenizer, a token is missing, or an id is not below
                ``vocab_size``.
        """
        from transformers import AutoTokenizer  # seconds to import; loader processes do without

        folder = Path(data_dir) / "tokenizer"
        if not folder.is_dir():
            raise DataError(f"{folder}: not found")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises the bare class on a malformed file
            raise DataError(f"{folder}: not loadable: {' '.join(str(error).split())}") from None
        ids = {
            name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "cls", "sep")
        }
        for name, value in ids.items():
            if value is None:
                raise DataError(f"{folder}: the tokenizer has no {name} token")
        every = tuple(sorted(set(tokenizer.all_special_ids)))
        if every[-1] >= vocab_size:
            raise DataError(f"{folder}: special token {every[-1]} is not below {vocab_size}")
        return cls(**ids, all=every)

    def is_special(self, vocab_size: int) -> np.ndarray:
        """bool [V]."""
        table = np.zeros(vocab_size, dtype=bool)
        table[list(self.all)] = True
        return table
