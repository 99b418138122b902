"""Reader ``trex``: the evidence sentences and facts of LAMA's T-REx files.

The input folder holds ``relations.jsonl``, ``trex/P*.jsonl`` and, if there,
``common_vocab_cased.txt``; each may be gzipped. A record of ``trex/``::

    {"sub_uri": "Q9441", "sub_label": "Gautama Buddha", "predicate_id": "P140",
     "obj_uri": "Q748", "obj_label": "Buddhism",
     "evidences": [{"sub_surface": "Gautama Buddha", "obj_surface": "Buddhism",
                    "masked_sentence": "He was ... propagation of [MASK] across Asia."}]}

- A sentence is its masked form with the object's surface put back; the object span is that place,
  the subject span the first place of ``sub_surface`` beside it. Equal sentences of several facts
  become one document with the spans of all.
- Held-out sentences are chosen by their letters alone, so that copies which differ in digits or
  punctuation fall on the same side.
- Graph-only facts: all facts of a seeded share of the subjects stay in the graph, and no text may
  state them: their evidence is dropped, and so is every sentence that names both ends.
- Probes: one ``template`` probe per fact (answer: the object's label) and one ``context`` probe per
  fact and held-out or dropped sentence (answer: the surface that was masked).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trelm_ds.errors import DataError
from trelm_ds.prepare.files import (
    check_id,
    expand,
    find_file,
    get,
    iter_jsonl,
    iter_lines,
    need_file,
)
from trelm_ds.prepare.mixing import lines
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, RawProbe
from trelm_ds.prepare.reader import ReaderOptions

MASK = "[MASK]"
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_WORD = re.compile(r"\w+")
_LETTERS_AND_DIGITS = re.compile(r"[^\W_]+")
_NO_ACCENTS = {code: None for code in range(0x300, 0x370)}  # combining marks
_FIRST_WORDS = 4  # by which a repeated sentence is looked up

Fact = tuple[str, str, str]


def _read_relations(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Names and templates by relation id."""
    names, templates = {}, {}
    for where, record in iter_jsonl(path):
        relation = check_id(get(record, "relation", str, where), where)
        template = get(record, "template", str, where)
        if template.count("[X]") != 1 or template.count("[Y]") != 1:
            raise DataError(f"{where}: the template needs one [X] and one [Y]: {template!r}")
        names[relation] = get(record, "label", str, where)
        templates[relation] = template
    return names, templates


def _facts(files: list[Path]) -> Iterator[tuple[str, dict]]:
    """Records of the files in turn, so that a limit takes from every relation."""
    for turn in itertools.zip_longest(*(iter_jsonl(file) for file in files)):
        yield from (item for item in turn if item is not None)


def _place(surface: str, text: str, avoid: tuple[int, int]) -> tuple[int, int] | None:
    """The first place of ``surface`` in ``text`` outside ``avoid``, at word ends if possible."""
    found = None
    for match in re.finditer(re.escape(surface), text):
        start, end = match.span()
        if start < avoid[1] and avoid[0] < end:
            continue
        before, after = text[start - 1 : start], text[end : end + 1]
        if not (before.isalnum() or after.isalnum()):
            return start, end
        found = found or (start, end)
    return found


class _Sentences:
    """Distinct sentences with the spans and facts of all their evidence."""

    def __init__(self):
        self.spans: dict[str, list[tuple[int, int, str]]] = {}
        self.evidence: dict[str, list[tuple[Fact, int, int]]] = {}  # object span per fact

    def add(self, text: str, fact: Fact, start: int, end: int, subject: tuple[int, int] | None):
        spans = self.spans.setdefault(text, [])
        if subject is not None:
            spans.append((*subject, fact[0]))
        spans.append((start, end, fact[2]))
        self.evidence.setdefault(text, []).append((fact, start, end))


def _names_both_ends(text: str, subjects: dict[str, list[tuple[str, set[str]]]]) -> bool:
    """Whether ``text`` names the subject and an object of a graph-only fact.

    Args:
        subjects: by a name's first word: (name, names of the objects).
    """
    for word in set(_WORD.findall(text)):
        for name, objects in subjects.get(word, ()):
            if name in text and any(other in text for other in objects):
                return True
    return False


@dataclass
class _GraphOnlyFact:
    """A fact that no text may state: the ids of its ends, and their names as ``_spaced`` words."""

    subject: str
    object: str
    subject_names: list[str]
    object_names: list[str]


