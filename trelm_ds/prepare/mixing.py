"""Several corpora as one: their texts, graphs and probes, and no leak of what the first holds back.

The corpora are of one Wikipedia: a sentence that the first holds out may stand in another, and so
may a fact that only its graph is to teach. So it is shown every document of the others, and the
lines that it refuses are left out. The others train only, because nobody would refuse copies of
their own held-out texts in each other: what they mark as held out is left out too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from trelm_ds.errors import ConfigError
from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph


def mix(corpora: Sequence[RawCorpus]) -> RawCorpus:
    """One corpus of all; of one alone, that one.

    Names of entities and relations are those of the first corpus that has them, and so are the
    candidates of probes.

    Args:
        corpora: with different names; their documents are consumed in this order.
    Raises:
        ConfigError: the first cannot tell what it must be kept apart from.
    """
    first, *others = corpora
    if not others:
        return first
    if first.refuses is None:
        raise ConfigError(
            f"--also: {first.name} cannot keep its held-out texts out of other corpora; begin with "
            "trex"
        )
    whole = RawCorpus("+".join(corpus.name for corpus in corpora), (), RawGraph())
    whole.candidates = next((c.candidates for c in corpora if c.candidates), [])
    whole.documents = _documents(corpora, whole)
    return whole


def _documents(corpora: Sequence[RawCorpus], whole: RawCorpus) -> Iterator[RawDocument]:
    for corpus in corpora:
        for document in corpus.documents:
            if corpus is not corpora[0]:
                if document.heldout:
                    whole.counts["heldout_left_out"] += 1
                    continue
                document.heldout = False
                _leave_out(document, corpora[0].refuses(document), whole.counts)
            yield document
        # Only now: a reader may find its graph, probes and counts on the way.
        whole.graph.merge(corpus.graph)
        whole.probes += corpus.probes
        whole.counts.update({f"{corpus.name}: {why}": n for why, n in corpus.counts.items()})


def _leave_out(document: RawDocument, refused: set[int], counts: Counter[str]) -> None:
    """Takes lines out of a document, and the mentions that do not lie in one that is kept."""
    if not refused:
        return
    kept, spans, length = [], [], 0
    for number, (begin, line) in enumerate(lines(document.text)):
        if number in refused:
            continue
        moved, end = length - begin, begin + len(line)
        spans += [
            (start + moved, stop + moved, entity)
            for start, stop, entity in document.spans
            if begin <= start and stop <= end
        ]
        kept.append(line)
        length += len(line) + 1
    counts["lines_refused"] += len(refused)
    counts["mentions_left_out"] += len(document.spans) - len(spans)
    document.text, document.spans = "\n".join(kept), spans


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(place of its first character, line) of every line."""
    begin = 0
    for line in text.split("\n"):
        yield begin, line
        begin += len(line) + 1
