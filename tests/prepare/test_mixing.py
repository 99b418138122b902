"""Corpora mixed into one: everything of each is there, and nothing leaks that one holds back."""

import json

import pytest
from prepare.corpora import trex_fact, write_lines, write_trex

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import ConfigError
from trelm_ds.prepare.cli import prepare
from trelm_ds.prepare.jsonl import read_jsonl
from trelm_ds.prepare.mixing import mix
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, RawProbe
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.trex import read_trex

PARIS, FRANCE, JAPAN = ("Q90", "Paris"), ("Q142", "France"), ("Q17", "Japan")


def corpus(name, texts, **changes):
    documents = [RawDocument(f"{name} {i}", text, spans) for i, (text, spans) in enumerate(texts)]
    return RawCorpus(name, documents, RawGraph(), **changes)


def nothing(document):
    return set()


def test_one_corpus_stays_as_it_is():
    alone = corpus("a", [("text", [])])
    assert mix([alone]) is alone


def test_the_first_has_to_say_what_it_holds_back():
    with pytest.raises(ConfigError, match="a cannot keep its held-out texts out of other corpora"):
        mix([corpus("a", []), corpus("b", [], refuses=nothing)])


def test_texts_graphs_probes_and_counts_of_all():
    def growing():  # as REBEL's reader: the graph is there when the texts have been read
        yield RawDocument("b 0", "Lyon", [(0, 4, "Q456")])
        late.graph.name_entity("Q456", "Lyon")
        late.graph.triples.append(("Q456", "P17", "Q142"))
        late.counts["mended"] += 2

    first = corpus("a", [("Paris", [(0, 5, "Q90")])], refuses=nothing)
    late = RawCorpus("b", (), RawGraph())
    late.documents = growing()
    first.graph.name_entity("Q90", "Paris")
    first.probes = [RawProbe("P17", "Q90", "Q142", "[MASK]", "France")]
    first.candidates = ["France"]
    whole = mix([first, late])
    assert whole.name == "a+b" and whole.candidates == ["France"]
    own, other = whole.documents
    assert (own.text, own.heldout) == ("Paris", None)
    assert (other.text, other.heldout, other.spans) == ("Lyon", False, [(0, 4, "Q456")])
    assert list(whole.graph.entities) == ["Q90", "Q456"]
    assert whole.graph.triples == [("Q456", "P17", "Q142")]
    assert len(whole.probes) == 1 and whole.counts == {"b: mended": 2}


def test_refused_lines_are_left_out_with_their_mentions():
    text = "Paris lies here\nsecret of Lyon\nand Lyon\nthere"
    spans = [(0, 5, "Q90"), (26, 30, "Q456"), (35, 39, "Q456"), (20, 33, "Q1"), (37, 45, "Q2")]

    def refuses(document):
        return {i for i, line in enumerate(document.text.split("\n")) if "secret" in line}

    first = corpus("a", [("secret", [])], refuses=refuses)
    whole = mix([first, corpus("b", [(text, spans), ("secret", [(0, 6, "Q1")])])])
    mine, kept, empty = whole.documents
    assert mine.text == "secret"  # its own line is its own affair
    assert kept.text == "Paris lies here\nand Lyon\nthere" and empty.text == ""
    assert [(kept.text[s:e], i) for s, e, i in kept.spans] == [("Paris", "Q90"), ("Lyon", "Q456")]
    assert whole.counts == {"lines_refused": 2, "mentions_left_out": 4}


SAY = "On 4 May 1900 Parïs, not Lyon, became [MASK]."
OPTIONS = next(  # Zed's fact is for the graph alone
    options
    for options in (ReaderOptions(seed=s, graph_only_fraction=0.5) for s in range(99))
    if options.is_graph_only("Q5") and not options.is_graph_only("Q90")
)


