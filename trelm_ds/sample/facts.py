"""Real-world facts of the sample corpus, read from the tables in ``facts/``.

A table's first column names the head entity and its type; ``aliases`` holds further names; every
other column ``relation:type`` holds tails (``^relation:type``: heads, for tables that list them
under their common tail). Several values are separated by ";". A leading lower-case "the " is the
article of a name, not part of it. Names are written in English spelling without diacritics.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import resources

from trelm_ds.errors import DataError

Triple = tuple[str, str, str]

SYMMETRIC = frozenset({"borders"})
# Types whose names take the article even where a table does not spell it out.
ARTICLE_TYPES = frozenset({"animal", "currency", "instrument", "range", "river"})


@dataclass(frozen=True, slots=True)
class Surface:
    """One way to write an entity: its words and whether they take the article "the"."""

    text: str
    article: bool


@dataclass(slots=True)
class Entity:
    """An entity of the sample; ``surfaces[0]`` is its name, the others are aliases."""

    type: str
    surfaces: list[Surface] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.surfaces[0].text

    def answer(self) -> Surface | None:
        """First surface that is one plain word, which a cloze question can ask for."""
        return next((s for s in self.surfaces if s.text.isalpha()), None)


@dataclass(slots=True)
class Facts:
    """All entities by id ("country/france") and all triples, in the order of the tables."""

    entities: dict[str, Entity] = field(default_factory=dict)
    triples: list[Triple] = field(default_factory=list)

    def restricted_to(self, relations: Collection[str]) -> Facts:
        """The facts of some relations and the entities that occur in them, in the same order."""
        triples = [triple for triple in self.triples if triple[1] in relations]
        ends = {end for head, _, tail in triples for end in (head, tail)}
        return Facts({i: e for i, e in self.entities.items() if i in ends}, triples)


def load_facts() -> Facts:
    """Reads every table and gives people their surname as an alias where it is unambiguous.

    Raises:
        DataError: a table has a malformed row or header.
    """
    facts = Facts()
    seen: set[Triple] = set()
    no_surname: set[str] = set()
    folder = resources.files(__package__).joinpath("facts")
    for table in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if table.name.endswith(".tsv"):
            _read_table(table.name, table.read_text("utf-8"), facts, seen, no_surname)
    _add_surnames(facts, no_surname)
    return facts


def _read_table(
    name: str, text: str, facts: Facts, seen: set[Triple], no_surname: set[str]
) -> None:
    header, *rows = (line.split("\t") for line in text.splitlines())
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"facts/{name}:{number}: {len(row)} cells, expected {len(header)}")
        head = _entity(header[0], row[0], facts)
        for column, cell in zip(header[1:], row[1:], strict=True):
            values = [value for value in cell.split(";") if value]
            if column == "aliases":
                if values == ["-"]:  # the last word of this name is not a surname
                    no_surname.add(head)
                else:
                    facts.entities[head].surfaces += [_surface(v, article=False) for v in values]
                continue
            relation, _, kind = column.removeprefix("^").partition(":")
            if not kind:
                raise DataError(f"facts/{name}: column {column!r} is not relation:type")
            for value in values:
                other = _entity(kind, value, facts)
                pair = (other, head) if column.startswith("^") else (head, other)
                _add(facts, seen, (pair[0], relation, pair[1]))
                if relation in SYMMETRIC:
                    _add(facts, seen, (pair[1], relation, pair[0]))


def _add(facts: Facts, seen: set[Triple], triple: Triple) -> None:
    if triple not in seen:
        seen.add(triple)
        facts.triples.append(triple)


def _surface(cell: str, article: bool) -> Surface:
    return Surface(cell.removeprefix("the "), article or cell.startswith("the "))


def _entity(kind: str, cell: str, facts: Facts) -> str:
    surface = _surface(cell, kind in ARTICLE_TYPES)
    slug = re.sub(r"[^a-z0-9]+", "-", surface.text.lower()).strip("-")
    identifier = f"{kind}/{slug}"
    known = facts.entities.setdefault(identifier, Entity(kind, [surface]))
    if known.surfaces[0] != surface:
        raise DataError(f"{identifier} is written both {known.surfaces[0]} and {surface}")
    return identifier


def _add_surnames(facts: Facts, no_surname: set[str]) -> None:
    """Surname aliases, left out where two people or any other entity share the word."""
    surnames = {
        identifier: entity.name.rsplit(" ", 1)[-1]
        for identifier, entity in facts.entities.items()
        if entity.type == "person" and len(entity.surfaces) == 1 and " " in entity.name
    }
    taken = Counter(s.text.lower() for e in facts.entities.values() for s in e.surfaces)
    taken.update(surname.lower() for surname in surnames.values())
    for identifier, surname in surnames.items():
        if taken[surname.lower()] == 1 and identifier not in no_surname:
            facts.entities[identifier].surfaces.append(Surface(surname, article=False))
