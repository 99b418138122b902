"""Mentions to entities by name: exact alias first, then the nearest spelling, else NIL.

An offline tool of the data build and of look-ups, never of a training step. Exact look-up is a
sorted table of 64-bit hashes, about 30 bytes and the name itself per alias; the stored name is
compared, so a hash collision cannot link. Approximate look-up searches hashed character n-gram
vectors with FAISS and re-ranks by edit distance.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.vector_index import inner_product_index

log = logging.getLogger(__name__)

VECTOR_SIZE = 128
NGRAMS = (2, 3, 4)
MAX_MENTION_WORDS = 8
MIN_FOUND_CHARACTERS = 3
_FLAT_LIMIT = 50_000  # names; beyond, exhaustive search answers fewer than 500 queries a second
_CANDIDATES = 10
_PROBES = 64
_ENCODE_CHUNK = 1 << 14
_WORD = re.compile(r"\w+")


def normalize(name: str) -> str:
    """The form in which names are compared: NFKC, case folded, blanks single."""
    # On ASCII both come to lower case, at a quarter of the cost; this is the linker's inner loop.
    name = name.lower() if name.isascii() else unicodedata.normalize("NFKC", name).casefold()
    return " ".join(name.split())


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, bit-parallel (Myers 1999): one pass of big-integer steps over ``b``."""
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    positive, negative, distance = full, 0, len(a)  # vertical differences of the current column
    for character in b:
        equal = places.get(character, 0)
        horizontal = (((equal & positive) + positive) ^ positive) | equal
        up = negative | ~(horizontal | positive) & full
        down = positive & horizontal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & full, down << 1 & full
        vertical = equal | negative
        positive, negative = down | ~(vertical | up) & full, up & vertical
    return distance


def name_vectors(names: list[str]) -> np.ndarray:
    """Signed hashed counts of character 2- to 4-grams, ends marked, scaled to length 1.

    Returns:
        float32 [len(names), 128].
    """
    vectors = np.zeros((len(names), VECTOR_SIZE), np.float32)
    for begin in range(0, len(names), _ENCODE_CHUNK):
        chunk = [f"\x02{name}\x03" for name in names[begin : begin + _ENCODE_CHUNK]]
        codes = np.frombuffer("".join(chunk).encode("utf-32-le"), np.uint32).astype(np.uint64)
        row = np.repeat(np.arange(len(chunk)), [len(name) for name in chunk])
        total = np.zeros(len(chunk) * VECTOR_SIZE)
        for n in NGRAMS:
            hashes = np.full(max(len(codes) - n + 1, 0), n, np.uint64)
            for i in range(n):
                hashes = (hashes ^ codes[i : len(codes) - n + 1 + i]) * np.uint64(
                    0x9E3779B97F4A7C15
                )
                hashes ^= hashes >> np.uint64(29)
            same = row[: len(hashes)] == row[n - 1 :]  # an n-gram must not run into the next name
            bucket = (hashes % np.uint64(VECTOR_SIZE)).astype(np.int64)
            sign = 1.0 - 2.0 * (hashes >> np.uint64(63)).astype(np.float64)
            place = row[: len(hashes)] * VECTOR_SIZE + bucket
            total += np.bincount(place[same], sign[same], minlength=len(total))
        block = total.reshape(len(chunk), VECTOR_SIZE).astype(np.float32)
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
        vectors[begin : begin + len(chunk)] = block
    return vectors


