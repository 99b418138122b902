"""Every reader on files of its format, good and bad."""

import bz2
import gzip
import html
import json
from collections import Counter
from pathlib import Path

import pytest
from prepare.corpora import CITIES, trex_fact, write_lines, write_own_graph, write_trex

from trelm_ds.errors import ConfigError, DataError
from trelm_ds.prepare import files, wikipedia
from trelm_ds.prepare.entities import Mentioned, index_graph
from trelm_ds.prepare.ernie import read_ernie
from trelm_ds.prepare.files import read_json
from trelm_ds.prepare.graphs import read_graph
from trelm_ds.prepare.jsonl import read_jsonl
from trelm_ds.prepare.raw import RawCorpus, RawGraph
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.rebel import read_rebel
from trelm_ds.prepare.trex import read_trex
from trelm_ds.prepare.wikidata5m import read_wikidata5m
from trelm_ds.prepare.wikipedia import read_wikipedia

NOTHING_APART = {"heldout_fraction": 0.0, "graph_only_fraction": 0.0}
CURIE, PARIS, POLAND = ("Q7186", "Marie Curie"), ("Q90", "Paris"), ("Q36", "Poland")


def surfaces(corpus: RawCorpus) -> list[list[tuple[str, str]]]:
    """Per document its (surface, id) pairs."""
    return [[(d.text[s:e], i) for s, e, i in sorted(d.spans)] for d in corpus.documents]


# --- trex ---------------------------------------------------------------------------------------


def test_trex_puts_the_object_back_and_merges_equal_sentences(tmp_path):
    folder = write_trex(
        tmp_path,
        [
            trex_fact(
                "P19",
                CURIE,
                PARIS,
                ("Curie of Paris, not Parisian, was born in [MASK].", "Curie", "Paris"),
                ("Curie of Paris, not Parisian, was born in [MASK].", "Curie", "Paris"),
                ("She came from [MASK].", "Marie Curie", "Paris"),
                ("No mask here.", "Marie Curie", "Paris"),
            ),
            trex_fact(
                "P27", CURIE, POLAND, ("[MASK] Curie left Poland.", "Curie", "Polish"),
            ),
            trex_fact(
                "P27", PARIS, ("Q142", "France"),
                ("Curie of [MASK], not Parisian, was born in Paris.", "Parisian", "Paris"),
            ),
        ],
    )  # fmt: skip
    corpus = read_trex([folder], ReaderOptions(**NOTHING_APART))
    assert surfaces(corpus) == [
        [("Curie", "Q7186"), ("Paris", "Q142"), ("Parisian", "Q90"), ("Paris", "Q90")],
        [("Paris", "Q90")],
        [("Polish", "Q36"), ("Curie", "Q7186")],
    ]
    assert corpus.counts["evidence_without_one_mask"] == 1
    assert corpus.counts["subject_not_found"] == 1
    assert sorted(corpus.graph.triples) == sorted(
        [("Q7186", "P19", "Q90"), ("Q7186", "P27", "Q36"), ("Q90", "P27", "Q142")]
    )
    assert corpus.graph.entities["Q7186"].name == "Marie Curie"
    assert corpus.graph.entities["Q36"].aliases == ("Polish",)
    assert corpus.graph.relations["P19"] == "place of birth"
    assert corpus.candidates == ["Paris", "Lyon", "French"]
    assert [(p.text, p.answer, p.set) for p in corpus.probes] == [
        ("Marie Curie was born in [MASK] .", "Paris", "template"),
        ("Marie Curie is [MASK] citizen .", "Poland", "template"),
        ("Paris is [MASK] citizen .", "France", "template"),
    ]


def people(count: int) -> list[dict]:
    """One birth and one citizenship for each of ``count`` persons."""
    rows = []
    for i in range(count):
        person = (f"Q{1000 + i}", f"Ann{i} Person")
        city = list(CITIES.items())[i % 5]
        born = (f"{person[1]} was born in [MASK] town {'x' * i} .", person[1], city[0])
        rows.append(trex_fact("P19", person, city[::-1], born))
        other = (f"As [MASK] , {person[1]} spoke {'y' * i} in {city[0]}", person[1], "French")
        rows.append(trex_fact("P27", person, ("Q142", "France"), other))
    return rows


def test_trex_keeps_graph_only_facts_out_of_every_text(tmp_path):
    folder = write_trex(tmp_path, people(200))
    options = ReaderOptions(heldout_fraction=0.1, graph_only_fraction=0.2)
    corpus = read_trex([folder], options)
    only = {p.subject for p in corpus.probes if p.graph_only}
    assert 20 < len(only) < 60
    text = "\n".join(d.text for d in corpus.documents)
    for probe in corpus.probes:
        if probe.set == "template":
            fact = (probe.subject, probe.relation, probe.object)
            assert fact in corpus.graph.triples
            name = corpus.graph.entities[probe.subject].name
            assert (f"{name} " in text) != probe.graph_only
    heldout = [d for d in corpus.documents if d.heldout]
    assert 20 < len(heldout) < 60
    context = [p for p in corpus.probes if p.set == "context"]
    asked = {p.text.replace("[MASK]", p.answer) for p in context if not p.graph_only}
    assert asked == {d.text for d in heldout}
    assert {p.subject for p in context if p.graph_only} == only
    again = read_trex([folder], options)
    assert again.documents == corpus.documents and again.probes == corpus.probes
    other = read_trex([folder], ReaderOptions(seed=7, graph_only_fraction=0.2))
    assert {p.subject for p in other.probes if p.graph_only} != only


