"""Graph and tables: what is saved is loaded, and files that do not fit are named."""

import pickle
import shutil

import numpy as np
import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.data.graph import KnowledgeGraph, graph_digest, save_graph
from trelm_ds.data.table_files import load_array, save_array
from trelm_ds.data.tables import KnowledgeTables, save_tables
from trelm_ds.errors import DataError

INDICES = ("codes", "head_offsets", "tail_order", "tail_offsets")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("tiny"), train=8, heldout=2)


@pytest.fixture
def folder(corpus, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(corpus.folder, tmp_path / "data")
    return tmp_path / "data"


def test_edges_match_a_plain_loop(corpus):
    graph = KnowledgeGraph.load(corpus.folder)
    triples = corpus.triples.tolist()
    some_without = False
    for entity in range(graph.num_entities):
        expected = [[1, r, t] for h, r, t in triples if h == entity]
        expected += [[2, r, h] for h, r, t in triples if t == entity]
        edges = graph.edges_of(entity)
        assert edges.dtype == np.int32 and edges.shape == (len(expected), 3)
        assert edges.tolist() == expected
        assert graph.degree(entity) == graph.degrees()[entity] == len(expected)
        assert [list(graph.edge(entity, i)) for i in range(len(expected))] == expected
        for others in ({0}, {1, 3, 5, 8}, set(), set(range(graph.num_entities))):
            near = [tuple(row) for row in expected if row[2] in others]
            assert graph.edges_between(entity, others) == near
        some_without |= not expected
    assert some_without and graph.degrees().sum() == 2 * len(triples)


def test_answers_match_a_plain_loop(corpus):
    graph = KnowledgeGraph.load(corpus.folder)
    facts = set(map(tuple, corpus.triples.tolist()))
    n, r = graph.num_entities, graph.num_relations
    asked = np.array([(e, via) for e in range(n) for via in range(2 * r)] * 2)  # each asked twice
    for candidates in (np.arange(n), np.array([0, 3, 4, 11, n - 1]), np.array([], dtype=np.int64)):
        rows, columns = graph.answers(asked[:, 0], asked[:, 1], candidates)
        expected = [
            (i, j)
            for i, (e, via) in enumerate(asked.tolist())
            for j, c in enumerate(candidates.tolist())
            if ((e, via, c) if via < r else (c, via - r, e)) in facts
        ]
        assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
        assert bool(expected) == bool(len(candidates))
    assert graph.answers(asked[:0, 0], asked[:0, 1], np.arange(n))[0].shape == (0,)


def test_edges_at_the_borders(tmp_path):
    """Self loops, parallel relations, and an entity range with gaps at both ends."""
    entities = [(f"Q{i}", f"n{i}", "") for i in range(6)]
    triples = [(2, 0, 2), (2, 1, 3), (2, 0, 3), (3, 0, 2)]
    save_graph(tmp_path, entities, [("P1", "a"), ("P2", "b")], np.array(triples), np.zeros((0, 3)))
    graph = KnowledgeGraph.load(tmp_path)
    assert [graph.degree(e) for e in range(6)] == [0, 0, 5, 3, 0, 0]
    edges = [[1, 0, 2], [1, 0, 3], [1, 1, 3], [2, 0, 2], [2, 0, 3]]
    assert graph.edges_of(2).tolist() == edges
    assert [list(graph.edge(2, i)) for i in range(5)] == edges
    assert graph.edges_between(2, {3}) == [(1, 0, 3), (1, 1, 3), (2, 0, 3)]
    assert graph.edges_of(5).shape == (0, 3)


def test_an_empty_graph(tmp_path):
    none = np.zeros((0, 3), dtype=np.int32)
    entry = save_graph(tmp_path, [("Q1", "only", "")], [], none, none)
    graph = KnowledgeGraph.load(tmp_path)
    assert (entry["entities"], entry["relations"], entry["triples"]) == (1, 0, 0)
    assert graph.degree(0) == 0 and graph.edges_of(0).shape == (0, 3)
    assert graph.degrees().tolist() == [0] and graph.edges_between(0, {0}) == []


def test_saved_and_loaded(corpus, tmp_path):
    names = ["Ælfrič  of\tEynsham\n", "plain", ""]
    entry = save_graph(
        tmp_path,
        [(f"Q{i}", name, "a\tb") for i, name in enumerate(names)],
        [("P1", "knows")],
        np.array([[1, 0, 2], [0, 0, 1], [1, 0, 2]]),  # unsorted, one twice
        np.array([[2, 0, 0]]),
        [("Ælf ric", 0), ("plain", 1)],
    )
    graph = KnowledgeGraph.load(tmp_path)
    assert entry["triples"] == 2 and graph.triples.tolist() == [[0, 0, 1], [1, 0, 2]]
    assert graph.withheld.tolist() == [[2, 0, 0]] and graph.triples.dtype == np.int32
    assert graph.entity_names == ["Ælfrič of Eynsham", "plain", ""]
    assert graph.entity_descriptions == ["a b"] * 3
    assert graph.entity_ids == ["Q0", "Q1", "Q2"]
    assert (graph.relation_ids, graph.relation_names) == (["P1"], ["knows"])
    assert graph.aliases == [("Ælf ric", 0), ("plain", 1)]
    assert not graph.triples.flags.writeable
    # The same content has the same hash, other content another.
    again = save_graph(
        tmp_path / "b",
        [(f"Q{i}", name, "a b") for i, name in enumerate(names)],
        [("P1", "knows")],
        np.array([[0, 0, 1], [1, 0, 2]]),
        np.zeros((0, 3)),
    )
    assert again == entry
    assert corpus.manifest["graph"]["sha256"] != entry["sha256"]


def test_both_travel_as_a_path(corpus):
    graph = KnowledgeGraph.load(corpus.folder)
    tables = KnowledgeTables.load(corpus.folder)
    graph.edges_of(0), graph.entity_names  # caches must not travel
    for original in (graph, tables):
        assert len(pickle.dumps(original)) < 1000
    copy = pickle.loads(pickle.dumps(graph))
    assert copy.edges_of(0).tolist() == graph.edges_of(0).tolist()
    for name in INDICES:  # mapped again, not copied, not made anew
        assert isinstance(getattr(copy, f"_{name}").base, np.memmap)
    copy = pickle.loads(pickle.dumps(tables))
    np.testing.assert_array_equal(copy.importance, tables.importance)
    assert copy.num_keys == tables.num_keys == 24 + 5


def test_tables(corpus):
    tables = KnowledgeTables.load(corpus.folder)
    assert tables.entity_embeddings.shape == (25, 8) and not tables.entity_embeddings[0].any()
    assert tables.relation_embeddings.shape == (5, 8)
    names = corpus.entity_names
    for entity in range(24):
        ids = tables.entity_names[entity]
        assert " ".join(corpus.words[i] for i in ids[ids >= 0]) == names[entity]
    counts = np.zeros(24 + 5, dtype=int)
    for sample in corpus.samples["train"]:
        np.add.at(counts, sample.spans[:, 2], 1)
    assert tables.entity_frequency.tolist() == counts[:24].tolist()
    assert [count for _, count in tables.long_tail_words] == counts[24:].tolist()
    assert [word for word, _ in tables.long_tail_words] == [f"rareword{i}" for i in range(5)]


def test_importance_may_be_scored_later(folder):
    (folder / "tables" / "importance.npy").unlink()
    tables = KnowledgeTables.load(folder)
    assert tables.importance is None and pickle.loads(pickle.dumps(tables)).importance is None


def test_indices_are_mapped_files_and_older_folders_do_without(folder, corpus):
    new = KnowledgeGraph.load(folder)
    for name in INDICES:
        index = getattr(new, f"_{name}")
        assert isinstance(index.base, np.memmap) and not index.flags.writeable
    digest = graph_digest(folder)
    for path in (folder / "graph").glob("index_*.npy"):
        path.unlink()
    old = KnowledgeGraph.load(folder)
    for name in INDICES:
        made, index = getattr(old, f"_{name}"), getattr(new, f"_{name}")
        assert made.base is None and made.dtype == index.dtype
        np.testing.assert_array_equal(made, index)
    assert graph_digest(folder) == digest == corpus.manifest["graph"]["sha256"]
    assert old.edges_of(3).tolist() == new.edges_of(3).tolist()


def swapped(*places):
    def damage(index):
        index[list(places)] = index[list(places[::-1])]
        return index

    return damage


def plus(place, value):
    def damage(index):
        index[place] += value
        return index

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("codes", plus(7, 1)),
        ("codes", plus(-1, 1)),
        ("codes", lambda index: index[:-1]),
        ("head_offsets", plus(0, 1)),
        ("head_offsets", plus(5, 1)),
        ("head_offsets", plus(-1, -1)),
        ("head_offsets", lambda index: index[:-1]),
        ("tail_offsets", plus(3, -1)),
        ("tail_offsets", lambda index: np.r_[index, index[-1]]),
        ("tail_order", swapped(0, -1)),
        ("tail_order", plus(0, 10**6)),
        ("tail_order", plus(0, -1000)),
        ("tail_order", lambda index: np.r_[index[:1], index[:-1]]),  # one twice, one missing
        ("tail_order", lambda index: index[1:]),
        ("tail_order", lambda index: index.astype(np.int64)),
        ("tail_order", lambda index: index[None]),
    ],
)
def test_an_index_of_other_triples_is_refused(folder, name, damage):
    """Wrong ones would answer wrongly, and nothing else would tell."""
    path = folder / "graph" / f"index_{name}.npy"
    save_array(path, damage(np.load(path)))
    with pytest.raises(DataError, match=f"index_{name}.npy: "):
        KnowledgeGraph.load(folder)
    path.unlink()
    KnowledgeGraph.load(folder)


