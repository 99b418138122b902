"""The embedded sample corpus: text about real facts, their graph, and cloze questions on them.

Facts come from ``facts/``, wording from ``templates.py``. Everything random is drawn from the
seed: which facts stay out of the text, how often a subject is written about, how a sentence is
put. The corpus is meant to show on a small machine what the method is for, so it has a long tail
of rarely mentioned subjects, facts that only the graph knows, and sentences kept out of training.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

from trelm_ds.errors import DataError
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawEntity, RawGraph, RawProbe
from trelm_ds.sample.facts import Facts, Surface, Triple, load_facts
from trelm_ds.sample.templates import DESCRIPTIONS, DISTRACTORS, RELATIONS

GRAPH_ONLY_FRACTION = 0.08  # of the facts: in the graph, never in the text
HELDOUT_FRACTION = 0.03  # of the documents
ZIPF_OFFSET = 30  # subjects are drawn with weight 1 / (rank + offset): Zipf-Mandelbrot
MIN_MENTIONS = 3  # times the training text states every fact that is not graph-only
SENTENCES = 2  # of a document, each of one fact
DISTRACTOR_PROBABILITY = 0.05  # a sentence mentions an unrelated entity
ALIAS_PROBABILITY = 0.3
REPEATED_ALIAS_PROBABILITY = 0.6  # once the document has already named the entity
SAME_SUBJECT, LINKED_SUBJECT = 0.45, 0.20  # how a document goes on; else a fresh subject
# Facts asked about per relation. Balanced as in LAMA, so no relation decides the mean alone.
TEMPLATE_PROBES, CONTEXT_PROBES = 48, 16
GRAPH_ONLY_TEMPLATE_PROBES, GRAPH_ONLY_CONTEXT_PROBES = 16, 4
# Tail values of a relation with several are only sometimes asked for: each answer is then one of
# several right ones, and P@1 counts the others as wrong.
SEVERAL_ANSWERS_FRACTION = 0.25

# About 2,600 facts on 2,100 entities, nearly all with one answer of one word, which a model of a
# million parameters takes in within minutes on two CPU cores. All 51 relations take hours.
SMALL_WORLD = frozenset(
    """animal_class capital company_of continent currency dish_of god_of headquarters industry
    instrument_family language_family located_in moon_of mountain_in mythology period region_of
    script state_of_matter""".split()
)

MASK = "[MASK]"
DISTRACTOR_TYPES = frozenset(
    "animal book city company country deity element invention landmark language moon mountain "
    "musical_work painting person planet region river university".split()
)
_ATTEMPTS = 20
_SLOT = re.compile(r"(a\(n\) )?\{(\w)\}")


@dataclass(slots=True)
class _Text:
    """Text with its mentions (start, end, entity id) and the letter that picks "a" or "an"."""

    text: str
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    initial: str = ""


def sample_corpus(
    seed: int = 0,
    num_documents: int = 6000,
    relations: Collection[str] = SMALL_WORLD,
) -> RawCorpus:
    """Generates the sample corpus; the same arguments give the same corpus.

    The facts, the graph-only choice and the frequency ranks of subjects depend on the seed alone.
    At the default size every fact that is not graph-only is stated at least ``MIN_MENTIONS``
    times in the training text; facts that fewer documents, or more relations, leave no room for
    are not asked about either.

    Args:
        seed: of every random choice.
        num_documents: training and held-out documents together, >= 2.
        relations: names from ``templates.RELATIONS``; the others' facts are left out.

    Returns:
        Documents of ``SENTENCES`` sentences with ``heldout`` fixed, the graph, and probes of both
        sets whose answers are single words.

    Raises:
        DataError: ``num_documents`` is below 2, or a fact table is malformed.
    """
    if num_documents < 2:
        raise DataError(f"the sample corpus needs at least 2 documents, got {num_documents}")
    facts = load_facts().restricted_to(relations)
    graph_only = _choose_graph_only(facts, random.Random(f"{seed}/graph-only"))
    text_facts = [fact for fact in facts.triples if fact not in graph_only]

    num_heldout = max(1, round(num_documents * HELDOUT_FRACTION))
    planner = _Planner(text_facts, graph_only, seed)
    writer = _Writer(facts, planner.blocked, random.Random(f"{seed}/text"))
    plans = [planner.plan() for _ in range(num_documents - num_heldout)]
    planner.cover(plans)
    documents = [writer.document(f"sample/train-{i:06d}", p) for i, p in enumerate(plans)]
    stated = {fact for plan in plans for fact in plan}
    training_sentences = frozenset(writer.sentences)
    for i in range(num_heldout):
        name = f"sample/heldout-{i:06d}"
        documents.append(writer.document(name, planner.plan(), training_sentences))

    asker = _Asker(facts, writer, planner, random.Random(f"{seed}/probes"))
    return RawCorpus(
        name="sample",
        documents=documents,
        graph=_graph(facts),
        probes=asker.probes([fact for fact in text_facts if fact in stated], graph_only),
    )


def _graph(facts: Facts) -> RawGraph:
    entities = {
        identifier: RawEntity(
            name=entity.name,
            description=DESCRIPTIONS[entity.type],
            aliases=tuple(surface.text for surface in entity.surfaces[1:]),
        )
        for identifier, entity in facts.entities.items()
    }
    told = {relation for _, relation, _ in facts.triples}
    relations = {name: relation.name for name, relation in RELATIONS.items() if name in told}
    return RawGraph(entities=entities, relations=relations, triples=list(facts.triples))


def _choose_graph_only(facts: Facts, rng: random.Random) -> set[Triple]:
    """Facts to keep out of the text, spread over the relations.

    Both ends must keep other facts in the text, else their words would be unknown to the
    vocabulary; and two entities share the fate of all their facts, else one would give away
    another (capital and located_in).
    """
    degree: Counter[str] = Counter()
    by_pair: defaultdict[frozenset[str], list[Triple]] = defaultdict(list)
    for fact in facts.triples:
        degree.update((fact[0], fact[2]))
        by_pair[frozenset((fact[0], fact[2]))].append(fact)
    quota = Counter(relation for _, relation, _ in facts.triples)
    for relation in quota:
        quota[relation] = round(2 * GRAPH_ONLY_FRACTION * quota[relation])

    chosen: set[Triple] = set()
    target = round(GRAPH_ONLY_FRACTION * len(facts.triples))
    for fact in rng.sample(facts.triples, len(facts.triples)):
        head, relation, tail = fact
        together = by_pair[frozenset((head, tail))]
        if (
            len(chosen) < target
            and fact not in chosen
            and facts.entities[tail].answer()
            and degree[head] - len(together) >= 1
            and degree[tail] - len(together) >= 3
            and all(quota[r] > 0 for _, r, _ in together)
        ):
            chosen.update(together)
            degree.subtract({head: len(together), tail: len(together)})
            quota.subtract(r for _, r, _ in together)
    return chosen


class _Planner:
    """Decides which facts a document states, one a sentence."""

    def __init__(self, text_facts: list[Triple], graph_only: set[Triple], seed: int) -> None:
        self.blocked: defaultdict[str, set[str]] = defaultdict(set)
        for head, _, tail in graph_only:
            self.blocked[head].add(tail)
            self.blocked[tail].add(head)
        self._rng = random.Random(f"{seed}/plan")
        self.text_facts = text_facts
        self.facts_of: defaultdict[str, list[Triple]] = defaultdict(list)
        for fact in text_facts:
            self.facts_of[fact[0]].append(fact)
        self._subjects = list(self.facts_of)
        random.Random(f"{seed}/ranks").shuffle(self._subjects)
        self._weights = list(
            accumulate(1 / (rank + ZIPF_OFFSET) for rank in range(1, len(self._subjects) + 1))
        )

    def plan(self) -> list[Triple]:
        plan: list[Triple] = []
        entities: set[str] = set()
        for _ in range(SENTENCES):
            fact = self._next(plan, entities)
            plan.append(fact)
            entities.update((fact[0], fact[2]))
        return plan

    def _next(self, used: list[Triple], entities: set[str]) -> Triple:
        while True:
            draw = self._rng.random()
            if used and draw < SAME_SUBJECT:
                candidates = self.facts_of[used[-1][0]]
            elif used and draw < SAME_SUBJECT + LINKED_SUBJECT:
                candidates = self.facts_of.get(used[-1][2], ())
            else:
                (subject,) = self._rng.choices(self._subjects, cum_weights=self._weights)
                candidates = self.facts_of[subject]
            if candidates:
                fact = self._rng.choice(candidates)
                if fact not in used and not self.conflicts(fact, entities):
                    return fact

    def conflicts(self, fact: Triple, entities: set[str]) -> bool:
        """Whether ``fact`` beside ``entities`` brings the ends of a graph-only fact together."""
        return not (
            self.blocked.get(fact[0], set()).isdisjoint(entities)
            and self.blocked.get(fact[2], set()).isdisjoint(entities)
        )

    def cover(self, plans: list[list[Triple]]) -> None:
        """Puts facts stated fewer than ``MIN_MENTIONS`` times in the place of frequent ones."""
        counts = Counter(fact for plan in plans for fact in plan)
        missing = [f for f in self.text_facts for _ in range(MIN_MENTIONS - counts[f])]
        self._rng.shuffle(missing)
        slots = [(plan, i) for plan in plans for i in range(len(plan))]
        self._rng.shuffle(slots)
        for plan, i in slots:
            if not missing:
                return
            if counts[plan[i]] <= MIN_MENTIONS:
                continue
            others = plan[:i] + plan[i + 1 :]
            entities = {entity for f in others for entity in (f[0], f[2])}
            if missing[-1] in others or self.conflicts(missing[-1], entities):
                continue
            counts[plan[i]] -= 1
            plan[i] = missing.pop()


class _Writer:
    """Turns planned facts into sentences with linked mentions."""

    def __init__(self, facts: Facts, blocked: dict[str, set[str]], rng: random.Random) -> None:
        self._entities = facts.entities
        self._blocked = blocked
        self._rng = rng
        self._distractors = [i for i, e in facts.entities.items() if e.type in DISTRACTOR_TYPES]
        self.sentences: set[str] = set()

    def document(
        self, name: str, plan: list[Triple], forbidden: frozenset[str] | None = None
    ) -> RawDocument:
        """Writes one document; held-out ones avoid every sentence in ``forbidden``."""
        heldout = forbidden is not None
        entities = {entity for fact in plan for entity in (fact[0], fact[2])}
        named: set[str] = set()
        document = RawDocument(doc=name, text="", heldout=heldout)
        for fact in plan:
            for attempt in range(_ATTEMPTS):
                # Templates are few: a distractor makes a sentence new where they do not suffice.
                sentence = self._sentence(fact, entities, named, distract=attempt > 2)
                if not heldout or sentence.text not in forbidden:
                    break
            else:
                raise AssertionError("no new sentence found for a held-out document")
            offset = len(document.text) + bool(document.text)
            document.text += " " * bool(document.text) + sentence.text
            document.spans += [(a + offset, b + offset, e) for a, b, e in sentence.spans]
            self.sentences.add(sentence.text)
        return document

    def _sentence(self, fact: Triple, entities: set[str], named: set[str], distract: bool) -> _Text:
        clause = self.clause(fact, named)
        if distract or self._rng.random() < DISTRACTOR_PROBABILITY:
            clause = self.distract(clause, entities)
        return finish(clause)

    def clause(self, fact: Triple, named: set[str]) -> _Text:
        head, relation, tail = fact
        template = self._rng.choice(RELATIONS[relation].train)
        return _fill(template, h=self._mention(head, named), t=self._mention(tail, named))

    def distract(self, clause: _Text, entities: set[str]) -> _Text:
        """Mentions an entity that has nothing to do with the clause or the document."""
        while True:
            other = self._rng.choice(self._distractors)
            if other not in entities and self._blocked.get(other, set()).isdisjoint(entities):
                break
        entities.add(other)
        return _fill(self._rng.choice(DISTRACTORS), c=clause, x=self._mention(other, set()))

    def _mention(self, identifier: str, named: set[str]) -> _Text:
        surfaces = self._entities[identifier].surfaces
        surface = surfaces[0]
        if len(surfaces) > 1:
            repeated = identifier in named
            probability = REPEATED_ALIAS_PROBABILITY if repeated else ALIAS_PROBABILITY
            if self._rng.random() < probability:
                surface = self._rng.choice(surfaces[1:])
        named.add(identifier)
        return mention(surface, identifier)


class _Asker:
    """Writes the probes."""

    def __init__(
        self, facts: Facts, writer: _Writer, planner: _Planner, rng: random.Random
    ) -> None:
        self._entities = facts.entities
        self._writer = writer
        self._planner = planner
        self._rng = rng
        self._num_answers = Counter((head, relation) for head, relation, _ in facts.triples)

    def probes(self, text_facts: list[Triple], graph_only: set[Triple]) -> list[RawProbe]:
        hidden = sorted(graph_only)
        probes = []
        texts: set[str] = set()  # facts with the same head and relation could ask the same twice
        for ask, text_limit, hidden_limit in (
            (self._template_probe, TEMPLATE_PROBES, GRAPH_ONLY_TEMPLATE_PROBES),
            (self._context_probe, CONTEXT_PROBES, GRAPH_ONLY_CONTEXT_PROBES),
        ):
            for pool, limit in ((text_facts, text_limit), (hidden, hidden_limit)):
                asked: Counter[str] = Counter()
                for fact in self._rng.sample(pool, len(pool)):
                    if asked[fact[1]] == limit or not self._suitable(fact, pool is hidden):
                        continue
                    probe = ask(fact)
                    if probe and probe.text not in texts:
                        texts.add(probe.text)
                        probe.graph_only = pool is hidden
                        asked[fact[1]] += 1
                        probes.append(probe)
        return probes

    def _suitable(self, fact: Triple, is_graph_only: bool) -> bool:
        return is_graph_only or (
            self._num_answers[fact[:2]] == 1 or self._rng.random() < SEVERAL_ANSWERS_FRACTION
        )

    def _template_probe(self, fact: Triple) -> RawProbe | None:
        template = self._rng.choice(RELATIONS[fact[1]].heldout)
        return self._probe(fact, "template", template, lambda clause: finish(clause).text)

    def _context_probe(self, fact: Triple) -> RawProbe | None:
        """Training wording in surroundings that the text never had."""
        template = self._rng.choice(RELATIONS[fact[1]].train)
        others = [f for f in self._planner.facts_of[fact[0]] if f != fact]

        def surround(clause: _Text) -> str | None:
            lead = ""
            if others and self._rng.random() < 0.5:
                lead = finish(self._writer.clause(self._rng.choice(others), set())).text + " "
            if not lead or self._rng.random() < 0.5:
                clause = self._writer.distract(clause, {fact[0], fact[2]})
            sentence = finish(clause).text
            answer = self._entities[fact[2]].answer().text
            stated = _capitalize(sentence.replace(MASK, answer))
            # In the text a sentence starts with a capital; the bare answer may not have one.
            bare_start = sentence.startswith(MASK) and answer.islower()
            return None if bare_start or stated in self._writer.sentences else lead + sentence

        return self._probe(fact, "context", template, surround)

    def _probe(
        self, fact: Triple, kind: str, template: str, complete: Callable[[_Text], str | None]
    ) -> RawProbe | None:
        head, relation, tail = fact
        answer = self._entities[tail].answer()
        if answer is None:
            return None
        mask = _Text("the " * answer.article + MASK, initial=answer.text[0])
        subject = mention(self._entities[head].surfaces[0], head)
        text = complete(_fill(template, h=subject, t=mask))
        # A question that spells out its answer asks for nothing.
        if text is None or re.search(rf"\b{re.escape(answer.text)}\b", text, re.IGNORECASE):
            return None
        return RawProbe(relation, head, tail, text, answer.text, set=kind)


def mention(surface: Surface, identifier: str) -> _Text:
    start = 4 * surface.article
    text = "the " * surface.article + surface.text
    return _Text(text, [(start, len(text), identifier)])


def finish(clause: _Text) -> _Text:
    return _Text(_capitalize(clause.text) + ".", clause.spans)


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def _pieces(template: str) -> tuple[tuple[str, bool, str], ...]:
    """(literal, whether "a" or "an" follows it, slot) for each slot; the last slot is empty."""
    pieces, end = [], 0
    for match in _SLOT.finditer(template):
        pieces.append((template[end : match.start()], bool(match[1]), match[2]))
        end = match.end()
    return (*pieces, (template[end:], False, ""))


def _fill(template: str, **slots: _Text) -> _Text:
    parts: list[str] = []
    spans: list[tuple[int, int, str]] = []
    length = 0
    for literal, indefinite, slot in _pieces(template):
        value = slots[slot] if slot else _Text("")
        if indefinite:
            # By letter is enough here; "u" is left out for "a Uralic language".
            initial = (value.initial or value.text[0]).lower()
            literal += "an " if initial in "aeio" else "a "
        offset = length + len(literal)
        spans += [(start + offset, end + offset, entity) for start, end, entity in value.spans]
        parts += (literal, value.text)
        length = offset + len(value.text)
    return _Text("".join(parts), spans)
