"""A prepared folder checked against itself: every checksum, sample, index, count and id."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trelm_ds.data.graph import KnowledgeGraph, graph_digest
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.data.tokenizer import load_tokenizer, tokenizer_digest
from trelm_ds.errors import DataError
from trelm_ds.prepare.files import get, iter_jsonl


def verify(folder: Path) -> str:
    """Reads the whole folder.

    Returns:
        One line that sums up what was found.

    Raises:
        DataError: naming the first file that is missing, damaged or inconsistent.
    """
    manifest = load_manifest(folder)
    graph = _check_graph(folder, manifest)
    tables = KnowledgeTables.load(folder)
    tokenizer = _check_tokenizer(folder, manifest)
    num_entities = graph.num_entities
    lines = []
    for split, entry in manifest["splits"].items():
        reader = ShardReader(folder, manifest, split)
        reader.verify_all()
        tokens = np.zeros(manifest["tokenizer"]["vocab_size"], np.int64)
        keys = np.zeros(tables.num_keys, np.int64)
        length = spans = 0
        for i in range(len(reader)):
            sample = reader[i]
            where = f"{folder}: {split} sample {i}"
            if sample.first_span != spans:
                raise DataError(f"{where}: first_span is {sample.first_span}, expected {spans}")
            if (sample.ids[0], sample.ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
                raise DataError(f"{where}: does not begin and end with the special tokens")
            np.add.at(tokens, sample.ids[1:-1], 1)
            np.add.at(keys, sample.spans[:, 2], 1)
            length += len(sample.ids)
            spans += len(sample.spans)
        if (length, spans) != (entry["tokens"], entry["spans"]):
            raise DataError(f"{folder}: {split} holds {length} tokens and {spans} spans, not those "
                            "of the manifest")  # fmt: skip
        if split == "train":
            for name, counted in (
                ("token_frequency", tokens),
                ("entity_frequency", keys[:num_entities]),
            ):
                if not np.array_equal(getattr(tables, name), counted):
                    raise DataError(f"{folder}/tables/{name}.npy: does not fit the training split")
        lines.append(f"{split} {len(reader)} samples, {length} tokens, {spans} spans")
    probes = _check_probes(folder, num_entities)
    return (
        f"{folder}: ok: {'; '.join(lines)}; {num_entities} entities, {graph.num_relations} "
        f"relations, {len(graph.triples)} triples, {probes} probes"
    )


def _check_graph(folder: Path, manifest: dict) -> KnowledgeGraph:
    graph = KnowledgeGraph.load(folder)
    entry = manifest["graph"]
    found = {
        "entities": len(graph.entity_ids),
        "relations": len(graph.relation_ids),
        "triples": len(graph.triples),
        "sha256": graph_digest(folder),
    }
    for name, value in found.items():
        if entry[name] != value:
            raise DataError(f"{folder}/graph: {name} is {value}, the manifest says {entry[name]}")
    if len(set(graph.entity_ids)) != len(graph.entity_ids):
        raise DataError(f"{folder}/graph/entities.tsv: an id occurs twice")
    _ = graph.aliases  # reads and checks them
    return graph


def _check_tokenizer(folder: Path, manifest: dict):
    tokenizer = load_tokenizer(folder / "tokenizer")
    entry = manifest["tokenizer"]
    for name, value in (("sha256", tokenizer_digest(folder)), ("vocab_size", len(tokenizer))):
        if entry[name] != value:
            raise DataError(f"{folder}/tokenizer: {name} is {value}, the manifest's {entry[name]}")
    return tokenizer


def _check_probes(folder: Path, num_entities: int) -> int:
    """Number of probes."""
    total = 0
    for path in sorted((folder / "probe").glob("*.jsonl")):
        for where, probe in iter_jsonl(path):
            subject, object_ = (get(probe, name, int, where) for name in ("subject", "object"))
            text = get(probe, "text", str, where)
            if not (
                -1 <= subject < num_entities
                and 0 <= object_ < num_entities
                and text.count("[MASK]") == 1
            ):
                raise DataError(f"{where}: not a probe of this folder's entities")
            total += 1
    return total