def test_trex_withholds_text_only_facts_from_its_graph(tmp_path):
    folder = write_trex(tmp_path, people(200))
    held = {"heldout_fraction": 0.1, "graph_only_fraction": 0.2}
    before = read_trex([folder], ReaderOptions(**held))
    assert not before.graph.withheld and not any(p.text_only for p in before.probes)
    corpus = read_trex([folder], ReaderOptions(**held, text_only_fraction=0.3))
    assert corpus.documents == before.documents  # the texts stay
    only = {p.subject for p in corpus.probes if p.text_only}
    assert 30 < len(only) < 70 and not only & {p.subject for p in corpus.probes if p.graph_only}
    assert {p.subject for p in corpus.probes if p.set == "context" and p.text_only} <= only
    assert sorted(corpus.graph.triples + corpus.graph.withheld) == sorted(before.graph.triples)
    assert {head for head, _, _ in corpus.graph.withheld} == only
    assert not only & {head for head, _, _ in corpus.graph.triples}
    assert corpus.counts["text_only_facts"] == len(corpus.graph.withheld)


def test_trex_drops_sentences_that_name_both_ends_of_a_graph_only_fact(tmp_path):
    rows = people(60)
    # Evidence of another person's fact, yet it also tells where Ann0 ... Ann59 were born.
    tell = [f"Ann{i} Person knew [MASK] and {list(CITIES)[i % 5]} well" for i in range(60)]
    evidence = [(f"{t} , Zed", "Zed", "Japan") for t in tell]
    rows.append(trex_fact("P27", ("Q5", "Zed"), ("Q17", "Japan"), *evidence))
    options = ReaderOptions(heldout_fraction=0.0, graph_only_fraction=0.3, seed=3)
    assert not options.is_graph_only("Q5")
    corpus = read_trex([write_trex(tmp_path, rows)], options)
    told = [d.text for d in corpus.documents if d.text.endswith("Zed")]
    only = {i for i in range(60) if options.is_graph_only(f"Q{1000 + i}")}
    assert len(told) == 60 - len(only) < 60
    for text in told:
        assert int(text.split()[0].removeprefix("Ann")) not in only


def test_trex_minds_neither_case_nor_punctuation_where_a_graph_only_fact_is_told(tmp_path):
    options = ReaderOptions(heldout_fraction=0.0, graph_only_fraction=0.3, seed=3)
    only = next(i for i in range(60) if options.is_graph_only(f"Q{1000 + i}"))
    city = list(CITIES)[only % 5]
    told = [f"ANN{only} - PERSON of {city.upper()}", f"Ann{only}, person\nof [MASK] and {city}'s"]
    told += [f"Ann{only} people of [MASK] and {city}"]  # not the name
    told = [text if "[MASK]" in text else f"{text} of [MASK]" for text in told]
    evidence = [(f"{t} , Zed", "Zed", "Japan") for t in told]
    rows = people(60) + [trex_fact("P27", ("Q5", "Zed"), ("Q17", "Japan"), *evidence)]
    corpus = read_trex([write_trex(tmp_path, rows)], options)
    kept = [d.text for d in corpus.documents if d.text.endswith("Zed")]
    assert kept == [f"Ann{only} people of Japan and {city} , Zed"]


def test_trex_near_copies_share_a_split(tmp_path):
    evidence = [
        (f"In {year} Curie lived in [MASK]!", "Curie", "Paris") for year in range(1890, 1950)
    ]
    folder = write_trex(tmp_path, [trex_fact("P19", CURIE, PARIS, *evidence)])
    documents = read_trex([folder], ReaderOptions(heldout_fraction=0.5)).documents
    assert len(documents) == 60 and len({d.heldout for d in documents}) == 1


def test_trex_limit_takes_from_every_relation(tmp_path):
    corpus = read_trex([write_trex(tmp_path, people(9))], ReaderOptions(limit=4))
    assert [r for _, r, _ in corpus.graph.triples] == ["P19", "P27", "P19", "P27"]


# --- rebel --------------------------------------------------------------------------------------

