"""The one way a tokenizer is loaded: from a local folder, complete for masking and mentions."""

from __future__ import annotations

from pathlib import Path

from trelm_ds.errors import DataError, one_line
from trelm_ds.files import file_sha256

FILES = ("tokenizer.json", "vocab.txt", "vocab.json")  # each holds a vocabulary
SPECIAL_TOKENS = ("cls", "sep", "mask", "pad", "unk")


def has_every_id(vocabulary: dict[str, int]) -> bool:
    """Whether the ids are 0 to len - 1, each once: what is kept by token has a row for each."""
    return sorted(vocabulary.values()) == list(range(len(vocabulary)))


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a model's folder has its tokenizer beside the weights."""
    return any((Path(folder) / name).is_file() for name in FILES)


def load_tokenizer(folder: str | Path):
    """The tokenizer of a local folder; never a download, never code from the folder.

    Returns:
        A fast Hugging Face tokenizer with each of ``SPECIAL_TOKENS``.

    Raises:
        DataError: it cannot be loaded, is not a fast one, lacks a special token, or its ids have
            gaps.
    """
    from transformers import AutoTokenizer  # seconds to import; loader processes do without

    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder, so there is no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    # transformers and tokenizers raise a dozen kinds of error, the bare class among them.
    except Exception as error:
        raise DataError(f"{folder}: tokenizer not loadable: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: not a fast tokenizer (character offsets are needed)")
    for name in SPECIAL_TOKENS:
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise DataError(f"{folder}: the tokenizer has no {name} token")
    if not has_every_id(tokenizer.get_vocab()):
        raise DataError(f"{folder}: its ids are not 0 to {len(tokenizer) - 1} each once")
    return tokenizer


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 of a prepared folder's ``tokenizer.json``, the whole definition of its tokenizer."""
    return file_sha256(Path(folder) / "tokenizer" / "tokenizer.json")