def longest_matches(
    text: str, look_up: Callable[[list[str]], list[int | None]]
) -> list[tuple[int, int, int]]:
    """Mentions in running text: from left to right the longest run of words that is a name.

    One word in lower case is no mention where the text has capitals, nor are bare numbers and
    surfaces under 3 characters: too many names are also common words.

    Args:
        look_up: entities (or None) of a list of surfaces.

    Returns:
        (start, end, entity) in characters, end excluded, sorted, without overlap.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    cased = any(character.isupper() for character in text)
    runs, surfaces = [], []
    for i, (start, _) in enumerate(words):
        for j in range(min(i + MAX_MENTION_WORDS, len(words)) - 1, i - 1, -1):
            surface = text[start : words[j][1]]
            if len(surface) < MIN_FOUND_CHARACTERS or surface.isdigit():
                continue
            if i == j and cased and surface.islower():
                continue
            runs.append((i, j))
            surfaces.append(surface)
    found, free = [], 0
    for (i, j), entity in zip(runs, look_up(surfaces), strict=True):
        if entity is not None and i >= free:
            found.append((words[i][0], words[j][1], entity))
            free = j + 1
    return found


@dataclass(frozen=True, slots=True)
class Link:
    """A mention's entity.

    Attributes:
        entity: index.
        alias: the (normalised) name it was found by.
        distance: edits per character of the longer name; 0 for an exact match.
    """

    entity: int
    alias: str
    distance: float = 0.0


class EntityLinker:
    """Finds entities by their names.

    Args:
        aliases: (name, entity index) pairs; a name may belong to several entities.
        prior: float or int [entities]; of several entities with one name the one with the
            largest prior is meant, if there is one largest; else the mention is NIL.
        max_distance: largest edit distance per character of an approximate match.

    Attributes:
        counts: mentions given to ``link``, by outcome: ``exact``, ``approximate``, ``nil``.
    """

    def __init__(
        self, aliases: Iterable[tuple[str, int]], prior: np.ndarray, max_distance: float = 0.2
    ):
        self.max_distance = max_distance
        self.counts: Counter[str] = Counter()
        self._prior = prior
        names: list[bytes] = []
        entities: list[int] = []
        for alias, entity in aliases:
            if name := normalize(alias):
                names.append(name.encode())
                entities.append(entity)
        hashes = np.fromiter((_hash(name) for name in names), np.uint64, len(names))
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._entities = np.asarray(entities, np.int32)[order]
        lengths = np.fromiter((len(names[i]) for i in order), np.int64, len(names))
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self._text = b"".join([names[i] for i in order])
        self._index = None
        self._index_rows = np.empty(0, np.int64)  # alias row of each vector

    @classmethod
    def load(cls, folder: str | Path) -> EntityLinker:
        """A linker over a prepared folder's aliases.

        The prior is the number of mentions in the training split; the number of triples decides
        between entities with as many.

        Raises:
            DataError: the folder cannot be read.
        """
        graph = KnowledgeGraph.load(folder)
        degrees = graph.degrees()
        prior = KnowledgeTables.load(folder).entity_frequency + degrees / (1 + degrees.max())
        return cls(graph.aliases, prior)

    def __len__(self) -> int:
        return len(self._hashes)

    def _name(self, row: int) -> bytes:
        return self._text[self._offsets[row] : self._offsets[row + 1]]

    def _rows(self, name: bytes) -> list[int]:
        """Alias rows with exactly this (normalised) name."""
        code = np.uint64(_hash(name))
        low = np.searchsorted(self._hashes, code, "left")
        high = np.searchsorted(self._hashes, code, "right")
        return [row for row in range(low, high) if self._name(row) == name]

    def _resolve(self, rows: Iterable[int]) -> int | None:
        """The entity meant by aliases of equal standing, or None."""
        entities = np.unique(self._entities[list(rows)])
        if len(entities) < 2:
            return int(entities[0]) if len(entities) else None
        prior = self._prior[entities]
        best = np.flatnonzero(prior == prior.max())
        return int(entities[best[0]]) if len(best) == 1 else None

    def exact(self, mentions: list[str]) -> list[int | None]:
        """Entities by exact normalised name; None: unknown or undecidable."""
        return [self._resolve(self._rows(normalize(mention).encode())) for mention in mentions]

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """Mentions in running text by exact name: (start, end, entity), see ``longest_matches``."""
        return longest_matches(text, self.exact)

    def link(self, mentions: list[str]) -> list[Link | None]:
        """The entity of each mention, or None (NIL).

        A name that is known exactly but undecidable is NIL; only an unknown name is looked up by
        its spelling.

        Raises:
            ConfigError: FAISS is needed and not installed.
        """
        names = [normalize(mention) for mention in mentions]
        links: list[Link | None] = [None] * len(names)
        unknown = []
        for i, name in enumerate(names):
            rows = self._rows(name.encode())
            if rows:
                entity = self._resolve(rows)
                links[i] = None if entity is None else Link(entity, name)
            elif name:
                unknown.append(i)
        self.counts["exact"] += sum(link is not None for link in links)
        if unknown and len(self):
            near = self._nearest([names[i] for i in unknown])
            for i, link in zip(unknown, near, strict=True):
                links[i] = link
                self.counts["approximate"] += link is not None
        self.counts["nil"] += sum(link is None for link in links)
        return links

    def _nearest(self, names: list[str]) -> list[Link | None]:
        if self._index is None:
            self._build_index()
        _, found = self._index.search(name_vectors(names), min(_CANDIDATES, len(self._index_rows)))
        return [self._rank(name, rows[rows >= 0]) for name, rows in zip(names, found, strict=True)]

    def _rank(self, name: str, candidates: np.ndarray) -> Link | None:
        """Of the candidates' vectors the nearest in spelling, if it is near enough."""
        best: dict[str, float] = {}
        for row in self._index_rows[candidates]:
            alias = self._name(row).decode()
            best[alias] = edit_distance(name, alias) / max(len(name), len(alias))
        if not best:
            return None
        distance = min(best.values())
        if distance > self.max_distance:
            return None
        nearest = [alias for alias, d in best.items() if d == distance]
        entity = self._resolve(row for alias in nearest for row in self._rows(alias.encode()))
        return None if entity is None else Link(entity, min(nearest), distance)

    def _build_index(self) -> None:
        first = np.ones(len(self), bool)  # one vector per distinct name, not per alias
        first[1:] = self._hashes[1:] != self._hashes[:-1]
        self._index_rows = np.flatnonzero(first)
        total = len(self._index_rows)
        vectors = name_vectors([self._name(row).decode() for row in self._index_rows])
        if total >= _FLAT_LIMIT:
            log.info("building the index of %d names; one time per process", total)
        self._index = inner_product_index(
            vectors,
            flat_limit=_FLAT_LIMIT,
            probes=_PROBES,
            seed=0,
            needed_for="approximate entity linking",
        )