TOKYO = {
    "docid": "7",
    "title": "Tokyo",
    "uri": "Q1490",
    "text": "Tokyo lies in Japan, not in Chile, since 1457.",
    "entities": [
        {"uri": "Q1490", "boundaries": [0, 5], "surfaceform": "Tokyo"},
        {"uri": "Q17", "boundaries": [16, 21], "surfaceform": "Japan"},
        {"uri": "Q298", "boundaries": [29, 34], "surfaceform": "Chile"},
        {"uri": "None", "boundaries": [6, 10], "surfaceform": "lies"},
        {"uri": "1457^^year", "boundaries": [41, 45], "surfaceform": "1457"},
    ],
    "triples": [
        {
            "subject": {"uri": "Q1490", "surfaceform": "Tokyo"},
            "predicate": {"uri": "P17", "surfaceform": "country"},
            "object": {"uri": "Q17", "surfaceform": "Japan"},
        },
        {
            "subject": {"uri": "Q1490", "surfaceform": "Tokyo"},
            "predicate": {"uri": "P571", "surfaceform": "inception"},
            "object": {"uri": "1457^^year", "surfaceform": "1457"},
        },
    ],
}


def test_rebel_mends_shifted_mentions_and_skips_what_is_no_entity(tmp_path):
    corpus = read_rebel([write_lines(tmp_path / "a.jsonl.gz", [TOKYO])], ReaderOptions())
    # Japan's boundaries are 2 too far and mended; Chile's are 1 off, which is no known shift.
    corpus.documents = list(corpus.documents)
    assert [document.about for document in corpus.documents] == ["Q1490"]
    assert surfaces(corpus) == [[("Tokyo", "Q1490"), ("Japan", "Q17")]]
    assert corpus.graph.triples == [("Q1490", "P17", "Q17")]
    assert corpus.graph.relations == {"P17": "country"}
    assert corpus.counts == {
        "mention_shift_mended": 1,
        "mention_surface_differs": 1,
        "mention_none": 1,
        "mention_literal": 1,
        "triple_literal": 1,
    }


def test_rebel_names_come_from_the_graph_then_titles_then_texts(tmp_path):
    """A text may call an entity by another word first; what is decoded is its name."""

    def record(docid, page, title, text, *mentions):
        entities = [
            {"uri": e, "boundaries": [text.index(s), text.index(s) + len(s)], "surfaceform": s}
            for s, e in mentions
        ]
        ends = ({"uri": e, "surfaceform": s} for s, e in mentions[:2])
        triple = dict(zip(("subject", "object"), ends, strict=True))
        triple["predicate"] = {"uri": "P17", "surfaceform": "country"}
        keys = {"docid": docid, "uri": page, "title": title, "text": text}
        return keys | {"entities": entities, "triples": [triple]}

    jan, dutch, hague = ("Jan", "Q7"), ("Dutch", "Q55"), ("Hague", "Q36600")
    rows = [
        record("1", "Q7", "Jan Steen", "Jan was a Dutch man of the Hague.", jan, dutch, hague),
        record("2", "Q55", "Netherlands (country)", "Dutch land, French.", dutch, ("French", "Q9")),
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)

    def names(known):
        corpus = read_rebel([path], ReaderOptions(graph=known))
        documents = list(corpus.documents)
        mentioned = {e: Mentioned(d.text[s:t], d.doc, 1) for d in documents for s, t, e in d.spans}
        whole = RawGraph()
        whole.merge(corpus.graph)  # as a mixture of corpora does
        whole.merge(known)
        indexed = index_graph(whole, mentioned, [], False, Counter())
        aliases = {name for name, i in indexed.aliases if i == indexed.index["Q55"]}
        return {entity: name for entity, name, _ in indexed.entities}, aliases

    own = {"Q7": "Jan Steen", "Q55": "Netherlands", "Q36600": "Hague", "Q9": "French"}
    assert names(RawGraph()) == (own, {"Netherlands", "Dutch"})
    graph = RawGraph()
    graph.name_entity("Q55", "Kingdom of the Netherlands")
    graph.name_entity("Q36600", "The Hague")
    assert names(graph) == (
        own | {"Q55": "Kingdom of the Netherlands", "Q36600": "The Hague"},
        {"Kingdom of the Netherlands", "Netherlands", "Dutch"},
    )


def test_an_end_of_a_triple_that_no_text_links_is_named_by_its_alias():
    graph = RawGraph(triples=[("Q1", "P1", "Q2")])
    graph.name_entity("Q1", "one")
    graph.add_alias("Q2", "two")
    indexed = index_graph(graph, {"Q1": Mentioned("one", "a", 1)}, [], False, Counter())
    assert [row[:2] for row in indexed.entities] == [("Q1", "one"), ("Q2", "two")]


# --- ernie --------------------------------------------------------------------------------------

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "state",
    "##less",
    "paris",
    "##ian",
]


def write_ernie(folder: Path) -> Path:
    write_lines(folder / "vocab.txt", VOCABULARY)
    write_lines(folder / "wiki_token", ["2\t4\t5\t6\t7\t8\t3\t8\t9\t6"])
    write_lines(folder / "wiki_entity.gz", ["2\t4\t#UNK#\tQ7\t#UNK#\tQ90\t3\tQ90\t#UNK#\tQ90"])
    return folder


