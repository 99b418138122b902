"""Writes a complete prepared data folder, small enough for a unit test (about 50 ms).

``write_tiny_corpus(folder)`` makes manifest, shards of both splits, graph, tables, a BERT
WordPiece tokenizer, probe files and stats, all drawn from one seed. Sentences mention entities by
their names, about every third one also holds a long-tail word, and some facts are withheld.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trelm_ds.config import NAME_TOKENS
from trelm_ds.data.graph import save_graph
from trelm_ds.data.schema import Sample
from trelm_ds.data.shards import INDEX_RECORD, ShardSetWriter, write_manifest
from trelm_ds.data.tables import save_tables
from trelm_ds.data.tokenizer import load_tokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
RELATIONS = ["born in", "works for", "capital of", "member of", "part of", "speaks"]
WORDS = (
    "the a of in was is and for by at on to near with from city person team river book film song "
    "old new big small red blue known called went made saw wrote won lost met played led built ."
).split()


@dataclass
class TinyCorpus:
    """What was written, for tests to compare with.

    Attributes:
        folder: the data folder.
        manifest: its manifest.
        words: the vocabulary in id order.
        samples: split -> samples as added (id and first_span set).
        entity_names: names as written.
        triples: int32 [T, 3].
        withheld: int32 [*, 3].
    """

    folder: Path
    manifest: dict
    words: list[str]
    samples: dict[str, list[Sample]]
    entity_names: list[str]
    triples: np.ndarray
    withheld: np.ndarray


def write_tokenizer(folder: Path, words: list[str]) -> str:
    """A WordPiece tokenizer that ``AutoTokenizer.from_pretrained(folder)`` loads.

    Returns:
        sha256 of its ``tokenizer.json``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _draw_triples(rng, entities: int, relations: int, count: int) -> np.ndarray:
    """Unique triples; the last entity has none, and low indices have most."""
    rows: set[tuple[int, int, int]] = set()
    while len(rows) < count:
        head, tail = (rng.random(2) ** 2 * (entities - 1)).astype(int)
        if head != tail:
            rows.add((int(head), int(rng.integers(relations)), int(tail)))
    return np.array(sorted(rows), dtype=np.int32)


