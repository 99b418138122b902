"""Late truncation: from a point of the run on, the backward ends above the lowest layers.

Everything that only the lower layers' gradients would train stands still from then on: their
parameters, the embeddings' LayerNorm, positions and types, the injection. The word embeddings go
on training through the MLM head (where the two are tied) and the decoder.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn

from trelm_ds.config import RoutingConfig
from trelm_ds.errors import ConfigError
from trelm_ds.routing.ffn import encoder_layers

INPUT = -1  # the "layer" of what lies below the first one


def truncated_layers(config: RoutingConfig, num_layers: int) -> int:
    """n, the layers that a truncated backward does not enter: lowest first, rounded down.

    Raises:
        ConfigError: the share asked for is less than one layer.
    """
    layers = math.floor(config.truncated_depth * num_layers + 1e-9)  # .3 * 10 is below 3
    if config.truncated_depth > 0 and layers == 0:
        raise ConfigError(
            f"routing.truncated_depth {config.truncated_depth} of {num_layers} layers is less "
            "than one layer"
        )
    return layers


class BackwardTruncation:
    """Runs embeddings and lower layers without recording them for backward, while active.

    Their output then asks for no gradient, so the backward ends at layer ``depth`` by itself, and
    no activation below it is kept. Hooks, and not a wrapped ``forward``, so that it holds for any
    way the encoder is run: checkpointed, padded or not.

    Attributes:
        depth: layers below the cut; 0: the run never truncates.
        active: whether forwards are cut now; the routing controller says so for each step.
    """

    def __init__(self, model: nn.Module, config: RoutingConfig):
        """Hooks into a model whose ``backbone`` is a Hugging Face BERT or RoBERTa.

        Args:
            model: its ``injection`` and ``decoder``, where it has them, are known by these names.
        """
        layers = encoder_layers(model.backbone)
        self.depth = truncated_layers(config, len(layers))
        self.active = False
        self._model = model
        self._grad_modes: list[bool] = []  # of the modules being run, outermost first
        if self.depth:
            for module in (model.backbone.base_model.embeddings, *layers[: self.depth]):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module, args) -> None:
        self._grad_modes.append(torch.is_grad_enabled())
        if self.active:
            torch.set_grad_enabled(False)

    def _leave(self, module, args, output) -> None:
        torch.set_grad_enabled(self._grad_modes.pop())

    def input_gradients(self):
        """Context for what only feeds the embeddings: not recorded while the backward is cut."""
        return torch.no_grad() if self.active else contextlib.nullcontext()

    def parameters(self) -> list[tuple[nn.Parameter, int]]:
        """(parameter, layer) of every trained parameter that stands still while active.

        Layer is its encoder layer, or ``INPUT``. The word embeddings are among them only if
        nothing above the cut uses them.
        """
        if not self.depth:
            return []
        model, backbone = self._model, self._model.backbone
        words = backbone.get_input_embeddings().weight
        output = backbone.get_output_embeddings()
        tied = output is not None and output.weight is words
        used_above = tied or getattr(model, "decoder", None) is not None
        found = [(p, INPUT) for p in backbone.base_model.embeddings.parameters()]
        if used_above:
            found = [(p, layer) for p, layer in found if p is not words]
        injection = getattr(model, "injection", None)
        if injection is not None:
            found += [(p, INPUT) for p in injection.parameters()]
        for index, layer in enumerate(encoder_layers(backbone)[: self.depth]):
            found += [(p, index) for p in layer.parameters()]
        return [(p, layer) for p, layer in found if p.requires_grad]
