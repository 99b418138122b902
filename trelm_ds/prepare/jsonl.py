"""Reader ``jsonl``: your own corpus, one JSON object a line.

::

    {"id": "doc-1", "text": "Paris is in France.", "spans": [[0, 5, "Q90"], [12, 18, "Q142"]]}
    {"id": "doc-2", "text": "Lyon is in France.", "link": true, "heldout": true}

- ``id``: name of the document; records with one id fall in the same split.
- ``spans``: [start, end, entity id] in characters of ``text``, end excluded. Instead of it,
  ``"link": true`` finds mentions by the names and aliases of the entities of ``--graph``.
- ``heldout``: optional; fixes the split, which else follows from ``id`` and the seed.

Other keys are ignored. The entities' names and the triples come from ``--graph``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import DataError
from trelm_ds.prepare.files import check_id, check_span, expand, get, iter_jsonl
from trelm_ds.prepare.linking import GraphLinker
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph
from trelm_ds.prepare.reader import ReaderOptions


def read_jsonl(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads as the documents are asked for."""
    corpus = RawCorpus("jsonl", (), RawGraph())
    documents = _documents(expand(inputs, (".jsonl",)), options, corpus)
    corpus.documents = itertools.islice(documents, options.limit)
    return corpus


def _documents(
    files: list[Path], options: ReaderOptions, corpus: RawCorpus
) -> Iterator[RawDocument]:
    linker = None
    for file in files:
        for where, record in iter_jsonl(file):
            text = get(record, "text", str, where)
            document = RawDocument(get(record, "id", str, where), text)
            if "heldout" in record:
                document.heldout = get(record, "heldout", bool, where)
            if record.get("link") is True and "spans" not in record:
                if linker is None:
                    if not options.graph.entities:
                        raise DataError(f"{where}: 'link' needs the names of a graph: --graph")
                    linker = GraphLinker(options.graph)
                document.spans = linker.find(text)
                corpus.counts["mention_linked"] += len(document.spans)
            else:
                for row in get(record, "spans", list, where):
                    if not (isinstance(row, list) and len(row) == 3):
                        raise DataError(f"{where}: a span must be [start, end, id], got {row!r}")
                    start, end = check_span(row[0], row[1], text, where)
                    document.spans.append((start, end, check_id(row[2], where)))
            yield document
