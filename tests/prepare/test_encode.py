"""Character spans to token spans, windows, names and tokenizer folders."""

import json
from collections import Counter

import numpy as np
import pytest

from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.prepare.encode import encode_names, encode_texts, token_spans, windows
from trelm_ds.prepare.long_tail import choose_band, rarity_ranks, word_types
from trelm_ds.prepare.vocabulary import (
    BERT_SPECIALS,
    load_vocabulary,
    prune_vocabulary,
    tokenizer_type,
    train_wordpiece,
)

LETTERS = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789,.'-?!é"]
WORDS = ["the", "paris", "lyon", "scott", "scottish", "is", "in", "france"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = BERT_SPECIALS + WORDS + LETTERS + [f"##{c}" for c in LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_vocabulary(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A byte-level vocabulary of single bytes and one merged word, `` Paris``."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("roberta")
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    parts = ["ĠP", "ar", "is", "aris", "ĠParis"]
    words = specials + sorted(ByteLevel.alphabet()) + parts + ["<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges = ["#version: 0.2", "Ġ P", "a r", "i s", "ar is", "ĠP aris"]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return load_vocabulary(folder)


def map_spans(tokenizer, text, *surfaces, counts=None):
    """(decoded tokens, key) of the spans of each surface's first place."""
    spans = [(text.index(s), text.index(s) + len(s), key) for key, s in enumerate(surfaces)]
    item = encode_texts(tokenizer, [text])[0]
    rows = token_spans(item, text, spans, Counter() if counts is None else counts)
    return [(tokenizer.decode(item.ids[left:right]).strip(), key) for left, right, key in rows]


def test_spans_decode_to_their_surface(bert, roberta):
    text = "The Scottish café, near Paris-Lyon in FRANCE."
    surfaces = ["café", "Paris-Lyon", " FRANCE", "Scottish"]
    assert map_spans(bert, text, *surfaces) == [
        ("scottish", 3), ("cafe", 0), ("paris - lyon", 1), ("france", 2),
    ]  # fmt: skip
    assert map_spans(roberta, text, *surfaces) == [
        ("Scottish", 3), ("café", 0), ("Paris-Lyon", 1), ("FRANCE", 2),
    ]  # fmt: skip


def test_a_span_inside_a_token_or_on_blanks_is_dropped_and_counted(bert):
    counts = Counter()
    text = "The Scottish   inn is in Paris"
    assert map_spans(bert, text, "Scott", "   ", "Paris", counts=counts) == [("paris", 2)]
    assert counts == {"span_cuts_token": 1, "span_empty": 1}


def test_of_overlapping_spans_the_longer_stays(bert):
    counts = Counter()
    text = "Paris Lyon France is in the France"
    kept = map_spans(bert, text, "Paris", "Paris Lyon", "Lyon France", "France", counts=counts)
    # Equal to "Paris Lyon" in neither end: "Lyon France" is longer, which frees "Paris".
    assert kept == [("paris", 0), ("lyon france", 2)]
    assert counts["span_overlap"] == 2


def test_a_special_token_in_the_text_is_ordinary_text(bert, roberta):
    for tokenizer in (bert, roberta):
        text = "in [SEP] the [MASK] </s> <mask> end"
        ids = encode_texts(tokenizer, [text])[0].ids.tolist()
        assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_whole_words_are_single_tokens_of_their_word(bert):
    item = encode_texts(bert, ["Paris zoo, France"])[0]
    tokens = bert.convert_ids_to_tokens(item.ids.tolist())
    whole = [t for t, w in zip(tokens, item.whole, strict=True) if w]
    assert tokens == ["paris", "z", "##o", "##o", ",", "france"]
    assert whole == ["paris", ",", "france"]


def test_windows_end_at_sentences_and_cover_every_token_once(bert):
    text = (
        "Paris is in France. Lyon is in France! the 2 in Paris\nscott is in the in in the france in"
    )
    item = encode_texts(bert, [text])[0]
    tokens = bert.convert_ids_to_tokens(item.ids.tolist())
    runs = windows(item, text, np.empty((0, 3), np.int32), 12)
    assert [tokens[b:e][-1] for b, e in runs] == ["!", "paris", "in"]
    assert [tokens[b] for b, _ in runs] == ["paris", "the", "scott"]
    for size in range(2, 25):
        runs = windows(item, text, np.empty((0, 3), np.int32), size)
        assert [b for b, _ in runs][1:] == [e for _, e in runs][:-1]
        assert runs[0][0] == 0 and runs[-1][1] == len(tokens)
        assert all(e - b <= size for b, e in runs)


@pytest.mark.timeout(60)
def test_windows_of_a_million_blanks_take_no_quadratic_time(bert):
    text = "the france is in" + " " * 1_000_000 + "lyon\n the paris"
    item = encode_texts(bert, [text])[0]
    assert windows(item, text, np.empty((0, 3), np.int32), 6) == [(0, 5), (5, 7)]


def test_windows_split_neither_mentions_nor_words_unless_they_must(bert):
    text = "in zoo " * 8
    item = encode_texts(bert, [text])[0]  # in z ##o ##o, 4 tokens each
    mention = np.array([[4, 12, 0]], np.int32)
    for begin, end in windows(item, text, mention, 9):
        assert not 4 < begin < 12 and not 4 < end < 12
        assert item.starts[begin]
    assert windows(item, text, mention, 3)[:2] == [(0, 1), (1, 4)]
    assert (4, 7) in windows(item, text, mention, 3)  # the mention alone is longer than 3


def test_names_read_as_inside_a_sentence(bert, roberta):
    table = encode_names(roberta, ["Paris", "Paris" * 9], 8)
    assert roberta.convert_ids_to_tokens(table[0, :1].tolist()) == ["ĠParis"]
    assert (table[0, 1:] == -1).all() and (table[1] >= 0).all()
    assert encode_names(bert, ["Lyon France"], 8)[0, :3].tolist() == [
        *bert.convert_tokens_to_ids(["lyon", "france"]), -1,
    ]  # fmt: skip


def test_tokenizers_survive_saving(tmp_path, bert, roberta):
    trained = train_wordpiece(lambda: ["Paris is in France , Lyon too"] * 5, vocab_size=300)
    for kind, tokenizer in (("bert", bert), ("roberta", roberta), ("bert", trained)):
        tokenizer.save_pretrained(str(tmp_path / "t"))
        again = load_tokenizer(tmp_path / "t")
        text = f"Paris {tokenizer.mask_token} in Paris"
        ids = again(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (again.cls_token_id, again.sep_token_id)
        assert ids.count(again.mask_token_id) == 1
        assert tokenizer_type(again) == kind and len(again) == len(tokenizer)
    ids = roberta("in <mask> Paris", add_special_tokens=False)["input_ids"]
    assert roberta.convert_ids_to_tokens(ids) == ["i", "n", "<mask>", "ĠParis"]


def test_training_a_vocabulary_is_deterministic_and_limits_its_alphabet(monkeypatch):
    from trelm_ds.prepare import vocabulary

    texts = [f"{a}{b}{a} {b}{a}{a}n tie{a} ties{b}" for a in "abcdefgh" for b in "ijklmnop"]
    texts += ["Ω Ω ω tie tie ties ties"]
    first = train_wordpiece(lambda: texts, vocab_size=120).get_vocab()
    for _ in range(4):
        assert train_wordpiece(lambda: texts, vocab_size=120).get_vocab() == first
    assert "ω" in first and {"tie", "ties"} & set(first)
    monkeypatch.setattr(vocabulary, "MAX_ALPHABET", 19)
    limited = train_wordpiece(lambda: texts, vocab_size=120).get_vocab()
    assert "ω" not in limited and "tie" in limited


def test_a_pruned_vocabulary_keeps_what_is_used_asked_or_spelled(bert, roberta):
    texts = ["Paris is in France"] * 3 + ["Lyon is in France"]
    pruned = prune_vocabulary(bert, texts, ["Scottish"], 3)
    words = set(pruned.get_vocab())
    letters = {*"parisnfcelyo"}  # of every word there is, so that rare ones are spelled
    letters |= {f"##{letter}" for letter in letters}
    assert {*BERT_SPECIALS, *letters, "paris", "is", "in", "france", "scottish"} == words
    # Ids stay in order, case is ignored as before, and what does not occur is unknown.
    assert pruned.tokenize("Paris, Lyon") == ["paris", "[UNK]", "l", "##y", "##o", "##n"]
    ids = [bert.get_vocab()[word] for word in sorted(words, key=pruned.get_vocab().get)]
    assert ids == sorted(ids)
    # A character that is unknown is not one that its name is spelled with.
    pruned = prune_vocabulary(bert, ["is ☃"] * 3, [], 3)
    assert {*BERT_SPECIALS, "is", "i", "s", "##i", "##s"} == set(pruned.get_vocab())
    pruned = prune_vocabulary(bert, [*texts, "ab ba"], [], 4)
    assert pruned.tokenize("ba is") == ["b", "##a", "is"]
    with pytest.raises(ConfigError, match="BERT"):
        prune_vocabulary(roberta, texts, [], 3)


def test_case_follows_the_vocabulary(tmp_path):
    words = [*BERT_SPECIALS, "Paris", "paris"]
    (tmp_path / "cased-vocab.txt").write_text("\n".join(words))
    cased = load_vocabulary(tmp_path / "cased-vocab.txt")
    assert cased.tokenize("Paris paris") == ["Paris", "paris"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nothing", "no such file or folder"),
        ({"a": ""}, ".", "no tokenizer.json, vocab.txt or vocab.json"),
        ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nx\n"}, ".", r"\[MASK\] missing"),
        ({"vocab.txt": "\n".join([*BERT_SPECIALS, "x", "x"])}, "vocab.txt", "occurs twice"),
        ({"vocab.json": "{}"}, ".", "no merges.txt beside it"),
        ({"vocab.json": "{", "merges.txt": ""}, ".", "not a RoBERTa vocabulary"),
        ({"tokenizer.json": "{"}, ".", "tokenizer not loadable"),
    ],
)
def test_bad_vocabularies(tmp_path, files, path, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_vocabulary(tmp_path / path)


@pytest.mark.parametrize("wrong", ["double", "gap"])
def test_vocabularies_whose_ids_are_not_every_number_once_are_refused(tmp_path, bert, wrong):
    """Tables have ``len(tokenizer)`` rows: ids beyond them failed after the corpus was read."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "c"]
    vocab = {word: i for i, word in enumerate(words)}
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert len(load_vocabulary(tmp_path)) == 8
    vocab["b"] = {"double": 5, "gap": 8}[wrong]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(DataError, match="vocab.json: .* ids are not 0 to 7 each once"):
        load_vocabulary(tmp_path)

    bert.save_pretrained(str(tmp_path / "t"))
    path = tmp_path / "t" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["france"] = {"double": 5, "gap": len(bert)}[wrong]
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="ids are not 0 to .* each once"):
        load_tokenizer(tmp_path / "t")


def test_the_band_of_long_tail_words(bert):
    types = word_types(bert)
    tokens = bert.convert_ids_to_tokens(list(range(len(bert))))
    assert [t for t, allowed in zip(tokens, types, strict=True) if allowed] == WORDS
    counts = np.zeros(len(bert), np.int64)
    ids = dict(zip(WORDS, bert.convert_tokens_to_ids(WORDS), strict=True))
    for word, count in {"the": 50, "paris": 2, "lyon": 3, "is": 2, "in": 1}.items():
        counts[ids[word]] = count
    ranks = rarity_ranks(counts, types)
    order = sorted((rank, word) for word, i in ids.items() if (rank := ranks[i]))
    assert [word for _, word in order] == ["is", "paris", "lyon", "the"]
    # 100 samples: ranks 1 and 2 reach 15%, rank 3 would make it 28%.
    assert choose_band(np.array([22, 5, 10, 13, 50])) == 2
    assert choose_band(np.array([22, 5, 10, 0, 13, 50])) == 2  # a rank that adds no sample
    assert choose_band(np.array([5, 0, 0])) == 0
    assert choose_band(np.array([5])) == 0
    assert choose_band(np.array([1, 3])) == 0  # 0% is nearer to 20% than 75%