def test_ernie_original_and_decoded_forms_agree(tmp_path):
    folder = write_ernie(tmp_path)
    options = ReaderOptions(vocab=folder / "vocab.txt")
    corpus = read_ernie([folder], options)
    document = next(iter(corpus.documents))
    assert document.text == "the stateless paris\nparisian state"
    spans = [(document.text[s:e], i) for s, e, i in document.spans]
    assert spans == [("stateless", "Q7"), ("paris", "Q90"), ("parisian state", "Q90")]
    sentences = [
        {"tokens": ["the", "state", "##less", "paris"], "entities": [[1, 3, "Q7"], [3, 4, "Q90"]]},
        {"tokens": ["paris", "##ian", "state"], "entities": [[0, 3, "Q90"]]},
    ]
    decoded = write_lines(tmp_path / "articles.jsonl", [{"article": 0, "sentences": sentences}])
    assert list(read_ernie([decoded], ReaderOptions()).documents) == [document]


def test_ernie_leaves_unknown_words_out(tmp_path):
    tokens = ["[UNK]", "the", "[UNK]", "paris", "[UNK]"]
    entities = [[0, 1, "Q1"], [2, 4, "Q90"], [4, 5, "Q2"]]
    sentences = [{"tokens": tokens, "entities": entities}, {"tokens": ["[UNK]"], "entities": []}]
    sentences.append({"tokens": ["state"], "entities": [[0, 1, "Q7"]]})
    decoded = write_lines(tmp_path / "articles.jsonl", [{"article": 0, "sentences": sentences}])
    (document,) = read_ernie([decoded], ReaderOptions()).documents
    assert document.text == "the paris\nstate"
    spans = [(document.text[s:e], i) for s, e, i in document.spans]
    assert spans == [("paris", "Q90"), ("state", "Q7")]


# --- jsonl, wikidata5m, graphs ------------------------------------------------------------------


def test_jsonl_spans_and_links(tmp_path):
    rows = [
        {"id": "a", "text": "Paris is a town.", "spans": [[0, 5, "Q90"]], "note": "ignored"},
        {"id": "b", "text": "Lyon is in France.", "link": True, "heldout": True},
    ]
    graph = read_graph(str(write_own_graph(tmp_path / "g")))
    path = write_lines(tmp_path / "x" / "c.jsonl", rows)
    corpus = read_jsonl([path.parent], ReaderOptions(graph=graph))
    documents = list(corpus.documents)
    assert documents[0].spans == [(0, 5, "Q90")] and documents[0].heldout is None
    assert documents[1].spans == [(0, 4, "Q456"), (11, 17, "Q142")] and documents[1].heldout
    with pytest.raises(DataError, match=r"c.jsonl:2: 'link' needs the names of a graph: --graph"):
        list(read_jsonl([path], ReaderOptions()).documents)
    nameless = read_graph(str(tmp_path / "g" / "triples.tsv"))
    with pytest.raises(DataError, match=r"--graph has none: name a folder with entities.tsv"):
        list(read_jsonl([path], ReaderOptions(graph=nameless)).documents)


def test_a_folder_may_hold_compressed_files_of_both_kinds(tmp_path):
    row = json.dumps({"id": "a", "text": "x", "spans": []}).encode() + b"\n"
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(row))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(row))
    assert len(list(read_jsonl([tmp_path], ReaderOptions()).documents)) == 2


def test_jsonl_links_spans_without_an_id(tmp_path):
    text = "Madri, JAPAN, Chili con carne and Lyon, not Paris."
    names = ("Madri", "JAPAN", "Chili con carne")
    ids = {"Lyon": "Q90", "Paris": "Q142"}  # taken as given, whatever the names say
    spans = [[text.index(n), text.index(n) + len(n)] for n in names]
    spans[1].append(None)
    spans += [[text.index(n), text.index(n) + len(n), i] for n, i in ids.items()]
    rows = [
        {"id": "a", "text": text, "spans": spans},
        {"id": "b", "text": "Toky0 and Tokyo", "spans": [[0, 5], [10, 15]]},
        {"id": "c", "text": "Twin", "spans": [[0, 4]]},
        {"id": "d", "text": "Tokyo", "spans": [[0, 5]]},
    ]
    graph = read_graph(str(write_own_graph(tmp_path / "g")))
    graph.name_entity("Q1", "Twin")
    graph.name_entity("Q2", "Twin")  # as many triples as Q1: ambiguous
    path = write_lines(tmp_path / "c.jsonl", rows)
    corpus = read_jsonl([path], ReaderOptions(graph=graph, limit=3))
    assert surfaces(corpus) == [
        [("Madri", "Q2807"), ("JAPAN", "Q17"), ("Lyon", "Q90"), ("Paris", "Q142")],
        [("Toky0", "Q1490"), ("Tokyo", "Q1490")],
        [],
    ]
    assert corpus.counts == {
        "span_linked_exact": 2,
        "span_linked_approximate": 2,
        "span_linked_nil": 2,
    }
    with pytest.raises(DataError, match=r"c.jsonl:1: a span without an id needs .* --graph"):
        list(read_jsonl([path], ReaderOptions()).documents)