def test_an_index_with_equal_tails_in_another_order_is_refused(folder, corpus):
    """It would hold the same edges, but not in the order of a folder without it."""
    path = folder / "graph" / "index_tail_order.npy"
    order = np.load(path)
    tails = corpus.triples[order, 2]
    first = np.flatnonzero(tails[1:] == tails[:-1])[0]
    save_array(path, swapped(first, first + 1)(order))
    with pytest.raises(DataError, match="index_tail_order.npy: not of these triples"):
        KnowledgeGraph.load(folder)


def test_a_graph_saved_over_another_has_its_own_indices(folder):
    entities = [(f"Q{i}", f"n{i}", "") for i in range(3)]
    none = np.zeros((0, 3))
    save_graph(folder, entities, [("P1", "a")], np.array([(2, 0, 0), (0, 0, 1)]), none)
    graph = KnowledgeGraph.load(folder)
    assert [graph.edges_of(e).tolist() for e in range(3)] == [
        [[1, 0, 1], [2, 0, 2]], [[2, 0, 0]], [[1, 0, 0]],
    ]  # fmt: skip


def saved(array, **options):
    def write(path):
        with open(path, "wb") as file:
            np.save(file, array, **options)

    return write


def changed(row, column, value):
    def write(path):
        array = np.load(path)
        array[row, column] = value
        np.save(path, array)

    return write


