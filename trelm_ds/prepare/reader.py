"""What every corpus reader is given, and the split they share with the builder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trelm_ds.errors import ConfigError
from trelm_ds.prepare.raw import RawGraph, chosen


@dataclass(frozen=True)
class ReaderOptions:
    """Settings of a preparation that matter while reading.

    Attributes:
        heldout_fraction: share of documents whose text is held out.
        graph_only_fraction: share of subjects whose facts only the graph may teach (trex).
        text_only_fraction: share of the other subjects whose facts only the texts may (trex).
        limit: stop after so many documents (trex: facts); None reads everything.
        vocab: ``--vocab``; the original ERNIE files need it to decode their token ids.
        graph: the merged graph of ``--graph``; linking readers find mentions by its names.
    """

    seed: int = 42
    heldout_fraction: float = 0.05
    graph_only_fraction: float = 0.1
    text_only_fraction: float = 0.0
    limit: int | None = None
    vocab: Path | None = None
    graph: RawGraph = field(default_factory=RawGraph)

    def __post_init__(self):
        for name in ("heldout_fraction", "graph_only_fraction", "text_only_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be in [0, 1)")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be at least 1")
        if not -(2**63) <= self.seed < 2**63:  # what torch takes
            raise ConfigError(f"--seed {self.seed}: must be in [-2^63, 2^63)")

    def is_heldout(self, doc: str) -> bool:
        """Whether a document's text is held out; a function of its name and the seed."""
        return chosen(doc, self.heldout_fraction, self.seed, "heldout")

    def is_graph_only(self, subject: str) -> bool:
        """Whether no training text may state this subject's facts."""
        return chosen(subject, self.graph_only_fraction, self.seed, "graph_only")

    def is_text_only(self, subject: str) -> bool:
        """Whether this subject's facts are withheld from the graph."""
        return not self.is_graph_only(subject) and chosen(
            subject, self.text_only_fraction, self.seed, "text_only"
        )
