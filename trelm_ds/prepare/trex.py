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
  state them: their evidence is dropped, and so is every sentence that names or links both ends.
- Text-only facts: all facts of a seeded share of the other subjects are withheld from the graph.
- Probes: one ``template`` probe per fact (answer: the object's label) and one ``context`` probe per
  fact and held-out or dropped sentence (answer: the surface that was masked).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
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
from trelm_ds.prepare.held_back import GraphOnlyFact, GraphOnlyFacts, HeldBackText, only_letters
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, RawProbe
from trelm_ds.prepare.reader import ReaderOptions

MASK = "[MASK]"

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
    for fact in answers:
        (graph.withheld if options.is_text_only(fact[0]) else graph.triples).append(fact)
    for entity, label in labels.items():
        graph.name_entity(entity, label)
        for surface in sorted(surfaces[entity]):
            graph.name_entity(entity, surface)

    graph_only_facts = GraphOnlyFacts(
        GraphOnlyFact(subject, object_, surfaces[subject], surfaces[object_])
        for subject, _, object_ in answers
        if options.is_graph_only(subject)
    )
    for fact, answer in answers.items():
        text = templates[fact[1]].replace("[X]", labels[fact[0]]).replace("[Y]", MASK)
        corpus.probes.append(
            RawProbe(
                *(fact[1], fact[0], fact[2], text, answer),
                graph_only=options.is_graph_only(fact[0]),
                text_only=options.is_text_only(fact[0]),
            )
        )
        counts["graph_only_facts"] += options.is_graph_only(fact[0])
        counts["text_only_facts"] += options.is_text_only(fact[0])

    asked: set[tuple[str, str]] = set()
    for text, spans in sentences.spans.items():
        letters = only_letters(text).casefold().strip()
        doc = "trex-" + hashlib.blake2b(letters.encode(), digest_size=8).hexdigest()
        facts = sentences.evidence[text]
        document = RawDocument(doc, text, list(dict.fromkeys(spans)), options.is_heldout(doc))
        dropped = any(options.is_graph_only(fact[0]) for fact, _, _ in facts) or bool(
            graph_only_facts.stated_in(document)
        )
        counts["graph_only_sentences_dropped"] += dropped
        if not dropped:
            corpus.documents.append(document)
        for fact, start, end in facts:
            graph_only = options.is_graph_only(fact[0])
            if not (graph_only or (document.heldout and not dropped)):
                continue
            question, answer = f"{text[:start]}{MASK}{text[end:]}", text[start:end]
            if (question, answer) not in asked:  # two relations may ask the same
                asked.add((question, answer))
                corpus.probes.append(
                    RawProbe(
                        *(fact[1], fact[0], fact[2], question, answer, "context", graph_only),
                        text_only=options.is_text_only(fact[0]),
                    )
                )

    @functools.cache  # an index of all sentences: for a document of another corpus alone
    def text_held_back() -> HeldBackText:
        return HeldBackText(sentences.spans)

    def refuses(document: RawDocument) -> set[int]:
        return text_held_back().repeated_in(document) | graph_only_facts.stated_in(document)

    corpus.refuses = refuses
    words = find_file(folder, "common_vocab_cased.txt")
    if words:
        corpus.candidates = [word for _, word in iter_lines(words) if word.strip()]
    return corpus
