"""Operators of knowledge routing: scores, selection, path-restricted gradient, masked AdamW.

C++ kernels on the CPU (``kernels/``), the same operators through ATen on CUDA, and torch's own as
the fallback without a compiler (``reference.py``). Each is ``torch.ops.trelm.NAME`` with a fake
kernel, so they trace under ``torch.compile``. The kernels are built and loaded at first use;
:func:`load_kernels` does it ahead.

Autograd: ``path_weight_grad`` alone is differentiable (a custom backward calls it, so this matters
for second derivatives only). Scores and selections choose paths and ``masked_adamw_`` updates
leaves: they take part in no loss, and what they return requires no gradient.

Values that are not finite: a term beyond the range of the sums makes its neuron's score infinite,
terms beyond it in both directions make it NaN; an infinite score ranks like any other, NaN is
never selected. In gradients and updates they stay in their own row and entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trelm_ds.ops import reference
from trelm_ds.ops.library import load_kernels

__all__ = [
    "load_kernels",
    "masked_adamw_",
    "neuron_scores",
    "path_weight_grad",
    "select_paths",
    "select_paths_padded",
]


def _prepare(tensor: Tensor) -> None:
    # CUDA tensors do without the kernels; a trace must not run a compiler.
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        load_kernels()


def neuron_scores(
    activation: Tensor,
    grad_activation: Tensor,
    positions: Tensor,
    weights: Tensor,
    absolute: bool = False,
) -> Tensor:
    """Attribution of each intermediate neuron, summed over knowledge positions (cheap Eq. 9).

    score_j = sum_p w_p * A[pos_p, j] * (-dL/dA[pos_p, j]), or with ``absolute``
    sum_p w_p * |dL/dA[pos_p, j]|. Summed in float32 (float64 for float64 inputs) without a
    [P, f] temporary. Not differentiable: scores choose paths, they are not part of the loss.

    Args:
        activation: A [N, f], bf16, fp16, float32 or float64.
        grad_activation: dL/dA, the same shape and dtype.
        positions: int64 [P], rows of A in [0, N); a row may come several times.
        weights: float32 [P].
        absolute: abs-gradient scores instead of signed attribution.

    Returns:
        float32 [f].

    Raises:
        IndexError: a position outside [0, N).
    """
    _prepare(activation)
    return torch.ops.trelm.neuron_scores(
        activation.detach(), grad_activation.detach(), positions, weights.detach(), absolute
    )


def select_paths(
    scores: Tensor, k: int, positive_only: bool = True, threshold: float = 0.0
) -> Tensor:
    """The (at most) k best neurons; equal scores go to the lower index, NaN is never selected.

    Args:
        scores: [f], any floating dtype.
        k: how many at most.
        positive_only: only scores above zero (negative attributions are never paths).
        threshold: only scores of at least this share of the largest, in [0, 1]; 0: no such
            limit. With a threshold and no positive score, nothing is selected.

    Returns:
        int64 [<= k], ascending. On a GPU its length makes the host wait for the device:
        :func:`select_paths_padded` does not.
    """
    _prepare(scores)
    return torch.ops.trelm.select_paths(scores.detach(), k, positive_only, threshold)


def select_paths_padded(
    scores: Tensor, k: int, positive_only: bool = True, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`select_paths` with results of a size known beforehand: no device is waited for.

    In torch's operators on every device.

    Args:
        scores, k, positive_only, threshold: as there.

    Returns:
        int64 [min(k, f)], ascending and distinct: the neurons that ``select_paths`` returns, and in
        the place of those that are missing others; and bool [min(k, f)], which of them are meant.
    """
    return reference.select_paths_padded(scores.detach(), k, positive_only, threshold)


def path_weight_grad(grad_out: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
    """grad_out^T inputs on the given rows, zero on the others: a dense GEMM over the path alone.

    One contiguous range of rows costs no gather (views of both operands' ends). On CUDA a range
    is recognised when ``rows`` lies on the CPU; rows on the device are gathered unread, without
    waiting. Differentiable in ``grad_out`` and ``inputs``.

    Args:
        grad_out: [N, f].
        inputs: [N, d], the same dtype.
        rows: int64 [k], strictly ascending in [0, f).

    Returns:
        [f, d] in the inputs' dtype.

    Raises:
        IndexError: a row outside [0, f) or out of order.
    """
    _prepare(grad_out)
    return torch.ops.trelm.path_weight_grad(grad_out, inputs, rows)


@torch.no_grad()
def masked_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    fragment_start: int,
    row_length: int,
    row_counts: Tensor,
    columns: Tensor | None = None,
    update_count: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on the path entries of a flat fragment, in place, in one pass.

    Entry e of the fragment is element ``fragment_start + e`` of a row-major [f, row_length]
    matrix. It is on the path if its row's count is positive and its column is in ``columns``; then
    torch.optim.AdamW's arithmetic applies with t = its row's count, or its own count plus one if
    ``update_count`` is given. Everything else, both moments included, stays as it is to the bit.
    An entry's result does not depend on where the fragment begins or ends.

    Args:
        param, grad, exp_avg, exp_avg_sq: flat, contiguous, one length [n] and dtype.
        fragment_start: index of the fragment's first element in the matrix.
        row_length: d, elements of a row; 1 for a bias.
        row_counts: int64 [f] on the CPU: 0 for a row off the path, else the number of updates
            including this one.
        columns: uint8 [row_length], nonzero for the active ones; None: all.
        update_count: float32 [n], updates of each element so far; counted up where active.
        lr, beta1, beta2, eps, weight_decay: AdamW's, decay decoupled.
    """
    _prepare(param)
    torch.ops.trelm.masked_adamw_(
        *(param, grad, exp_avg, exp_avg_sq, fragment_start, row_length, row_counts),
        *(columns, update_count, lr, beta1, beta2, eps, weight_decay),
    )
