"""Reader ``wikipedia``: a Wikipedia dump as WikiExtractor writes it with its links kept.

``--input`` has two parts, in any order:

- the output folder of ``WikiExtractor --links``, or files of it: ``AA/wiki_00``, plain, ``.gz`` or
  ``.bz2``, with ``--json`` or in ``<doc id= url= title=>`` form, where links are
  ``<a href="Page%20title">surface</a>``. Reserved characters are HTML entities unless
  ``--no-html-safe`` was given: both are read.
- a table of titles, ``NAME.tsv`` or ``anchor2id.txt`` (ERNIE's), plain or compressed: ``title<TAB>Q
  id``, titles with blanks, underscores or percent signs. Dumps have it as the page property
  ``wikibase_item``; titles that redirect need lines of their own.

A link is a mention of the entity of its page, with the letters that follow it (``Pole</a>s``); one
whose page has no id is text. An article links a page at its first mention alone, so the surfaces
that it has linked to one entity, and its own title, are mentions where they stand again outside
links: whole words, by the rules of ``linker.longest_matches``. Names and triples come from
``--graph``; entities that it does not know are named by their titles.

The table is held in memory: about 200 bytes a title. The articles are not; they take about a second
per million characters.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from trelm_ds.errors import DataError
from trelm_ds.knowledge.linker import longest_matches, normalize
from trelm_ds.prepare.files import (
    MAX_LINE_CHARACTERS,
    bare_name,
    check_length,
    first_line,
    get,
    is_wikidata_id,
    iter_columns,
    iter_jsonl,
    iter_lines,
    once,
)
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph, page_name
from trelm_ds.prepare.reader import ReaderOptions

# Reference, surface, and what MediaWiki calls the trail.
_LINK = re.compile(r'<a href="([^"<>]*)">((?:(?!<a ).)*?)</a>(\w*)', re.DOTALL)
_TAG = re.compile(r'<a href="[^"<>]*">|</a>')  # what is left around a link inside another
_ESCAPED_LINK = "&lt;a href="
_DOC = re.compile(r'<doc id="([^"]*)"(?: revid="[^"]*")? url="[^"]*" title="(.*)">\s*')
_FILE = re.compile(r"wiki_\d+")
_QUOTES = "\"'“”‘’«» \n"
_CORE = re.compile(r"\w(?:.*\w)?", re.DOTALL)  # linear, which taking \W+$ off is not

Article = tuple[str, str, str, str]  # file and line, id, title, text


def read_wikipedia(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    """Reads the titles whole and the articles as they are asked for; one document each."""
    articles, tables = _sort_out(inputs)
    corpus = RawCorpus("wikipedia", (), RawGraph())
    linker = _Linker(_titles(tables), corpus, options.graph)
    found = itertools.chain.from_iterable(map(_articles, articles))
    documents = (linker.document(*article) for article in found)
    corpus.documents = itertools.islice(documents, options.limit)
    return corpus


def _sort_out(inputs: list[Path]) -> tuple[list[Path], list[Path]]:
    """Files of articles and of titles."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    names = [(bare_name(path), path) for path in files]
    articles = once([path for name, path in names if _FILE.fullmatch(name)])
    tables = once([p for name, p in names if name.endswith(".tsv") or name == "anchor2id.txt"])
    if not articles:
        raise DataError("wikipedia: no wiki_* file of WikiExtractor among the --input")
    if not tables:
        raise DataError(
            "wikipedia: no table of titles (NAME.tsv or anchor2id.txt: title, tab, Q id) among "
            "the --input"
        )
    return articles, tables


def _title(reference: str) -> str:
    """A page's title as MediaWiki has it: blanks for underscores, a capital first, no section.

    Dumps are XML, and WikiExtractor quotes what it reads there: ``AT%26amp%3BT``, and twice where
    the editor wrote an entity.
    """
    text = html.unescape(html.unescape(unquote(reference)))
    title = " ".join(text.partition("#")[0].replace("_", " ").split())
    return title[:1].upper() + title[1:]


def _titles(tables: list[Path]) -> dict[str, str]:
    titles: dict[str, str] = {}
    for table in tables:
        for _, (title, entity, *_) in iter_columns(table, 2):
            title = _title(title)
            if title and is_wikidata_id(entity.strip()):  # ERNIE's has #UNK# too, others a header
                titles.setdefault(title, entity.strip())
    if not titles:
        raise DataError(f"{tables[0]}: no line of a title, a tab and a Wikidata id")
    return titles


