"""What a prepared folder holds, in numbers (``stats.json``) and as a figure (``stats.png``)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.shards import ShardReader
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import DataError
from trelm_ds.files import whole_file, write_text
from trelm_ds.prepare.files import iter_jsonl


def write_stats(folder: Path, manifest: dict, preparation: dict | None = None) -> dict:
    """Reads the folder's training split and rewrites its two files.

    Args:
        preparation: what only the builder knows (seconds, dropped items by reason); None keeps
            what ``stats.json`` says about it.

    Returns:
        The contents of ``stats.json``.
    """
    path = folder / "stats.json"
    if preparation is None:
        preparation = _previous(path)
    lengths, stats = collect(folder, manifest)
    stats["preparation"] = preparation
    frequency = np.sort(KnowledgeTables.load(folder).entity_frequency)[::-1]
    plot(folder / "stats.png", lengths, frequency[frequency > 0], manifest)
    write_text(path, json.dumps(stats, indent=2, ensure_ascii=False) + "\n")
    return stats


def _previous(path: Path) -> dict:
    try:
        preparation = json.loads(path.read_text(encoding="utf-8"))["preparation"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return preparation if isinstance(preparation, dict) else {}


def collect(folder: Path, manifest: dict) -> tuple[np.ndarray, dict]:
    """Counts over the training split, the graph and the probes.

    Returns:
        int64 [max_seq_length + 1] samples by length, and the statistics.
    """
    graph, tables = KnowledgeGraph.load(folder), KnowledgeTables.load(folder)
    reader = ShardReader(folder, manifest, "train")
    degree = graph.degrees()
    lengths = np.zeros(manifest["max_seq_length"] + 1, np.int64)
    counts: Counter[str] = Counter()
    for i in range(len(reader)):
        sample = reader[i]
        lengths[len(sample.ids)] += 1
        keys = sample.spans[:, 2]
        entities = keys[keys < graph.num_entities]
        counts["entity_spans"] += len(entities)
        counts["word_spans"] += len(keys) - len(entities)
        counts["samples_with_mention"] += len(entities) > 0
        counts["samples_with_triple"] += bool((degree[entities] > 0).any())
        counts["samples_with_long_tail_word"] += len(keys) > len(entities)
    samples = max(1, len(reader))
    cumulative = np.cumsum(lengths) / samples
    frequency = tables.entity_frequency
    seen = frequency[frequency > 0]
    words = [count for _, count in tables.long_tail_words]
    return lengths, {
        "name": manifest["name"],
        "dataset_id": manifest["dataset_id"],
        "samples": {split: entry["samples"] for split, entry in manifest["splits"].items()},
        "tokens": {split: entry["tokens"] for split, entry in manifest["splits"].items()},
        "train": {
            "entity_spans": counts["entity_spans"],
            "word_spans": counts["word_spans"],
            "share_with_mention": counts["samples_with_mention"] / samples,
            "share_with_injectable_mention": counts["samples_with_triple"] / samples,
            "share_with_long_tail_word": counts["samples_with_long_tail_word"] / samples,
            "length_mean": float((lengths * np.arange(len(lengths))).sum() / samples),
            "length_median": int(np.searchsorted(cumulative, 0.5)),
            "length_p95": int(np.searchsorted(cumulative, 0.95)),
        },
        "graph": {
            "entities": graph.num_entities,
            "entities_mentioned": len(seen),
            "entities_with_triple": int((degree > 0).sum()),
            "relations": graph.num_relations,
            "triples": len(graph.triples),
            "withheld": len(graph.withheld),
        },
        "entity_frequency": {
            "mean": float(frequency.mean()) if len(frequency) else 0.0,
            "median_of_mentioned": float(np.median(seen)) if len(seen) else 0.0,
            "max": int(frequency.max(initial=0)),
        },
        "long_tail_words": {
            "types": len(words),
            "count_min": min(words, default=0),
            "count_max": max(words, default=0),
        },
        "vocabulary": {
            "size": manifest["tokenizer"]["vocab_size"],
            "used": int((tables.token_frequency > 0).sum()),
        },
        "probes": _count_probes(folder / "probe"),
    }


def _count_probes(folder: Path) -> dict:
    """Records by set, and of them the long-tail, graph-only and text-only ones."""
    sets: dict[str, Counter[str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for where, record in iter_jsonl(path):
            try:
                counter = sets.setdefault(record["set"], Counter(all=0))
                counter["all"] += 1
                counter["tail"] += int(record["tail"])
                counter["graph_only"] += int(record["graph_only"])
                counter["text_only"] += int(record.get("text_only", False))  # older folders: none
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{where}: not a probe record: {str(record)[:80]}") from None
    return {name: dict(counter) for name, counter in sets.items()}


def plot(path: Path, lengths: np.ndarray, frequency: np.ndarray, manifest: dict) -> None:
    """Entity frequency by rank, and the samples' lengths.

    Args:
        lengths: int [L] samples by number of tokens.
        frequency: int [mentioned entities], descending.
    """
    # Not pyplot: no window system, no state shared with the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.loglog(np.arange(1, len(frequency) + 1), frequency, drawstyle="steps-post")
    left.set(xlabel="entity rank", ylabel="mentions in train", title="Entity frequency")
    right.bar(np.arange(len(lengths)), lengths, width=1.0)
    right.set(xlabel="tokens, specials included", ylabel="train samples", title="Sample length")
    figure.suptitle(f"{manifest['name']}: {lengths.sum():,} training samples")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
