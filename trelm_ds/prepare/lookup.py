"""The command line of ``launch/lookup.py``: what a prepared folder knows about a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trelm_ds.arguments import LineParser
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.schema import ROLE_HEAD
from trelm_ds.data.shards import load_manifest
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import EXIT_DONE, ConfigError, TrelmError, report
from trelm_ds.knowledge.linker import MAX_MENTION_WORDS, EntityLinker


def look_up(text: str, folder: Path, max_triples: int = 10) -> list[dict]:
    """Entities of a text, with their triples.

    The whole text is tried as one mention, approximately too, if it is short enough for one;
    otherwise, or if it is none, its mentions are found by exact name.

    Returns:
        One mapping per mention, ready for JSON; ``distance`` is 0 for an exact name, ``triples``
        holds at most ``max_triples`` of the entity's ``degree`` as (head, relation, tail) names.

    Raises:
        DataError: the folder cannot be read.
    """
    load_manifest(folder)  # its absence says best that this is no prepared folder
    linker = EntityLinker.load(folder)
    whole = linker.link([text])[0] if len(text.split()) <= MAX_MENTION_WORDS else None
    if whole is not None:
        found = [(0, len(text), whole.entity, whole.distance)]
    else:
        found = [(start, end, entity, 0.0) for start, end, entity in linker.find(text)]
    graph, tables = KnowledgeGraph.load(folder), KnowledgeTables.load(folder)
    names, relations = graph.entity_names, graph.relation_names
    rows = []
    for start, end, entity, distance in found:
        triples = []
        for i in range(min(max_triples, graph.degree(entity))):
            role, relation, other = graph.edge(entity, i)
            head, tail = (entity, other) if role == ROLE_HEAD else (other, entity)
            triples.append([names[head], relations[relation], names[tail]])
        rows.append(
            {
                "start": start,
                "end": end,
                "mention": text[start:end],
                "distance": round(distance, 4),
                "entity": entity,
                "id": graph.entity_ids[entity],
                "name": names[entity],
                "description": graph.entity_descriptions[entity],
                "mentions_in_train": int(tables.entity_frequency[entity]),
                "degree": graph.degree(entity),
                "triples": triples,
            }
        )
    return rows


def _format(row: dict) -> str:
    match = "exact" if not row["distance"] else f"{row['distance']:.0%} of the letters differ"
    lines = [
        f"{row['mention']!r} -> {row['id']} {row['name']} ({match}; "
        f"{row['mentions_in_train']} mentions, {row['degree']} triples)"
    ]
    if row["description"]:
        lines.append(f"    {row['description']}")
    lines += [f"    {head} | {relation} | {tail}" for head, relation, tail in row["triples"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The script.

    Returns:
        The exit code.
    """
    parser = LineParser(
        prog="launch/lookup.py",
        description="Entities and triples that a prepared data folder has for a mention or a text.",
    )
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="prepared folder")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="triples per entity at most")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    try:
        args = parser.parse_args(argv)
        if args.k < 0:
            raise ConfigError(f"--k {args.k}: must not be negative")
        rows = look_up(args.text, args.data, args.k)
    except (TrelmError, OSError) as error:
        return report(error)
    if args.json:
        result = {"text": args.text, "entities": rows}
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(map(_format, rows)) + "\n" if rows else "no entity found\n")
    return EXIT_DONE