def _articles(path: Path) -> Iterator[Article]:
    """The articles of a file of either form, as its first character tells."""
    if first_line(path).startswith("{"):
        for where, record in iter_jsonl(path):
            page, title, text = (get(record, key, str, where) for key in ("id", "title", "text"))
            yield where, page, html.unescape(title), text
    else:
        yield from _doc_elements(path)


def _doc_elements(path: Path) -> Iterator[Article]:
    where, page, title, lines, length = "", None, "", [], 0
    for here, line in iter_lines(path):
        if page is None:
            if not line.strip():
                continue
            if not (begin := _DOC.fullmatch(line)):
                raise DataError(f"{here}: expected a JSON object or <doc id= url= title=>")
            where, page, title, lines, length = here, begin[1], html.unescape(begin[2]), [], 0
        elif line.strip() == "</doc>":
            if lines and html.unescape(lines[0]).strip() == title:
                lines = lines[1:]  # the title again
            yield where, page, title, "\n".join(lines)
            page = None
        else:
            lines.append(line)
            length += len(line)
            if length > MAX_LINE_CHARACTERS:  # as of an article on one line
                raise DataError(f"{where}: longer than {MAX_LINE_CHARACTERS} characters")
    if page is not None:
        raise DataError(f"{where}: the article does not end: the file is cut short")


class _Linker:
    """Titles to entities, and articles to documents.

    Args:
        titles: by page, its entity.
        corpus: gets the counts, and the titles as names of entities that ``known`` lacks.
        known: the graph of ``--graph``.
    """

    def __init__(self, titles: dict[str, str], corpus: RawCorpus, known: RawGraph):
        self._titles = titles
        self._corpus = corpus
        self._known = known

    def _entity(self, reference: str) -> str | None:
        title = _title(reference)
        entity = self._titles.get(title)
        if entity is not None and not self._known.has_name(entity):
            self._corpus.graph.name_entity(entity, page_name(title))
        return entity

    def document(self, where: str, page: str, title: str, text: str) -> RawDocument:
        """The article as plain text, its links and their repetitions as mentions.

        Raises:
            DataError: the article has no id, or is too long.
        """
        if not page:
            raise DataError(f"{where}: the article has no id")
        if _ESCAPED_LINK in text or not _LINK.search(text):
            text = html.unescape(text)
        document, parts, length, begin = RawDocument(page, ""), [], 0, 0
        links: list[tuple[int, int]] = []  # of every one: what has no id is nobody else either
        owners: dict[str, str | None] = {}  # None: of more than one entity

        for link in _LINK.finditer(text):
            reference, surface, trail = link.groups()
            whole = surface + trail
            parts += [_TAG.sub("", text[begin : link.start()]), whole]
            start = length + len(parts[-2])
            begin, length = link.end(), start + len(whole)
            links.append((start, length))
            if not surface.strip(_QUOTES):
                continue
            entity = self._entity(reference)
            self._corpus.counts["link_without_id" if entity is None else "link"] += 1
            if entity is not None:
                for name in {_key(surface), _key(whole)}:
                    owners[name] = entity if owners.get(name, entity) == entity else None
                start += len(whole) - len(whole.lstrip(_QUOTES))
                document.spans.append((start, start + len(whole.strip(_QUOTES)), entity))
        document.text = "".join([*parts, _TAG.sub("", text[begin:])])
        check_length(page, document.text)
        if entity := self._entity(title):  # whatever the links say
            owners[_key(page_name(title))] = document.about = entity
        names = {name: entity for name, entity in owners.items() if name and entity is not None}
        repeated = _repeated(document.text, names, links)
        self._corpus.counts["mention_repeated"] += len(repeated)
        document.spans += repeated
        return document


def _key(surface: str) -> str:
    """What a surface is compared by: matches begin and end with a letter or digit."""
    core = _CORE.search(surface)
    return normalize(core[0]) if core else ""


def _repeated(
    text: str, owners: dict[str, str], links: list[tuple[int, int]]
) -> list[tuple[int, int, str]]:
    """The places outside links that read like one, or like the title."""
    entities = list(owners.values())
    number = {name: i for i, name in enumerate(owners)}
    again = longest_matches(text, lambda surfaces: [number.get(normalize(s)) for s in surfaces])
    # Links come in the order of the text, and so do the matches.
    ahead, found = iter([*links, (len(text) + 1,) * 2]), []
    left, right = next(ahead)
    for start, end, i in again:
        while right <= start:
            left, right = next(ahead)
        if end <= left:
            found.append((start, end, entities[i]))
    return found
