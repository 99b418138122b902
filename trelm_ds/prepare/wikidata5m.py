"""Reader ``wikidata5m``: the Wikidata5M graph with its entities' Wikipedia texts.

The input folder (or the files of it) holds ``wikidata5m_text.txt`` (``id<TAB>text``), one of the
triple files, ``wikidata5m_entity.txt`` and ``wikidata5m_relation.txt``; each may be gzipped.

The texts are not linked. A mention is the longest run of words that is a name of the text's own
entity or of one of its neighbours in the graph: far fewer links than a full entity linker would
find, but rarely a wrong one, and every neighbour found is one end of a triple about the text.

The graph is held in memory: about 0.8 GiB per million triples and 300,000 entities, measured, so
plan 16 GiB for the whole of it. The texts are not.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trelm_ds.errors import DataError
from trelm_ds.knowledge.linker import longest_matches, normalize
from trelm_ds.prepare.files import check_id, iter_lines, need_file
from trelm_ds.prepare.graphs import read_wikidata5m as read_wikidata5m_graph
from trelm_ds.prepare.linking import entity_names
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph
from trelm_ds.prepare.reader import ReaderOptions

log = logging.getLogger(__name__)

_MAX_NEIGHBOURS = 1000  # a country's neighbours are half the graph, and most names are in vain


def read_wikidata5m(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads the graph whole and the texts as they are asked for."""
    folders = {path if path.is_dir() else path.parent for path in inputs}
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if len(folders) != 1:
        raise DataError("wikidata5m: the files of --input must be in one folder")
    folder = folders.pop()
    texts = need_file(folder, "wikidata5m_text.txt")
    corpus = RawCorpus("wikidata5m", (), read_wikidata5m_graph(folder))
    log.info("%s: %d triples", folder, len(corpus.graph.triples))
    corpus.documents = itertools.islice(_documents(texts, corpus), options.limit)
    return corpus


class _Neighbours:
    """Neighbours by entity id, compressed rows instead of a million lists."""

    def __init__(self, graph: RawGraph):
        self._ids = list(graph.entities)
        self._index = {entity: i for i, entity in enumerate(self._ids)}
        pairs = np.fromiter(
            (
                self._index[end]
                for head, _, tail in graph.triples
                if head in self._index and tail in self._index
                for end in (head, tail)
            ),
            np.int32,
        ).reshape(-1, 2)
        ends = np.concatenate([pairs[:, 0], pairs[:, 1]])
        self._others = np.concatenate([pairs[:, 1], pairs[:, 0]])[np.argsort(ends, kind="stable")]
        self._first = np.searchsorted(np.sort(ends), np.arange(len(self._ids) + 1))

    def of(self, entity: str) -> list[str]:
        if entity not in self._index:
            return []
        i = self._index[entity]
        others = self._others[self._first[i] : self._first[i + 1]][:_MAX_NEIGHBOURS]
        return [self._ids[other] for other in dict.fromkeys(others.tolist())]


def _documents(texts: Path, corpus: RawCorpus) -> Iterator[RawDocument]:
    neighbours = _Neighbours(corpus.graph)
    for where, line in iter_lines(texts):
        entity, tab, text = line.partition("\t")
        if not line.strip():
            continue
        if not tab:
            raise DataError(f"{where}: expected an id, a tab and a text")
        check_id(entity, where)
        near = [entity, *neighbours.of(entity)]
        owners: dict[str, int] = {}
        for i, candidate in enumerate(near):
            for name in entity_names(corpus.graph, candidate):
                owners.setdefault(normalize(name), i)  # the text's own entity comes first
        found = longest_matches(text, lambda names, o=owners: [o.get(normalize(n)) for n in names])
        corpus.counts["mention_linked"] += len(found)
        spans = [(start, end, near[i]) for start, end, i in found]
        yield RawDocument(entity, text, spans, about=entity)
