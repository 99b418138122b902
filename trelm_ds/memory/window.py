"""Local memory of a mention: the mean state of a window of text around it (Eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def local_memory(
    hidden_states: Tensor,
    attention_mask: Tensor,
    spans: Tensor,
    half_window: int,
    paper_norm: bool = False,
    num_tokens: int | None = None,
) -> Tensor:
    """Mean state over [left - k, right + k), clipped to the real tokens (Eq. 4).

    The paper sums i = l - k .. r + k and divides by 2k + r - l, the number of tokens of an
    interior window whose right end is exclusive. Ours is that window, divided by the number of
    tokens that exist in it.

    Args:
        hidden_states: float [B, S, d], last encoder layer.
        attention_mask: int64 [B, S], 1 on real tokens; padding is on the right.
        spans: int64 [M, 3], rows (row, left, right), right exclusive, inside the real tokens.
        half_window: k in tokens, >= 0.
        paper_norm: divide by 2k + r - l even where the window is clipped.
        num_tokens: of all windows together; with it nothing waits for a GPU, without it the sizes
            are summed up.

    Returns:
        float32 [M, d], without gradient.
    """
    _, length, hidden = hidden_states.shape
    if not len(spans):
        return hidden_states.new_zeros((0, hidden), dtype=torch.float32)
    row, left, right = spans.unbind(1)
    low = (left - half_window).clamp(min=0)
    high = torch.minimum(right + half_window, attention_mask.sum(1)[row])
    size = high - low
    # One bag of flat positions per mention, summed in float32 without materialising the windows:
    # 5 to 100 times faster on CPU than differences of cumulative sums.
    start = size.cumsum(0) - size
    positions = torch.repeat_interleave(row * length + low - start, size, output_size=num_tokens)
    positions += torch.arange(len(positions), device=positions.device)
    flat = hidden_states.detach().reshape(-1, hidden).float()
    total = F.embedding_bag(positions, flat, start, mode="sum")
    norm = 2 * half_window + right - left if paper_norm else size
    return total / norm[:, None]
