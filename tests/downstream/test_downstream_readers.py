"""Readers of the downstream data sets: their forms, bad files, markers and cutting."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from tiny_corpus import SPECIALS, write_tokenizer

from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.downstream.entity_typing import GENERAL_TYPES, read_typing
from trelm_ds.downstream.examples import (
    TextExample,
    cut_far_tokens,
    encode_examples,
    insert_markers,
    spread,
)
from trelm_ds.downstream.glue import FORMATS, read_glue
from trelm_ds.downstream.relations import read_relation
from trelm_ds.errors import DataError
from trelm_ds.prepare.encode import EncodedText


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# -- typing -------------------------------------------------------------------------------------

ROME = {"sent": "He went to Rome .", "start": 11, "end": 15, "labels": ["place"], "ents": []}
BOB = {"sent": "Bob slept .", "start": 0, "end": 3, "labels": ["person", "entity"]}
CROWD = {
    "left_context_token": ["He", "went", "to"], "mention_span": "Rome",
    "right_context_token": ["."], "y_str": ["city", "place"],
}  # fmt: skip


def test_typing_forms_agree(tmp_path):
    write(tmp_path / "a" / "train.json.gz", json.dumps([ROME, BOB]))
    write(tmp_path / "a" / "dev.json.gz", json.dumps([ROME]))
    first = CROWD | {"left_context_token": [], "mention_span": "Bob"}
    second = first | {"right_context_token": ["slept", "."], "y_str": ["person", "entity", "man"]}
    write(tmp_path / "b" / "train.jsonl", lines(CROWD, second))
    write(tmp_path / "b" / "dev.jsonl", lines(CROWD))
    listed, crowd = read_typing(tmp_path / "a"), read_typing(tmp_path / "b")
    assert listed.train == crowd.train and listed.evals == crowd.evals
    assert listed.labels == ["entity", "person", "place"]
    example = listed.train[0]
    assert example.text[slice(*example.spans[0])] == "Rome"
    assert (listed.kind, listed.metric, listed.spans) == ("multilabel", "micro_f1", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(ROME) + "{", r"dev.json:2: not valid JSON"),
        (json.dumps([ROME])[:-4], r"dev.json:1: not valid JSON"),
        ("[" * 100_000, r"dev.json.*not valid JSON"),
        (json.dumps([ROME, 5]), r"dev.json: record 2: expected a JSON object"),
        (lines(ROME, {"text": "x"}), r"dev.json:2: neither 'sent' nor 'mention_span'"),
        (lines(ROME | {"end": 99}), r"dev.json:1: span \[11, 99\) is not inside"),
        (lines(ROME | {"start": "11"}), r"dev.json:1: span ends must be integers"),
        (lines(ROME | {"labels": "place"}), r"dev.json:1: 'labels' is missing or not a list of st"),
        (lines(ROME | {"labels": [1]}), r"dev.json:1: 'labels'"),
        (lines(ROME | {"sent": 7}), r"dev.json:1: 'sent' has the wrong type"),
        (lines(CROWD | {"mention_span": ""}), r"dev.json:1: span"),
        (lines(CROWD | {"y_str": None}), r"dev.json:1: 'y_str'"),
        ('{"sent": "\\ud800", "start": 0, "end": 1, "labels": []}', r"dev.json:1: .*surrogate"),
        ("", "no example in its split dev"),
    ],
)
def test_bad_typing_files(tmp_path, content, said):
    write(tmp_path / "train.json", lines(ROME, BOB))
    write(tmp_path / "dev.json", content)
    with pytest.raises(DataError, match=said) as error:
        read_typing(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="none: no such folder"):
        read_typing(tmp_path / "none")
    with pytest.raises(DataError, match="no train_general9_linked.json or train.json"):
        read_typing(tmp_path)
    write(tmp_path / "train.json", lines(ROME))
    with pytest.raises(DataError, match="nothing to evaluate on"):
        read_typing(tmp_path)
    write(tmp_path / "dev.json", lines(ROME))
    with pytest.raises(DataError, match="only one label in it: place"):
        read_typing(tmp_path)
    (tmp_path / "dev.json").unlink()
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(lines(ROME).encode())[:-9])
    with pytest.raises(DataError, match="dev.json.gz:.*broken .gz file"):
        read_typing(tmp_path)


# -- relations ----------------------------------------------------------------------------------

TOKENS = ["the", "crane", "arm", "moves", "."]
PARTS = {
    "token": TOKENS, "h": {"name": "crane", "pos": [1, 2]}, "t": {"pos": [2, 4]},
    "relation": "Part(e2,e1)",
}  # fmt: skip
TACRED = {
    "token": TOKENS, "subj_start": 1, "subj_end": 1, "obj_start": 2, "obj_end": 3,
    "relation": "no_relation",
}  # fmt: skip


def surfaces(example):
    return [example.text[a:b] for a, b in example.spans]


def test_relation_forms_and_their_measures(tmp_path):
    write(tmp_path / "s" / "train.jsonl", lines(PARTS, PARTS | {"relation": "Other"}))
    write(tmp_path / "s" / "val.txt", lines(PARTS))
    semeval = read_relation(tmp_path / "s")
    assert surfaces(semeval.train[0]) == ["crane", "arm moves"]
    assert semeval.metric == "official_macro_f1" and list(semeval.evals) == ["val"]
    scores = semeval.score(["Part(e1,e2)", "Part(e2,e1)", "Other"], ["Part(e2,e1)"] * 2 + ["Other"])
    assert scores["official_macro_f1"] == scores["micro_f1"] == 0.5

    write(tmp_path / "t" / "train.json", json.dumps([TACRED, TACRED | {"relation": "per:age"}]))
    write(tmp_path / "t" / "dev.json", json.dumps([TACRED]))
    write(tmp_path / "t" / "test.json", json.dumps([TACRED]))
    tacred = read_relation(tmp_path / "t")
    assert tacred.train[0].spans == semeval.train[0].spans
    assert (tacred.metric, list(tacred.evals)) == ("micro_f1", ["dev", "test"])

    write(tmp_path / "o" / "train.json", lines(PARTS | {"relation": "Other"}, PARTS, TACRED))
    write(tmp_path / "o" / "dev.json", lines(PARTS))
    assert read_relation(tmp_path / "o").metric == "micro_f1"  # not SemEval's labels


def fewrel(count):
    return [
        {"tokens": [f"w{i}", *TOKENS], "h": ["crane", "Q1", [[2], [5]]],
         "t": ["arm", "Q2", [[3, 4]]]} for i in range(count)
    ]  # fmt: skip


def test_a_list_on_one_line_may_be_longer_than_a_line(tmp_path, monkeypatch):
    """TACRED's own files: a hundred million characters without a line end."""
    content = json.dumps([TACRED, TACRED | {"relation": "per:age"}] * 10)
    monkeypatch.setattr("trelm_ds.prepare.files.MAX_LINE_CHARACTERS", len(content) // 2)
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", content)
    assert len(read_relation(tmp_path).train) == 20
    monkeypatch.setattr("trelm_ds.prepare.files.MAX_JSON_CHARACTERS", len(content) // 2)
    with pytest.raises(DataError, match=r"train.json:1: longer than \d+ characters"):
        read_relation(tmp_path)


def test_fewrel_is_split_within_relations(tmp_path):
    write(tmp_path / "val_wiki.json", json.dumps({"P1": fewrel(600), "P2": fewrel(10)}))
    task = read_relation(tmp_path)
    counts = {k: Counter(e.target for e in v) for k, v in task.evals.items()}
    assert Counter(e.target for e in task.train) == {"P1": 100, "P2": 2}
    assert counts == {"dev": {"P1": 200, "P2": 4}, "test": {"P1": 200, "P2": 4}}
    every = [(e.text, e.target) for s in (task.train, *task.evals.values()) for e in s]
    assert len(set(every)) == len(every)
    assert surfaces(task.train[0]) == ["crane", "arm moves"]
    assert task.metric == "accuracy"
    assert set(task.score(["P1"], ["P2"])) == {"accuracy", "macro_f1"}
    write(tmp_path / "val_wiki.json", json.dumps({"P2": fewrel(10)[::-1], "P1": fewrel(600)[::-1]}))
    again = read_relation(tmp_path)  # the order in the file does not matter
    assert sorted(e.text for e in again.train) == sorted(e.text for e in task.train)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(PARTS, PARTS | {"token": "the"}), r"dev.json:2: 'token'"),
        (lines(PARTS | {"h": {"pos": [1, 9]}}), r"dev.json:1: span \[1, 9\) is not inside the 5"),
        (lines(PARTS | {"h": {"pos": [2, 2]}}), r"dev.json:1: span"),
        (lines(PARTS | {"h": {"pos": [True, 2]}}), r"dev.json:1: span"),
        (lines(PARTS | {"h": {"pos": 1}}), r"dev.json:1: 'pos' of 'h'"),
        (lines(PARTS | {"t": [1, 2]}), r"dev.json:1: 't' has the wrong type"),
        (lines(PARTS | {"relation": " "}), r"dev.json:1: the relation has no name"),
        (lines(TACRED | {"obj_end": None}), r"dev.json:1: 'obj_end' has the wrong type"),
        (lines(TACRED | {"subj_start": -1}), r"dev.json:1: span \[-1, 2\)"),
    ],
)
def test_bad_relation_files(tmp_path, content, said):
    write(tmp_path / "train.json", lines(PARTS, TACRED))
    write(tmp_path / "dev.json", content)
    with pytest.raises(DataError, match=said):
        read_relation(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["P1"]', "expected a JSON object"),
        ('{"P1": 3}', "P1: expected a list"),
        ('{"P1": [3]}', "P1: instance 1: expected a JSON object"),
        ('{"P1": [{"tokens": ["a"], "h": ["a", "Q1"], "t": []}]}', "instance 1: 'h' is not"),
        ('{"P1": [{"tokens": ["a"], "h": ["a", 1, [["0"]]], "t": []}]}', "instance 1: 'h' is not"),
        ('{"P1": []}', "no example in its split train"),
    ],
)
def test_bad_fewrel_files(tmp_path, content, said):
    write(tmp_path / "val_wiki.json", content)
    with pytest.raises(DataError, match=said):
        read_relation(tmp_path)


