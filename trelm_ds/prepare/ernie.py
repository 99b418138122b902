"""Reader ``ernie``: the linked Wikipedia articles of ERNIE's (Tsinghua) pre-training.

Two forms, each possibly gzipped:

- ``wiki_token`` and ``wiki_entity``: one article a line, tab-separated: the number of sentences,
  then for each its length and as many items. Items are bert-base-uncased ids in one file and
  Wikidata ids or ``#UNK#`` in the other. The ids need the vocabulary: ``--vocab``.
- ``articles.jsonl``: the same decoded, ``{"article": 0, "sentences": [{"tokens": ["ana", "##rch"],
  "entities": [[0, 2, "Q6199"]]}]}`` with [start, end) over word pieces.

Words that were outside the vocabulary (``[UNK]``) are left out. In ``wiki_entity`` only the first
piece of a linked word carries the id: its continuation pieces are added, and neighbouring words
with the same id become one mention. The files name no entity: names come from ``--graph`` or else
from the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.errors import ConfigError, DataError
from trelm_ds.prepare.files import bare_name, check_id, find_file, get, iter_jsonl, iter_lines
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph
from trelm_ds.prepare.reader import ReaderOptions

_UNLINKED = "#UNK#"
_UNKNOWN = "[UNK]"  # a word that was outside ERNIE's vocabulary: nobody knows which
_FORMS = "articles.jsonl, or wiki_token and wiki_entity"

Sentence = tuple[list[str], list[tuple[int, int, str]]]  # word pieces; (start, end, id)


def read_ernie(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads as the documents are asked for; one document per article."""
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if len(inputs) == 1 and inputs[0].is_dir():
        found = [find_file(inputs[0], n) for n in ("articles.jsonl", "wiki_token", "wiki_entity")]
    else:
        named = {bare_name(path): path for path in inputs if path.is_file()}
        found = [named.get(n) for n in ("articles.jsonl", "wiki_token", "wiki_entity")]
    articles, tokens, entities = found
    if articles:
        pieces = _decoded(articles)
    elif tokens and entities:
        pieces = _original(tokens, entities, _vocabulary(options.vocab))
    else:
        raise DataError(f"{', '.join(map(str, inputs))}: ernie needs {_FORMS}")
    documents = (_document(f"article {n}", sentences) for n, sentences in pieces)
    return RawCorpus("ernie", itertools.islice(documents, options.limit), RawGraph())


def _vocabulary(path: Path | None) -> list[str]:
    if path is None:
        raise ConfigError(
            "ernie: wiki_token holds ids; give their vocabulary with --vocab vocab.txt"
        )
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".txt":
        raise ConfigError(f"ernie: --vocab {path}: wiki_token needs BERT's vocab.txt")
    return [word for _, word in iter_lines(file)]


def _items(line: str, where: str) -> list[list[str]]:
    """The sentences of an article."""
    fields = line.split("\t")
    sentences, position = [], 1
    try:
        for _ in range(int(fields[0])):
            length = int(fields[position])
            items = fields[position + 1 : position + 1 + length]
            if length < 0 or len(items) != length:
                raise ValueError
            sentences.append(items)
            position += 1 + length
    except (ValueError, IndexError):
        raise DataError(f"{where}: sentence counts and lengths do not fit the line") from None
    return sentences


def _original(
    tokens: Path, entities: Path, vocabulary: list[str]
) -> Iterator[tuple[int, list[Sentence]]]:
    lines = itertools.zip_longest(iter_lines(tokens), iter_lines(entities))
    for number, (token_line, entity_line) in enumerate(lines):
        if token_line is None or entity_line is None:
            raise DataError(f"{tokens} and {entities}: different numbers of lines")
        where = token_line[0]
        if not token_line[1].strip():
            continue
        sentences = []
        for ids, links in itertools.zip_longest(
            _items(token_line[1], where), _items(entity_line[1], entity_line[0])
        ):
            if ids is None or links is None or len(ids) != len(links):
                raise DataError(f"{where}: does not align with {entity_line[0]}")
            try:
                numbers = [int(i) for i in ids]
                if numbers and min(numbers) < 0:
                    raise ValueError
                pieces = [vocabulary[i] for i in numbers]
            except (ValueError, IndexError):
                raise DataError(
                    f"{where}: a token id is not in the vocabulary of {len(vocabulary)}"
                ) from None
            sentences.append((pieces, _runs(pieces, links, entity_line[0])))
        yield number, sentences


def _runs(pieces: list[str], links: list[str], where: str) -> list[tuple[int, int, str]]:
    """Mentions of a sentence: runs of pieces with one id."""
    carried = []
    for piece, link in zip(pieces, links, strict=True):
        if link == _UNLINKED and piece.startswith("##") and carried:
            link = carried[-1]
        carried.append(link)
    runs, start = [], 0
    for link, group in itertools.groupby(carried):
        end = start + len(list(group))
        if link != _UNLINKED:
            runs.append((start, end, check_id(link, where)))
        start = end
    return runs


def _decoded(path: Path) -> Iterator[tuple[int, list[Sentence]]]:
    for where, record in iter_jsonl(path):
        sentences = []
        for sentence in get(record, "sentences", list, where):
            if not isinstance(sentence, dict):
                raise DataError(f"{where}: a sentence is not a JSON object")
            pieces = get(sentence, "tokens", list, where)
            if not all(isinstance(piece, str) for piece in pieces):
                raise DataError(f"{where}: tokens must be strings")
            mentions = []
            for row in get(sentence, "entities", list, where):
                if not (isinstance(row, list) and len(row) == 3):
                    raise DataError(f"{where}: a mention must be [start, end, id], got {row!r}")
                start, end, entity = row
                inside = isinstance(start, int) and isinstance(end, int)
                if not inside or not 0 <= start < end <= len(pieces):
                    raise DataError(f"{where}: mention {row!r} is outside its {len(pieces)} tokens")
                mentions.append((start, end, check_id(entity, where)))
            sentences.append((pieces, mentions))
        yield get(record, "article", int, where), sentences


def _document(doc: str, sentences: list[Sentence]) -> RawDocument:
    """Words apart by one blank, sentences by a line break; mentions in characters."""
    document = RawDocument(doc, "")
    parts: list[str] = []
    length = 0
    for pieces, mentions in sentences:
        places = []
        begun = False
        for piece in pieces:
            if piece == _UNKNOWN:
                places.append((length, length))
                continue
            if begun and piece.startswith("##") and len(piece) > 2:
                blank, piece = "", piece[2:]
            else:
                blank = " " if begun else "\n" if parts else ""
            begun = True
            parts.append(blank + piece)
            places.append((length + len(blank), length + len(blank) + len(piece)))
            length += len(blank) + len(piece)
        for start, end, entity in mentions:
            known = [place for place in places[start:end] if place[0] < place[1]]
            if known:
                document.spans.append((known[0][0], known[-1][1], entity))
    document.text = "".join(parts)
    return document
