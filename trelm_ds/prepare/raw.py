"""What a corpus reader hands to the builder: documents, a graph, probes, all by string id."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_DISAMBIGUATION = re.compile(r" \([^()]*\)$")


@dataclass(slots=True)
class RawDocument:
    """A sentence or short text with linked mentions.

    Attributes:
        doc: name of the document the text is from; the unit of the train/held-out split.
        text: plain text. A line break is taken as the end of a sentence.
        spans: (start, end, entity id) in characters of ``text``, end excluded.
        heldout: True or False to fix the split; None lets the builder choose by ``doc``.
        about: id of the entity whose page it is, where the source says so: a page hardly ever
            links itself, and need not spell its title out.
    """

    doc: str
    text: str
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    heldout: bool | None = None
    about: str | None = None


@dataclass(slots=True)
class RawEntity:
    """A node of the graph; the first name is ``name``, every other one an alias.

    An empty ``name`` means that the source has none: the builder then takes another source's, or
    else the entity's first surface form in the text, or its first alias.
    """

    name: str
    description: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(slots=True)
class RawGraph:
    """Triples (head id, relation id, tail id) and the names of their parts.

    Attributes:
        withheld: facts that only the texts may teach: kept out of injection, TransE, knowledge
            rows and decoding, with whatever else the graph says of their two ends.
    """

    entities: dict[str, RawEntity] = field(default_factory=dict)
    relations: dict[str, str] = field(default_factory=dict)
    triples: list[tuple[str, str, str]] = field(default_factory=list)
    withheld: list[tuple[str, str, str]] = field(default_factory=list)

    def has_name(self, entity: str) -> bool:
        return entity in self.entities and bool(self.entities[entity].name)

    def name_entity(self, entity: str, name: str, description: str = "") -> None:
        """Adds an entity, or another name of it; the first name given stays its name."""
        known = self.entities.get(entity)
        if known is None:
            self.entities[entity] = RawEntity(name, description)
            return
        known.description = known.description or description
        if not known.name:
            known.name = name
        else:
            self.add_alias(entity, name)

    def add_alias(self, entity: str, alias: str) -> None:
        """Adds an entity, or what it is called too: never its name while any source has one."""
        known = self.entities.setdefault(entity, RawEntity(""))
        if alias and alias != known.name and alias not in known.aliases:
            known.aliases += (alias,)

    def merge(self, other: RawGraph) -> None:
        """Adds what ``other`` knows; names already here win."""
        for entity, node in other.entities.items():
            self.name_entity(entity, node.name, node.description)
            for alias in node.aliases:
                self.add_alias(entity, alias)
        for relation, name in other.relations.items():
            self.relations[relation] = self.relations.get(relation) or name
        self.triples.extend(other.triples)
        self.withheld.extend(other.withheld)


@dataclass(slots=True)
class RawProbe:
    """A cloze question in LAMA's form; ``text`` holds one literal ``[MASK]``.

    Attributes:
        set: ``template`` (a template applied to a fact) or ``context`` (a real sentence).
        graph_only: the fact occurs in the graph but in no training text.
        text_only: the fact is withheld from the graph.
    """

    relation: str
    subject: str | None
    object: str
    text: str
    answer: str
    set: str = "template"
    graph_only: bool = False
    text_only: bool = False


@dataclass(slots=True)
class RawCorpus:
    """Everything a reader found.

    Attributes:
        documents: may be a one-pass iterable. ``graph``, ``probes`` and ``counts`` may still be
            filled while it runs, so the builder reads them only after its last document.
        candidates: words a probe may answer; empty: any.
        counts: what the reader dropped or mended, by reason; goes into ``stats.json``.
        refuses: of a document of another corpus beside this one, the numbers of the lines that
            would undo what this one holds back: they repeat its sentences, or state a fact that
            only the graph is to teach. None: it cannot tell.
    """

    name: str
    documents: Iterable[RawDocument]
    graph: RawGraph
    probes: list[RawProbe] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    refuses: Callable[[RawDocument], set[int]] | None = None


def page_name(title: str) -> str:
    """What a Wikipedia page of this title is about: the title without ``(disambiguation)``."""
    return _DISAMBIGUATION.sub("", title)


def chosen(name: str, fraction: float, seed: int, purpose: str) -> bool:
    """Whether ``name`` falls in a seeded share of all names; independent of their order."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
