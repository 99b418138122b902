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


def integration_rule(rule: str, nodes: int) -> tuple[list[float], list[float]]:
    """Points alpha in [0, 1] and weights of the integral over alpha.

    Args:
        rule: ``riemann_right`` (Eq. 11: alpha = k/m, k = 1..m) or ``gauss_legendre``.
        nodes: m, or the number of Gauss-Legendre nodes.
    """
    if rule == "riemann_right":
        return [(k + 1) / nodes for k in range(nodes)], [1 / nodes] * nodes
    if rule == "gauss_legendre":
        x, w = np.polynomial.legendre.leggauss(nodes)
        return ((x + 1) / 2).tolist(), (w / 2).tolist()
    raise ValueError(f"unknown integration rule {rule!r}")


@dataclass
class _LayerRecord:
    """What one layer saw in the batch's forward."""

    args: tuple = ()  # of the layer's call, hidden states included
    kwargs: dict | None = None
    ffn_input: torch.Tensor | None = None  # [B, S, d]; also the residual of the layer's output
    ffn_output: torch.Tensor | None = None  # [B, S, d]


def _record(problem: AttributionProblem) -> list[_LayerRecord]:
    """Runs the batch once and keeps what each layer was called with; hooks are gone after."""
    records = [_LayerRecord() for _ in problem.layers]
    handles = []

    def on_layer(record):
        def hook(module, args, kwargs):
            record.args, record.kwargs = args, kwargs

        return hook

    def on_ffn(record):
        def hook(module, args, output):
            record.ffn_input, record.ffn_output = args[0], output

        return hook

    try:
        for layer, record in zip(problem.layers, records, strict=True):
            handles.append(layer.register_forward_pre_hook(on_layer(record), with_kwargs=True))
            handles.append(layer.output.dense.register_forward_hook(on_ffn(record)))
        with torch.no_grad():
            problem.encode()
    finally:
        for handle in handles:
            handle.remove()
    return records


