"""FLOPs of a training step by arithmetic: what routing should save before anything is timed.

Counted are the matrix products of the encoder and of the MLM head on masked positions, split into
forward, gradients of inputs (dX) and gradients of weights (dW); 1 multiply-accumulate = 2 FLOPs.
Elementwise work, softmax, LayerNorm, embeddings, the optimizer and the decoder are not counted, so
a measured ratio above the predicted one is what these cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from trelm_ds.config import RoutingConfig
from trelm_ds.routing.paths import kept_count
from trelm_ds.routing.truncation import truncated_layers


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step."""

    forward: float
    input_gradients: float
    weight_gradients: float

    @property
    def total(self) -> float:
        return self.forward + self.input_gradients + self.weight_gradients


def step_flops(
    model_config,
    routing: RoutingConfig,
    tokens: float,
    masked: float,
    sequence_length: float,
    *,
    truncated: bool = False,
) -> StepFlops:
    """The matrix products of one forward and backward pass.

    Args:
        model_config: Hugging Face config (hidden, intermediate and vocabulary sizes, layers).
        routing: form, kept fraction, scope and input gradient; the step is a routed one.
        tokens: real tokens of the step.
        masked: positions the MLM head runs on.
        sequence_length: mean real length, for the attention core.
        truncated: the backward ends at ``routing.truncated_depth``.
    """
    d, f = model_config.hidden_size, model_config.intermediate_size
    layers = model_config.num_hidden_layers
    projections, ffn, core = 4 * d * d, 2 * d * f, 2 * sequence_length * d
    routed = routing.form not in ("none", "frozen")
    kept = 1.0
    if routed:
        kept = kept_count(f, routing.kept_fraction, routing.multiple_of) / f
    strict = routing.scope == "strict"
    backward_layers, unused = layers, 0
    if truncated:
        backward_layers = layers - truncated_layers(routing, layers)
        unused = 3 * d * d  # nobody asks for the gradient of the lowest layer's input

    through_path = routed and routing.input_gradient == "path"
    input_layer = projections + 2 * core + ffn * (kept if through_path else 1.0)
    weight_layer = 0.0 if strict else float(projections)
    weight_layer += 0.0 if routing.form == "frozen" else ffn * kept
    transform, decoder = d * d, d * model_config.vocab_size
    head_weights = transform + (0 if strict else decoder)  # the decoder is the tied, frozen table
    return StepFlops(
        2.0 * (tokens * layers * (projections + ffn + core) + masked * (transform + decoder)),
        2.0 * (tokens * (backward_layers * input_layer - unused) + masked * (transform + decoder)),
        2.0 * (tokens * backward_layers * weight_layer + masked * head_weights),
    )