# -- GLUE ---------------------------------------------------------------------------------------


def test_glue_columns(tmp_path):
    rte = 'index\tsentence1\tsentence2\tlabel\n0\ta "b\tc\tentailment\n1\td\te\tnot_entailment\n'
    write(tmp_path / "RTE" / "train.tsv", rte)
    write(tmp_path / "RTE" / "dev.tsv.gz", rte.replace("\n", "\r\n"))
    mrpc = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tx y\tz\n0\t5\t6\tp\tq\n"
    cola = "gj04\t1\t\tone .\ngj04\t0\t*\ttwo .\n"
    stsb = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n1\tc\td\t0\n"
    for name, content in (("MRPC", mrpc), ("CoLA", cola), ("STS-B", stsb)):
        for split in ("train", "dev"):
            write(tmp_path / name / f"{split}.tsv", content)
    mnli = "index\tsentence1\tsentence2\tlabel1\tgold_label\n" + "".join(
        f"0\tp\th\tneutral\t{label}\n" for label in ("neutral", "contradiction")
    )
    for split in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / "MNLI" / f"{split}.tsv", mnli)
    tasks = {task.name: task for task in read_glue(tmp_path)}
    assert set(tasks) == {"RTE", "MRPC", "CoLA", "STS-B", "MNLI"}
    assert tasks["RTE"].train == [
        TextExample('a "b', "entailment", (), "c"), TextExample("d", "not_entailment", (), "e"),
    ]  # fmt: skip
    assert tasks["RTE"].evals == {"dev": tasks["RTE"].train}
    assert tasks["MRPC"].train[0] == TextExample("x y", "1", (), "z")
    assert tasks["CoLA"].train[1] == TextExample("two .", "0")
    assert tasks["STS-B"].train[0] == TextExample("a", 2.5, (), "b")
    assert tasks["STS-B"].kind == "regression" and tasks["STS-B"].labels == []
    assert list(tasks["MNLI"].evals) == ["dev_matched", "dev_mismatched"]
    assert tasks["MNLI"].train[1].target == "contradiction"
    assert [task.name for task in read_glue(tmp_path / "RTE")] == ["RTE"]
    for task in tasks.values():  # the name of its measure is one of its scores
        gold = [example.target for example in task.train]
        assert task.score(gold, gold)[task.metric] == pytest.approx(1)
    assert set(FORMATS) == {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("SST-2", "sentence\tlabel\ngood\t1\nbad\t2\n", r"dev.tsv:3: label '2' is not one of 0, 1"),
        ("SST-2", "sentence\tlabel\ngood\n", r"dev.tsv:2: expected 2 tab-separated columns, got 1"),
        ("SST-2", "text\tlabel\ngood\t1\n", r"dev.tsv:1: no column 'sentence' in the header"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"dev.tsv:2: score 'nan'"),
        ("SST-2", "", "SST-2: no example in its split dev"),
    ],
)
def test_bad_glue_files(tmp_path, name, content, said):
    train = "sentence\tlabel\ngood\t1\nbad\t0\n"
    if name == "STS-B":
        train = "sentence1\tsentence2\tscore\na\tb\t1\n"
    write(tmp_path / name / "train.tsv", train)
    write(tmp_path / name / "dev.tsv", content)
    with pytest.raises(DataError, match=said):
        read_glue(tmp_path)