def write_wikidata5m(folder: Path) -> Path:
    write_lines(
        folder / "wikidata5m_transductive_train.txt.gz",
        [("Q90", "P17", "Q142"), ("Q142", "P36", "Q90"), ("Q17", "P36", "Q1490")],
    )
    write_lines(
        folder / "wikidata5m_entity.txt",
        [
            ("Q90", "Paris", "City of Light"),
            ("Q142", "France"),
            ("Q17", "Japan"),
            ("Q1490", "Tokyo"),
        ],
    )
    write_lines(
        folder / "wikidata5m_relation.txt", [("P17", "country"), ("P36", "capital", "seat")]
    )
    write_lines(
        folder / "wikidata5m_text.txt",
        ["Q90\tParis, the City of Light,\tis in France, far from Japan .", "Q17\tNo names here"],
    )
    return folder


def test_wikidata5m_links_a_text_to_its_entity_and_neighbours(tmp_path):
    corpus = read_wikidata5m([write_wikidata5m(tmp_path)], ReaderOptions())
    # The text itself may hold tabs; Japan is no neighbour of Paris.
    assert surfaces(corpus) == [
        [("Paris", "Q90"), ("City of Light", "Q90"), ("France", "Q142")],
        [],
    ]
    assert corpus.graph.relations == {"P17": "country", "P36": "capital"}
    again = read_wikidata5m([write_wikidata5m(tmp_path)], ReaderOptions())
    assert all(document.about == document.doc for document in again.documents)


def test_graph_formats(tmp_path):
    plain = write_lines(tmp_path / "t.tsv", [("a", "r", "b")])
    assert read_graph(f"{plain}:tsv").triples == [("a", "r", "b")]
    own = read_graph(str(write_own_graph(tmp_path / "own")))
    assert own.entities["Q90"].description == "the Paris" and own.relations["P36"] == "capital"
    wikidata = read_graph(f"{write_wikidata5m(tmp_path / 'w5m')}")
    assert wikidata.entities["Q90"].aliases == ("City of Light",)

    freebase = tmp_path / "fb"
    write_lines(freebase / "train.tsv", [("/m/1", "/a/b", "/m/2"), ("/m/1", "/a/b", "/m/9")])
    write_lines(freebase / "relation2text.txt", [("/a/b", "a b")])
    names = {
        "/m/1": {"label": "Paris", "wikidata_id": "Q90", "description": "d", "alternatives": ["P"]},
        "/m/2": {"label": "France", "wikidata_id": "Q142", "description": None},
    }
    write_lines(freebase / "entity2wikidata.json", [json.dumps(names)])
    graph = read_graph(str(freebase))
    assert graph.triples == [("Q90", "/a/b", "Q142")]
    assert graph.entities["Q90"].aliases == ("P",) and graph.relations == {"/a/b": "a b"}
    for no_list in (5, "Pa", {"P": 1}, None):  # is no list of names
        names["/m/1"]["alternatives"] = no_list
        write_lines(freebase / "entity2wikidata.json", [json.dumps(names)])
        assert read_graph(str(freebase)).entities["Q90"].aliases == ()

    codex = tmp_path / "codex"
    write_lines(codex / "train.txt.gz", [("Q90", "P17", "Q142")])
    write_lines(codex / "relations.json", [json.dumps({"P17": {"label": "country"}})])
    labels = {"Q90": {"label": "Paris", "description": None}}
    write_lines(codex / "entity_labels_partial.json", [json.dumps(labels)])
    graph = read_graph(str(codex))
    assert graph.triples == [("Q90", "P17", "Q142")] and graph.entities["Q90"].name == "Paris"


# --- bad input ----------------------------------------------------------------------------------


def consume(reader, inputs, **options):
    """Reads everything, as the builder would."""
    list(reader(inputs, ReaderOptions(**options)).documents)


def bad_span(folder):
    row = {"id": "a", "text": "Paris", "spans": [[0, 6, "Q90"]]}
    return read_jsonl, [write_lines(folder / "a.jsonl", ["", row])]


def bad_id(folder):
    row = {"id": "a", "text": "Paris", "spans": [[0, 5, "Q 90"]]}
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def spans_and_link(folder):
    row = {"id": "a", "text": "Paris", "spans": [], "link": True}
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def long_span(folder):
    row = {"id": "a", "text": "Paris", "spans": [[0, 5, "Q90", "Q142"]]}
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def bad_json(folder):
    return read_jsonl, [write_lines(folder / "a.jsonl", ["{", "{}"])]


def deep_json(folder):
    return read_jsonl, [write_lines(folder / "a.jsonl", ['{"id": ' + "[" * 200_000])]


def no_spans_key(folder):
    return read_jsonl, [write_lines(folder / "a.jsonl", [{"id": "a", "text": "x", "span": []}])]


def surrogate(folder):
    row = '{"id": "a", "text": "x \\ud800", "spans": []}'
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def surrogate_id(folder):
    row = '{"id": "a", "text": "x y", "spans": [[0, 1, "Q\\ud800"]]}'
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def surrogate_title(folder):
    row = '{"docid": "1", "uri": "Q1", "title": "\\uDBFF", "text": "", "entities": []}'
    return read_rebel, [write_lines(folder / "a.jsonl", [row])]


def boolean_span(folder):
    row = {"id": "a", "text": "Paris", "spans": [[False, True, "Q90"]]}
    return read_jsonl, [write_lines(folder / "a.jsonl", [row])]


