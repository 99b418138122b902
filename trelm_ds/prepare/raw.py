"""What a corpus reader hands to the builder: documents, a graph, probes, all by string id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class RawDocument:
    """A sentence or short text with linked mentions.

    Attributes:
        doc: name of the document the text is from; the unit of the train/held-out split.
        text: plain text.
        spans: (start, end, entity id) in characters of ``text``, end excluded.
        heldout: True or False to fix the split; None lets the builder choose by ``doc``.
    """

    doc: str
    text: str
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    heldout: bool | None = None


@dataclass(slots=True)
class RawEntity:
    """A node of the graph; the first name is ``name``, every other one an alias."""

    name: str
    description: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(slots=True)
class RawGraph:
    """Triples (head id, relation id, tail id) and the names of their parts.

    Attributes:
        withheld: facts kept out of injection, TransE and decoding (probes of facts that only
            text may teach).
    """

    entities: dict[str, RawEntity] = field(default_factory=dict)
    relations: dict[str, str] = field(default_factory=dict)
    triples: list[tuple[str, str, str]] = field(default_factory=list)
    withheld: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(slots=True)
class RawProbe:
    """A cloze question in LAMA's form; ``text`` holds one literal ``[MASK]``.

    Attributes:
        set: ``template`` (a template applied to a fact) or ``context`` (a real sentence).
        graph_only: the fact occurs in the graph but in no training text.
    """

    relation: str
    subject: str | None
    object: str
    text: str
    answer: str
    set: str = "template"
    graph_only: bool = False


@dataclass(slots=True)
class RawCorpus:
    """Everything a reader found. ``documents`` may be a one-pass iterable."""

    name: str
    documents: Iterable[RawDocument]
    graph: RawGraph
    probes: list[RawProbe] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)  # words a probe may answer; empty: any