def test_lines_that_the_published_qqp_breaks_are_left_out(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "1\t3\t4\thow ?\twhy ?\t1\n"
    broken = "2\t5\t6\tis it\n so ?\twhy ?\t0\n"  # a line end within a question
    other = good.replace("\t1\n", "\t0\n")
    write(tmp_path / "QQP" / "train.tsv", header + good + broken + other)
    write(tmp_path / "QQP" / "dev.tsv", header + good)
    (task,) = read_glue(tmp_path)
    assert [example.target for example in task.train] == ["1", "0"]
    assert len(task.evals["dev"]) == 1
    assert "train.tsv: 2 lines that are not of 6 columns are left out" in caplog.text
    assert "dev.tsv" not in caplog.text


def test_no_glue_folder(tmp_path):
    with pytest.raises(DataError, match="no folder of a GLUE task in it"):
        read_glue(tmp_path)


# -- tokens and markers -------------------------------------------------------------------------


def encoded(*offsets):
    return EncodedText(
        np.arange(len(offsets), dtype=np.int32), np.asarray(offsets, np.int64).reshape(-1, 2), None
    )


@pytest.mark.parametrize(
    ("spans", "ids", "opening"),
    [
        ([(3, 5)], [0, 100, 1, 101, 2, 3], [1]),
        ([(0, 2), (3, 5)], [100, 0, 101, 102, 1, 103, 2, 3], [0, 3]),
        ([(6, 11), (0, 2)], [102, 0, 103, 1, 100, 2, 3, 101], [4, 0]),
        ([(0, 11), (3, 5)], [100, 0, 102, 1, 103, 2, 3, 101], [0, 2]),
        ([(4, 7)], [0, 100, 1, 2, 101, 3], [1]),  # shares a letter with tokens 1 and 2
        ([(2, 3), (5, 6)], [0, 100, 101, 1, 102, 103, 2, 3], [1, 4]),  # blanks: no token
    ],
)
def test_markers(spans, ids, opening):
    text = encoded((0, 2), (3, 5), (6, 8), (9, 11))
    assert insert_markers(text, spans, 100) == (ids, opening)


def test_markers_in_a_text_without_tokens():
    assert insert_markers(encoded(), [(0, 1)], 100) == ([100, 101], [0])


def test_what_is_far_from_the_markers_is_cut():
    ids = [*range(10), 100, 50, 101, *range(60, 70), 102, 51, 103, *range(70, 80)]
    kept, opening = cut_far_tokens(ids, [10, 23], 100, 12)
    assert kept == [8, 9, 100, 50, 101, 60, 61, 69, 102, 51, 103, 70]
    assert [kept[i] for i in opening] == [100, 102]
    assert cut_far_tokens(ids, [10, 23], 100, len(ids)) == (ids, [10, 23])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*SPECIALS, "the", "crane", "arm", "moves", "sep", "[", "]", "."]
    write_tokenizer(folder, words)
    return load_tokenizer(folder)


