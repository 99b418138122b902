"""Knowledge attribution by integrated gradients, layer by layer (TRELM section 3.3, Eqs. 9 to 11).

    Attr(v_j) = v_j * integral_0^1 dP(alpha v)/dv_j dalpha

P is the probability that the decoder gives the gold tokens of ONE mention; v is the FFN's
activation vector of ONE layer at that mention's positions, scaled jointly from zero. The integral
is the paper's right Riemann sum with m points (``riemann_right``), or Gauss-Legendre with a few
nodes, which costs a tenth and is closer to the integral (``gauss_legendre``). Attributions are
summed over positions, decoded tokens and mentions.

What the model must offer (and nothing else)::

    model.attribution_problem(batch, memory, memory_weight) -> AttributionProblem

``AttributionProblem.encode()`` runs the embedding (injection and memory included) and the encoder
once over the micro-batch, exactly as the training forward does; its result is ignored, because
everything is captured from the Hugging Face layers by hooks. If it runs the encoder more than once
(texts of injected entities), the batch itself must come last. It may be called under
``torch.no_grad``. The caller switches the model to evaluation mode, so there is no dropout.

``AttributionProblem.gold_probability(hidden_states, mentions)`` turns last hidden states into P::

    hidden_states: float [n, S, d]; row i is one copy of the sequence that holds mention
        ``mentions[i]``, at the same positions as in the batch.
    mentions: int64 [n], rows of ``batch.mention_spans``; the same mention comes several times.
    returns: float [n], differentiable in ``hidden_states``: the sum over every decoded token of
        that mention (all its rows of ``decode_mention``, pads left out) of
        P(y*) = exp(log softmax of the gold token over {gold} + the step's negatives), that is
        exp(-loss) of the CKA loss, computed in float32 or better.

for which the model would pool each row's span, pick the decode rows of each copy with
``(mentions[:, None] == batch.decode_mention[None]).nonzero(as_tuple=True)`` and ``index_add`` the
tokens' probabilities back to the copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trelm_ds.routing.paths import PathScores


@dataclass
class AttributionProblem:
    """One micro-batch as attribution sees it; built by ``model.attribution_problem``."""

    encode: Callable[[], object]  # one forward of embedding and encoder over the micro-batch
    layers: Sequence[nn.Module]  # the Hugging Face encoder layers, lowest first
    spans: torch.Tensor  # int64 [M, 3], rows (row, left, right exclusive): batch.mention_spans
    mentions: torch.Tensor  # int64 [Q], ascending: the rows of spans that have decoded tokens
    gold_probability: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
