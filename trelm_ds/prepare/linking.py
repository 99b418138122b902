"""Mentions to a raw graph's entities, by their names."""

from __future__ import annotations

import numpy as np

from trelm_ds.knowledge.linker import EntityLinker
from trelm_ds.prepare.raw import RawGraph


def entity_names(graph: RawGraph, entity: str) -> tuple[str, ...]:
    """Every name of an entity; none if the graph does not name it."""
    node = graph.entities.get(entity)
    return (node.name, *node.aliases) if node is not None else ()


class GraphLinker:
    """Links by all names of a graph; of entities with one name, the one in more triples.

    Attributes:
        counts: mentions given to ``link``, by outcome: ``exact``, ``approximate``, ``nil``.
    """

    def __init__(self, graph: RawGraph):
        self._ids = list(graph.entities)
        index = {entity: i for i, entity in enumerate(self._ids)}
        degree = np.zeros(len(self._ids), np.int64)
        for head, _, tail in graph.triples:
            for end in (head, tail):
                if end in index:
                    degree[index[end]] += 1
        aliases = ((n, i) for i, e in enumerate(self._ids) for n in entity_names(graph, e))
        self._linker = EntityLinker(aliases, degree)
        self.counts = self._linker.counts

    def link(self, mentions: list[str]) -> list[str | None]:
        """The entity id of each mention by exact name, else by the nearest spelling; None is NIL.

        Raises:
            ConfigError: a name has to be looked up by its spelling and FAISS is not installed.
        """
        links = self._linker.link(mentions)
        return [None if link is None else self._ids[link.entity] for link in links]

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, entity id) of the mentions in running text, by exact name."""
        return [(start, end, self._ids[i]) for start, end, i in self._linker.find(text)]