def not_utf8(folder):
    (folder / "a.jsonl").write_bytes(b'{"id": "\xff"}\n')
    return read_jsonl, [folder / "a.jsonl"]


def cut_gzip(folder):
    path = write_lines(folder / "a.jsonl.gz", [{"id": "a", "text": "x" * 999, "spans": []}])
    path.write_bytes(path.read_bytes()[:-12])
    return read_jsonl, [path]


def no_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(b"plain")
    return read_jsonl, [folder / "a.jsonl.gz"]


def rebel_outside(folder):
    mention = {"uri": "Q1", "boundaries": [0, 99], "surfaceform": "Tokyo"}
    row = {"docid": "1", "text": "Tokyo", "entities": [mention], "triples": []}
    return read_rebel, [write_lines(folder / "a.jsonl", [row])]


def trex_relation(folder):
    return read_trex, [write_trex(folder, [trex_fact("P99", CURIE, PARIS)])]


def trex_template(folder):
    write_trex(folder, [])
    write_lines(folder / "relations.jsonl", [{"relation": "P1", "template": "[X]", "label": "l"}])
    return read_trex, [folder]


def ernie_misaligned(folder):
    write_ernie(folder)
    write_lines(folder / "wiki_entity.gz", ["2\t4\tQ1\tQ1\tQ1\tQ1\t2\tQ90\tQ90"])
    return read_ernie, [folder]


def ernie_lengths(folder):
    write_ernie(folder)
    write_lines(folder / "wiki_token", ["2\t4\t5\t6\t7\t8\t99\t8"])
    return read_ernie, [folder]


def ernie_ids(folder):
    write_ernie(folder)
    write_lines(folder / "wiki_token", ["2\t4\t5\t6\t7\t8\t3\t8\t9\t-6"])
    return read_ernie, [folder]


def missing(folder):
    return read_jsonl, [folder / "nothing.jsonl"]


def empty_folder(folder):
    return read_rebel, [folder]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_span, r"a.jsonl:2: span \[0, 6\) is not inside the text of 5 characters"),
        (bad_id, r"a.jsonl:1: 'Q 90' is not an id"),
        (long_span, r"a.jsonl:1: a span must be \[start, end, id\] or \[start, end\], got"),
        (bad_json, r"a.jsonl:1: not valid JSON"),
        (deep_json, r"a.jsonl:1: not valid JSON"),
        (spans_and_link, r"a.jsonl:1: has 'spans' and asks to find them \('link'\)"),
        (no_spans_key, r"""a.jsonl:1: 'spans' is missing; "link": true"""),
        (surrogate, r"a.jsonl:1: holds a lone surrogate"),
        (surrogate_id, r"a.jsonl:1: holds a lone surrogate"),
        (surrogate_title, r"a.jsonl:1: holds a lone surrogate"),
        (boolean_span, r"a.jsonl:1: span ends must be integers"),
        (not_utf8, r"a.jsonl:1: not UTF-8"),
        (cut_gzip, r"a.jsonl.gz:\d: broken .gz file"),
        (no_gzip, r"a.jsonl.gz:1: broken .gz file"),
        (rebel_outside, r"a.jsonl:1: span \[0, 99\)"),
        (trex_relation, r"P99.jsonl.gz:1: relation 'P99' is not in relations.jsonl"),
        (trex_template, r"relations.jsonl:1: the template needs one \[X\] and one \[Y\]"),
        (ernie_misaligned, r"wiki_token:1: does not align with .*wiki_entity.gz:1"),
        (ernie_lengths, r"wiki_token:1: sentence counts and lengths do not fit"),
        (ernie_ids, r"wiki_token:1: a token id is not in the vocabulary of 10"),
        (missing, r"nothing.jsonl: no such file or folder"),
        (empty_folder, r"no file ending in .jsonl or .jsonl.gz"),
    ],
)
def test_bad_input_is_one_error_that_names_the_place(tmp_path, make, message):
    reader, inputs = make(tmp_path)
    vocab = tmp_path / "vocab.txt" if reader is read_ernie else None
    with pytest.raises(DataError, match=message) as caught:
        consume(reader, inputs, vocab=vocab)
    assert "\n" not in str(caught.value)


def test_ernie_ids_need_a_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="--vocab"):
        consume(read_ernie, [write_ernie(tmp_path)])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", DataError, "--graph .*nowhere: no such file"),
        ("t.tsv:owl", ConfigError, "unknown format; known: fb15k237"),
        ("t.tsv", DataError, r"t.tsv:2: expected 3 tab-separated columns, got 2"),
        ("empty.tsv", DataError, "no triples in it"),
        ("folder", DataError, "not a graph folder of a known format"),
        ("folder:codex", DataError, "no relations.json"),
    ],
)
def test_bad_graphs(tmp_path, source, error, message):
    write_lines(tmp_path / "t.tsv", [("a", "r", "b"), ("a", "r")])
    write_lines(tmp_path / "empty.tsv", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=message):
        read_graph(str(tmp_path / source))


