"""The memory term at the input, local and global rows weighted by lambda (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from trelm_ds.memory.bank import MemoryRows


def memory_input(
    rows: MemoryRows, weight: float, embedding_rms: float | Tensor, rescale: str = "rms"
) -> Tensor:
    """The memory term of Eq. 7, lambda / 2 * (M_local + M_global).

    The whole, I_p = (1 - lambda) h_e + lambda / 2 * (M_local + M_global), is put together by the
    model, where h_e stands.

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


def _with_rms(rows: Tensor, rms: float | Tensor) -> Tensor:
    own = rows.square().mean(1, keepdim=True).sqrt()
    return rows * (rms / own.clamp(min=torch.finfo(rows.dtype).tiny))  # a zero row stays zero
