"""Which mentions of a sequence get knowledge, with which triple, and which triples are decoded.

A mention is *selected* when it passes ``injection.selection`` and the cap of K per 128 tokens.
Selected mentions and long-tail words are what matters to a batch. Each of them is *injected* with
probability ``injection.probability``, a mention decoded whatever that draw says. What is injected
is never a target of the MLM: at probability 1 a long-tail word is never predicted at all. With
``decoding.mentions: all`` every other mention that has a triple is decoded too, never injected; its
memory is kept like that of any mention of the batch. All draws depend on (seed, sample, span
number, epoch), so every method sees the same triple at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trelm_ds.config import Config
from trelm_ds.data import rng
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.schema import ROLE_NONE, ROLE_TAIL, Sample
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import DataError

_LOOK_AHEAD = 8  # triples looked at for one with another answer


@dataclass
class SampledMentions:
    """What ``MentionSampler`` chose for one sequence; M mentions in text order, D decoded triples.

    Attributes:
        spans: int64 [M, 2] (left, right exclusive).
        keys: int64 [M] entity or long-tail word.
        injected: bool [M]; the span's input embeddings are replaced.
        role: int64 [M]; 0: by its own token embedding (and memory), 1: the mention is the head of
            the injected triple, 2: the tail.
        relation: int64 [M] of the injected triple, 0 where role is 0.
        other: int64 [M] entity at the triple's other end, 0 where role is 0.
        decode_mention: int64 [D] row of the arrays above.
        decode_relation: int64 [D]; r where the mention is the head, R + r where it is the tail.
        decode_entity: int64 [D] the entity whose name is decoded.
    """

    spans: np.ndarray
    keys: np.ndarray
    injected: np.ndarray
    role: np.ndarray
    relation: np.ndarray
    other: np.ndarray
    decode_mention: np.ndarray
    decode_relation: np.ndarray
    decode_entity: np.ndarray


def no_mentions() -> SampledMentions:
    none = np.zeros(0, dtype=np.int64)
    return SampledMentions(
        none.reshape(0, 2), none, none.astype(bool), none, none, none, none, none, none
    )


class MentionSampler:
    """Applies ``config.injection`` and ``config.decoding`` to sequences.

    Args:
        config: the run's configuration.
        graph: training triples; withheld facts are not among them.
        tables: frequencies, semantic importance and two-hop counts.
    Raises:
        DataError: the selection needs semantic importance and nobody has scored it.
    """

    def __init__(self, config: Config, graph: KnowledgeGraph, tables: KnowledgeTables):
        self._config = config
        self._graph = graph
        self._tables = tables
        self._seed = config.train.seed
        # Without any use for mentions (plain MLM) none is looked up.
        self.active = config.uses_mentions
        if self.active and tables.importance is None:
            # Also for the selections by frequency: SI ranks the mentions under the cap.
            raise DataError(
                f"{tables.folder}/tables/importance.npy not found: score the mentions first, "
                f"python launch/prepare.py score"
            )
        frequency = np.asarray(tables.entity_frequency)
        seen = frequency[frequency > 0]
        # Over the entities the corpus mentions: a graph's many unseen ones would only lower it.
        self._mean_frequency = float(seen.mean()) if len(seen) else 0.0

    # -- selection --------------------------------------------------------------------------------

    def _scores(self, keys: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """float64 [m]: what mentions are ranked by, SI (Eq. 1) or DKPLM's KLT."""
        if self._config.injection.selection != "klt":
            return importance
        rare = self._tables.entity_frequency[keys] < self._mean_frequency
        return rare * importance * np.log1p(self._tables.two_hop[keys])

    def _passes(self, keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """bool [m]: the selection's rule, before the cap."""
        settings = self._config.injection
        if settings.selection == "importance":
            if settings.quantile is not None:
                return scores >= np.quantile(scores, settings.quantile)
            return scores >= scores.mean()
        if settings.selection == "klt":
            return (scores > 0) & (scores >= scores.mean())
        if settings.selection == "all":
            return np.ones(len(keys), dtype=bool)
        rare = self._tables.entity_frequency[keys] < self._mean_frequency
        return rare if settings.selection == "long_tail" else ~rare

    def select(self, sample: Sample) -> np.ndarray:
        """Indices into ``sample.spans`` of the selected entity mentions, ascending.

        The best K for each 128 tokens begun, by SI (``klt``: by KLT), the earlier one on ties.
        """
        keys = sample.spans[:, 2]
        mentions = np.flatnonzero(keys < self._graph.num_entities)
        if not len(mentions):
            return mentions
        keys = keys[mentions]
        importance = self._tables.importance[sample.first_span + mentions].astype(np.float64)
        scores = self._scores(keys, importance)
        passing = np.flatnonzero(self._passes(keys, scores))
        cap = self._config.injection.max_per_128_tokens * -(-len(sample.ids) // 128)
        best = passing[np.argsort(-scores[passing], kind="stable")[:cap]]
        return mentions[np.sort(best)]

    # -- triples ----------------------------------------------------------------------------------

    def _choose_triple(self, entity: int, near: set[int], draw: float):
        """One (role, relation, other) of the entity, or None: in the text if there is one."""
        degree = self._graph.degree(entity)
        if not degree:
            return None
        in_text = self._graph.edges_between(entity, near - {entity})
        if in_text:
            return in_text[int(draw * len(in_text))]
        return self._graph.edge(entity, int(draw * degree))

    def _triples_to_decode(
        self,
        sample: Sample,
        epoch: int,
        number: int,
        chosen: tuple | None,
        draws: tuple[float, float],
    ) -> list:
        settings = self._config.decoding
        entity = int(sample.spans[number, 2])
        degree = self._graph.degree(entity)
        if settings.triple == "all":
            if degree <= settings.max_triples:
                return self._graph.edges_of(entity).tolist()
            stream = rng.generator(self._seed, rng.MENTION, epoch, sample.id, 1 + number)
            rows = stream.choice(degree, settings.max_triples, replace=False)
            return [self._graph.edge(entity, i) for i in np.sort(rows).tolist()]
        if chosen is None:
            return []
        if settings.triple == "same" or degree == 1:
            return [chosen]
        return [self._another_triple(entity, degree, chosen, draws)]

    def _another_triple(
        self, entity: int, degree: int, chosen: tuple, draws: tuple[float, float]
    ) -> tuple:
        """Any triple but the injected one, and one with another answer where there is one near:
        "born in Rome" injected gives away "lived in Rome"."""
        i = int(draws[0] * degree)
        if self._graph.edge(entity, i) == chosen:
            i = (i + 1 + int(draws[1] * (degree - 1))) % degree
        for step in range(min(degree, _LOOK_AHEAD)):
            triple = self._graph.edge(entity, (i + step) % degree)
            if triple[2] != chosen[2]:
                return triple
        return self._graph.edge(entity, i)

    def __call__(self, sample: Sample, epoch: int) -> SampledMentions:
        """Chooses for one sequence in one epoch."""
        if not self.active or not len(sample.spans):
            return no_mentions()
        config, graph = self._config, self._graph
        is_entity = sample.spans[:, 2] < graph.num_entities
        near = set(sample.spans[is_entity, 2].tolist())
        selected = set(self.select(sample).tolist())
        ask_all = config.decoding.enabled and config.decoding.mentions == "all"
        asks_for_it = config.decoding.enabled and config.decoding.triple != "all"
        use_words = config.memory.enabled and config.injection.long_tail_words
        # A row for every span and use, whatever the method: methods share them.
        stream = rng.generator(self._seed, rng.MENTION, epoch, sample.id)
        draws = stream.random((len(sample.spans), 4)).tolist()
        rows, decoded = [], []
        for number, (left, right, key) in enumerate(sample.spans.tolist()):
            if key >= graph.num_entities:
                if use_words:  # its own token embedding in place of h_e, mixed with memory
                    inject = draws[number][0] < config.injection.probability
                    rows.append((left, right, key, inject, ROLE_NONE, 0, 0))
                continue
            is_selected = number in selected
            if not is_selected and not ask_all:
                continue
            inject_draw, triple_draw, *decode_draws = draws[number]
            inject = is_selected and bool(inject_draw < config.injection.probability)
            # Looked for only where it is read: the search grows with the square of the mentions.
            triple = None
            if asks_for_it or (inject and config.injection.form != "none"):
                triple = self._choose_triple(key, near, triple_draw)
            role, relation, other = ROLE_NONE, 0, 0
            asked = []
            if config.decoding.enabled:
                asked = self._triples_to_decode(sample, epoch, number, triple, decode_draws)
            if not is_selected and not asked:
                continue
            for how, via, entity in asked:
                inverse = graph.num_relations if how == ROLE_TAIL else 0
                decoded.append((len(rows), via + inverse, entity))
            # "different" asks for what was not given: a mention with one answer only is asked.
            gives_away = config.decoding.triple == "different" and any(
                entity == triple[2] for _, _, entity in asked
            )
            if inject and triple and config.injection.form != "none" and not gives_away:
                role, relation, other = triple
            # Without a triple there is only memory to mix in.
            inject = inject and (role != ROLE_NONE or config.memory.enabled)
            rows.append((left, right, key, inject, role, relation, other))
        mentions = np.array(rows, dtype=np.int64).reshape(-1, 7)
        decode = np.array(decoded, dtype=np.int64).reshape(-1, 3)
        has_name = self._tables.entity_names[decode[:, 2], 0] >= 0
        decode = decode[has_name]
        return SampledMentions(
            mentions[:, :2],
            mentions[:, 2],
            mentions[:, 3].astype(bool),
            *(mentions[:, i] for i in (4, 5, 6)),
            *(decode[:, i] for i in range(3)),
        )
