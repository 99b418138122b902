"""Slices of the real corpora: every mention decodes to a name of its entity."""

import json
import re
import unicodedata

import numpy as np
import pytest

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.prepare.cli import prepare
from trelm_ds.prepare.ernie import read_ernie
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.verify import verify

UNCASED = "bert-base-uncased-vocab.txt"


def letters(text: str) -> str:
    """What a lower-casing tokenizer keeps of a surface: letters and digits without accents."""
    plain = unicodedata.normalize("NFD", text.lower())
    return re.sub(r"[\W_]|[\u0300-\u036f]", "", plain)


def round_trip(folder) -> float:
    """Share of training mentions whose tokens read as a name or alias of their entity."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    graph = KnowledgeGraph.load(folder)
    names = [set() for _ in range(graph.num_entities)]
    for alias, entity in graph.aliases:
        names[entity].add(letters(alias))
    reader = ShardReader(folder, load_manifest(folder), "train")
    right = total = 0
    for i in range(len(reader)):
        sample = reader[i]
        for left, right_end, key in sample.spans:
            if key < graph.num_entities:
                tokens = tokenizer.convert_ids_to_tokens(sample.ids[left:right_end].tolist())
                if tokenizer.unk_token in tokens:
                    continue
                total += 1
                right += letters("".join(t.removeprefix("##") for t in tokens)) in names[key]
    assert total
    return right / total


def test_trex(real_data, tmp_path):
    output = tmp_path / "trex"
    prepare(
        ["trex", f"--input={real_data / 'lama'}", f"--output={output}", "--limit=300"]
        + [f"--vocab={real_data / 'vocab' / UNCASED}", "--dim=16", "--epochs=5"]
    )
    verify(output)
    assert round_trip(output) == 1.0
    manifest = load_manifest(output)
    assert manifest["graph"]["triples"] == 300 and manifest["graph"]["relations"] == 14
    probes = [
        json.loads(line)
        for name in ("template", "context")
        for line in (output / "probe" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sum(p["set"] == "template" for p in probes) == 300
    only = {(p["subject"], p["object"]) for p in probes if p["graph_only"]}
    assert 15 < len(only) < 60
    reader = ShardReader(output, manifest, "train")
    for i in range(len(reader)):
        keys = set(reader[i].spans[:, 2].tolist())
        assert not any(subject in keys and object_ in keys for subject, object_ in only)
    stats = json.loads((output / "stats.json").read_text())
    assert stats["train"]["share_with_long_tail_word"] == pytest.approx(0.2, abs=0.01)
    assert (output / "probe" / "candidates.txt").read_text().count("\n") == 21018


def test_rebel(real_data, tmp_path):
    output = tmp_path / "rebel"
    prepare(
        ["rebel", f"--input={real_data / 'rebel' / 'sample.jsonl.gz'}", f"--output={output}"]
        + [f"--vocab={real_data / 'vocab' / 'roberta-vocab.json'}", "--limit=150"]
        + ["--dim=16", "--epochs=5"]
    )
    verify(output)
    manifest = load_manifest(output)
    assert manifest["tokenizer"] | {"sha256": ""} == {
        "type": "roberta", "vocab_size": 50265, "sha256": "",
    }  # fmt: skip
    tokenizer = load_tokenizer(output / "tokenizer")
    graph = KnowledgeGraph.load(output)
    names = [set() for _ in range(graph.num_entities)]
    for alias, entity in graph.aliases:
        names[entity].add(alias)
    reader = ShardReader(output, manifest, "train")
    seen = 0
    for sample in (reader[i] for i in range(len(reader))):
        for left, right, key in sample.spans[sample.spans[:, 2] < graph.num_entities]:
            # A byte-level tokenizer loses nothing: letter for letter a surface of the entity.
            assert tokenizer.decode(sample.ids[left:right]).strip() in names[key]
            seen += 1
    reasons = json.loads((output / "stats.json").read_text())["preparation"]["reader"]
    assert seen > 500 and reasons["mention_shift_mended"] > 0


def test_ernie_forms_agree_and_tokens_stay_what_they_were(real_data, tmp_path):
    folder, vocab = real_data / "ernie_wiki", real_data / "vocab" / UNCASED
    original = [folder / "wiki_token.gz", folder / "wiki_entity.gz"]
    options = ReaderOptions(vocab=vocab, limit=4)
    documents = list(read_ernie(original, options).documents)
    decoded = list(read_ernie([folder], options).documents)
    assert [d.text for d in documents] == [d.text for d in decoded]
    assert [d.spans for d in documents] == [d.spans for d in decoded]
    output = tmp_path / "ernie"
    prepare(
        ["ernie", f"--input={folder}", f"--output={output}", f"--vocab={vocab}", "--limit=4"]
        + [f"--graph={real_data / 'codex_s'}", "--dim=16", "--epochs=2", "--heldout_fraction=0"]
    )
    verify(output)
    assert round_trip(output) > 0.5  # names come from one surface or from the graph: a floor
    reader = ShardReader(output, load_manifest(output), "train")
    ids = np.concatenate([reader[i].ids[1:-1] for i in range(len(reader))])
    vocabulary = {word: i for i, word in enumerate(vocab.read_text().split("\n"))}
    pieces = [vocabulary[p] for d in _pieces(folder, 4) for p in d]
    assert ids.tolist() == pieces


def _pieces(folder, limit):
    from trelm_ds.prepare.files import iter_jsonl

    for number, (_, record) in enumerate(iter_jsonl(folder / "articles.jsonl.gz")):
        if number < limit:
            yield [piece for sentence in record["sentences"] for piece in sentence["tokens"]]