def test_encoding(tokenizer):
    counts = Counter()
    example = TextExample("the crane arm moves .", "a", ((4, 9), (10, 13)))
    size = len(tokenizer)
    (found,) = encode_examples([example], tokenizer, ["a", "b"], size, 16, counts)
    e1, e1_end, e2, e2_end = range(size, size + 4)
    assert found.ids == [2, 5, e1, 6, e1_end, e2, 7, e2_end, 8, 12, 3]
    assert (found.positions, found.target, counts["truncated"]) == ([2, 5], 0, 0)
    (short,) = encode_examples([example], tokenizer, ["a", "b"], size, 8, counts)
    assert len(short.ids) == 8 and short.ids[0] == 2 and short.ids[-1] == 3
    assert [short.ids[i] for i in short.positions] == [e1, e2] and counts["truncated"] == 1

    pair = TextExample("the crane", "b", (), "the arm moves .")
    (found,) = encode_examples([pair], tokenizer, ["a", "b"], size, 16, counts)
    assert found.ids == [2, 5, 6, 3, 5, 7, 8, 12, 3]
    assert found.token_types == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert (found.positions, found.target) == ([0], 1)
    (short,) = encode_examples([pair], tokenizer, ["a", "b"], size, 8, counts)
    assert len(short.ids) == len(short.token_types) == 8 and counts["truncated"] == 2

    typed = TextExample("the crane", frozenset(("b", "a")), ((4, 9),))
    (found,) = encode_examples([typed], tokenizer, ["a", "b", "c"], size, 16, counts)
    assert found.target == [0, 1] and len(found.positions) == 1