def test_a_file_that_is_one_object_has_a_limit(tmp_path, monkeypatch):
    """Lines have one, but a small gzip file can hold any number of them."""
    lines = ["{", *["" for _ in range(200)], '"a": 1}']
    path = write_lines(tmp_path / "a.json.gz", lines)
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(files, "MAX_JSON_CHARACTERS", 100)
    with pytest.raises(DataError, match="a.json.gz: longer than 100 characters"):
        read_json(path)


# --- wikipedia ----------------------------------------------------------------------------------

TITLES = [("title", "item", "?"), ("Marie_Curie", "Q7186"), ("Paris", "Q90"), ("#x", "Q1")]
TITLES += [("Paris%20%28mythology%29", "Q167646"), ("City_of_Light", "Q90"), ("AT&T", "Q35476")]
TITLES += [("Nowhere", "#UNK#"), ('"Heroes"_(song)', "Q5"), ("Polish_people", "Q6")]
ARTICLE = (
    'Marie Curie\nMarie Curie lived in <a href="City%20of%20Light">the capital</a>s & '
    '<a href="Nowhere">nowhere</a>; <a href="paris#History">Paris</a> knew Marie Curie. '
    'The Capital of Paris is <a href="File%3AX.png">a <a href="Paris">small</a> picture</a>. '
    'Not <a href="Marie%20Curie%20%28ship%29">Marie Curie</a>, <a href="%23Later">Later</a>, '
    '<a href="AT%26amp%3BT">AT&T</a>, <a href="%26quot%3BHeroes%26quot%3B%20(song)">"Heroes"</a> '
    '(AT&T, Heroes). <a href="Paris">Pol</a>ish, <a href="Polish people">Polish</a>: Polish.'
)
PLAIN = (
    "Marie Curie lived in the capitals & nowhere; Paris knew Marie Curie. The Capital of Paris is"
    ' a small picture. Not Marie Curie, Later, AT&T, "Heroes" (AT&T, Heroes). '
    "Polish, Polish: Polish."
)
MENTIONS = [
    ("Marie Curie", "Q7186"), ("the capitals", "Q90"), ("Paris", "Q90"), ("Marie Curie", "Q7186"),
    ("The Capital", "Q90"), ("Paris", "Q90"), ("small", "Q90"), ("AT&T", "Q35476"),
    ("Heroes", "Q5"), ("AT&T", "Q35476"), ("Heroes", "Q5"), ("Polish", "Q90"), ("Polish", "Q6"),
]  # fmt: skip


def write_wikipedia(folder: Path, articles: dict[str, list], titles=TITLES) -> Path:
    for name, rows in articles.items():
        write_lines(folder / name, rows)
    write_lines(folder / "anchor2id.txt", titles)
    return folder


def doc_element(text: str, page="12", title="Marie Curie") -> str:
    return (
        f'<doc id="{page}" url="https://example.org?curid={page}" title="{title}">\n{text}\n</doc>'
    )


def without_title(text: str) -> str:
    return text.partition("\n")[2]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("form", ["json", "doc"])
def test_wikipedia_links_are_mentions_and_so_are_their_repetitions(tmp_path, form, escaped):
    text = html.escape(ARTICLE, quote=False) if escaped else ARTICLE
    article = (
        {"id": "12", "revid": "1", "title": "Marie Curie", "text": without_title(text)}
        if form == "json"
        else doc_element(text)
    )
    folder = write_wikipedia(tmp_path, {"AA/wiki_00": [article]})
    corpus = read_wikipedia([folder], ReaderOptions())
    documents = list(corpus.documents)
    assert [(d.doc, d.text, d.about) for d in documents] == [("12", PLAIN, "Q7186")]
    assert [(documents[0].text[s:e], i) for s, e, i in sorted(documents[0].spans)] == MENTIONS
    assert corpus.counts == {"link": 7, "link_without_id": 3, "mention_repeated": 6}
    assert corpus.graph.entities["Q90"].name == "City of Light"
    assert corpus.graph.entities["Q90"].aliases == ("Paris",)


@pytest.mark.timeout(60)
def test_wikipedia_surfaces_end_with_letters_in_no_quadratic_time(tmp_path):
    dots = "." * 1_000_000
    text = f'<a href="Paris">-P{dots}s.</a>, <a href="Paris">?!</a>: {"P" + dots + "s"}, P!'
    article = {"id": "1", "title": "Other", "text": text}
    corpus = read_wikipedia([write_wikipedia(tmp_path, {"wiki_00": [article]})], ReaderOptions())
    (document,) = corpus.documents
    found = [(document.text[start:end].replace(dots, ""), e) for start, end, e in document.spans]
    assert found == [("-Ps.", "Q90"), ("?!", "Q90"), ("Ps", "Q90")]


