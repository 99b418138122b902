"""The graph of a prepared folder: which entities and triples stay, their names and indices."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from trelm_ds.data.tables import TWO_HOP_CAP
from trelm_ds.errors import DataError
from trelm_ds.prepare.files import is_wikidata_id
from trelm_ds.prepare.raw import RawEntity, RawGraph, RawProbe

_NUMBER = re.compile(r"(\d+)")


@dataclass(slots=True)
class Mentioned:
    """What the texts say about an entity.

    Attributes:
        count: mentions in all splits.
        surface: its first surface form.
        doc: the document that has it.
    """

    surface: str
    doc: str
    count: int = 0


@dataclass
class IndexedGraph:
    """Entities and relations by index; mentioned entities first, the most frequent first of all.

    Attributes:
        index: entity id to index.
        entities: (id, name, description) rows.
        relations: (id, name) rows.
        triples: int32 [T, 3] rows (head, relation, tail).
        withheld: int32 [*, 3].
        aliases: (name or alias, entity index).
        examples: of what was left out, by the name of its counter.
    """

    index: dict[str, int]
    entities: list[tuple[str, str, str]]
    relations: list[tuple[str, str]]
    triples: np.ndarray
    withheld: np.ndarray
    aliases: list[tuple[str, int]] = field(default_factory=list)
    examples: dict[str, object] = field(default_factory=dict)


def _natural(entity: str) -> tuple[list, str]:
    """Q9 before Q10; of n1 and n01, which are equal as numbers, always the same one first."""
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(entity)], entity


def _clean(name: str) -> str:
    return " ".join(name.split())


def index_graph(
    graph: RawGraph,
    mentioned: dict[str, Mentioned],
    probes: list[RawProbe],
    strict: bool,
    counts: Counter,
) -> IndexedGraph:
    """Settles what the folder knows.

    - A mentioned id that no source knows: an error with ``strict``; else a new entity named by its
      surface if it is a Wikidata id, and no mention at all if it is not.
    - An entity without a name is named by its first surface form, else by its first alias; one
      without either is dropped with its triples: nothing could be decoded for it.
    - A triple stays if an end of it is mentioned or probed: a merged graph adds the neighbourhood
      of the corpus, not the rest of the world.

    Args:
        counts: gets what was added, dropped or pruned.

    Raises:
        DataError: an unknown id with ``strict``, or no entity is left.
    """
    linked = set(graph.entities)
    for head, _, tail in itertools.chain(graph.triples, graph.withheld):
        linked.update((head, tail))
    known: set[str] = set()
    examples: dict[str, object] = {}
    for entity, seen in mentioned.items():
        if entity in linked:
            known.add(entity)
        elif strict:
            raise DataError(
                f"document {seen.doc!r}: entity {entity!r} ({seen.surface!r}) is not in the graph"
            )
        elif is_wikidata_id(entity):
            known.add(entity)
            counts["entity_named_by_text_only"] += 1
        else:
            counts["mention_of_unknown_entity"] += seen.count
            examples.setdefault("mention_of_unknown_entity", entity)
    known.update(end for p in probes for end in (p.subject, p.object) if end is not None)

    nameless = RawEntity("")

    def name_of(entity: str) -> str:
        node = graph.entities.get(entity, nameless)
        surface = mentioned[entity].surface if entity in mentioned else ""
        return next(filter(None, map(_clean, (node.name, surface, *node.aliases))), "")

    def usable(triples):
        for head, relation, tail in triples:
            if not (head in known or tail in known):
                counts["triple_out_of_reach"] += 1
                examples.setdefault("triple_out_of_reach", (head, relation, tail))
            elif not (name_of(head) and name_of(tail)):
                counts["triple_end_without_name"] += 1
            else:
                yield head, relation, tail

    withheld = dict.fromkeys(usable(graph.withheld))
    # Another graph has other names for a relation, and maybe its inverse.
    apart = {ends for head, _, tail in withheld for ends in ((head, tail), (tail, head))}
    triples = {}
    for triple in usable(graph.triples):
        if (triple[0], triple[2]) in apart:
            counts["triple_of_withheld_ends"] += 1
        else:
            triples[triple] = None
    kept = {entity for entity in known if name_of(entity)}
    for head, _, tail in (*triples, *withheld):
        kept.update((head, tail))
    if not kept and linked and mentioned:
        raise DataError(
            f"none of the {len(mentioned)} ids, such as {next(iter(mentioned))!r}, is in --graph, "
            f"which has ids such as {min(linked)!r}"
        )
    if not kept:
        missing = "" if linked else ": is --graph missing?"
        raise DataError(f"no mention could be linked to an entity{missing}")
    unseen = Mentioned("", "")
    order = sorted(kept, key=lambda e: (-mentioned.get(e, unseen).count, _natural(e)))
    index = {entity: i for i, entity in enumerate(order)}
    relation_ids = sorted({r for _, r, _ in (*triples, *withheld)}, key=_natural)
    relation_index = {relation: i for i, relation in enumerate(relation_ids)}

    def rows(facts) -> np.ndarray:
        flat = [x for h, r, t in facts for x in (index[h], relation_index[r], index[t])]
        return np.asarray(flat, np.int32).reshape(-1, 3)

    aliases = []
    for i, entity in enumerate(order):
        node = graph.entities.get(entity, nameless)
        names = dict.fromkeys(_clean(n) for n in (name_of(entity), *node.aliases))
        aliases.extend((name, i) for name in names if name)
    return IndexedGraph(
        index=index,
        entities=[
            (e, name_of(e), _clean(graph.entities.get(e, nameless).description)) for e in order
        ],
        relations=[(r, _clean(graph.relations.get(r, "")) or r) for r in relation_ids],
        triples=rows(triples),
        withheld=rows(withheld),
        aliases=aliases,
        examples=examples,
    )


def two_hop_counts(triples: np.ndarray, num_entities: int) -> np.ndarray:
    """Distinct entities within two hops of each, itself excluded, at most 1000 (for KLT).

    Args:
        triples: int [T, 3] rows (head, relation, tail).

    Returns:
        int32 [num_entities].
    """
    counts = np.zeros(num_entities, np.int32)
    if not len(triples):
        return counts
    ends = np.concatenate([triples[:, [0, 2]], triples[:, [2, 0]]]).astype(np.int64)
    ends = np.unique(ends[ends[:, 0] != ends[:, 1]], axis=0)  # each neighbour once, no loops
    others = ends[:, 1]
    first = np.searchsorted(ends[:, 0], np.arange(num_entities + 1))
    degree = np.diff(first)
    # One neighbour with 1000 others settles the answer, and spares the union of a hub's rows.
    hub = np.zeros(num_entities, bool)
    hub[ends[degree[others] > TWO_HOP_CAP, 0]] = True
    hub |= degree >= TWO_HOP_CAP
    counts[hub] = TWO_HOP_CAP
    for entity in np.flatnonzero(~hub & (degree > 0)):
        near = others[first[entity] : first[entity + 1]]
        reach = np.concatenate([near, *(others[first[n] : first[n + 1]] for n in near)])
        counts[entity] = min(len(np.unique(reach)) - (entity in reach), TWO_HOP_CAP)
    return counts
