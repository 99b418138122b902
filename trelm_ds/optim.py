"""AdamW for everything but what a step leaves alone: off-path FFN entries, truncated layers.

A zero gradient is not enough to leave a weight alone: Adam's momentum and decoupled weight decay
move it all the same. So path updates mask the update: an entry off the path keeps its value and
both moments to the bit, and bias correction counts the updates of its own neuron, so that a
neuron first reached at step 1000 behaves as one at step 1. In the same way a parameter below the
cut of a truncated backward is not moved at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trelm_ds.errors import ConfigError
from trelm_ds.ops import load_kernels, masked_adamw_
from trelm_ds.ops.reference import count_runs, update_rows

KINDS = ("up_weight", "up_bias", "down_weight", "down_bias")
WHOLE = "whole parameter"  # any other parameter, or an FFN's without paths: all of it or nothing


@dataclass(frozen=True, eq=False)
class RoutedFragment:
    """A piece of a parameter inside a tensor that the optimizer sees.

    The tensor is the parameter itself without ZeRO, else a flat partition. Both FFN matrices are
    neuron-major: [f, d], one row per intermediate neuron.
    """

    tensor: Tensor
    start: int  # first element in the flattened tensor
    numel: int
    layer: int  # -1 below the first layer
    kind: str  # one of KINDS, or WHOLE
    param_start: int  # first element in the flattened parameter
    row_length: int  # elements of a row: d for the matrices, 1 for the biases


def _batches(tensor: Tensor) -> bool:
    """Whether AdamW over views of many tensors costs one launch and not one loop each."""
    return tensor.device.type != "cpu"


def _send_numbers(steps: list[Tensor | float], device: torch.device) -> None:
    """Puts tensors on ``device`` in the place of numbers; one transfer that nothing waits for."""
    places = [i for i, step in enumerate(steps) if isinstance(step, float)]
    if places:
        sent = torch.tensor([steps[i] for i in places]).to(device, non_blocking=True)
        for i, step in zip(places, sent.unbind(), strict=True):
            steps[i] = step


class _ScatteredRows:
    """Rows of many pieces of one tensor, to be stepped as rows of one matrix."""

    def __init__(self):
        # (row length, where the tensor's first row begins) -> rows and their counts
        self._parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def take(self, piece: RoutedFragment, counts: Tensor) -> bool:
        """Whether the piece, of which rows with a count train, is of whole rows: then it is in."""
        length, offset = piece.row_length, piece.start - piece.param_start
        if piece.param_start % length or piece.numel % length:
            return False
        first = piece.param_start // length
        counts = counts[first : first + piece.numel // length]
        active = (counts > 0).nonzero().flatten()
        rows = active + first + offset // length
        self._parts.setdefault((length, offset % length), []).append((rows, counts[active]))
        return True

    def step(self, flat: list[Tensor], numbers: dict) -> None:
        """AdamW on the rows of flat (param, grad, exp_avg, exp_avg_sq)."""
        for (length, phase), parts in self._parts.items():
            end = phase + (flat[0].numel() - phase) // length * length
            matrices = [t[phase:end].view(-1, length) for t in flat]
            rows, counts = (torch.cat(part) for part in zip(*parts, strict=True))
            if len(rows):
                update_rows([*matrices, None], rows, counts, **numbers)


class Paths(Protocol):
    """The current step's paths. Asked several times per step (once per fragment)."""

    def frozen(self, layer: int) -> bool:
        """Whether nothing of the layer trains in this step, nor in any later one."""

    def row_counts(self, layer: int) -> Tensor:
        """int64 [f] on the CPU: 0 off the path, else the neuron's updates including this one.

        Where routing is not active, every count is positive.
        """

    def active_inputs(self, layer: int) -> Tensor | None:
        """bool [d], S_in: the columns of up_weight that train; None: all."""

    def active_outputs(self, layer: int) -> Tensor | None:
        """bool [d], S_out: the columns of down_weight and entries of down_bias; None: all."""


class PathAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, restricted to the paths in what :meth:`bind` names.

    Usable as DeepSpeed's client optimizer: it steps parameters (ZeRO 0), flat partitions
    (ZeRO 1 and 2) and sub-groups one at a time (ZeRO 3), on the CPU and on CUDA. Unbound, it is
    torch's fused AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"AdamW needs lr, eps, weight_decay >= 0 and betas in [0, 1), got lr {lr}, eps "
                f"{eps}, weight_decay {weight_decay}, betas {tuple(betas)}"
            )
        # `fused` makes torch load `step` onto the parameter's device, where the fused kernel is.
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(params, defaults)
        self._paths: Paths | None = None
        self._routed: dict[Tensor, list[RoutedFragment]] = {}
        self._element_counts = False
        self._layer_runs: dict[int, list[tuple[int, int, int]] | None] = {}  # of the step
        self._started = False

    def bind(
        self,
        fragments: Sequence[RoutedFragment],
        paths: Paths | None = None,
        *,
        element_counts: bool = False,
    ) -> None:
        """Says which entries may have to stand still and who knows; once, before training.

        To be called after ``deepspeed.initialize`` (also without fragments): a step before it
        whose gradients are all zero is taken for DeepSpeed's initialising one, which must neither
        decay weights nor count.

        Args:
            fragments: from :func:`trelm_ds.zero_layout.routed_fragments`.
            paths: the routing's state; needed if there are fragments.
            element_counts: count updates per element in the state ``update_count`` (float32, 4
                bytes per FFN parameter), as paths over columns (``routing.paths full``) need.
                Without it columns are not restricted and down_bias trains fully.
        """
        if fragments and paths is None:
            raise ValueError("bind: fragments need paths")
        if any(fragment.tensor.device.type == "cpu" for fragment in fragments):
            load_kernels()  # not in the first step
        self._paths = paths
        self._element_counts = element_counts
        self._started = True
        self._routed = {}
        for fragment in fragments:
            if fragment.kind not in (*KINDS, WHOLE):
                raise ValueError(f"bind: unknown kind {fragment.kind!r}")
            self._routed.setdefault(fragment.tensor, []).append(fragment)
        for tensor, pieces in self._routed.items():
            pieces.sort(key=lambda piece: piece.start)
            ends = [0] + [piece.start + piece.numel for piece in pieces]
            starts = [piece.start for piece in pieces] + [tensor.numel()]
            if any(end > start for end, start in zip(ends, starts, strict=True)):
                raise ValueError("bind: fragments overlap or leave their tensor")
        # DeepSpeed links a parameter to its optimizer state at the first group's step: by then
        # the other groups' states must exist too.
        for tensor in [*self._routed, *(p for group in self.param_groups for p in group["params"])]:
            self._state(tensor)

    def _state(self, tensor: Tensor) -> dict:
        state = self.state[tensor]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        counted = any(piece.kind != WHOLE for piece in self._routed.get(tensor, ()))
        if self._element_counts and counted and "update_count" not in state:
            state["update_count"] = torch.zeros_like(state["exp_avg"], dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every tensor in ``param_groups`` that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._started:
            stepped = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
            if not any(p.grad.any() for p in stepped):
                for p in stepped:
                    self._state(p)
                return loss
            self._started = True
        self._layer_runs.clear()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            numbers = dict(lr=group["lr"], beta1=beta1, beta2=beta2)
            numbers |= dict(eps=group["eps"], weight_decay=group["weight_decay"])
            plain = []  # (param, grad, exp_avg, exp_avg_sq, step); a number for a step of a view
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(p)
                # A new tensor for each, where the fused kernel wants it, since that counts it up in
                # place: DeepSpeed's universal checkpoints restore one `step`, on the CPU, into
                # several tensors' states.
                state["step"] = state["step"].to(p.device, copy=True)
                pieces = self._routed.get(p)
                if pieces is None:
                    plain.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
                else:
                    plain.extend(self._step_routed(p, state, pieces, numbers))
            if plain:
                params, grads, first, second, steps = map(list, zip(*plain, strict=True))
                _send_numbers(steps, params[0].device)
                # fused counts the steps up
                adamw(
                    *(params, grads, first, second, [], steps),
                    fused=True, amsgrad=False, maximize=False, **numbers,
                )  # fmt: skip
        return loss

    def _step_routed(self, p: Tensor, state: dict, pieces: list[RoutedFragment], numbers: dict):
        """Steps the routed pieces of ``p``; returns what is left to plain AdamW: what lies between
        them and, where launches count, the rows of blocks, all of a group in one call. Scattered
        rows are then stepped together, those of all pieces."""
        grad = p.grad.contiguous()
        flat = [t.view(-1) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"])]
        between, end, stepped = [], 0, False
        batches, scattered = _batches(p) and not self._element_counts, _ScatteredRows()
        for piece in pieces:
            frozen = self._paths.frozen(piece.layer)
            plain = piece.kind == WHOLE or (piece.kind == "down_bias" and not self._element_counts)
            if plain and not frozen:
                continue  # as if it were not listed
            if piece.start > end:
                # a step of its own, because the fused kernel counts every one that it is given
                views = [t[end : piece.start] for t in flat]
                between.append((*views, state["step"].clone()))
            end = piece.start + piece.numel
            if not frozen:
                stepped = True
                views = [t[piece.start : end] for t in flat]
                runs = self._runs(piece.layer) if batches else None
                if runs is None:
                    counts = self._paths.row_counts(piece.layer) if batches else None
                    if counts is None or not scattered.take(piece, counts):
                        self._step_piece(piece, views, state, numbers)
                    continue
                for begin, stop, count in runs:
                    cut = slice(
                        max(0, begin * piece.row_length - piece.param_start),
                        min(piece.numel, stop * piece.row_length - piece.param_start),
                    )
                    if cut.start < cut.stop:
                        between.append((*(view[cut] for view in views), count - 1.0))
        scattered.step(flat, numbers)
        if end < p.numel():
            between.append((*(t[end:] for t in flat), state["step"].clone()))
        if stepped or between:
            state["step"] += 1
        return between

    def _runs(self, layer: int) -> list[tuple[int, int, int]] | None:
        """Runs of the layer's rows that train and share a count; None: too many."""
        if layer not in self._layer_runs:
            self._layer_runs[layer] = count_runs(self._paths.row_counts(layer))
        return self._layer_runs[layer]

    def _step_piece(self, piece: RoutedFragment, views: list[Tensor], state, numbers) -> None:
        counts, columns = self._active(piece)
        updates = None
        if self._element_counts:
            updates = state["update_count"].view(-1)[piece.start : piece.start + piece.numel]
        masked_adamw_(
            *(*views, piece.param_start, piece.row_length, counts, columns, updates), **numbers
        )

    def _active(self, piece: RoutedFragment) -> tuple[Tensor, Tensor | None]:
        """Counts of the rows, and the columns as uint8, in which a piece's parameter trains."""
        if piece.kind == "down_bias":
            outputs = self._paths.active_outputs(piece.layer)
            if outputs is not None:
                return outputs.to("cpu", torch.int64), None
            return torch.ones(piece.param_start + piece.numel, dtype=torch.int64), None
        counts = self._paths.row_counts(piece.layer)
        columns = None
        if self._element_counts and piece.kind != "up_bias":
            side = "active_inputs" if piece.kind == "up_weight" else "active_outputs"
            columns = getattr(self._paths, side)(piece.layer)
        return counts, None if columns is None else columns.to(torch.uint8)