def _replay_layer(layer, record: _LayerRecord, hidden_states, rows):
    """The layer on other hidden states [n, S, d]; row i stands for row ``rows[i]`` of the batch."""
    batch_size = record.ffn_input.shape[0]

    def pick(value):
        if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == batch_size:
            return value.index_select(0, rows)  # attention mask and the like; [1, ...] broadcasts
        return value

    args = [pick(value) for value in record.args]
    kwargs = {key: pick(value) for key, value in record.kwargs.items()}
    if "hidden_states" in kwargs:
        kwargs["hidden_states"] = hidden_states
    else:
        args[0] = hidden_states
    output = layer(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class _Copies:
    """Copies of sequences, and the tokens of their mentions; int64 index tensors."""

    rows: torch.Tensor  # [n], row of the batch
    mentions: torch.Tensor  # [n], row of the problem's spans
    copy_of: torch.Tensor  # [t], copy that holds the token
    token: torch.Tensor  # [t], row of the token table
    position: torch.Tensor  # [t], position in the sequence


class _Targets:
    """The attributed mentions and their tokens, as index tensors."""

    def __init__(self, problem: AttributionProblem, max_targets: int | None, device):
        mentions = problem.mentions.tolist()
        if max_targets is not None and len(mentions) > max_targets:
            # evenly spread over the batch, so that no sequence is favoured
            mentions = [mentions[i * len(mentions) // max_targets] for i in range(max_targets)]
        self.mentions = mentions
        self.spans = problem.spans.index_select(0, problem.mentions.new_tensor(mentions)).tolist()
        self.device = device
        # tokens of all mentions, one mention after the other
        self.first_token = [0]
        for _, left, right in self.spans:
            self.first_token.append(self.first_token[-1] + right - left)
        self.token_rows = self._tensor([r for r, a, b in self.spans for _ in range(a, b)])
        self.token_positions = self._tensor([t for _, a, b in self.spans for t in range(a, b)])

    def _tensor(self, values):
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def copies(self, which: list[int]) -> _Copies:
        """One copy of the sequence for each entry of ``which``, indices of mentions."""
        copy_of, token = [], []
        for copy, i in enumerate(which):
            tokens = range(self.first_token[i], self.first_token[i + 1])
            token += tokens
            copy_of += [copy] * len(tokens)
        token = self._tensor(token)
        return _Copies(
            rows=self._tensor([self.spans[i][0] for i in which]),
            mentions=self._tensor([self.mentions[i] for i in which]),
            copy_of=self._tensor(copy_of),
            token=token,
            position=self.token_positions[token],
        )


def integrated_gradients(
    problem: AttributionProblem,
    rule: str = "riemann_right",
    nodes: int = 20,
    *,
    full: bool = False,
    max_targets: int | None = None,
    first_layer: int = 0,
    inner_batch_size: int = 64,
) -> PathScores:
    """Attribution of every FFN neuron of every layer, summed over the batch (Eqs. 9 to 11).

    Each (mention, alpha) is a copy of its own of the mention's sequence, so two mentions of one
    sequence do not disturb one another. For layer l the copies start at its FFN and only the
    layers above are run again. Gradients are taken with respect to the scaled vectors only: no
    parameter gets a ``.grad``, no hook of a distributed engine fires.

    Args:
        problem: of this rank's micro-batch; its model in evaluation mode and its FFNs dense.
        rule, nodes: see :func:`integration_rule`; the paper's Eq. 11 is riemann_right, 20.
        full: also the attributions of the FFN's input and output vectors (for S_in and S_out),
            each of them scaled from zero in the same way (the residual stays as it is).
        max_targets: attribute at most this many mentions, evenly spread over the batch.
        first_layer: attribute this one and those above it; zeros for the others.
        inner_batch_size: copies run at a time: what bounds memory.

    Returns:
        ``mid`` [L, f], and with ``full`` ``inputs`` and ``outputs`` [L, d]; float32, or float64
        for a float64 model. Zeros when there is no mention.
    """
    alphas, weights = integration_rule(rule, nodes)
    ffns = [layer.output.dense for layer in problem.layers]
    parameter = ffns[0].down_bias
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    device = parameter.device

    def zeros(size):
        return torch.zeros(len(ffns), size, dtype=dtype, device=device)

    scores = PathScores(zeros(ffns[0].intermediate_size))
    if full:
        scores.inputs, scores.outputs = (zeros(ffns[0].hidden_size) for _ in range(2))
    targets = _Targets(problem, max_targets, device)
    if not targets.mentions:
        return scores
    records = _record(problem)
    work = [(i, k) for i in range(len(targets.mentions)) for k in range(nodes)]

    for index, (ffn, record) in enumerate(zip(ffns, records, strict=True)):
        if index < first_layer:
            continue
        at_input = record.ffn_input[targets.token_rows, targets.token_positions]  # [T, d]
        with torch.no_grad():
            # vector attributed, the rest of the FFN after it, where its scores go
            sites = [(ffn.intermediate(at_input), ffn.project, scores.mid)]
            if full:
                at_output = record.ffn_output[targets.token_rows, targets.token_positions]
                sites.append((at_input, ffn, scores.inputs))
                sites.append((at_output, lambda output: output, scores.outputs))
        for values, finish, total in sites:
            for begin in range(0, len(work), inner_batch_size):
                chunk = work[begin : begin + inner_batch_size]
                copies = targets.copies([i for i, _ in chunk])
                alpha = torch.tensor([alphas[k] for _, k in chunk], dtype=dtype, device=device)
                weight = torch.tensor([weights[k] for _, k in chunk], dtype=dtype, device=device)
                value = values[copies.token]
                scaled = (alpha[copies.copy_of, None] * value).to(value.dtype).requires_grad_()
                with torch.enable_grad():
                    p = _probability(problem, records, index, finish(scaled), copies)
                    (gradient,) = torch.autograd.grad(p.sum(), scaled)
                total[index] += (weight[copies.copy_of, None] * value * gradient).sum(0)
    return scores


def _probability(problem, records, index, ffn_output, copies: _Copies) -> torch.Tensor:
    """P of each copy when layer ``index``'s FFN gives ``ffn_output`` [t, d] at its mention."""
    record, rows = records[index], copies.rows
    output = record.ffn_output[rows].index_put((copies.copy_of, copies.position), ffn_output)
    block = problem.layers[index].output
    hidden_states = block.LayerNorm(block.dropout(output) + record.ffn_input[rows])
    for layer, above in zip(problem.layers[index + 1 :], records[index + 1 :], strict=True):
        hidden_states = _replay_layer(layer, above, hidden_states, rows)
    return problem.gold_probability(hidden_states, copies.mentions)
