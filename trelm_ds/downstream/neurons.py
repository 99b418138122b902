"""Knowledge neurons of a probe (Dai et al. 2022), by integrated gradients at the mask.

For one cloze row, P is the MLM probability of the answer at the mask, and the attribution of an
intermediate neuron of layer l is Eq. 9 with that P: the layer's activation vector at the mask
position is scaled from zero, the integral is the right Riemann sum of Eq. 11 with m = 20 points.
The row's knowledge neurons are those with at least ``THRESHOLD`` times the largest attribution of
any layer. (Dai et al. then keep the neurons shared by several paraphrases of a fact; a probe has
one row of each, so this is their set before that step.)
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from trelm_ds.backbone import MaskedLanguageModel, encode
from trelm_ds.downstream.examples import spread
from trelm_ds.errors import DataError
from trelm_ds.evaluate import Probe, ProbeRow
from trelm_ds.evaluation_mode import evaluation_mode
from trelm_ds.output_layer import mlm_head
from trelm_ds.routing.attribution import AttributionProblem, integrated_gradients
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.ffn import RoutedFFN, encoder_layers, install_routed_ffn

logger = logging.getLogger(__name__)

THRESHOLD = 0.2  # of the row's largest attribution
RULE, NODES = "riemann_right", 20
EDITS = {"suppress": 0.0, "amplify": 2.0}  # what the activations are multiplied by


class KnowledgeNeurons:
    """A masked language model whose FFN activations can be attributed and scaled at the mask."""

    def __init__(self, model: MaskedLanguageModel):
        """
        Args:
            model: with Hugging Face's FFNs, which are replaced in place (outputs change by
                rounding only), or with routed ones.
        Raises:
            ConfigError: an activation or architecture that routed FFNs do not know.
        """
        self.model = model
        self.layers = encoder_layers(model.backbone)
        if not isinstance(self.layers[0].output.dense, RoutedFFN):
            install_routed_ffn(model.backbone, RoutingContext())
        self.ffns: list[RoutedFFN] = [layer.output.dense for layer in self.layers]
        self.device = self.ffns[0].down_bias.device

    def _states(self, row: ProbeRow, copies: int) -> torch.Tensor:
        ids = torch.tensor(row.ids, device=self.device).expand(copies, -1)
        # Not model.last_hidden_states, which may pack the rows into one: layers are run again and
        # edited row by row.
        embeds = self.model.word_embeddings(ids)
        return encode(self.model.backbone, embeds, torch.ones_like(ids))

    def _probability(self, states: torch.Tensor, row: ProbeRow) -> torch.Tensor:
        """P(answer) at the mask: [n] from states [n, S, hidden], in float32 or better."""
        logits = mlm_head(self.model.backbone)(states[:, row.mask])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(-1, dtype=dtype)[:, row.answer]

    def attribution(self, row: ProbeRow) -> torch.Tensor:
        """Attribution of every neuron: float [layers, intermediate size]."""
        problem = AttributionProblem(
            encode=lambda: self._states(row, 1),
            layers=self.layers,
            spans=torch.tensor([[0, row.mask, row.mask + 1]], device=self.device),
            mentions=torch.zeros(1, dtype=torch.int64, device=self.device),
            gold_probability=lambda states, _: self._probability(states, row),
        )
        return integrated_gradients(problem, RULE, NODES).mid

    def find(self, row: ProbeRow) -> torch.Tensor:
        """Which neurons are knowledge neurons of the row: bool [layers, intermediate size]."""
        scores = self.attribution(row)
        return (scores > 0) & (scores >= THRESHOLD * scores.max())

    @torch.no_grad()
    def edited_probability(self, row: ProbeRow, scale: torch.Tensor) -> torch.Tensor:
        """P(answer) with the activations at the mask multiplied.

        Args:
            row: of the probe.
            scale: float [n, layers, intermediate size]; n versions of one forward.
        Returns:
            float [n].
        """
        at = row.mask

        def scaled(index):
            def hook(ffn, args, output):
                change = ffn.intermediate(args[0][:, at]) * (scale[:, index] - 1)
                output = output.clone()
                output[:, at] += change @ ffn.down_weight
                return output

            return hook

        handles = [ffn.register_forward_hook(scaled(i)) for i, ffn in enumerate(self.ffns)]
        try:
            return self._probability(self._states(row, len(scale)), row)
        finally:
            for handle in handles:
                handle.remove()


def random_like(chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many random neurons in each layer as ``chosen`` has there: bool [layers, f]."""
    order = torch.rand(chosen.shape, generator=generator).argsort(1)
    ranks = order.argsort(1).to(chosen.device)
    return ranks < chosen.sum(1, keepdim=True)


