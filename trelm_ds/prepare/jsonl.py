"""Reader ``jsonl``: your own corpus, one JSON object a line.

::

    {"id": "doc-1", "text": "Paris is in France.", "spans": [[0, 5, "Q90"], [12, 18, "Q142"]]}
    {"id": "doc-2", "text": "Pariss is in France.", "spans": [[0, 6], [13, 19, null]]}
    {"id": "doc-3", "text": "Lyon is in France.", "link": true, "heldout": true}

- ``id``: name of the document; records with one id fall in the same split.
- ``spans``: [start, end, entity id] in characters of ``text``, end excluded. Without an id, or
  with null for it, the span's surface is linked: by exact (normalised) name or alias first, then
  by the nearest spelling; too far from every name, or ambiguous, it is NIL and no mention.
- ``"link": true`` instead of ``spans`` finds the mentions too, by exact name or alias alone.
- ``heldout``: optional; fixes the split of the record, which else follows from ``id`` and the seed:
  all records of an ``id`` have it, or none.

Other keys are ignored. The entities' names and the triples come from ``--graph``. Of several
entities with one name the one in more triples is meant; as many is ambiguous. Counted in
``stats.json``: ``span_linked_exact``, ``span_linked_approximate``, ``span_linked_nil`` of the spans
without an id, ``mention_linked`` of the texts with ``"link"``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import DataError
from trelm_ds.prepare.files import check_id, check_length, check_span, expand, get, iter_jsonl
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
    linker: GraphLinker | None = None

    def get_linker(where: str, asking: str) -> GraphLinker:
        nonlocal linker
        if linker is None:
            if not options.graph.entities:
                problem = "needs the names of a graph: --graph"
                if options.graph.triples:
                    problem = "needs names, and --graph has none: name a folder with entities.tsv"
                raise DataError(f"{where}: {asking} {problem}")
            linker = GraphLinker(options.graph)
        return linker

    for file in files:
        for where, record in iter_jsonl(file):
            text = get(record, "text", str, where)
            document = RawDocument(get(record, "id", str, where), text)
            check_length(document.doc, text)  # before it is linked
            if "heldout" in record:
                document.heldout = get(record, "heldout", bool, where)
            link = "link" in record and get(record, "link", bool, where)
            if link and "spans" in record:
                raise DataError(f"{where}: has 'spans' and asks to find them ('link')")
            if link:
                document.spans = get_linker(where, "'link'").find(text)
                corpus.counts["mention_linked"] += len(document.spans)
            elif "spans" not in record:
                raise DataError(
                    f"{where}: 'spans' is missing; \"link\": true instead finds the mentions"
                )
            else:
                unlinked = []
                for row in get(record, "spans", list, where):
                    if not (isinstance(row, list) and len(row) in (2, 3)):
                        raise DataError(
                            f"{where}: a span must be [start, end, id] or [start, end], got {row!r}"
                        )
                    start, end = check_span(row[0], row[1], text, where)
                    if len(row) == 2 or row[2] is None:
                        unlinked.append((start, end))
                    else:
                        document.spans.append((start, end, check_id(row[2], where)))
                if unlinked:
                    entities = get_linker(where, "a span without an id").link(
                        [text[start:end] for start, end in unlinked]
                    )
                    document.spans += [
                        (*span, entity)
                        for span, entity in zip(unlinked, entities, strict=True)
                        if entity is not None
                    ]
                    for outcome in ("exact", "approximate", "nil"):  # totals, not this document's
                        corpus.counts[f"span_linked_{outcome}"] = linker.counts[outcome]
            yield document
