"""Reader ``rebel``: Wikipedia abstracts with linked mentions and triples, one JSON object a line.

A record, as in the REBEL data set::

    {"docid": "1", "title": "Chelopech Hill", "uri": "Q5090011", "text": "...",
     "entities": [{"uri": "Q51", "boundaries": [176, 186], "surfaceform": "Antarctica"}],
     "triples": [{"subject": {"uri": ...}, "predicate": {"uri": "P30", "surfaceform": "continent"},
                  "object": {"uri": ...}}]}

Dates, numbers and the string ``None`` in place of a Wikidata id are no entities: skipped, and so
are triples with such an end. Some documents carry boundaries 2 (or twice 2) characters too far to
the right: a mention whose surface form stands exactly there is moved, any other mismatch dropped.

Names come from ``--graph``, else from the titles of the pages. A surface form may be another word
for the entity ("Dutch" for the Netherlands): it names what has no other name, and is an alias else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import DataError
from trelm_ds.prepare.files import check_id, check_span, expand, get, is_wikidata_id, iter_jsonl
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, page_name
from trelm_ds.prepare.reader import ReaderOptions

_SHIFTS = (-2, -4)


def read_rebel(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads as the documents are asked for; the graph grows with them."""
    corpus = RawCorpus("rebel", (), RawGraph())
    files = expand(inputs, (".jsonl",))
    corpus.documents = itertools.islice(_documents(files, corpus, options.graph), options.limit)
    return corpus


def _documents(files: list[Path], corpus: RawCorpus, known: RawGraph) -> Iterator[RawDocument]:
    seen: set[tuple[str, str, str]] = set()
    for file in files:
        for where, record in iter_jsonl(file):
            text = get(record, "text", str, where)
            document = RawDocument(get(record, "docid", str, where), text)
            page = record.get("uri")
            if is_wikidata_id(page):
                document.about = page
            if is_wikidata_id(page) and isinstance(record.get("title"), str):
                name = page_name(record["title"])
                add = corpus.graph.add_alias if known.has_name(page) else corpus.graph.name_entity
                add(page, name)
            for mention in get(record, "entities", list, where):
                if span := _span(mention, text, corpus, where):
                    document.spans.append(span)
            for triple in get(record, "triples", list, where):
                _add_triple(triple, corpus, seen, where)
            yield document


def _part(record: object, key: str, where: str) -> dict:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object")
    return get(record, key, dict, where)


def _span(mention: object, text: str, corpus: RawCorpus, where: str):
    """(start, end, id) of a mention, or None."""
    if not isinstance(mention, dict):
        raise DataError(f"{where}: a mention is not a JSON object")
    entity = get(mention, "uri", str, where)
    if not is_wikidata_id(entity):
        corpus.counts["mention_none" if entity == "None" else "mention_literal"] += 1
        return None
    boundaries = get(mention, "boundaries", list, where)
    if len(boundaries) != 2:
        raise DataError(f"{where}: boundaries must be [start, end], got {boundaries!r}")
    surface = get(mention, "surfaceform", str, where)
    start, end = boundaries
    # A shifted mention at the very end may stick out: only its mended place must lie inside.
    if isinstance(start, int) and isinstance(end, int) and text[start:end] != surface:
        for shift in _SHIFTS:
            if start + shift >= 0 and text[start + shift : end + shift] == surface:
                start, end = start + shift, end + shift
                corpus.counts["mention_shift_mended"] += 1
                break
        else:
            check_span(start, end, text, where)
            corpus.counts["mention_surface_differs"] += 1
            return None
    check_span(start, end, text, where)
    corpus.graph.add_alias(entity, surface)
    return start, end, entity


def _add_triple(triple: object, corpus: RawCorpus, seen: set, where: str) -> None:
    subject, predicate, object_ = (
        _part(triple, key, where) for key in ("subject", "predicate", "object")
    )
    head, tail = get(subject, "uri", str, where), get(object_, "uri", str, where)
    if not (is_wikidata_id(head) and is_wikidata_id(tail)):
        corpus.counts["triple_literal"] += 1
        return
    relation = check_id(get(predicate, "uri", str, where), where)
    corpus.graph.relations.setdefault(relation, get(predicate, "surfaceform", str, where))
    for entity, end in ((head, subject), (tail, object_)):
        corpus.graph.add_alias(entity, get(end, "surfaceform", str, where))
    if (head, relation, tail) not in seen:
        seen.add((head, relation, tail))
        corpus.graph.triples.append((head, relation, tail))
