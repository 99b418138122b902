"""Knowledge graphs that can be merged with any corpus: ``--graph PATH[:format]``.

========================  ======================================================================
format                    PATH
========================  ======================================================================
``fb15k237``              folder: ``train.tsv``, ``entity2wikidata.json``, ``relation2text.txt``;
                          Freebase ids become Wikidata ids, entities without one are dropped
``codex``                 folder: ``train.txt``, ``relations.json``, ``entities.json`` or
                          ``entity_labels_partial.json``
``wikidata5m``            folder: ``wikidata5m_*_train.txt`` or ``wikidata5m_all_triplet.txt``,
                          ``wikidata5m_entity.txt``, ``wikidata5m_relation.txt``
``tsv``                   a file of ``head<TAB>relation<TAB>tail``, or a folder: ``triples.tsv``
                          and, if there, ``entities.tsv`` (id, name, description, aliases...)
                          and ``relations.tsv`` (id, name)
========================  ======================================================================

Every file may be gzipped (``.gz``). Only training triples are read: validation and test triples
of these sets are others' test data.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trelm_ds.errors import ConfigError, DataError
from trelm_ds.prepare.files import (
    check_id,
    find_file,
    get,
    iter_columns,
    iter_triples,
    need_file,
    read_json,
)
from trelm_ds.prepare.raw import RawEntity, RawGraph

log = logging.getLogger(__name__)

WIKIDATA5M_TRIPLES = (
    "wikidata5m_transductive_train.txt",
    "wikidata5m_inductive_train.txt",
    "wikidata5m_all_triplet.txt",
)
CODEX_LABELS = ("entities.json", "entity_labels_partial.json")


def read_fb15k237(path: Path) -> RawGraph:
    graph = RawGraph()
    wikidata: dict[str, str] = {}
    names = need_file(path, "entity2wikidata.json")
    for mid, record in read_json(names).items():
        where = f"{names}: {mid}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object")
        if not record.get("wikidata_id"):
            continue
        entity = check_id(get(record, "wikidata_id", str, where), where)
        wikidata[mid] = entity
        description = record.get("description")
        graph.name_entity(
            entity,
            get(record, "label", str, where),
            description if isinstance(description, str) else "",
        )
        alternatives = record.get("alternatives")
        for alias in alternatives if isinstance(alternatives, list) else ():
            if isinstance(alias, str):
                graph.name_entity(entity, alias)
    relations = need_file(path, "relation2text.txt")
    graph.relations = {columns[0]: columns[1] for _, columns in iter_columns(relations, 2)}
    unmapped = 0
    for head, relation, tail in iter_triples(need_file(path, "train.tsv")):
        if head in wikidata and tail in wikidata:
            graph.triples.append((wikidata[head], relation, wikidata[tail]))
        else:
            unmapped += 1
    if unmapped:
        log.info("%s: %d triples dropped, an end has no Wikidata id", path, unmapped)
    return graph


def read_codex(path: Path) -> RawGraph:
    graph = RawGraph()
    for file, add in (
        (need_file(path, "relations.json"), lambda i, name, _: graph.relations.update({i: name})),
        (need_file(path, *CODEX_LABELS), graph.name_entity),
    ):
        for key, record in read_json(file).items():
            where = f"{file}: {key}"
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object")
            description = record.get("description")
            add(
                check_id(key, where),
                get(record, "label", str, where),
                description if isinstance(description, str) else "",
            )
    graph.triples = list(iter_triples(need_file(path, "train.txt")))
    return graph


def read_wikidata5m(path: Path) -> RawGraph:
    graph = RawGraph()
    shared: dict[str, str] = {}  # one string object per id, not one per mention of it in a triple
    for where, columns in iter_columns(need_file(path, "wikidata5m_entity.txt"), 2):
        entity = check_id(columns[0], where)
        names = [name for name in columns[1:] if name.strip()]
        if names:
            graph.entities[shared.setdefault(entity, entity)] = RawEntity(
                names[0], "", tuple(dict.fromkeys(names[1:]))
            )
    for where, columns in iter_columns(need_file(path, "wikidata5m_relation.txt"), 2):
        graph.relations[check_id(columns[0], where)] = columns[1]
    for triple in iter_triples(need_file(path, *WIKIDATA5M_TRIPLES)):
        graph.triples.append(tuple(shared.setdefault(part, part) for part in triple))
    return graph


def read_tsv(path: Path) -> RawGraph:
    graph = RawGraph()
    if path.is_file():
        graph.triples = list(iter_triples(path))
        return graph
    graph.triples = list(iter_triples(need_file(path, "triples.tsv")))
    if names := find_file(path, "entities.tsv"):
        for where, columns in iter_columns(names, 2):
            entity = check_id(columns[0], where)
            graph.name_entity(entity, columns[1], columns[2] if len(columns) > 2 else "")
            for alias in columns[3:]:
                graph.name_entity(entity, alias)
    if names := find_file(path, "relations.tsv"):
        for where, columns in iter_columns(names, 2):
            graph.relations[check_id(columns[0], where)] = columns[1]
    return graph


GRAPH_READERS = {
    "fb15k237": read_fb15k237,
    "codex": read_codex,
    "wikidata5m": read_wikidata5m,
    "tsv": read_tsv,
}


def _guess_format(path: Path) -> str:
    if path.is_file():
        return "tsv"
    if find_file(path, "entity2wikidata.json"):
        return "fb15k237"
    if find_file(path, *CODEX_LABELS) and find_file(path, "relations.json"):
        return "codex"
    if find_file(path, *WIKIDATA5M_TRIPLES):
        return "wikidata5m"
    if find_file(path, "triples.tsv"):
        return "tsv"
    raise DataError(f"{path}: not a graph folder of a known format ({', '.join(GRAPH_READERS)})")


def read_graph(source: str) -> RawGraph:
    """The graph of one ``PATH[:format]``; without a format it is told by the files in PATH.

    Raises:
        ConfigError: the format is unknown.
        DataError: a file is missing or broken.
    """
    path, colon, form = source.rpartition(":")
    if not colon or Path(source).exists():
        path, form = source, ""
    if form and form not in GRAPH_READERS:
        raise ConfigError(f"--graph {source}: unknown format; known: {', '.join(GRAPH_READERS)}")
    if not Path(path).exists():
        raise DataError(f"--graph {path}: no such file or folder")
    graph = GRAPH_READERS[form or _guess_format(Path(path))](Path(path))
    if not graph.triples:
        raise DataError(f"--graph {path}: no triples in it")
    log.info("%s: %d triples, %d named entities", path, len(graph.triples), len(graph.entities))
    return graph
