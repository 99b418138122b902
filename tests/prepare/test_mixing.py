"""Corpora mixed into one: everything of each is there, and nothing leaks that one holds back."""

import pytest
from prepare.corpora import trex_fact, write_lines, write_trex

from trelm_ds.data.schema import Sample
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.errors import ConfigError
from trelm_ds.knowledge.graph import KnowledgeGraph
from trelm_ds.prepare.cli import prepare
from trelm_ds.prepare.jsonl import read_jsonl
from trelm_ds.prepare.mixing import mix
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, RawProbe
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.trex import read_trex

PARIS, FRANCE = ("Q90", "Paris"), ("Q142", "France")


def corpus(name, texts, **changes):
    documents = [RawDocument(f"{name} {i}", text, spans) for i, (text, spans) in enumerate(texts)]
    return RawCorpus(name, documents, RawGraph(), **changes)


def test_one_corpus_stays_as_it_is():
    alone = corpus("a", [("text", [])])
    assert mix([alone]) is alone


def test_texts_graphs_probes_and_counts_of_all():
    def growing():  # as REBEL's reader: the graph is there when the texts have been read
        yield RawDocument("b 0", "Lyon", [(0, 4, "Q456")])
        late.graph.name_entity("Q456", "Lyon")
        late.graph.triples.append(("Q456", "P17", "Q142"))
        late.counts["mended"] += 2

    first, late = corpus("a", [("Paris", [(0, 5, "Q90")])]), RawCorpus("b", (), RawGraph())
    late.documents = growing()
    first.graph.name_entity("Q90", "Paris")
    first.probes = [RawProbe("P17", "Q90", "Q142", "[MASK]", "France")]
    first.candidates = ["France"]
    whole = mix([first, late])
    assert whole.name == "a+b" and whole.candidates == ["France"]
    assert [d.text for d in whole.documents] == ["Paris", "Lyon"]
    assert list(whole.graph.entities) == ["Q90", "Q456"]
    assert whole.graph.triples == [("Q456", "P17", "Q142")]
    assert len(whole.probes) == 1 and whole.counts == {"b: mended": 2}


def test_refused_lines_are_left_out_with_their_mentions():
    text = "Paris lies here\nsecret of Lyon\nand Lyon\nthere"
    spans = [(0, 5, "Q90"), (26, 30, "Q456"), (35, 39, "Q456"), (20, 33, "Q1"), (37, 45, "Q2")]
    own = [("secret", [])]
    first = corpus("a", own, refuses=lambda line: "secret" in line)
    whole = mix([first, corpus("b", [(text, spans), ("secret", [(0, 6, "Q1")])])])
    mine, kept, empty = whole.documents
    assert mine.text == "secret"  # its own line is its own affair
    assert kept.text == "Paris lies here\nand Lyon\nthere" and empty.text == ""
    assert [(kept.text[s:e], i) for s, e, i in kept.spans] == [("Paris", "Q90"), ("Lyon", "Q456")]
    assert whole.counts == {"lines_refused": 2, "mentions_left_out": 4}


@pytest.fixture
def trex(tmp_path):
    """A corpus of one fact in a text and one, of Zed's, in the graph alone."""
    zed, say = ("Q5", "Zéd A. Person"), "On 4 May 1900 Parïs, not Lyon, became [MASK]."
    facts = [
        trex_fact("P27", PARIS, FRANCE, (say, "Parïs", "Frânce"), ("[MASK].", "Paris", "France")),
        trex_fact("P27", zed, ("Q17", "Japan"), ("Zed is of [MASK].", "Zed", "Nippon")),
    ]
    options = next(
        options
        for options in (ReaderOptions(seed=s, graph_only_fraction=0.5) for s in range(99))
        if options.is_graph_only("Q5") and not options.is_graph_only("Q90")
    )
    return read_trex([write_trex(tmp_path / "trex", facts)], options)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("On 4 May 1900 Parïs, not Lyon, became Frânce.", True),
        ("so : on 5 may 1901 paris , not lyon , became france , it is said", True),
        ("on 4 may 1900 paris , not lyon , became francesco", False),
        ("on may paris not", False),
        ("France .", True),  # a whole sentence of it, if a short one
        ("all of France", False),
        ("zed a . person came to japan", True),
        ("zed lived in nippon for long", True),
        ("zed lived in japanese towns", False),
        ("zedd lived in japan", False),
        ("japan", False),
        ("", False),
    ],
)
def test_trex_refuses_its_sentences_and_graph_only_facts(trex, line, refused):
    assert trex.refuses(line) == refused


def test_a_folder_of_two_corpora(tmp_path, trex):
    tokyo = "the city of tokyo is large and lies in the east of the land"
    rows = [
        {"id": "0", "text": f"{tokyo}\nzed a . person came to japan", "spans": [[12, 17, "Q1490"]]},
        {"id": "1", "text": f"{tokyo} and is old", "spans": [[12, 17, "Q1490"]]},
    ]
    own = write_lines(tmp_path / "own.jsonl", rows)
    flags = ["--heldout_fraction=0", "--dim=4", "--epochs=1", f"--output={tmp_path / 'data'}"]
    prepare(["trex", f"--input={tmp_path / 'trex'}", "--also", f"jsonl={own}", *flags])
    manifest = load_manifest(tmp_path / "data")
    assert manifest["name"] == "trex+jsonl"
    graph = KnowledgeGraph.load(tmp_path / "data")
    assert graph.num_entities >= 4 and len(graph.triples) == 2
    reader = ShardReader(tmp_path / "data", manifest, "train")
    samples: list[Sample] = [reader[i] for i in range(len(reader))]
    assert {s.doc for s in samples} >= {"0", "1"}
    reader.close()


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