@dataclass
class _Tally:
    """Sums over the facts of one relation."""

    facts: int
    uses: torch.Tensor  # int64 [L, f], facts that a neuron belongs to
    sizes: torch.Tensor  # float64 [L], neurons of all facts
    squares: torch.Tensor  # float64 [L], sum over facts of the squared number of neurons
    probability: torch.Tensor  # float64 [1 + 2 * edits]: plain; knowledge, random for each edit

    @classmethod
    def empty(cls, layers: int, width: int) -> _Tally:
        def zeros(n):
            return torch.zeros(n, dtype=torch.float64)

        uses = torch.zeros(layers, width, dtype=torch.int64)
        return cls(0, uses, zeros(layers), zeros(layers), zeros(1 + 2 * len(EDITS)))

    def add(self, chosen: torch.Tensor, probability: torch.Tensor) -> None:
        sizes = chosen.sum(1).double()
        self.facts += 1
        self.uses += chosen
        self.sizes += sizes
        self.squares += sizes**2
        self.probability += probability

    def pairs(self) -> tuple[float, float, float]:
        """Over all pairs of facts: their number, neurons shared, and shared if sets of these
        sizes were drawn at random layer by layer."""
        shared = (self.uses * (self.uses - 1) // 2).sum().item()
        chance = ((self.sizes**2 - self.squares) / 2 / self.uses.shape[1]).sum().item()
        return self.facts * (self.facts - 1) / 2, shared, chance


def knowledge_neuron_report(
    model: MaskedLanguageModel, probe: Probe, max_facts: int | None = None
) -> dict:
    """Where the probe's facts are stored, how far they share neurons, and what those do.

    Args:
        model: asked without injection; its FFNs are replaced, see ``KnowledgeNeurons``.
        probe: its template rows are used, or all rows where it has none.
        max_facts: at most this many, evenly spaced over the probe.
    Returns:
        ``facts``, ``relations``; ``neurons``: mean number per fact, ``per_layer`` too;
        ``overlap``: mean number of neurons that two facts share, ``within`` a relation and
        ``across`` relations, each with the ``chance`` of random sets of the same sizes (None
        without such a pair); ``effect``: relative change of P(answer) when the fact's
        ``knowledge`` neurons, or as many ``random`` ones in each layer, are suppressed (times 0)
        or amplified (times 2), macro average over relations of mean change / mean P;
        ``p_gold``: mean P(answer); ``by_relation``; ``skipped`` as of the probe.
    Raises:
        DataError: the probe has no row.
    """
    rows = [row for row in probe.rows if "template" in row.splits] or probe.rows
    rows = spread(rows, max_facts)
    if not rows:
        raise DataError("the probe has no fact to attribute")
    neurons = KnowledgeNeurons(model)
    layers, width = len(neurons.ffns), neurons.ffns[0].intermediate_size
    factors = list(EDITS.values())
    generator = torch.Generator().manual_seed(0)
    tallies: dict[str, _Tally] = {}
    with evaluation_mode(model):
        for number, row in enumerate(rows, 1):
            chosen = neurons.find(row)
            sets = torch.stack([chosen, random_like(chosen, generator)])
            scale = torch.ones(1 + 2 * len(factors), layers, width, device=neurons.device)
            for i, factor in enumerate(factors):
                scale[1 + 2 * i : 3 + 2 * i].masked_fill_(sets, factor)
            probability = neurons.edited_probability(row, scale)
            tally = tallies.setdefault(row.relation, _Tally.empty(layers, width))
            tally.add(chosen.cpu(), probability.cpu().double())
            if number % 100 == 0 or number == len(rows):
                logger.info("knowledge neurons of %d/%d facts", number, len(rows))
    return _report(tallies, layers, width) | {"skipped": probe.skipped}


def _report(tallies: dict[str, _Tally], layers: int, width: int) -> dict:
    total = _Tally.empty(layers, width)
    within = [0.0, 0.0, 0.0]
    by_relation = {}
    for relation, tally in sorted(tallies.items()):
        total.facts += tally.facts
        for name in ("uses", "sizes", "squares", "probability"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        within = [a + b for a, b in zip(within, tally.pairs(), strict=True)]
        by_relation[relation] = {
            "facts": tally.facts,
            "neurons": tally.sizes.sum().item() / tally.facts,
            "p_gold": tally.probability[0].item() / tally.facts,
            "effect": _effect(tally.probability),
        }
    across = [a - b for a, b in zip(total.pairs(), within, strict=True)]
    effects = [entry["effect"] for entry in by_relation.values()]
    return {
        "facts": total.facts,
        "relations": len(by_relation),
        "layers": layers,
        "intermediate_size": width,
        "threshold": THRESHOLD,
        "integration": {"rule": RULE, "nodes": NODES},
        "p_gold": total.probability[0].item() / total.facts,
        "neurons": {
            "mean": total.sizes.sum().item() / total.facts,
            "per_layer": (total.sizes / total.facts).tolist(),
        },
        "overlap": {"within": _overlap(*within), "across": _overlap(*across)},
        "effect": {
            kind: {edit: _mean([effect[kind][edit] for effect in effects]) for edit in EDITS}
            for kind in ("knowledge", "random")
        },
        "by_relation": by_relation,
    }


def _overlap(pairs: float, shared: float, chance: float) -> dict | None:
    if not pairs:
        return None
    return {"pairs": int(pairs), "shared": shared / pairs, "chance": chance / pairs}


def _effect(probability: torch.Tensor) -> dict:
    plain, *edited = probability.tolist()
    change = [p / plain - 1 if plain else 0.0 for p in edited]
    return {
        "knowledge": dict(zip(EDITS, change[0::2], strict=True)),
        "random": dict(zip(EDITS, change[1::2], strict=True)),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
