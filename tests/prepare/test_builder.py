"""Whole preparations of a tiny corpus: contents, determinism, refusals, nothing half-written."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prepare.corpora import CITIES, COUNTRIES, own_corpus, write_lines, write_own_graph

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import DataError
from trelm_ds.prepare import builder, files
from trelm_ds.prepare.builder import BuildOptions, build
from trelm_ds.prepare.cli import prepare
from trelm_ds.prepare.entities import Mentioned, index_graph, two_hop_counts
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawEntity, RawGraph, RawProbe
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.verify import verify

QUICK = ["--dim", "4", "--epochs", "2"]
NAMES = {entity: name for name, entity in (CITIES | COUNTRIES).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_lines(folder / "corpus.jsonl", own_corpus())
    write_own_graph(folder / "graph")
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "deep" / "data"
    prepare(arguments(source, output))
    return output


def arguments(source: Path, output: Path, *more) -> list[str]:
    paths = [f"--input={source / 'corpus.jsonl'}", f"--graph={source / 'graph'}"]
    return ["jsonl", *paths, f"--output={output}", *QUICK, *map(str, more)]


def samples(folder, split):
    manifest = load_manifest(folder)
    reader = ShardReader(folder, manifest, split)
    return [reader[i] for i in range(len(reader))]


def leftovers(output: Path) -> list[str]:
    return [p.name for p in output.parent.iterdir() if ".tmp-" in p.name or ".old-" in p.name]


def test_every_mention_decodes_to_its_surface(prepared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    graph, tables = KnowledgeGraph.load(prepared), KnowledgeTables.load(prepared)
    seen = Counter()
    for split, count in (("train", 54), ("heldout", 6)):
        found = samples(prepared, split)
        assert len(found) == count
        for sample in found:
            entities = sample.spans[sample.spans[:, 2] < graph.num_entities]
            number = int(sample.doc.removeprefix("d"))
            city, country = list(CITIES)[number % 5], list(COUNTRIES)[number % 4]
            decoded = [tokenizer.decode(sample.ids[a:b]) for a, b, _ in entities]
            assert decoded == [city.lower(), country.lower()]
            assert [graph.entity_names[key] for key in entities[:, 2]] == [city, country]
            for left, right, key in sample.spans[sample.spans[:, 2] >= graph.num_entities]:
                word = tables.long_tail_words[key - graph.num_entities][0]
                assert right == left + 1
                assert tokenizer.convert_ids_to_tokens(int(sample.ids[left])) == word
            if split == "train":
                seen.update(entities[:, 2].tolist())
    assert seen == {i: n for i, n in enumerate(tables.entity_frequency.tolist()) if n}


def test_graph_and_tables(prepared):
    graph, tables = KnowledgeGraph.load(prepared), KnowledgeTables.load(prepared)
    names = dict(zip(graph.entity_ids, graph.entity_names, strict=True))
    assert names == NAMES  # the pair that no text mentions is not the corpus's business
    facts = {
        (graph.entity_ids[h], graph.relation_ids[r], graph.entity_ids[t])
        for h, r, t in graph.triples.tolist()
    }
    assert len(facts) == len(graph.triples) == 6 and ("Q142", "P36", "Q90") in facts
    assert graph.relation_names == ["country", "capital"]
    mentions = Counter(entity for row in own_corpus() for _, _, entity in row["spans"])
    assert [mentions[e] for e in graph.entity_ids] == sorted(mentions.values(), reverse=True)
    assert tables.entity_embeddings.shape == (10, 4)
    assert (tables.importance == 1).all()
    france = graph.entity_ids.index("Q142")
    assert tables.two_hop[france] == 2 and (tables.entity_names[:, 0] >= 0).all()
    stats = json.loads((prepared / "stats.json").read_text())
    assert stats["train"]["entity_spans"] == 108
    assert stats["preparation"]["builder"]["triple_out_of_reach"] == 1
    assert stats["train"]["share_with_long_tail_word"] == pytest.approx(10 / 54)
    assert (prepared / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert verify(prepared).startswith(f"{prepared}: ok: train 54 samples")
    assert not leftovers(prepared)


def test_equal_inputs_give_equal_folders(source, prepared, tmp_path):
    prepare(arguments(source, tmp_path / "again"))
    first, again = load_manifest(prepared), load_manifest(tmp_path / "again")
    assert first == again
    for name in ("entity_embeddings", "two_hop", "token_frequency"):
        files = [f / "tables" / f"{name}.npy" for f in (prepared, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_spans_without_ids_are_linked_and_the_outcomes_reported(source, prepared, tmp_path, caplog):
    rows = own_corpus()
    for row in rows:
        row["spans"] = [[start, end] for start, end, _ in row["spans"]]
    path = write_lines(tmp_path / "corpus.jsonl", rows)
    graph, output = f"--graph={source / 'graph'}", tmp_path / "same"
    with caplog.at_level("INFO"):
        prepare(["jsonl", f"--input={path}", graph, f"--output={output}", *QUICK])
    assert load_manifest(output) == load_manifest(prepared)
    linked = {"span_linked_exact": 120, "span_linked_approximate": 0, "span_linked_nil": 0}
    assert json.loads((output / "stats.json").read_text())["preparation"]["reader"] == linked
    assert "span_linked_exact 120, span_linked_nil 0" in caplog.text

    typo, unknown = dict(rows[0]), dict(rows[1])
    typo["text"] = typo["text"].replace("France", "Frunce")  # 1 of 6 letters
    unknown["text"] = unknown["text"].replace("Spain", "Xyzzy")
    write_lines(path, [typo, unknown, *rows[2:]])
    output = tmp_path / "typo"
    prepare(["jsonl", f"--input={path}", graph, f"--output={output}", *QUICK])
    linked = {"span_linked_exact": 118, "span_linked_approximate": 1, "span_linked_nil": 1}
    assert json.loads((output / "stats.json").read_text())["preparation"]["reader"] == linked
    tables, names = KnowledgeTables.load(output), KnowledgeGraph.load(output).entity_names
    before, order = KnowledgeTables.load(prepared), KnowledgeGraph.load(prepared).entity_names
    for name, lost in (("France", 0), ("Spain", 1), ("Tokyo", 0)):
        frequency = tables.entity_frequency[names.index(name)]
        assert frequency == before.entity_frequency[order.index(name)] - lost


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shards/train-00000.tar", "sha256"),
        ("shards/heldout-00000.idx", "sha256"),
        ("graph/entities.tsv", "sha256"),
        ("tokenizer/tokenizer.json", "tokenizer"),
        ("tables/entity_frequency.npy", "does not fit the training split"),
        ("tables/token_frequency.npy", "does not fit the training split"),
    ],
)
def test_verify_finds_one_changed_byte(prepared, damage, message):
    path = prepared / damage
    good = path.read_bytes()
    at = {".tar": 600, ".npy": len(good) - 8}.get(path.suffix, len(good) - 3)
    try:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError, match=message):
            verify(prepared)
    finally:
        path.write_bytes(good)
    verify(prepared)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"subject": 0, "object": 99, "text": "[MASK]"}', "not a probe of this folder's entit"),
        (b'{"subject": -2, "object": 0, "text": "[MASK]"}', "not a probe of this folder's entit"),
        (b'{"subject": 0, "object": 0, "text": "none"}', "not a probe of this folder's entities"),
        (b'{"subject": 0, "object": 0, "text": ["[MASK]"]}', "'text' has the wrong type: list"),
        (b'{"object": 0, "text": "[MASK]"}', "'subject' is missing"),
        (b'{"subject": 0, "object": 0, "text": "\xff [MASK]"}', "not UTF-8"),
        (b"[0]", "expected a JSON object"),
    ],
)
def test_verify_finds_what_is_no_probe(prepared, line, message):
    path = prepared / "probe" / "template.jsonl"
    try:
        path.write_bytes(b'{"subject": -1, "object": 0, "text": "[MASK]"}\n' + line + b"\n")
        with pytest.raises(DataError, match=rf"template.jsonl:\d: {message}"):
            verify(prepared)
    finally:
        path.unlink()


def test_embed_and_stats_steps(source, tmp_path):
    output = tmp_path / "data"
    prepare(arguments(source, output))
    before = load_manifest(output)
    prepare(["embed", f"--output={output}", "--dim", "6", "--epochs", "1"])
    assert KnowledgeTables.load(output).entity_embeddings.shape == (10, 6)
    stats = json.loads((output / "stats.json").read_text())
    (output / "stats.png").unlink()
    prepare(["stats", f"--output={output}"])
    assert json.loads((output / "stats.json").read_text()) == stats
    assert (output / "stats.png").is_file() and load_manifest(output) == before


def test_overwrite_rules(source, tmp_path):
    output = tmp_path / "data"
    output.mkdir()
    prepare(arguments(source, output))  # an empty folder is no obstacle
    first = load_manifest(output)
    with pytest.raises(DataError, match="--overwrite"):
        prepare(arguments(source, output))
    prepare(arguments(source, output, "--overwrite", "--max_seq_length", 16))
    assert load_manifest(output)["max_seq_length"] == 16 != first["max_seq_length"]
    precious = tmp_path / "precious"
    write_lines(precious / "thesis.txt", ["years of work"])
    with pytest.raises(DataError, match="not a prepared data folder"):
        prepare(arguments(source, precious, "--overwrite"))
    assert (precious / "thesis.txt").is_file() and not leftovers(output)


def test_long_texts_become_windows_within_the_limit(source, tmp_path):
    output = tmp_path / "data"
    rows = own_corpus(20)
    text = " ".join(row["text"] for row in rows)
    spans, offset = [], 0
    for row in rows:
        spans += [[s + offset, e + offset, entity] for s, e, entity in row["spans"]]
        offset += len(row["text"]) + 1
    row = {"id": "long", "text": text, "spans": spans, "heldout": False}
    write_lines(tmp_path / "long" / "corpus.jsonl", [row])
    write_own_graph(tmp_path / "long" / "graph")
    prepare(arguments(tmp_path / "long", output, "--max_seq_length", 64))
    found = samples(output, "train")
    assert len(found) > 2 and max(len(s.ids) for s in found) <= 64
    entities = load_manifest(output)["graph"]["entities"]
    assert sum(int((s.spans[:, 2] < entities).sum()) for s in found) == 40
    assert not samples(output, "heldout")


# --- refusals -----------------------------------------------------------------------------------


def corpus_of(*documents, graph=None, probes=()) -> RawCorpus:
    return RawCorpus("test", list(documents), graph or RawGraph(), list(probes))


def text_of(words: str = "Paris is a large town , they say", **more) -> RawDocument:
    return RawDocument("d", words, heldout=False, **more)


def build_quickly(corpus, output, **options):
    reading = ReaderOptions(heldout_fraction=0.0)
    return build(corpus, output, reading, BuildOptions(dim=4, epochs=1, **options))


@pytest.mark.parametrize(
    ("corpus", "strict", "message"),
    [
        (corpus_of(), False, "no training text in it"),
        (corpus_of(RawDocument("d", " \n")), False, "no training text in it"),
        (corpus_of(RawDocument("d", "all held out", heldout=True)), False, "no training text"),
        (corpus_of(text_of()), False, "no mention could be linked"),
        (corpus_of(text_of(spans=[(0, 5, "my-id")])), False, "no mention could be linked"),
        (corpus_of(text_of(spans=[(0, 99, "Q90")])), False, r"document 'd': span \[0, 99\)"),
        (corpus_of(text_of(spans=[(0, 5, "Q90")])), True, "'d': entity 'Q90' .'Paris'. is not in"),
        (
            corpus_of(text_of(spans=[(0, 5, "q1")]), graph=RawGraph(triples=[("Q1", "P1", "Q2")])),
            False,
            "none of the 1 ids, such as 'q1', is in --graph, which has ids such as 'Q1'",
        ),
        (corpus_of(text_of("ab", spans=[(0, 2, "Q1")])), False, "shorter than any sample"),
    ],
)  # fmt: skip
def test_a_refused_corpus_leaves_nothing_behind(tmp_path, corpus, strict, message):
    output = tmp_path / "new" / "data"
    with pytest.raises(DataError, match=message):
        build_quickly(corpus, output, strict=strict)
    assert not output.exists() and not leftovers(output)


def test_a_text_too_long_to_be_encoded_whole_is_refused(tmp_path, monkeypatch):
    text = text_of(spans=[(0, 5, "Q90")])
    monkeypatch.setattr(files, "MAX_TEXT_CHARACTERS", len(text.text))
    build_quickly(corpus_of(text), tmp_path / "as long as can be")
    text.text += "s"
    with pytest.raises(DataError, match="document 'd': 33 characters, more than 32"):
        build_quickly(corpus_of(text), tmp_path / "longer")


def test_a_failure_half_way_keeps_the_old_folder(source, tmp_path, monkeypatch):
    output = tmp_path / "data"
    prepare(arguments(source, output))
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "save_tables", full_disk)
    with pytest.raises(OSError, match="No space"):
        prepare(arguments(source, output, "--overwrite", "--seed", 1))
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert not leftovers(output)


# --- the graph's rules --------------------------------------------------------------------------


def test_withheld_facts_unknown_ids_and_missing_names(tmp_path, caplog):
    graph = RawGraph(
        entities={
            "Q1": RawEntity("One"),
            "Q2": RawEntity("Two", "", ("Deux",)),
            "Q3": RawEntity(""),
        },
        relations={"P1": "next"},
        triples=[
            *(("Q1", "P1", "Q2"), ("Q1", "P2", "Q2"), ("Q1", "P1", "Q3"), ("Q1", "P1", "Q4")),
            ("Q5", "P1", "Q6"),
            *(("Q2", "P1", "Q1"), ("Q2", "P1", "Q3")),
        ],
        withheld=[("Q1", "P1", "Q2")],
    )
    text = "One and Two and Three with Four met Five"
    odd = "One is\u2028next\u0085to [MASK]"  # what `splitlines` would cut
    ids = {"One": "Q1", "Two": "Q2", "Three": "Q3", "Four": "Q77", "Five": "own:5"}
    spans = [(text.index(word), text.index(word) + len(word), i) for word, i in ids.items()]
    probes = [
        RawProbe("P1", "Q1", "Q2", odd, "Two", text_only=True),
        RawProbe("P1", None, "Q3", "nobody [MASK]", "Three"),
        RawProbe("P1", "Q1", "Q99", "One [MASK]", "Nine"),
    ]
    corpus = corpus_of(text_of(text, spans=spans), graph=graph, probes=probes)
    with caplog.at_level("INFO"):
        build_quickly(corpus, tmp_path / "d")
    assert "1 mention(s) left out: their ids, such as 'own:5'" in caplog.text
    assert "--strict makes that an error" in caplog.text
    assert "1 triple(s) of the graph left out" in caplog.text and "Q5 P1 Q6" in caplog.text
    loaded = KnowledgeGraph.load(tmp_path / "d")
    names = dict(zip(loaded.entity_ids, loaded.entity_names, strict=True))
    # Q3 is named by the text, Q77 is new, own:5 is no id of a graph, Q4 has no name anywhere.
    assert names == {"Q1": "One", "Q2": "Two", "Q3": "Three", "Q77": "Four"}
    index = loaded.entity_ids.index
    # What the withheld fact joins is joined by no other triple, in either direction.
    assert loaded.relation_names == ["next"]
    assert loaded.triples.tolist() == sorted(
        [[index("Q1"), 0, index("Q3")], [index("Q2"), 0, index("Q3")]]
    )
    assert loaded.withheld.tolist() == [[index("Q1"), 0, index("Q2")]]
    assert ("Deux", index("Q2")) in loaded.aliases
    lines = (tmp_path / "d" / "probe" / "template.jsonl").read_text().strip().split("\n")
    rows = [json.loads(line) for line in lines]
    assert rows[0]["text"] == odd and len(rows) == 2
    assert [row["text_only"] for row in rows] == [True, False]
    assert [(r["subject_id"], r["object_id"]) for r in rows] == [("Q1", "Q2"), (None, "Q3")]
    assert [(r["subject"], r["object"], r["answer"]) for r in rows] == [
        (index("Q1"), index("Q2"), "Two"),
        (-1, index("Q3"), "Three"),
    ]
    counts = json.loads((tmp_path / "d" / "stats.json").read_text())["preparation"]["builder"]
    assert counts["mention_of_unknown_entity"] == counts["entity_named_by_text_only"] == 1
    assert counts["triple_end_without_name"] == counts["probe_dropped"] == 1


def test_a_large_corpus_has_larger_shards_and_not_more(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SAMPLES_PER_SHARD", 2)
    monkeypatch.setattr(builder, "MAX_OPEN_SHARDS", 4)
    text = "Paris is a large town , they say"
    documents = [RawDocument(f"d{i}", text, [(0, 5, "Q90")], heldout=i > 20) for i in range(23)]
    build_quickly(corpus_of(*documents), tmp_path / "d")
    splits = load_manifest(tmp_path / "d")["splits"]
    assert [shard["samples"] for shard in splits["train"]["shards"]] == [6, 6, 6, 3]


def test_tail_is_the_lower_half_of_the_mentioned_subjects():
    frequency = np.array([8, 4, 4, 1, 0, 50])
    index = {f"Q{i}": i for i in range(6)}
    probes = [RawProbe("P1", f"Q{i}", "Q5", "[MASK]", "x") for i in range(5)]
    probes.append(RawProbe("P1", None, "Q5", "[MASK]", "x"))
    rows = list(builder.probe_rows(probes, index, frequency, Counter()))
    assert [row["tail"] for row in rows] == [False, True, True, True, True, False]


def test_ids_that_are_equal_as_numbers_have_an_order():
    """Ids come out of sets: what ties in the key stood in the order of PYTHONHASHSEED."""
    ids = [f"n{'0' * zeros}{i}" for i in (1, 2) for zeros in range(20, -1, -1)]
    relations = [f"r{'0' * zeros}1" for zeros in range(20, -1, -1)]
    triples = [(head, relation, "n2") for head, relation in zip(ids, relations * 2, strict=True)]
    graph = RawGraph({entity: RawEntity(entity) for entity in ids}, {}, triples)
    mentioned = {entity: Mentioned(entity, "d", 1) for entity in ids}
    indexed = index_graph(graph, mentioned, [], False, Counter())
    assert [row[0] for row in indexed.entities] == ids
    assert [row[0] for row in indexed.relations] == relations


def test_two_hop_counts_equal_a_search(monkeypatch):
    from trelm_ds.prepare import entities

    rng = np.random.default_rng(0)
    triples = np.stack(
        [rng.integers(40, size=70), rng.integers(3, size=70), rng.integers(40, size=70)], 1
    )
    near = {e: set() for e in range(45)}
    for head, _, tail in triples.tolist():
        if head != tail:
            near[head].add(tail)
            near[tail].add(head)
    reach = [len(set().union(near[e], *(near[n] for n in near[e])) - {e}) for e in range(45)]
    assert two_hop_counts(triples, 45).tolist() == reach
    monkeypatch.setattr(entities, "TWO_HOP_CAP", 6)
    assert two_hop_counts(triples, 45).tolist() == [min(r, 6) for r in reach]
