"""Memory at the input: injection embedding and memory rows mixed by the weight lambda (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from trelm_ds.memory.bank import MemoryRows


def memory_input(
    rows: MemoryRows, weight: float, embedding_rms: float | Tensor, rescale: str = "rms"
) -> Tensor:
    """The memory term of Eq. 7, lambda / 2 * (M_local + M_global).

    Args:
        rows: of M mentions.
        weight: lambda of Eq. 8, in [0, 1].
        embedding_rms: root mean square of the word-embedding table; used by ``rms`` alone.
        rescale: ``rms`` gives every local and every global row this root mean square, because
            last-layer states are many times larger than word embeddings and would drown the
            injected knowledge; ``literal`` takes the rows as stored, as Eq. 7 is printed.

    Returns:
        float32 [M, d].
    """
    local, global_ = rows.local, rows.global_
    if rescale == "rms":
        local, global_ = _with_rms(local, embedding_rms), _with_rms(global_, embedding_rms)
    return weight / 2 * (local + global_)


def mix(
    injection: Tensor,
    rows: MemoryRows,
    weight: float,
    embedding_rms: float | Tensor,
    rescale: str = "rms",
) -> Tensor:
    """The embedding that replaces a mention's tokens (Eq. 7).

    I_p = (1 - lambda) h_e + lambda / 2 (M_local + M_global).

    Args:
        injection: float [M, d], h_e: the knowledge embedding, or the token's own.
        rows, weight, embedding_rms, rescale: as in :func:`memory_input`.

    Returns:
        [M, d] in the dtype of ``injection``; with weight 0 exactly ``injection``.
    """
    if weight == 0:
        return injection
    memory = memory_input(rows, weight, embedding_rms, rescale)
    return (1 - weight) * injection + memory.to(injection.dtype)


def _with_rms(rows: Tensor, rms: float | Tensor) -> Tensor:
    own = rows.square().mean(1, keepdim=True).sqrt()
    return rows * (rms / own.clamp(min=torch.finfo(rows.dtype).tiny))  # a zero row stays zero