class _Refusal:
    """Which lines of another corpus's document repeat a sentence or state a graph-only fact.

    Case, accents and punctuation do not count, nor words of other letters than a to z, for other
    corpora are lower-cased or cut into pieces; of a sentence neither do digits, as where this
    corpus's own are split. Lines may be cut elsewhere. A fact is taken as stated by every
    line that names its object, by a name or a link, in a document that names its subject
    anywhere: an article names its subject once. Too much is refused rather than too little.
    """

    def __init__(self, sentences: Iterable[str], facts: Iterable[_GraphOnlyFact]):
        self._short: set[tuple[str, ...]] = set()
        self._sentences: dict[tuple[str, ...], set[tuple[str, ...]]] = {}  # by their first words
        for sentence in sentences:
            words = tuple(_words(_NOT_LETTERS.sub(" ", sentence)))
            if len(words) < _FIRST_WORDS:
                self._short.add(words)
            else:
                self._sentences.setdefault(words[:_FIRST_WORDS], set()).add(words)
        self._short.discard(())
        self._by_name: dict[str, list[tuple[str, _GraphOnlyFact]]] = {}  # by its first word
        self._by_id: dict[str, list[_GraphOnlyFact]] = {}
        for fact in facts:
            self._by_id.setdefault(fact.subject, []).append(fact)
            for name in fact.subject_names:
                self._by_name.setdefault(name.split()[0], []).append((name, fact))

    def __call__(self, document: RawDocument) -> set[int]:
        rows = list(lines(document.text))
        refused = self._repeated([_words(_NOT_LETTERS.sub(" ", line)) for _, line in rows])
        words = [_words(line) for _, line in rows]
        facts = self._named(list(itertools.chain(*words)), document)
        for number, (begin, line) in enumerate(rows):
            spaced, end = _spaced(words[number]), begin + len(line)
            linked = {entity for start, _, entity in document.spans if begin <= start < end}
            if any(
                fact.object in linked or any(name in spaced for name in fact.object_names)
                for fact in facts
            ):
                refused.add(number)
        return refused

    def _repeated(self, rows: list[list[str]]) -> set[int]:
        """Lines that hold a part of a sentence, wherever a document's lines are cut."""
        refused = {number for number, words in enumerate(rows) if tuple(words) in self._short}
        owner = [number for number, words in enumerate(rows) for _ in words]
        words = tuple(itertools.chain(*rows))
        for first in range(len(words) - _FIRST_WORDS + 1):
            for known in self._sentences.get(words[first : first + _FIRST_WORDS], ()):
                if words[first : first + len(known)] == known:
                    refused.update(owner[first : first + len(known)])
        return refused

    def _named(self, words: list[str], document: RawDocument) -> list[_GraphOnlyFact]:
        """The facts whose subject the document names, links or is about."""
        spaced = _spaced(words)
        found = [
            fact
            for word in set(words)
            for name, fact in self._by_name.get(word, ())
            if name in spaced
        ]
        for entity in {document.about, *(entity for _, _, entity in document.spans)}:
            found += self._by_id.get(entity, ())
        return found


def _words(text: str) -> list[str]:
    """Its words that are of the letters a to z and digits, in lower case and without accents."""
    plain = unicodedata.normalize("NFD", text.casefold()).translate(_NO_ACCENTS)
    return [word for word in _LETTERS_AND_DIGITS.findall(plain) if word.isascii()]


def _spaced(words: list[str]) -> str:
    """With blanks at both ends, so that whole words alone are found in it."""
    return f" {' '.join(words)} "


def _spaced_names(names: Iterable[str]) -> list[str]:
    return [_spaced(words) for name in sorted(names) if (words := _words(name))]