def text(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


INT32 = np.int32


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("triples.npy", lambda p: p.unlink(), "not found"),
        ("triples.npy", lambda p: p.write_bytes(b"junk" * 100), "not a readable .npy"),
        ("triples.npy", lambda p: p.write_bytes(p.read_bytes()[:-4]), "not a readable .npy"),
        ("triples.npy", saved(np.array([{}], object), allow_pickle=True), "not a readable"),
        ("triples.npy", lambda p: np.savez(open(p, "wb"), a=np.zeros((9, 3), INT32)), "readable"),
        ("triples.npy", saved(np.zeros((5, 3), np.int64)), r"int64 \[5, 3\], expected int32"),
        (
            "triples.npy",
            saved(np.zeros((5, 4), INT32)),
            r"int32 \[5, 4\], expected int32 \[\*, 3\]",
        ),
        ("triples.npy", saved(np.zeros((2, 3), INT32)), "not sorted and unique"),
        ("triples.npy", saved(np.array([[1, 0, 0], [0, 0, 1]], INT32)), "not sorted and unique"),
        ("triples.npy", changed(0, 0, -1), "a negative index"),
        ("triples.npy", changed(-1, 2, 24), "an entity index is not below 24"),
        ("triples.npy", changed(-1, 0, 24), "an entity index is not below 24"),
        ("triples.npy", changed(-1, 1, 4), "a relation index is not below 4"),
        ("withheld.npy", changed(0, 2, 24), "an entity index is not below 24"),
        ("entities.tsv", lambda p: p.unlink(), "not found"),
        ("entities.tsv", lambda p: p.write_text(""), "an entity index is not below 0"),
    ],
)
def test_a_damaged_graph_is_named(folder, name, damage, message):
    damage(folder / "graph" / name)
    with pytest.raises(DataError, match=message) as caught:
        KnowledgeGraph.load(folder)
    text = str(caught.value)
    assert "\n" not in text and (name in text or "triples.npy" in text)


