"""From a raw corpus to a prepared data folder.

Passes: (1) the reader's documents are checked, counted and spooled to disk; (2) the graph is
settled, texts become token windows, spooled again with their counts; (3) the band of long-tail
words is chosen; (4) shards are written. What stays in memory is the graph, a few counters per
entity and token, and one number per sample; the text never does.

The folder takes its name only when everything in it is complete.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trelm_ds.config import NAME_TOKENS
from trelm_ds.data.graph import save_graph
from trelm_ds.data.schema import MAX_DOC_CHARACTERS, MAX_TOKENS, Sample
from trelm_ds.data.shards import (
    MAX_OPEN_SHARDS,
    SAMPLES_PER_SHARD,
    ShardSetWriter,
    write_manifest,
)
from trelm_ds.data.tables import save_tables
from trelm_ds.data.tokenizer import tokenizer_digest
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.knowledge.transe import train_transe
from trelm_ds.prepare.encode import (
    MIN_WINDOW_TOKENS,
    batched,
    encode_names,
    encode_texts,
    spans_inside,
    token_spans,
    windows,
)
from trelm_ds.prepare.entities import IndexedGraph, Mentioned, index_graph, two_hop_counts
from trelm_ds.prepare.files import check_length, check_span, check_text
from trelm_ds.prepare.long_tail import choose_band, free_words, rarity_ranks, word_types
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawProbe
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.spool import Spool
from trelm_ds.prepare.staging import staged_folder
from trelm_ds.prepare.stats import write_stats
from trelm_ds.prepare.vocabulary import (
    load_vocabulary,
    prune_vocabulary,
    tokenizer_type,
    train_wordpiece,
)

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
_PROGRESS = 20_000  # documents between two lines


@dataclass(frozen=True)
class BuildOptions:
    """Settings of a preparation beside the reader's.

    Attributes:
        max_seq_length: tokens of a sample, specials included.
        strict: a mentioned id that the graph does not know is an error.
        overwrite: replace an existing prepared folder.
        dim: length of a TransE vector.
        epochs: TransE passes over the triples.
        vocab_min_count: pieces of a given BERT vocabulary that the texts use less often are left
            out; 0 keeps them all.
    """

    max_seq_length: int = 128
    strict: bool = False
    overwrite: bool = False
    dim: int = 100
    epochs: int = 50
    vocab_min_count: int = 0

    def __post_init__(self):
        if not 16 <= self.max_seq_length <= MAX_TOKENS:
            raise ConfigError(f"--max_seq_length {self.max_seq_length}: must be 16 to {MAX_TOKENS}")
        if self.vocab_min_count < 0:
            raise ConfigError(f"--vocab_min_count {self.vocab_min_count}: must not be negative")
        for name in ("dim", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1")


def build(corpus: RawCorpus, output: Path, reading: ReaderOptions, options: BuildOptions) -> dict:
    """Writes the prepared folder ``output``.

    Args:
        corpus: what a reader returned for ``reading``; its documents are consumed.

    Returns:
        The manifest.

    Raises:
        DataError: the corpus is empty or inconsistent, or ``output`` may not be written. Nothing
            is left behind.
    """
    with staged_folder(output, options.overwrite) as folder:
        return _Builder(corpus, folder, reading, options).run()


class _Builder:
    """State shared by the passes."""

    def __init__(
        self, corpus: RawCorpus, folder: Path, reading: ReaderOptions, options: BuildOptions
    ):
        self.corpus = corpus
        self.folder = folder
        self.reading = reading
        self.options = options
        self.counts: Counter[str] = Counter()  # dropped and mended, by reason
        self.seconds: dict[str, float] = {}

    def run(self) -> dict:
        documents = Spool(self.folder / ".documents.spool")
        mentioned = self._timed("read", self._read, documents)
        tokenizer = self._timed("tokenizer", self._make_tokenizer, documents)
        graph = self._timed("graph", self._settle_graph, mentioned)
        del mentioned
        samples = Spool(self.folder / ".samples.spool")
        words = self._timed("tokenize", self._tokenize, documents, samples, tokenizer, graph.index)
        documents.remove()
        splits = self._timed(
            "shards", self._write_shards, samples, tokenizer, len(graph.index), words
        )
        samples.remove()
        graph_entry = save_graph(
            self.folder,
            graph.entities,
            graph.relations,
            graph.triples,
            graph.withheld,
            graph.aliases,
        )
        embeddings = self._timed("transe", self._embed, graph)
        save_tables(
            self.folder,
            entity_embeddings=embeddings[0],
            relation_embeddings=embeddings[1],
            entity_frequency=self.entity_frequency,
            token_frequency=self.token_frequency,
            # Until `score` has run all mentions are equally important.
            importance=np.ones(splits["train"]["spans"], np.float32),
            entity_names=encode_names(tokenizer, [row[1] for row in graph.entities], NAME_TOKENS),
            relation_names=encode_names(
                tokenizer, [row[1] for row in graph.relations], NAME_TOKENS
            ),
            two_hop=self._timed("two_hop", two_hop_counts, graph.triples, len(graph.entities)),
            long_tail_words=self.long_tail_words,
        )
        self._write_probes(graph)
        manifest = {
            "name": self.corpus.name,
            "max_seq_length": self.options.max_seq_length,
            "tokenizer": {
                "sha256": tokenizer_digest(self.folder),
                "vocab_size": len(tokenizer),
                "type": tokenizer_type(tokenizer),
            },
            "graph": graph_entry,
            "long_tail_words": len(self.long_tail_words),
            "splits": splits,
        }
        manifest = write_manifest(self.folder, manifest)
        self._tell_what_was_left_out(graph.examples)
        write_stats(
            self.folder,
            manifest,
            {
                "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
                "reader": dict(self.corpus.counts),
                "builder": dict(self.counts),
                "seed": self.reading.seed,
                "heldout_fraction": self.reading.heldout_fraction,
            },
        )
        return manifest

    def _timed(self, name: str, work, *args):
        started = time.perf_counter()
        result = work(*args)
        self.seconds[name] = time.perf_counter() - started
        log.info("%s: %.1f s", name, self.seconds[name])
        return result

    def _read(self, spool: Spool) -> dict[str, Mentioned]:
        """Pass 1."""
        mentioned: dict[str, Mentioned] = {}
        splits: Counter[str] = Counter()
        for number, document in enumerate(self.corpus.documents, 1):
            if not document.text.strip():
                self.counts["document_empty"] += 1
                continue
            heldout = self._check(document)
            splits[SPLITS[heldout]] += 1
            for start, end, entity in document.spans:
                seen = mentioned.get(entity)
                if seen is None:
                    surface = document.text[start:end]
                    seen = mentioned[entity] = Mentioned(surface, document.doc)
                seen.count += 1
            spool.add((heldout, document.doc[:MAX_DOC_CHARACTERS], document.text, document.spans))
            if number % _PROGRESS == 0:
                log.info("read %d documents, %d entities mentioned", number, len(mentioned))
        spool.finish()
        if self.corpus.counts:
            counted = (f"{name} {count}" for name, count in sorted(self.corpus.counts.items()))
            log.info("%s: %s", self.corpus.name, ", ".join(counted))
        for split, count in splits.items():
            self.counts[f"document_{split}"] = count
        if not splits["train"]:
            raise DataError(
                f"{self.corpus.name}: no training text in it ({dict(splits) or 'empty'})"
            )
        if not splits["heldout"]:
            log.warning("no document is held out: there will be no held-out loss")
        return mentioned

    def _check(self, document: RawDocument) -> bool:
        """The document's split; raises for text too long to encode, and for text and spans that
        readers should not have let through.
        """
        where = f"document {document.doc!r}"
        check_text(document.text, where)
        check_text(document.doc, where)
        check_length(document.doc, document.text)
        for start, end, _ in document.spans:
            check_span(start, end, document.text, where)
        if document.heldout is None:
            return self.reading.is_heldout(document.doc)
        return document.heldout

    def _make_tokenizer(self, spool: Spool):
        if self.reading.vocab is not None:
            tokenizer = load_vocabulary(self.reading.vocab)
            if self.options.vocab_min_count:
                # Held-out texts too: they are cut into pieces here, nothing is learnt of them.
                texts = (text for _, _, text, _ in spool)
                answers = [probe.answer for probe in self.corpus.probes]
                least = self.options.vocab_min_count
                tokenizer = prune_vocabulary(tokenizer, texts, answers, least)
        else:
            tokenizer = train_wordpiece(
                lambda: (text for heldout, _, text, _ in spool if not heldout)
            )
        tokenizer.save_pretrained(str(self.folder / "tokenizer"))
        return tokenizer

    def _settle_graph(self, mentioned: dict[str, Mentioned]) -> IndexedGraph:
        graph = self.corpus.graph
        graph.merge(self.reading.graph)
        indexed = index_graph(
            graph, mentioned, self.corpus.probes, self.options.strict, self.counts
        )
        if not len(indexed.triples):
            log.warning("the graph has no triple: nothing can be injected or decoded")
        return indexed

    def _tell_what_was_left_out(self, examples: dict[str, object]) -> None:
        if mentions := self.counts["mention_of_unknown_entity"]:
            log.warning(
                "%d mention(s) left out: their ids, such as %r, are not in the graph; "
                "--strict makes that an error",
                mentions,
                examples["mention_of_unknown_entity"],
            )
        if triples := self.counts["triple_out_of_reach"]:
            log.info(
                "%d triple(s) of the graph left out: no text mentions an end of them, such as %s",
                triples,
                " ".join(examples["triple_out_of_reach"]),
            )

    def _windows(
        self, spool: Spool, tokenizer, index: dict[str, int]
    ) -> Iterator[tuple[bool, str, np.ndarray, np.ndarray, np.ndarray]]:
        """(heldout, doc, ids, spans, whole) of every window; spans in tokens without specials."""

        for batch in batched(spool, lambda record: len(record[2])):
            encoded = encode_texts(tokenizer, [text for _, _, text, _ in batch])
            for (heldout, doc, text, spans), item in zip(batch, encoded, strict=True):
                known = [(start, end, index[e]) for start, end, e in spans if e in index]
                rows = token_spans(item, text, known, self.counts)
                whole = item.whole
                for begin, end in windows(item, text, rows, self.options.max_seq_length - 2):
                    if end - begin < MIN_WINDOW_TOKENS:
                        self.counts["window_too_short"] += 1
                        continue
                    inside = spans_inside(rows, begin, end)
                    yield heldout, doc, item.ids[begin:end], inside, whole[begin:end]

    def _tokenize(
        self, documents: Spool, samples: Spool, tokenizer, index: dict[str, int]
    ) -> np.ndarray:
        """Passes 2 and 3; leaves the frequencies of the training split on the builder.

        Returns:
            int64 [V] counts of the long-tail words, 0 for every other token.
        """
        self.token_frequency = np.zeros(len(tokenizer), np.int64)
        self.entity_frequency = np.zeros(len(index), np.int64)
        word_counts = np.zeros(len(tokenizer), np.int64)
        total = 0
        for heldout, doc, ids, spans, whole in self._windows(documents, tokenizer, index):
            if not heldout:
                np.add.at(self.token_frequency, ids, 1)
                np.add.at(self.entity_frequency, spans[:, 2], 1)
                np.add.at(word_counts, ids[whole], 1)
            samples.add((heldout, doc, ids.tobytes(), spans.tobytes(), whole.tobytes()))
            total += 1
            if total % _PROGRESS == 0:
                log.info("tokenized %d samples", total)
        samples.finish()
        self.num_samples = total
        ranks = rarity_ranks(word_counts, word_types(tokenizer))
        rarest = np.zeros(ranks.max() + 1, np.int64)  # samples by the rank of their rarest word
        for heldout, _, ids, spans, whole in _unpacked(samples):
            if not heldout:
                words = free_words(ids, whole, spans, ranks > 0)
                rarest[ranks[ids[words]].min() if len(words) else 0] += 1
        if not rarest.any():
            raise DataError(f"{self.corpus.name}: its texts are shorter than any sample")
        rare = (ranks > 0) & (ranks <= choose_band(rarest))
        return np.where(rare, word_counts, 0)

    def _write_shards(
        self, samples: Spool, tokenizer, num_entities: int, word_counts: np.ndarray
    ) -> dict:
        """Pass 4: the manifest's ``splits``."""
        rare = word_counts > 0
        tokens = np.flatnonzero(rare)
        self.long_tail_words = [
            (token, int(word_counts[i]))
            for i, token in zip(
                tokens, tokenizer.convert_ids_to_tokens(tokens.tolist()), strict=True
            )
        ]
        keys = np.zeros(len(rare), np.int32)
        keys[tokens] = num_entities + np.arange(len(tokens))
        edges = np.asarray([[tokenizer.cls_token_id], [tokenizer.sep_token_id]], np.int32)
        writers = {}
        # Reading is at random over all of them: no more than a process keeps open.
        size = max(SAMPLES_PER_SHARD, -(-self.num_samples // MAX_OPEN_SHARDS))
        with (
            ShardSetWriter(self.folder, "train", size) as writers[False],
            ShardSetWriter(self.folder, "heldout", size) as writers[True],
        ):
            for heldout, doc, ids, spans, whole in _unpacked(samples):
                words = free_words(ids, whole, spans, rare)
                rows = np.stack([words, words + 1, keys[ids[words]]], axis=1).astype(np.int32)
                spans = np.concatenate([spans, rows])
                spans = spans[np.argsort(spans[:, 0])] + np.asarray([1, 1, 0], np.int32)
                ids = np.concatenate([edges[0], ids, edges[1]])
                writers[heldout].add(Sample(0, doc, ids, spans, 0))
            return {split: writers[split == "heldout"].close() for split in SPLITS}

    def _embed(self, graph: IndexedGraph) -> tuple[np.ndarray, np.ndarray]:
        return train_transe(
            graph.triples,
            len(graph.entities),
            len(graph.relations),
            dim=self.options.dim,
            epochs=self.options.epochs,
            seed=self.reading.seed,
        )

    def _write_probes(self, graph: IndexedGraph) -> None:
        folder = self.folder / "probe"
        folder.mkdir()
        lines: dict[str, list[str]] = {}
        for row in probe_rows(self.corpus.probes, graph.index, self.entity_frequency, self.counts):
            lines.setdefault(row["set"], []).append(json.dumps(row, ensure_ascii=False) + "\n")
        for name, rows in lines.items():
            (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        if self.corpus.candidates:
            words = "\n".join(dict.fromkeys(self.corpus.candidates)) + "\n"
            (folder / "candidates.txt").write_text(words, encoding="utf-8")


def _unpacked(samples: Spool) -> Iterator[tuple[bool, str, np.ndarray, np.ndarray, np.ndarray]]:
    for heldout, doc, ids, spans, whole in samples:
        yield (
            heldout,
            doc,
            np.frombuffer(ids, np.int32),
            np.frombuffer(spans, np.int32).reshape(-1, 3),
            np.frombuffer(whole, bool),
        )


def probe_rows(
    probes: list[RawProbe], index: dict[str, int], frequency: np.ndarray, counts: Counter
) -> Iterator[dict]:
    """The records of ``probe/*.jsonl``.

    A probe is long-tail (``tail``) if its subject is mentioned in the training split at most as
    often as the median subject among those that are mentioned at all: half of the mentioned
    subjects, and all that only the graph knows. A probe without a subject is not.

    Args:
        index: entity id to index.
        frequency: int [N] mentions in the training split.
        counts: gets probes dropped because the folder lacks their object or the mask.
    """
    subjects = {index[p.subject] for p in probes if p.subject in index}
    seen = [frequency[subject] for subject in subjects if frequency[subject] > 0]
    median = float(np.median(seen)) if seen else 0.0
    for probe in probes:
        if probe.object not in index or probe.text.count("[MASK]") != 1:
            counts["probe_dropped"] += 1
            continue
        subject = index.get(probe.subject, -1)
        yield {
            "relation": probe.relation,
            "subject": subject,
            "object": index[probe.object],
            "subject_id": probe.subject,
            "object_id": probe.object,
            "text": probe.text,
            "answer": probe.answer,
            "set": probe.set,
            "tail": bool(subject >= 0 and frequency[subject] <= median),
            "graph_only": probe.graph_only,
            "text_only": probe.text_only,
        }
