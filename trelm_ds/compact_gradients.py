"""Gradient averaging for slow networks: all ranks hold the same paths, so only path rows travel.

Without ZeRO DeepSpeed sends every FFN gradient whole, though it is zero off the path. Here the
rows on the path are packed, averaged by DeepSpeed's own bucketed all-reduce, and put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trelm_ds.distributed import has_peers
from trelm_ds.errors import ConfigError
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.paths import LayerPaths


class CompactGradients:
    """Takes the averaging of gradients over from a DeepSpeed engine without ZeRO.

    Gradients below the cut of a truncated backward do not exist and are not sent. Everything else
    goes as DeepSpeed would send it, bit for bit the same on two ranks; on more, the sums' order
    within an all-reduce depends on where a gradient lies in its bucket.
    """

    def __init__(
        self,
        engine,
        routed: Sequence[tuple[int, str, nn.Parameter]],
        routing: RoutingController,
        parameter_layers: dict[nn.Parameter, int],
    ):
        """Switches the engine's own averaging off.

        Args:
            engine: what ``deepspeed.initialize`` returned.
            routed: (layer, kind, parameter) of the FFN's tensors; kinds as in ``RoutedFFN``.
            routing: knows the paths and the cut of the step.
            parameter_layers: layer of each parameter that a cut may leave without a gradient.

        Raises:
            ConfigError: the engine keeps gradients of its own.
        """
        if hasattr(engine.optimizer, "get_grads_for_reduction"):
            raise ConfigError(
                "routing.compact_gradients does not work with DeepSpeed's "
                f"{type(engine.optimizer).__name__}, which keeps gradients of its own: leave "
                "data_types.grad_accum_dtype out"
            )
        engine.enable_backward_allreduce = False
        self._engine = engine
        self._routing = routing
        self._routed = {p: (layer, kind) for layer, kind, p in routed}
        self._layers = parameter_layers
        self._bytes = 0
        self._steps = 0

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages the step's gradients over the ranks, in place; collective.

        After the last backward of an optimizer step and before ``engine.step()``.
        """
        parts: list[Tensor] = []
        copies = []  # of (gradient, kind, path, its entries)
        for parameter in self._engine.module.parameters():
            if not parameter.requires_grad or self._frozen(parameter):
                continue
            if parameter.grad is None:  # on this rank; another may have one
                parameter.grad = torch.zeros_like(parameter)
            layer, kind = self._routed.get(parameter, (None, ""))
            paths = None if layer is None else self._routing.layer_paths(layer)
            part = parameter.grad
            if paths is not None:
                part, is_copy = _take(parameter.grad, kind, paths)
                if is_copy:
                    copies.append((parameter.grad, kind, paths, part))
            if part.numel() > 0:
                parts.append(part)
        itemsize = torch.empty((), dtype=self._engine.communication_data_type).element_size()
        self._bytes += itemsize * sum(part.numel() for part in parts)
        self._steps += 1
        if has_peers():
            self._engine.buffered_allreduce_fallback(grads=parts)
            for gradient, kind, paths, part in copies:
                _put(gradient, kind, paths, part)

    def _frozen(self, parameter: nn.Parameter) -> bool:
        layer = self._layers.get(parameter)
        return layer is not None and self._routing.frozen(layer)

    def metrics(self) -> dict[str, float]:
        """``communication/gradient_mib``: what a rank gives to the all-reduces, mean per step."""
        mib = self._bytes / max(1, self._steps) / 2**20
        self._bytes = self._steps = 0
        return {"communication/gradient_mib": mib}


def _index(kind: str, paths: LayerPaths) -> tuple[Tensor, ...] | None:
    """The path's entries of an FFN gradient; None: all."""
    if kind == "down_bias":
        return None if paths.outputs is None else (paths.outputs,)
    columns = {"up_weight": paths.inputs, "down_weight": paths.outputs}.get(kind)
    return (paths.rows,) if columns is None else (paths.rows[:, None], columns)


def _take(gradient: Tensor, kind: str, paths: LayerPaths) -> tuple[Tensor, bool]:
    """The part of a gradient that lies on the path, and whether it is a copy and not a view."""
    index = _index(kind, paths)
    if index is None:
        return gradient, False
    if paths.start is not None:
        return gradient.narrow(0, paths.start, len(paths.rows)), False
    return gradient[index], True


def _put(gradient: Tensor, kind: str, paths: LayerPaths, part: Tensor) -> None:
    gradient[_index(kind, paths)] = part