def test_a_special_token_s_name_in_a_marked_text_is_text(tokenizer):
    example = TextExample("the [SEP] arm", "a", ((10, 13),))
    (found,) = encode_examples([example], tokenizer, ["a"], len(tokenizer), 16, Counter())
    assert found.ids.count(tokenizer.sep_token_id) == 1


def test_spread():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 4) == [1, 2] and spread([1, 2], None) == [1, 2]


# -- the real files -----------------------------------------------------------------------------


def sizes(task):
    return len(task.train), *(len(split) for split in task.evals.values())


def test_real_typing(real_data, tmp_path):
    folder = real_data / "open_entity_wikipedia"
    task = read_typing(folder)
    assert sizes(task) == (445, 422) and set(task.labels) <= GENERAL_TYPES
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl.gz").symlink_to(folder / f"{split}.jsonl.gz")
    crowd = read_typing(tmp_path)
    assert [e.target for e in crowd.train] == [e.target for e in task.train]
    assert sum(not e.target for e in task.train) == 92


def test_real_relations(real_data):
    task = read_relation(real_data / "semeval2010_task8")
    assert sizes(task) == (6507, 1493) and len(task.labels) == 19
    assert task.metric == "official_macro_f1"
    assert surfaces(task.train[0]) == ["play", "humor"]
    fewrel = read_relation(real_data / "fewrel")
    assert sizes(fewrel) == (800, 1600, 1600) and len(fewrel.labels) == 8


def test_real_glue(real_data):
    found = {task.name: sizes(task) for task in read_glue(real_data / "glue")}
    assert found == {"RTE": (2490, 277), "MRPC": (3667, 408), "SST-2": (67349, 872)}