def read_trex(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads the folder whole: LAMA's files are small."""
    if len(inputs) != 1 or not inputs[0].is_dir():
        raise DataError("trex: --input must be one folder, with trex/ and relations.jsonl in it")
    folder = inputs[0]
    names, templates = _read_relations(need_file(folder, "relations.jsonl"))
    graph = RawGraph()
    corpus = RawCorpus("trex", [], graph)
    counts = corpus.counts
    sentences = _Sentences()
    labels: dict[str, str] = {}
    answers: dict[Fact, str] = {}  # in reading order
    surfaces: dict[str, set[str]] = {}
    files = expand([folder / "trex"], (".jsonl",))
    for where, record in itertools.islice(_facts(files), options.limit):
        relation = get(record, "predicate_id", str, where)
        if relation not in templates:
            raise DataError(f"{where}: relation {relation!r} is not in relations.jsonl")
        subject = check_id(get(record, "sub_uri", str, where), where)
        object_ = check_id(get(record, "obj_uri", str, where), where)
        fact = (subject, relation, object_)
        labels.setdefault(subject, get(record, "sub_label", str, where))
        labels.setdefault(object_, get(record, "obj_label", str, where))
        answers.setdefault(fact, get(record, "obj_label", str, where))
        for entity in (subject, object_):
            surfaces.setdefault(entity, {labels[entity]})
        for evidence in get(record, "evidences", list, where):
            if not isinstance(evidence, dict):
                raise DataError(f"{where}: an evidence is not a JSON object")
            masked = get(evidence, "masked_sentence", str, where)
            if masked.count(MASK) != 1:
                counts["evidence_without_one_mask"] += 1
                continue
            subject_surface = get(evidence, "sub_surface", str, where)
            object_surface = get(evidence, "obj_surface", str, where)
            if not object_surface.strip() or not subject_surface.strip():
                counts["evidence_empty_surface"] += 1
                continue
            surfaces[subject].add(subject_surface)
            surfaces[object_].add(object_surface)
            start = masked.index(MASK)
            end = start + len(object_surface)
            text = masked.replace(MASK, object_surface)
            place = _place(subject_surface, text, (start, end))
            counts["evidence"] += 1
            counts["subject_not_found"] += place is None
            sentences.add(text, fact, start, end, place)
    counts["sentences"] = len(sentences.spans)

    graph.relations = {relation: names[relation] for _, relation, _ in answers}
    graph.triples = list(answers)
    for entity, label in labels.items():
        graph.name_entity(entity, label)
        for surface in sorted(surfaces[entity]):
            graph.name_entity(entity, surface)

    subjects: dict[str, list[tuple[str, set[str]]]] = {}
    for subject, _, object_ in answers:
        if options.is_graph_only(subject):
            for name in surfaces[subject]:
                if word := _WORD.search(name):
                    subjects.setdefault(word[0], []).append((name, surfaces[object_]))

    for fact, answer in answers.items():
        text = templates[fact[1]].replace("[X]", labels[fact[0]]).replace("[Y]", MASK)
        corpus.probes.append(
            RawProbe(
                fact[1], fact[0], fact[2], text, answer, graph_only=options.is_graph_only(fact[0])
            )
        )
        counts["graph_only_facts"] += options.is_graph_only(fact[0])

    asked: set[tuple[str, str]] = set()
    for text, spans in sentences.spans.items():
        letters = _NOT_LETTERS.sub(" ", text).casefold().strip()
        doc = "trex-" + hashlib.blake2b(letters.encode(), digest_size=8).hexdigest()
        facts = sentences.evidence[text]
        dropped = any(options.is_graph_only(fact[0]) for fact, _, _ in facts) or (
            _names_both_ends(text, subjects)
        )
        heldout = options.is_heldout(doc)
        counts["graph_only_sentences_dropped"] += dropped
        if not dropped:
            spans = list(dict.fromkeys(spans))
            corpus.documents.append(RawDocument(doc, text, spans, heldout))
        for fact, start, end in facts:
            graph_only = options.is_graph_only(fact[0])
            if not (graph_only or (heldout and not dropped)):
                continue
            question, answer = f"{text[:start]}{MASK}{text[end:]}", text[start:end]
            if (question, answer) not in asked:  # two relations may ask the same
                asked.add((question, answer))
                corpus.probes.append(
                    RawProbe(fact[1], fact[0], fact[2], question, answer, "context", graph_only)
                )

    @functools.cache  # an index of all sentences: for a document of another corpus alone
    def refusal() -> _Refusal:
        facts = [
            _GraphOnlyFact(s, o, _spaced_names(surfaces[s]), _spaced_names(surfaces[o]))
            for s, _, o in answers
            if options.is_graph_only(s)
        ]
        return _Refusal(sentences.spans, facts)

    corpus.refuses = lambda document: refusal()(document)
    words = find_file(folder, "common_vocab_cased.txt")
    if words:
        corpus.candidates = [word for _, word in iter_lines(words) if word.strip()]
    return corpus
