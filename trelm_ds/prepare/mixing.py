"""Several corpora as one: their texts, graphs and probes, and no leak of what one holds back.

The corpora are of one Wikipedia: a sentence that one holds out may stand in another, and so may a
fact that only its graph is to teach. So every line of a text is shown to the other corpora, and
left out if one of them refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from trelm_ds.prepare.raw import RawCorpus, RawDocument, RawGraph


def mix(corpora: Sequence[RawCorpus]) -> RawCorpus:
    """One corpus of all; of one alone, that one.

    Names of entities and relations are those of the first corpus that has them, and so are the
    candidates of probes.

    Args:
        corpora: with different names; their documents are consumed in this order.
    """
    if len(corpora) == 1:
        return corpora[0]
    whole = RawCorpus("+".join(corpus.name for corpus in corpora), (), RawGraph())
    whole.candidates = next((c.candidates for c in corpora if c.candidates), [])
    whole.documents = _documents(corpora, whole)
    return whole


def _documents(corpora: Sequence[RawCorpus], whole: RawCorpus) -> Iterator[RawDocument]:
    for corpus in corpora:
        others = [c.refuses for c in corpora if c is not corpus and c.refuses is not None]
        for document in corpus.documents:
            if others:
                _leave_out(document, others, whole)
            yield document
        # Only now: a reader may find its graph, probes and counts on the way.
        whole.graph.merge(corpus.graph)
        whole.probes += corpus.probes
        whole.counts.update({f"{corpus.name}: {why}": n for why, n in corpus.counts.items()})


def _leave_out(
    document: RawDocument, others: Sequence[Callable[[str], bool]], whole: RawCorpus
) -> None:
    """Takes the refused lines out of a document, and the mentions that do not lie in one kept."""
    lines, spans = [], []
    begin = length = 0
    for line in document.text.split("\n"):
        end = begin + len(line)
        if any(refuses(line) for refuses in others):
            whole.counts["lines_refused"] += 1
        else:
            moved = length - begin
            spans += [
                (start + moved, stop + moved, entity)
                for start, stop, entity in document.spans
                if begin <= start and stop <= end
            ]
            lines.append(line)
            length += len(line) + 1
        begin = end + 1
    if len(spans) < len(document.spans):
        whole.counts["mentions_left_out"] += len(document.spans) - len(spans)
    document.text, document.spans = "\n".join(lines), spans
