"""What a corpus keeps out of other texts: its sentences, and facts that only its graph teaches."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from trelm_ds.prepare.mixing import lines
from trelm_ds.prepare.raw import RawDocument

_NOT_LETTERS = re.compile(r"[\W\d_]+")
_LETTERS_AND_DIGITS = re.compile(r"[^\W_]+")
_NO_ACCENTS = {code: None for code in range(0x300, 0x370)}  # combining marks
_FIRST_WORDS = 4  # by which a repeated sentence is looked up


@dataclass
class GraphOnlyFact:
    """A fact that no text may state: the ids of its ends, and all their names."""

    subject: str
    object: str
    subject_names: Iterable[str]
    object_names: Iterable[str]


class GraphOnlyFacts:
    """Finds the lines that state one of the facts.

    A fact is taken as stated by every line that names its object, by a name or a link, in a
    document that names, links or is about its subject anywhere: an article names its subject
    once. Too much is found rather than too little. Names are whole words; case, accents and
    punctuation do not count, for corpora are lower-cased or cut into pieces.
    """

    def __init__(self, facts: Iterable[GraphOnlyFact]):
        # Both hold (object, its names), by a name's first word and by the subject's id.
        self._by_name: dict[str, list[tuple[str, str, list[str]]]] = {}
        self._by_id: dict[str, list[tuple[str, list[str]]]] = {}
        for fact in facts:
            names = _spaced_names(fact.object_names)
            self._by_id.setdefault(fact.subject, []).append((fact.object, names))
            for name in _spaced_names(fact.subject_names):
                self._by_name.setdefault(name.split()[0], []).append((name, fact.object, names))

    def stated_in(self, document: RawDocument) -> set[int]:
        """The numbers of those lines of ``document``."""
        rows = [(begin, line, _words(line)) for begin, line in lines(document.text)]
        facts = self._of_subjects([word for *_, words in rows for word in words], document)
        if not facts:
            return set()
        found = set()
        for number, (begin, line, words) in enumerate(rows):
            spaced, end = _spaced(words), begin + len(line)
            linked = {entity for start, _, entity in document.spans if begin <= start < end}
            if any(
                other in linked or any(name in spaced for name in names) for other, names in facts
            ):
                found.add(number)
        return found

    def _of_subjects(self, words: list[str], document: RawDocument) -> list[tuple[str, list[str]]]:
        """(object, its names) of the facts about what the document names, links or is about."""
        spaced = _spaced(words)
        found = [
            (other, names)
            for word in set(words)
            for name, other, names in self._by_name.get(word, ())
            if name in spaced
        ]
        for entity in {document.about, *(entity for _, _, entity in document.spans)}:
            found += self._by_id.get(entity, ())
        return found


class HeldBackText:
    """Finds the lines of another corpus's document that repeat a sentence.

    Case, accents, punctuation and digits do not count (this corpus's own copies that differ in
    digits are of one split), nor words of other letters than a to z, which other corpora may have
    lost. Lines may be cut elsewhere.
    """

    def __init__(self, sentences: Iterable[str]):
        self._short: set[tuple[str, ...]] = set()
        self._long: dict[tuple[str, ...], set[tuple[str, ...]]] = {}  # by their first words
        for sentence in sentences:
            words = tuple(_plain_words(sentence))
            if len(words) < _FIRST_WORDS:
                self._short.add(words)
            else:
                self._long.setdefault(words[:_FIRST_WORDS], set()).add(words)
        self._short.discard(())

    def repeated_in(self, document: RawDocument) -> set[int]:
        """The numbers of the lines that hold a part of a sentence."""
        rows = [_plain_words(line) for _, line in lines(document.text)]
        found = {number for number, words in enumerate(rows) if tuple(words) in self._short}
        owner = [number for number, words in enumerate(rows) for _ in words]
        words = tuple(itertools.chain(*rows))
        for first in range(len(words) - _FIRST_WORDS + 1):
            for known in self._long.get(words[first : first + _FIRST_WORDS], ()):
                if words[first : first + len(known)] == known:
                    found.update(owner[first : first + len(known)])
        return found


def only_letters(text: str) -> str:
    """``text`` with one blank for whatever stands between its letters, and for digits."""
    return _NOT_LETTERS.sub(" ", text)


def _words(text: str) -> list[str]:
    """Its words of letters and digits, in lower case and without accents."""
    plain = unicodedata.normalize("NFD", text.casefold()).translate(_NO_ACCENTS)
    return _LETTERS_AND_DIGITS.findall(plain)


def _plain_words(text: str) -> list[str]:
    """Its words of the letters a to z alone."""
    return [word for word in _words(only_letters(text)) if word.isascii()]


def _spaced(words: list[str]) -> str:
    """With blanks at both ends, so that whole words alone are found in it."""
    return f" {' '.join(words)} "


def _spaced_names(names: Iterable[str]) -> list[str]:
    return [_spaced(words) for name in sorted(names) if (words := _words(name))]
