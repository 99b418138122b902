"""Miniature source files in the original formats, for the tests of the readers and the builder."""

import gzip
import json
from pathlib import Path

RELATIONS = [
    {"relation": "P19", "template": "[X] was born in [Y] .", "label": "place of birth"},
    {"relation": "P27", "template": "[X] is [Y] citizen .", "label": "country of citizenship"},
]
COUNTRIES = {"France": "Q142", "Spain": "Q29", "Chile": "Q298", "Japan": "Q17"}
CITIES = {"Paris": "Q90", "Lyon": "Q456", "Madrid": "Q2807", "Santiago": "Q2887", "Tokyo": "Q1490"}


def write_lines(path: Path, rows) -> Path:
    """JSON objects, lists of columns or plain lines; gzip by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row
        if isinstance(row, str)
        else json.dumps(row)
        if isinstance(row, dict)
        else "\t".join(row)
        for row in rows
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def trex_fact(relation, subject, object_, *evidences) -> dict:
    """Ends as (id, label), evidences as (masked sentence, subject and object surfaces)."""
    return {
        "uuid": "-",
        "sub_uri": subject[0],
        "sub_label": subject[1],
        "predicate_id": relation,
        "obj_uri": object_[0],
        "obj_label": object_[1],
        "evidences": [
            {"masked_sentence": m, "sub_surface": s, "obj_surface": o} for m, s, o in evidences
        ],
    }


def write_trex(folder: Path, facts, words=("Paris", "Lyon", "French")) -> Path:
    """A folder as of LAMA."""
    write_lines(folder / "relations.jsonl", RELATIONS)
    write_lines(folder / "common_vocab_cased.txt", words)
    by_relation: dict[str, list] = {"P19": [], "P27": []}
    for fact in facts:
        by_relation.setdefault(fact["predicate_id"], []).append(fact)
    for relation, rows in by_relation.items():
        write_lines(folder / "trex" / f"{relation}.jsonl.gz", rows)
    return folder


def own_corpus(documents: int = 60) -> list[dict]:
    """``jsonl`` records about countries and cities, each with both linked.

    Every tenth is held out; of the first twelve, pairs share a rare word.
    """
    rare = ["amber", "basil", "cedar", "delta", "ember", "fjord"]
    rows = []
    for i in range(documents):
        city, city_id = list(CITIES.items())[i % 5]
        country, country_id = list(COUNTRIES.items())[i % 4]
        word = rare[i // 2] if i < 12 else "again"
        text = f"{city} was visited by number{i % 7} friends who went on to {country} {word} ."
        start = text.index(country)
        spans = [[0, len(city), city_id], [start, start + len(country), country_id]]
        rows.append({"id": f"d{i}", "text": text, "spans": spans, "heldout": i % 10 == 9})
    return rows


def write_own_graph(folder: Path) -> Path:
    """A ``tsv`` graph folder of the same names."""
    triples = [
        ("Q90", "P17", "Q142"),
        ("Q456", "P17", "Q142"),
        ("Q2807", "P17", "Q29"),
        ("Q2887", "P17", "Q298"),
        ("Q1490", "P17", "Q17"),
        ("Q142", "P36", "Q90"),
        ("Q142", "P36", "Q90"),
        ("Q9001", "P17", "Q9002"),
    ]
    write_lines(folder / "triples.tsv", triples)
    names = [(entity, name, f"the {name}") for name, entity in (CITIES | COUNTRIES).items()]
    names += [("Q9001", "Nowhere", ""), ("Q9002", "Never", "")]
    write_lines(folder / "entities.tsv", names)
    write_lines(folder / "relations.tsv", [("P17", "country"), ("P36", "capital")])
    return folder