def test_wikipedia_names_come_from_the_graph_first(tmp_path):
    known = RawGraph()
    known.name_entity("Q90", "Paris, France")
    article = {"id": "1", "title": "Paris (mythology)", "text": 'Paris saw <a href="Paris">P</a>.'}
    folder = write_wikipedia(tmp_path, {"wiki_00.gz": [article]})
    corpus = read_wikipedia([folder], ReaderOptions(graph=known))
    assert surfaces(corpus) == [[("Paris", "Q167646"), ("P", "Q90")]]
    assert {e: node.name for e, node in corpus.graph.entities.items()} == {"Q167646": "Paris"}


def test_wikipedia_titles_are_of_xml_in_json(tmp_path):
    article = {"id": "1", "title": "AT&amp;T", "text": "The firm AT&amp;T."}
    folder = write_wikipedia(tmp_path, {"wiki_00": [article]})
    (folder / "anchor2id.txt").rename(folder / "wiki_titles.tsv")
    assert surfaces(read_wikipedia([folder], ReaderOptions())) == [[("AT&T", "Q35476")]]


def test_wikipedia_reads_bz2_files_in_order_and_up_to_the_limit(tmp_path):
    folder = write_wikipedia(tmp_path, {"AB/wiki_00": [doc_element("c", page="3")]})
    packed = bz2.compress(f"{doc_element('a', page='1')}\n{doc_element('b', page='2')}\n".encode())
    (folder / "AA").mkdir()
    (folder / "AA" / "wiki_00.bz2").write_bytes(packed)
    corpus = read_wikipedia(
        [folder / "AA", folder / "AB", folder / "anchor2id.txt"], ReaderOptions()
    )
    assert [d.doc for d in corpus.documents] == ["1", "2", "3"]
    limited = read_wikipedia([folder], ReaderOptions(limit=2))
    assert [d.doc for d in limited.documents] == ["1", "2"]


@pytest.mark.parametrize(
    ("files", "titles", "message"),
    [
        ({"text": ["x"]}, TITLES, r"no wiki_\* file"),
        (
            {"wiki_0": [doc_element("a")]},
            [("Paris", "#UNK#")],
            r"anchor2id.txt: no line of a title",
        ),
        ({"wiki_0": [doc_element("a")]}, ["Paris"], r"anchor2id.txt:1: expected 2 tab-separated"),
        ({"wiki_0": ["a line"]}, TITLES, r"wiki_0:1: expected a JSON object or <doc"),
        ({"wiki_0": [doc_element("a")[:-6]]}, TITLES, r"wiki_0:1: the article does not end"),
        ({"wiki_0": [{"id": "1", "title": "a"}]}, TITLES, r"wiki_0:1: 'text' is missing"),
        ({"wiki_0": [{"id": "", "title": "a", "text": "b"}]}, TITLES, r"wiki_0:1: .* has no id"),
        ({"wiki_0.bz2": ["not bz2"]}, TITLES, r"wiki_0.bz2:1: broken .bz2 file"),
    ],
)
def test_wikipedia_says_what_is_wrong(tmp_path, files, titles, message):
    folder = write_wikipedia(tmp_path, files, titles)
    with pytest.raises(DataError, match=message):
        list(read_wikipedia([folder], ReaderOptions()).documents)


def test_a_text_that_is_there_twice_is_refused(tmp_path):
    row = {"id": "1", "text": "Paris", "spans": []}
    whole = write_lines(tmp_path / "x.jsonl", [row])
    write_lines(tmp_path / "other.jsonl", [row])
    assert len(list(read_jsonl([tmp_path], ReaderOptions()).documents)) == 2
    with pytest.raises(DataError, match="x.jsonl are one text twice"):
        read_jsonl([tmp_path, whole], ReaderOptions())
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(DataError, match="x.jsonl.gz and .*x.jsonl are one text twice"):
        read_jsonl([tmp_path], ReaderOptions())
    folder = write_wikipedia(tmp_path / "wiki", {"wiki_0": [doc_element("a")]}, TITLES)
    (folder / "wiki_0.gz").write_bytes(gzip.compress((folder / "wiki_0").read_bytes()))
    with pytest.raises(DataError, match="are one text twice"):
        read_wikipedia([folder], ReaderOptions())


def test_a_text_too_long_is_refused_before_it_is_linked(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", [{"id": "1", "text": "Paris " * 9, "link": True}])
    monkeypatch.setattr(files, "MAX_TEXT_CHARACTERS", 50)
    with pytest.raises(DataError, match="'1': 54 characters"):  # there is no graph to link to
        list(read_jsonl([path], ReaderOptions()).documents)
    folder = write_wikipedia(tmp_path / "wiki", {"wiki_0": [doc_element("a" * 60)]}, TITLES)
    with pytest.raises(DataError, match="characters, more than 50"):
        list(read_wikipedia([folder], ReaderOptions()).documents)
    monkeypatch.setattr(wikipedia, "MAX_LINE_CHARACTERS", 40)
    with pytest.raises(DataError, match="wiki_0:1: longer than 40 characters"):
        list(read_wikipedia([folder], ReaderOptions()).documents)


def test_wikipedia_needs_a_table_of_titles(tmp_path):
    write_lines(tmp_path / "wiki_00", [doc_element("a")])
    with pytest.raises(DataError, match="no table of titles"):
        read_wikipedia([tmp_path], ReaderOptions())