@pytest.fixture
def trex_folder(tmp_path):
    odd = "Sjælland (ꜩealand) has long been part of [MASK]."
    facts = [
        trex_fact("P27", PARIS, FRANCE, (odd, "Sjælland", "Gaul")),
        trex_fact("P27", PARIS, FRANCE, (SAY, "Parïs", "Frânce"), ("[MASK].", "Paris", "France")),
        trex_fact("P27", ("Q5", "Zéd A. Person"), JAPAN, ("Zed is of [MASK].", "Zed", "Nippon")),
        trex_fact("P19", ("Q5", "Zéd A. Person"), ("Q580", "Łódź"), ("[MASK], Zed", "Zed", "Łódź")),
        trex_fact("P27", ("Q5", "Zéd A. Person"), ("Q6", "Karol Biały")),
    ]
    return write_trex(tmp_path / "trex", facts)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("On 4 May 1900 Parïs, not Lyon, became Frânce.", {0}),
        ("so : on 5 may 1901 paris , not lyon , became france , it is said", {0}),
        ("well\non 4 may 1900 paris ,\nnot lyon , became france .\nyes", {1, 2}),  # cut in two
        ("on 4 may\n\n1900 paris , not\nlyon , became france", {0, 2, 3}),  # in three
        # A line that ends one and begins another is not the end of the second.
        ("on 4 may 1900 paris , not\nlyon , became france zed\nlived well in the year\nso", {0, 1}),
        ("on 4 may 1900 paris , not lyon , became francesco", set()),
        ("on may paris not", set()),
        ("( ) has long been part of gaul .", {0}),  # words that ERNIE did not know
        ("France .", {0}),  # a whole sentence of it, if a short one
        ("all of France", set()),
        ("zed a . person came to japan", {0}),
        ("zed lived in nippon for long", {0}),
        ("zed plays .\nhe is one\nof japan .", {2}),  # named once in an article
        ("zed lived in japanese towns", set()),
        ("zedd lived in japan", set()),
        ("zed came\nto łodz once", {1}),  # letters that are more than a letter and an accent
        ("zed met karol", set()),
        ("karol biały knew zed", {0}),
        ("japan", set()),
        ("", set()),
    ],
)
def test_trex_refuses_its_sentences_and_graph_only_facts(trex_folder, text, refused):
    refuses = read_trex([trex_folder], OPTIONS).refuses
    assert refuses(RawDocument("x", text)) == refused


def test_a_link_is_as_good_as_a_name(trex_folder):
    refuses = read_trex([trex_folder], OPTIONS).refuses
    text = "Z. Person\nin Tokyo\nand there"
    assert refuses(RawDocument("x", text, [(0, 9, "Q5"), (13, 18, "Q17")])) == {1}
    assert refuses(RawDocument("x", text, [(0, 9, "Q7"), (13, 18, "Q17")])) == set()
    # A page of the subject links neither itself nor, here, names it.
    page = RawDocument("x", text, [(13, 18, "Q17")])
    assert refuses(page) == set()
    page.about = "Q5"
    assert refuses(page) == {1}


def test_a_folder_of_two_corpora_has_none_of_what_is_held_back(tmp_path, trex_folder):
    tokyo = "the city of tokyo is large and lies in the east of the land"
    secret = "zed a . person came to japan"
    rows = [
        {"id": "0", "text": f"{tokyo}\n{secret}\n{SAY.replace('[MASK]', 'France')}"},
        {"id": "1", "text": f"{tokyo} and is old", "heldout": True},  # so nobody may train on it
        {"id": "2", "text": f"{tokyo} and is new", "heldout": False},
    ]
    for row in rows:
        row["spans"] = [[12, 17, "Q1490"]]
    own = write_lines(tmp_path / "own.jsonl", rows)
    flags = [f"--seed={OPTIONS.seed}", "--graph_only_fraction=0.5", "--heldout_fraction=0"]
    flags += ["--dim=4", "--epochs=1", f"--output={tmp_path / 'data'}"]
    prepare(["trex", f"--input={trex_folder}", "--also", f"jsonl={own}", *flags])
    manifest = load_manifest(tmp_path / "data")
    assert manifest["name"] == "trex+jsonl"
    assert len(KnowledgeGraph.load(tmp_path / "data").triples) == 4
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    texts = []
    for split in ("train", "heldout"):
        reader = ShardReader(tmp_path / "data", manifest, split)
        texts += [(split, tokenizer.decode(reader[i].ids)) for i in range(len(reader))]
        reader.close()
    assert sum("tokyo" in text for _, text in texts) == 2
    assert sum("not lyon" in text for _, text in texts) == 1  # T-REx's own
    assert not any("person" in text or "is old" in text for _, text in texts)
    assert {split for split, _ in texts} == {"train"}
    reader_counts = json.loads((tmp_path / "data" / "stats.json").read_text())["preparation"]
    assert reader_counts["reader"]["lines_refused"] == 2
    assert reader_counts["reader"]["heldout_left_out"] == 1


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("owl=x", "kinds are trex, ernie"),
        ("jsonl", "expected KIND=PATH"),
        ("jsonl=", "expected KIND=PATH"),
        ("sample=x", "expected KIND=PATH"),
        ("trex=x", "name it with --input"),
    ],
)
def test_bad_names_of_other_corpora(tmp_path, also, message):
    flags = ["trex", f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--also", also]
    with pytest.raises(ConfigError, match=message):
        prepare(flags)


def test_a_reader_without_a_text_held_back_refuses_nothing(tmp_path):
    rows = [{"id": "0", "text": "a text", "spans": []}]
    assert read_jsonl([write_lines(tmp_path / "own.jsonl", rows)], ReaderOptions()).refuses is None
