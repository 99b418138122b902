"""The tokenizer of a prepared folder: a given vocabulary, or WordPiece trained on the corpus."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from trelm_ds.data.tokenizer import has_every_id, load_tokenizer
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.prepare.encode import batched

log = logging.getLogger(__name__)

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TRAINED_VOCABULARY = 8192  # the embedded sample and corpora of a few MiB fill about this much
MAX_ALPHABET = 500  # characters; a rarer one is unknown


def train_wordpiece(texts: Callable[[], Iterable[str]], vocab_size: int = TRAINED_VOCABULARY):
    """A lower-casing BERT tokenizer trained on ``texts``; equal texts give an equal vocabulary.

    Args:
        texts: called for each of three passes.

    Returns:
        A fast Hugging Face tokenizer.
    """
    from tokenizers import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=True)
    normalize = trainer.normalizer.normalize_str
    characters: Counter[str] = Counter()
    for text in texts():
        characters.update(normalize(text))
    ordered = sorted(characters, key=lambda c: (-characters[c], c))
    alphabet = sorted(c for c in ordered[:MAX_ALPHABET] if not c.isspace())
    rare = str.maketrans(dict.fromkeys(ordered[MAX_ALPHABET:]))
    # The library breaks ties between merges by ids that it would hand to continuation pieces in
    # the order of a randomly seeded hash table. Naming them beforehand fixes the ids.
    pieces = alphabet + [f"##{c}" for c in alphabet if c.isalnum()]
    trainer.train_from_iterator(
        (normalize(text).translate(rare) for text in texts()),
        vocab_size=max(vocab_size, len(BERT_SPECIALS) + len(pieces)),
        min_frequency=2,
        limit_alphabet=MAX_ALPHABET,
        special_tokens=BERT_SPECIALS + pieces,
        show_progress=False,
    )
    vocabulary = trainer.get_vocab()
    # Merging leaves the steps on the way to each word behind, more than a third of the pieces.
    # A longest match never reaches most of them; without them the same text has the same tokens.
    words = sorted(vocabulary, key=vocabulary.get)
    used = {*BERT_SPECIALS, *pieces}
    encoder = _bert(words, lowercase=True).backend_tokenizer
    for batch in batched(texts(), len):
        for encoding in encoder.encode_batch(batch, add_special_tokens=False):
            used.update(encoding.tokens)
    return _bert([word for word in words if word in used], lowercase=True)


def prune_vocabulary(tokenizer, texts: Iterable[str], names: Iterable[str], min_count: int):
    """A BERT tokenizer without the pieces that a corpus hardly uses: a small model's output layer
    is most of its step, and most of a full vocabulary is never asked for.

    Args:
        tokenizer: fast BERT tokenizer.
        texts: of the corpus.
        names: their pieces are all kept, e.g. answers of probes.
        min_count: uses in ``texts`` from which on a piece stays. Every character that a used piece
            holds stays, so that a word of dropped pieces is spelled and not unknown.

    Raises:
        ConfigError: not a BERT tokenizer.
    """
    if tokenizer_type(tokenizer) != "bert":
        raise ConfigError("--vocab_min_count prunes BERT vocabularies only")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    counts = [0] * len(words)
    special = set(tokenizer.all_special_ids)

    def encoded(batch):
        return tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]

    for batch in batched(texts, len):
        for ids in encoded(batch):
            for i in ids:
                counts[i] += 1
    kept = set(special)
    if names := list(names):
        kept.update(itertools.chain.from_iterable(encoded(names)))
    kept.update(i for i, count in enumerate(counts) if count >= min_count)
    bare = [word.removeprefix("##") for word in words]
    used = set().union(*(bare[i] for i, n in enumerate(counts) if n and i not in special))
    kept.update(i for i, letter in enumerate(bare) if letter in used)
    lowercase = bool(tokenizer.init_kwargs.get("do_lower_case", True))
    return _bert([word for i, word in enumerate(words) if i in kept], lowercase)


def _bert(words: list[str], lowercase: bool):
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    backend = BertWordPieceTokenizer(
        {word: index for index, word in enumerate(words)}, lowercase=lowercase
    )
    return BertTokenizerFast(tokenizer_object=backend._tokenizer, do_lower_case=lowercase)


def _bert_from_file(path: Path):
    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--vocab {path}: {error}") from None
    words = [word.rstrip("\r") for word in words]
    missing = [special for special in BERT_SPECIALS if special not in words]
    if missing or len(set(words)) != len(words):
        fault = f"{', '.join(missing)} missing" if missing else "a word occurs twice"
        raise DataError(f"--vocab {path}: not a BERT vocabulary: {fault}")
    # A cased vocabulary holds capitals outside the bracketed specials, an uncased one never does.
    lowercase = all(word == word.lower() for word in words if not word.startswith("["))
    return _bert(words, lowercase)


def _roberta_from_files(vocabulary: Path, merges: Path):
    from tokenizers import AddedToken, ByteLevelBPETokenizer, processors
    from transformers import RobertaTokenizerFast

    try:
        # The upstream file's pairs, one a line; its first line is a version comment.
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(x.rstrip("\r").split(" ")) for x in lines if x and x[:9] != "#version:"]
        vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
        for special in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
            if special not in vocab:
                raise ValueError(f"{special} missing")
        if not has_every_id(vocab):
            raise ValueError(f"its ids are not 0 to {len(vocab) - 1} each once")
        backend = ByteLevelBPETokenizer(vocab, pairs)
    # More checks written by hand would only repeat the backend's, which are of many kinds.
    except Exception as error:
        raise DataError(f"--vocab {vocabulary}: not a RoBERTa vocabulary: {error}") from None
    # By position: the name of the second argument differs between versions of tokenizers.
    backend._tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"])
    )
    # As upstream: the mask takes the blank before it along, so "in <mask>." is three tokens.
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return RobertaTokenizerFast(tokenizer_object=backend._tokenizer, mask_token=mask)


def load_vocabulary(path: Path):
    """A fast tokenizer from local files only.

    Args:
        path: a BERT ``*vocab.txt``; a RoBERTa ``*vocab.json`` with ``*merges.txt`` beside it; or
            a folder that holds ``tokenizer.json`` or one of these.

    Raises:
        DataError: nothing of that kind is there, or it is broken.
    """
    if path.is_dir():
        if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
            return load_tokenizer(path)
        for name in ("vocab.txt", "vocab.json"):
            if (path / name).is_file():
                return load_vocabulary(path / name)
        raise DataError(f"--vocab {path}: no tokenizer.json, vocab.txt or vocab.json in it")
    if not path.is_file():
        raise DataError(f"--vocab {path}: no such file or folder")
    if path.suffix == ".json":
        merges = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        if not merges.is_file():
            raise DataError(f"--vocab {path}: no {merges.name} beside it")
        return _roberta_from_files(path, merges)
    return _bert_from_file(path)


def tokenizer_type(tokenizer) -> str:
    """``bert`` or ``roberta``: which backbone the special tokens belong to."""
    return "roberta" if tokenizer.cls_token == "<s>" else "bert"
