"""A split of a prepared folder, opened with everything that has to fit it."""

from __future__ import annotations

from pathlib import Path

from trelm_ds.config import Config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import ConfigError, DataError


def open_split(
    config: Config,
    data_dir: str | Path,
    graph: KnowledgeGraph,
    tables: KnowledgeTables,
    split: str,
    verify: bool,
    tolerant: bool = False,
) -> tuple[ShardReader, dict]:
    """The split's reader and the manifest, after checking that everything fits together."""
    manifest = load_manifest(data_dir)
    reader = ShardReader(data_dir, manifest, split, verify=verify, tolerant=tolerant)
    if len(reader) < 1:
        raise DataError(f"{data_dir}: empty corpus: split {split!r} holds no sample")
    longest = manifest["max_seq_length"]
    if longest > config.data.max_seq_length:
        raise ConfigError(
            f"data.max_seq_length {config.data.max_seq_length} is below the {longest} tokens "
            f"{data_dir} was prepared with"
        )
    counts = manifest["graph"]
    if (graph.num_entities, graph.num_relations) != (counts["entities"], counts["relations"]):
        raise DataError(f"{data_dir}: graph/ and manifest.json count different entities")
    if tables.num_keys != counts["entities"] + manifest["long_tail_words"]:
        raise DataError(f"{data_dir}: tables/ and manifest.json count different memory keys")
    return reader, manifest
