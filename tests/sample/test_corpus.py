"""The sample corpus: true facts, linked text, a long tail, and questions the text cannot leak."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from trelm_ds.errors import DataError
from trelm_ds.sample.corpus import sample_corpus
from trelm_ds.sample.facts import Facts, _read_table, load_facts
from trelm_ds.sample.templates import DISTRACTORS, RELATIONS

SLOT = re.compile(r"(?:a\(n\) )?\{\w\}")


@pytest.fixture(scope="module")
def corpus():
    return sample_corpus()


@pytest.fixture(scope="module")
def co_mentions(corpus):
    """Number of training documents that mention both of two entities, and any held-out one."""
    train, anywhere = Counter(), set()
    for document in corpus.documents:
        entities = sorted({entity for _, _, entity in document.spans})
        pairs = {(a, b) for i, a in enumerate(entities) for b in entities[i:]}
        anywhere |= pairs
        if not document.heldout:
            train.update(pairs)
    return train, anywhere


def pair_of(triple):
    return tuple(sorted((triple[0], triple[2])))


def sentences_of(text):
    return [s if s.endswith(".") else s + "." for s in text.split(". ")]


def test_is_large_enough(corpus):
    assert len(corpus.documents) == 6000
    assert len(corpus.graph.entities) >= 800
    assert len(corpus.graph.relations) >= 12
    assert len(corpus.graph.triples) >= 2500
    assert min(Counter(r for _, r, _ in corpus.graph.triples).values()) >= 20


def test_graph_is_consistent(corpus):
    graph = corpus.graph
    assert len(set(graph.triples)) == len(graph.triples)
    assert {end for h, _, t in graph.triples for end in (h, t)} == set(graph.entities)
    assert {relation for _, relation, _ in graph.triples} == set(graph.relations)
    assert all(head != tail for head, _, tail in graph.triples)
    borders = {(h, t) for h, r, t in graph.triples if r == "borders"}
    assert borders == {(t, h) for h, t in borders}


def test_aliases_name_one_entity(corpus):
    surfaces = Counter()
    for entity in corpus.graph.entities.values():
        surfaces.update(name.lower() for name in (entity.name, *entity.aliases))
    for entity in corpus.graph.entities.values():
        assert all(surfaces[alias.lower()] == 1 for alias in entity.aliases), entity


def test_every_span_is_a_name_of_its_entity(corpus):
    by_alias = 0
    mentions = 0
    for document in corpus.documents:
        end_of_last = 0
        for start, end, identifier in document.spans:
            assert end_of_last <= start < end
            end_of_last = end
            entity = corpus.graph.entities[identifier]
            text = document.text[start:end]
            names = (entity.name, *entity.aliases)
            # The first letter of a sentence is a capital.
            assert text in names or text in [n[0].upper() + n[1:] for n in names], (text, entity)
            mentions += 1
            by_alias += text[1:] != entity.name[1:]
    assert 0.01 < by_alias / mentions < 0.3


def test_articles(corpus):
    text = " ".join(document.text for document in corpus.documents)
    assert "flows through the the" not in text
    assert re.search(r"\bthe Netherlands\b", text)
    assert re.search(r"\bthe (lion|tiger)\b", text)
    assert not re.search(r"\b(in|borders|from) Netherlands\b", text)
    assert not re.search(r"\ba (actinide|oratorio|economist|insect)\b", text)
    assert not re.search(r"\ban (Uralic|mammal|novel)\b", text)


def test_documents_are_short_texts(corpus):
    lengths = [len(document.text.split()) for document in corpus.documents]
    assert 12 < sum(lengths) / len(lengths) < 20
    assert sum(8 <= n <= 30 for n in lengths) / len(lengths) > 0.95
    assert {len(sentences_of(document.text)) for document in corpus.documents} == {2}
    assert len({document.doc for document in corpus.documents}) == len(corpus.documents)


def test_some_sentences_hold_a_distractor(corpus):
    sentences = [s for d in corpus.documents if not d.heldout for s in sentences_of(d.text)]
    pieces = [
        re.compile(".+".join(map(re.escape, SLOT.split(t))), re.IGNORECASE) for t in DISTRACTORS
    ]
    share = sum(any(p.search(s) for p in pieces) for s in sentences[:4000]) / 4000
    assert 0.03 < share < 0.08


@pytest.mark.parametrize("name", RELATIONS)
def test_relation_has_its_templates(name):
    relation = RELATIONS[name]
    assert len(set(relation.train)) >= 6
    assert len(set(relation.heldout)) >= 2
    assert not set(relation.train) & set(relation.heldout)
    for template in (*relation.train, *relation.heldout):
        assert sorted(re.findall(r"\{\w\}", template)) == ["{h}", "{t}"]


def test_heldout_templates_are_never_in_the_text(corpus):
    text = "\n".join(document.text for document in corpus.documents).lower()
    for relation in RELATIONS.values():
        for template in relation.heldout:
            literal = max(SLOT.split(template), key=len).lower()
            assert len(literal) > 8
            assert literal not in text, template


def test_graph_only_facts_are_never_told(corpus, co_mentions):
    train, anywhere = co_mentions
    silent = {triple for triple in corpus.graph.triples if pair_of(triple) not in anywhere}
    assert 0.07 < len(silent) / len(corpus.graph.triples) < 0.09
    told_rarely = [t for t in corpus.graph.triples if t not in silent and train[pair_of(t)] < 3]
    assert told_rarely == []
    for probe in corpus.probes:
        fact = (probe.subject, probe.relation, probe.object)
        assert probe.graph_only == (fact in silent)
    # Both ends stay known from other sentences.
    mentioned = {end for pair in train for end in pair}
    assert {end for h, _, t in silent for end in (h, t)} <= mentioned


def test_frequencies_have_a_long_tail(corpus):
    subjects = {head for head, _, _ in corpus.graph.triples}
    mentions = Counter(e for d in corpus.documents if not d.heldout for *_, e in d.spans)
    counts = sorted((mentions[subject] for subject in subjects), reverse=True)
    total = sum(counts)
    assert sum(counts[: len(counts) // 10]) > 0.4 * total
    assert sum(counts[len(counts) // 2 :]) < 0.2 * total
    assert counts[-1] >= 1


def test_heldout_sentences_are_new(corpus):
    heldout = [d for d in corpus.documents if d.heldout]
    assert len(heldout) == pytest.approx(0.03 * len(corpus.documents), rel=0.1)
    assert all(d.heldout is False for d in corpus.documents if d not in heldout)
    train = {s for d in corpus.documents if not d.heldout for s in sentences_of(d.text)}
    assert train.isdisjoint(s for d in heldout for s in sentences_of(d.text))


def test_probes_are_cloze_questions(corpus):
    facts = set(corpus.graph.triples)
    for probe in corpus.probes:
        assert (probe.subject, probe.relation, probe.object) in facts
        assert probe.text.count("[MASK]") == 1
        assert probe.answer.isalpha()
        entity = corpus.graph.entities[probe.object]
        assert probe.answer in (entity.name, *entity.aliases)
        rest = re.findall(r"\w+", probe.text.replace("[MASK]", "").lower())
        assert probe.answer.lower() not in rest
    assert len({probe.text for probe in corpus.probes}) == len(corpus.probes)
    by_set = Counter((probe.set, probe.graph_only) for probe in corpus.probes)
    assert by_set["template", False] >= 800
    assert by_set["context", False] >= 250
    assert by_set["template", True] >= 80
    assert by_set["context", True] >= 20
    assert {probe.relation for probe in corpus.probes} == set(corpus.graph.relations)


def test_template_probes_use_heldout_wording_and_context_probes_training_wording(corpus):
    for probe in corpus.probes:
        relation = RELATIONS[probe.relation]
        templates = relation.heldout if probe.set == "template" else relation.train
        others = relation.train if probe.set == "template" else relation.heldout
        assert any(literals_in(template, probe.text) for template in templates)
        assert probe.set == "template" or not any(literals_in(t, probe.text) for t in others)


def literals_in(template, text):
    return all(piece.lower() in text.lower() for piece in SLOT.split(template) if piece)


def test_context_probes_are_not_in_the_text(corpus):
    told = {s.lower() for d in corpus.documents for s in sentences_of(d.text)}
    for probe in corpus.probes:
        if probe.set == "context":
            sentence = next(s for s in sentences_of(probe.text) if "[MASK]" in s)
            assert sentence.replace("[MASK]", probe.answer).lower() not in told


def test_several_right_answers_are_the_exception(corpus):
    tails = defaultdict(set)
    for head, relation, tail in corpus.graph.triples:
        tails[head, relation].add(tail)
    several = sum(len(tails[p.subject, p.relation]) > 1 for p in corpus.probes)
    assert several < 0.15 * len(corpus.probes)


def digest(seed, num_documents):
    corpus = sample_corpus(seed, num_documents)
    return hashlib.sha256(repr(corpus).encode()).hexdigest()


def test_depends_on_its_arguments_alone(repo):
    here = digest(3, 300)
    assert here == digest(3, 300)
    assert here != digest(4, 300)
    code = (
        "import hashlib; from trelm_ds.sample.corpus import sample_corpus as s; "
        "print(hashlib.sha256(repr(s(3, 300)).encode()).hexdigest())"
    )
    # Another hash seed orders sets of strings differently.
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == here


def test_small_corpus_asks_only_about_told_or_graph_only_facts():
    small = sample_corpus(0, 200)
    told = set()
    for document in small.documents:
        entities = {entity for *_, entity in document.spans}
        told |= {tuple(sorted((a, b))) for a in entities for b in entities}
    for probe in small.probes:
        assert probe.graph_only != (pair_of((probe.subject, "", probe.object)) in told)
    assert len(small.documents) == 200
    assert len(sample_corpus(0, 2).documents) == 2
    with pytest.raises(DataError, match="at least 2"):
        sample_corpus(0, 1)


@pytest.mark.parametrize(
    "fact",
    [
        ("country/france", "capital", "city/paris"),
        ("country/japan", "currency", "currency/yen"),
        ("country/brazil", "official_language", "language/portuguese"),
        ("country/spain", "borders", "country/portugal"),
        ("city/lyon", "located_in", "country/france"),
        ("river/danube", "flows_into", "water/black-sea"),
        ("mountain/kilimanjaro", "mountain_in", "country/tanzania"),
        ("element/gold", "symbol", "symbol/au"),
        ("element/iron", "period", "period/fourth"),
        ("element/radium", "discovered_by", "person/marie-curie"),
        ("person/albert-einstein", "born_in", "city/ulm"),
        ("person/charles-darwin", "field", "field/biology"),
        ("book/hamlet", "author", "person/william-shakespeare"),
        ("book/candide", "written_in", "language/french"),
        ("musical_work/aida", "composed_by", "person/giuseppe-verdi"),
        ("painting/guernica", "painted_by", "person/pablo-picasso"),
        ("moon/titan", "moon_of", "planet/saturn"),
        ("invention/telephone", "invented_by", "person/alexander-graham-bell"),
        ("deity/zeus", "roman_equivalent", "deity/jupiter"),
        ("animal/octopus", "animal_class", "animal_class/mollusc"),
        ("language/finnish", "language_family", "family/uralic"),
        ("company/lego", "headquarters", "city/billund"),
    ],
)
def test_states_well_known_facts(fact):
    assert fact in load_facts().triples


def test_other_relations_can_be_asked_for(corpus):
    people = ("occupation", "nationality", "borders")
    other = sample_corpus(0, 300, people)
    assert set(other.graph.relations) == set(people)
    assert {relation for _, relation, _ in other.graph.triples} == set(people)
    assert "person/charles-darwin" in other.graph.entities
    assert "person/charles-darwin" not in corpus.graph.entities
    assert any("Darwin" in document.text for document in other.documents)
    everything = sample_corpus(0, 300, RELATIONS)
    assert set(everything.graph.triples) == set(load_facts().triples)


def test_heldout_wording_uses_words_of_the_training_text(corpus):
    """A model from scratch cannot read a question whose words it has never seen."""
    text = " ".join(d.text for d in corpus.documents if not d.heldout).lower()
    known = set(re.findall(r"[a-z]+", text))
    unknown = {
        name: [w for t in RELATIONS[name].heldout for w in re.findall(r"[a-z]+", SLOT.sub(" ", t))]
        for name in corpus.graph.relations
    }
    unknown = {name: set(w.lower() for w in words) - known for name, words in unknown.items()}
    assert all(len(words) <= 1 for words in unknown.values()), unknown


def test_functional_relations_have_one_tail():
    triples = load_facts().triples
    tails = defaultdict(set)
    for head, relation, tail in triples:
        tails[head, relation].add(tail)
    functional = """capital continent currency region_capital region_of symbol period category
        state_of_matter occupation nationality born_in died_in field movement author
        literary_form written_in composed_by musical_form painted_by kept_in moon_of mythology
        roman_equivalent animal_class language_family script instrument_family company_of
        headquarters industry dish_of university_in landmark_in flows_into part_of_range""".split()
    for (head, relation), values in tails.items():
        assert len(values) == 1 or relation not in functional, (head, relation, values)
    # Names that are one to one.
    for relation in ("symbol", "roman_equivalent"):
        values = [t for _, r, t in triples if r == relation]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("country\tcapital:city\nFrance", "odd.tsv:2: 1 cells, expected 2"),
        ("country\tcapital\nFrance\tParis", "'capital' is not relation:type"),
        ("country\tborders:country\nFrance\tthe France", "country/france is written both"),
    ],
)
def test_malformed_table_is_named(table, message):
    with pytest.raises(DataError, match=re.escape(message)):
        _read_table("odd.tsv", table, Facts(), set(), set())


def test_surnames_are_aliases_only_where_unambiguous():
    entities = load_facts().entities
    names = {i: [s.text for s in e.surfaces] for i, e in entities.items()}
    assert names["person/leo-tolstoy"] == ["Leo Tolstoy", "Tolstoy"]
    assert names["person/emily-bronte"] == ["Emily Bronte"]  # two sisters
    assert names["person/jack-london"] == ["Jack London"]  # a city
    assert names["person/alexander-the-great"] == ["Alexander the Great"]