def write_tiny_corpus(
    folder: str | Path,
    *,
    train: int = 96,
    heldout: int = 24,
    entities: int = 24,
    relations: int = 4,
    triples: int = 70,
    long_tail_words: int = 5,
    max_seq_length: int = 32,
    dim: int = 8,
    samples_per_shard: int = 40,
    seed: int = 0,
) -> TinyCorpus:
    """Writes a prepared data folder.

    Args:
        folder: where; made if missing.
        train, heldout: samples of the splits.
        entities, relations, triples: of the graph; a tenth of the triples is withheld.
        long_tail_words: words that are memory keys.
        max_seq_length: longest sample, specials included; lengths vary from about 10 up.
        dim: of the TransE tables.
        samples_per_shard: small, so that several shards exist.
        seed: of everything random here.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)

    rare = [f"rareword{i}" for i in range(long_tail_words)]
    name_words = [f"name{i}" for i in range(entities + entities // 2)]
    relation_words = sorted({w for name in RELATIONS for w in name.split()} - set(WORDS))
    words = SPECIALS + WORDS + relation_words + name_words + rare
    words += [f"##{letter}" for letter in "abc"]
    token = {word: i for i, word in enumerate(words)}
    tokenizer_sha256 = write_tokenizer(folder / "tokenizer", words)

    # Entity e is called "name{e}", every third one has a second word.
    entity_names = [
        f"name{e} name{entities + e // 3}" if e % 3 == 0 and entities + e // 3 < len(name_words)
        else f"name{e}"
        for e in range(entities)
    ]  # fmt: skip
    facts = _draw_triples(rng, entities, relations, triples)
    kept_out = np.zeros(len(facts), dtype=bool)
    kept_out[rng.choice(len(facts), max(1, len(facts) // 10), replace=False)] = True
    graph_entry = save_graph(
        folder,
        [(f"Q{100 + e}", name, f"entity number {e}") for e, name in enumerate(entity_names)],
        [(f"P{10 + r}", RELATIONS[r % len(RELATIONS)]) for r in range(relations)],
        facts[~kept_out],
        facts[kept_out],
        [(name, e) for e, name in enumerate(entity_names)],
    )

    samples: dict[str, list[Sample]] = {"train": [], "heldout": []}
    splits = {}
    frequency = np.zeros(entities, dtype=np.int64)
    word_counts = np.zeros(long_tail_words, dtype=np.int64)
    token_frequency = np.zeros(len(words), dtype=np.int64)
    importance: list[float] = []
    for split, count in (("train", train), ("heldout", heldout)):
        with ShardSetWriter(folder, split, samples_per_shard) as writer:
            for i in range(count):
                sample = _draw_sample(rng, split, i, token, entity_names, rare, max_seq_length)
                writer.add(sample)
                samples[split].append(sample)
                if split == "train":
                    np.add.at(token_frequency, sample.ids, 1)
                    for key in sample.spans[:, 2].tolist():
                        if key < entities:
                            frequency[key] += 1
                            importance.append(1 + float(rng.gamma(1.0, 0.2)))
                        else:
                            word_counts[key - entities] += 1
                            importance.append(1.0)
            splits[split] = writer.close()

    def name_rows(names):
        rows = np.full((len(names), NAME_TOKENS), -1, dtype=np.int32)
        for row, name in zip(rows, names, strict=True):
            ids = [token[w] for w in name.split()][:NAME_TOKENS]
            row[: len(ids)] = ids
        return rows

    embeddings = {}
    for name, rows in (("entity_embeddings", entities), ("relation_embeddings", relations)):
        embeddings[name] = rng.normal(size=(rows + 1, dim)).astype(np.float32)
        embeddings[name][0] = 0
    save_tables(
        folder,
        entity_frequency=frequency,
        token_frequency=token_frequency,
        importance=importance,
        entity_names=name_rows(entity_names),
        relation_names=name_rows([RELATIONS[r % len(RELATIONS)] for r in range(relations)]),
        two_hop=_two_hop(facts[~kept_out], entities),
        long_tail_words=zip(rare, word_counts.tolist(), strict=True),
        **embeddings,
    )
    _write_probes(folder / "probe", facts, kept_out, entity_names, frequency)
    (folder / "stats.json").write_text(json.dumps({"train_samples": train}) + "\n")
    manifest = write_manifest(
        folder,
        {
            "name": "tiny",
            "max_seq_length": max_seq_length,
            "tokenizer": {
                "sha256": tokenizer_sha256,
                "vocab_size": len(words),
                "type": "bert",
            },
            "graph": graph_entry,
            "long_tail_words": long_tail_words,
            "splits": splits,
        },
    )
    return TinyCorpus(
        folder, manifest, words, samples, entity_names, facts[~kept_out], facts[kept_out]
    )


def _draw_sample(rng, split, i, token, entity_names, rare, max_seq_length) -> Sample:
    length = int(rng.integers(min(10, max_seq_length), max_seq_length + 1))
    ids, spans = [CLS], []
    while True:
        piece, key = [WORDS[rng.integers(len(WORDS))]], None
        draw = rng.random()
        if draw < 0.25:
            # Squared: low entity indices are frequent, high ones form the tail.
            key = int(rng.random() ** 2 * len(entity_names))
            piece = entity_names[key].split()
        elif draw < 0.28 and rare:
            key = int(rng.integers(len(rare)))
            piece, key = [rare[key]], len(entity_names) + key
        if len(ids) + len(piece) + 1 > length:
            break
        if key is not None:
            spans.append((len(ids), len(ids) + len(piece), key))
        ids += [token[word] for word in piece]
    ids.append(SEP)
    return Sample(
        id=0,
        doc=f"{split}-document-{i // 4}",
        ids=np.array(ids, dtype=np.int32),
        spans=np.array(spans, dtype=np.int32).reshape(-1, 3),
        first_span=0,
    )


def _two_hop(triples: np.ndarray, entities: int) -> np.ndarray:
    near = [set() for _ in range(entities)]
    for head, _, tail in triples.tolist():
        near[head].add(tail)
        near[tail].add(head)
    reach = [set().union(near[e], *(near[n] for n in near[e])) - {e} for e in range(entities)]
    return np.array([min(len(r), 1000) for r in reach], dtype=np.int32)


def _write_probes(folder, facts, kept_out, entity_names, frequency) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {}
    mean = frequency.mean()
    for number, (head, relation, tail) in enumerate(facts.tolist()):
        answer = entity_names[tail]
        if " " in answer:  # one mask: single-token answers only
            continue
        row = {
            "relation": f"P{10 + relation}",
            "subject": head,
            "object": tail,
            "text": f"{entity_names[head]} was {RELATIONS[relation % len(RELATIONS)]} [MASK] .",
            "answer": answer,
            "set": "template",
            "tail": bool(frequency[head] < mean),
            # A mark alone: no sentence is made to state a fact.
            "graph_only": number % 4 == 0 and not kept_out[number],
            "text_only": bool(kept_out[number]),
        }
        rows.setdefault(row["relation"], []).append(json.dumps(row))
    for relation, lines in rows.items():
        (folder / f"{relation}.jsonl").write_text("\n".join(lines) + "\n")
    singles = [name for name in entity_names if " " not in name]
    (folder / "candidates.txt").write_text("\n".join(singles) + "\n")


def byte_level_tokenizer(folder: Path):
    """A small byte-level BPE tokenizer in RoBERTa's form, saved to ``folder`` and loaded."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "c", "d", "Ġ", "(", ")"]
    words += ["ab", "cd", "Ġab", "Ġcd"]
    merges = [("a", "b"), ("c", "d"), ("Ġ", "ab"), ("Ġ", "cd")]
    bpe = models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), *words[:4]])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad": "<pad>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
    settings = {f"{k}_token": v for k, v in names.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def damage(folder: Path, samples) -> None:
    """Flips a byte of training samples of a prepared folder, in place."""
    numbers = set(samples)
    for shard in json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]:
        path = folder / "shards" / shard["name"]
        index = np.fromfile(path.with_suffix(".idx"), INDEX_RECORD)
        with open(path, "r+b") as file:
            for i, record in enumerate(index, shard["first_sample"]):
                if i in numbers:
                    file.seek(int(record["offset"]) + 3)
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 1]))