def npy(shape: str, data: bytes = b"", end: str = ", }") -> bytes:
    """An int32 array file that says it has this shape."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}{end}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


NO_ARRAYS = {
    "empty": b"",
    "archive": b"PK\x03\x04",
    "magic alone": b"\x93NUMPY",
    "no data": npy("(1, 3)"),
    "600 TB": npy("(50000000000000, 3)", bytes(12)),
    "over 64 bits": npy(f"({10**23}, 3)", bytes(12)),
    "0 elements in 64 bits": npy("(4294967296, 4294967296)", bytes(12)),
    "negative": npy("(-1, 3)", bytes(12)),
    "truth value": npy("(True, 3)", bytes(12)),
    "5000 digits": npy(f"({'9' * 5000}, 3)", bytes(12)),
    "open bracket": npy("(1, 3)", bytes(12), end=", }("),
    "deep": npy("(1, 3)", bytes(12), end=", }" + "-" * 9000),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
@pytest.mark.filterwarnings("error")
def test_what_is_no_array_file_is_one_clear_error(tmp_path, kind):
    path = tmp_path / "x.npy"
    path.write_bytes(NO_ARRAYS[kind])
    with pytest.raises(DataError, match="x.npy: not a readable .npy array: ") as caught:
        load_array(path, "int32", (None, 3))
    assert "\n" not in str(caught.value)


def test_small_and_empty_arrays_are_mapped_too(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(npy("(1, 3)", bytes(12)))
    assert load_array(path, "int32", (None, 3)).tolist() == [[0, 0, 0]]
    save_array(path, np.zeros((0, 3), INT32))
    assert load_array(path, "int32", (None, 3)).shape == (0, 3)


def test_a_withheld_fact_among_the_triples_is_refused(corpus, folder):
    save_array(folder / "graph" / "withheld.npy", corpus.triples[3:4])
    with pytest.raises(DataError, match="a withheld fact is a training triple"):
        KnowledgeGraph.load(folder)


@pytest.mark.parametrize(
    "name, damage, read, message",
    [
        ("entities.tsv", text("1\tQ101", "7\tQ101"), "entity_names", "line 2 has index '7'"),
        ("entities.tsv", text("1\tQ101\t", "1\tQ101"), "entity_ids", "line 2 has 3 values, not 4"),
        ("relations.tsv", text("born in", "born\tin"), "relation_names", "has 4 values, not 3"),
        (
            "relations.tsv",
            lambda p: p.write_bytes(b"0\tP1\t\xff\n" * 4),
            "relation_ids",
            "not UTF-8",
        ),
        ("aliases.tsv", text("\t1\n", "\t24\n"), "aliases", "entity index '24'"),
        ("aliases.tsv", text("\t1\n", "\t-1\n"), "aliases", "entity index '-1'"),
        ("aliases.tsv", text("\t1\n", f"\t{'1' * 5000}\n"), "aliases", "entity index '1{40}'"),
    ],
)
def test_damaged_names_are_named(folder, name, damage, read, message):
    damage(folder / "graph" / name)
    graph = KnowledgeGraph.load(folder)
    with pytest.raises(DataError, match=message) as caught:
        getattr(graph, read)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("entity_embeddings", lambda p: p.unlink(), "not found"),
        ("entity_embeddings", saved(np.zeros((24, 8), np.float32)), r"expected float32 \[25, \*\]"),
        ("entity_embeddings", saved(np.zeros((25, 8))), r"float64 \[25, 8\], expected float32"),
        ("entity_embeddings", saved(np.zeros((25, 9), np.float32)), "differ in dimension"),
        ("entity_embeddings", changed(3, 3, np.nan), "not finite"),
        ("entity_embeddings", changed(0, 3, 1), "row 0 is not zero"),
        ("relation_embeddings", changed(2, 0, np.inf), "not finite"),
        ("entity_frequency", saved(np.zeros(23, np.int64)), r"expected int64 \[24\]"),
        ("entity_frequency", saved(np.full(24, -1)), "outside 0.."),
        ("token_frequency", saved(np.zeros(9, np.int64)), "expected int64"),
        ("importance", saved(np.ones(3, np.float32)), "expected float32"),
        ("entity_names", changed(3, 0, 10_000), "outside -1.."),
        ("relation_names", changed(1, 0, -2), "outside -1.."),
        ("two_hop", saved(np.full(24, 1001, INT32)), "outside 0..1000"),
    ],
)
def test_a_damaged_table_is_named(folder, name, damage, message):
    damage(folder / "tables" / f"{name}.npy")
    with pytest.raises(DataError, match=message) as caught:
        KnowledgeTables.load(folder)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or message == "differ in dimension"


def test_unscored_values_are_not_finite(folder):
    path = folder / "tables" / "importance.npy"
    importance = np.load(path)
    importance[5] = np.nan
    np.save(path, importance)
    with pytest.raises(DataError, match="importance.npy: a value is not finite"):
        KnowledgeTables.load(folder)


def test_long_tail_words_match_the_manifest(folder):
    save_tables(folder, long_tail_words=[("one", 3)])
    with pytest.raises(DataError, match="long_tail_words.tsv: not 5 rows"):
        KnowledgeTables.load(folder)


@pytest.mark.parametrize("count", ["-1", "", "9" * 5000])
def test_counts_of_long_tail_words_are_numbers(folder, count):
    path = folder / "tables" / "long_tail_words.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].rpartition("\t")[0] + f"\t{count}", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="long_tail_words.tsv: a count is not a number"):
        KnowledgeTables.load(folder)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.npy"
    save_array(path, np.arange(5, dtype=np.int32))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trelm_ds.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_array(path, np.zeros(1, dtype=np.int32))
    assert load_array(path, "int32", (5,)).tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("triple", [(3, 0, 0), (0, 1, 0), (0, 0, -1)])
def test_a_graph_with_indices_out_of_range_is_not_saved(tmp_path, triple):
    entities = [(f"Q{i}", f"n{i}", "") for i in range(3)]
    with pytest.raises(DataError, match="triples.npy: .* index"):
        save_graph(tmp_path, entities, [("P1", "a")], np.array([triple]), np.zeros((0, 3)))
    assert not (tmp_path / "graph" / "triples.npy").exists()
