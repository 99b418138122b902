"""The operators in torch's own: the definition, the fallback without a compiler, the CUDA path.

Written in ATen calls that neither wait for the device nor hold a [positions, f] or second [f, d]
temporary, so that they serve on a GPU as they are. The C++ kernels are tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

CHUNK_ELEMENTS = 1 << 22  # of a temporary over positions
MAX_VIEWS = 16  # above this many runs of path rows, gathering them is cheaper than launching each


def neuron_scores(
    activation: Tensor, gradient: Tensor, positions: Tensor, weights: Tensor, absolute: bool
) -> Tensor:
    wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
    weights = weights.float().to(wide)
    scores = torch.zeros(activation.shape[1], dtype=wide, device=activation.device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, activation.shape[1]))
    for start in range(0, len(positions), chunk):
        rows = positions[start : start + chunk]
        g = gradient.index_select(0, rows).to(wide)
        terms = g.abs() if absolute else activation.index_select(0, rows).to(wide).mul_(-g)
        scores.addmv_(terms.t(), weights[start : start + chunk])
    return scores.float()


def select_paths(scores: Tensor, k: int, positive_only: bool, threshold: float) -> Tensor:
    rows, used = select_paths_padded(scores, k, positive_only, threshold)
    return rows[used]  # its length is data: a GPU is waited for


def select_paths_padded(
    scores: Tensor, k: int, positive_only: bool, threshold: float
) -> tuple[Tensor, Tensor]:
    scores = scores.double()
    allowed = ~scores.isnan()
    if positive_only:
        allowed &= scores > 0
    if threshold > 0 and scores.numel():
        largest = scores.masked_fill(~allowed, -torch.inf).amax()
        allowed &= (scores >= threshold * largest) & (largest > 0)
    best = scores.argsort(descending=True, stable=True)
    best = best[allowed[best].argsort(descending=True, stable=True)]  # the allowed ones first
    rows = best[:k].sort().values
    return rows, allowed[rows]


def contiguous_range(rows: Tensor) -> tuple[int, int] | None:
    """(first, end) if ``rows``, on the host, is a range; rows on a device are not read."""
    if rows.device.type != "cpu" or len(rows) == 0:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return (first, last + 1) if last - first + 1 == len(rows) else None


def path_weight_grad(grad_out: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
    width = grad_out.shape[1]
    block = contiguous_range(rows)
    if block is None:
        rows = rows.to(grad_out.device, non_blocking=True)
        out = inputs.new_zeros(width, inputs.shape[1])
        return out.index_copy_(0, rows, grad_out.index_select(1, rows).t() @ inputs)
    first, end = block
    out = inputs.new_empty(width, inputs.shape[1])
    out[:first].zero_()
    out[end:].zero_()
    torch.mm(grad_out[:, first:end].t(), inputs, out=out[first:end])
    return out


def masked_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    fragment_start: int,
    row_length: int,
    row_counts: Tensor,
    columns: Tensor | None,
    update_count: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    size = param.numel()
    if size == 0:
        return
    numbers = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    first_row, last_row = fragment_start // row_length, (fragment_start + size - 1) // row_length
    counts = row_counts[first_row : last_row + 1].cpu()
    tensors = [param, grad, exp_avg, exp_avg_sq]
    offset = first_row * row_length - fragment_start  # of the first row's start, <= 0

    if columns is None and update_count is None:
        runs = count_runs(counts)
        if runs is not None:
            # Few runs of neighbours, as in block routing: torch's fused AdamW on views of them.
            cuts = [
                slice(max(0, offset + begin * row_length), min(size, offset + end * row_length))
                for begin, end, _ in runs
            ]
            views = [[t[cut] for cut in cuts] for t in tensors]
            steps = [torch.full((), t - 1.0, device=param.device) for _, _, t in runs]
            adamw(*views, [], steps, fused=True, amsgrad=False, maximize=False, **numbers)
            return

    active = (counts > 0).nonzero().flatten()
    # A row that the fragment cuts is updated in place, whole rows are gathered and put back.
    begin = 0 if offset == 0 else offset + row_length
    end = begin + max(0, size - begin) // row_length * row_length
    if columns is not None:
        columns = columns.to(param.device, non_blocking=True).bool()
    everything = [*tensors, update_count]
    for cut, row in ((slice(0, min(begin, size)), 0), (slice(end, size), len(counts) - 1)):
        if cut.start < cut.stop and counts[row] > 0:
            parts = [None if t is None else t[cut] for t in everything]
            phase = cut.start - (offset + row * row_length)
            mask = None if columns is None else columns[phase : phase + cut.stop - cut.start]
            updated = _update(*parts, counts[row], mask, **numbers)
            for part, new in zip([parts[0], *parts[2:]], updated, strict=True):
                if part is not None:
                    part.copy_(new)
    if end > begin:
        skipped = (begin - offset) // row_length
        rows = active[(active >= skipped) & (active < skipped + (end - begin) // row_length)]
        whole = [None if t is None else t[begin:end].view(-1, row_length) for t in everything]
        update_rows(whole, rows - skipped, counts[rows], columns, **numbers)


def update_rows(
    tensors: list[Tensor | None],
    rows: Tensor,
    counts: Tensor,
    columns: Tensor | None = None,
    **numbers: float,
) -> None:
    """AdamW in place on some rows of param, grad, exp_avg, exp_avg_sq, update_count, [R, d] each.

    Args:
        tensors: ``update_count`` may be None.
        rows: int64 [k] on the host, distinct.
        counts: int64 [k] on the host, the rows' updates including this one.
        columns: bool [d], those that train; None: all.
        numbers: lr, beta1, beta2, eps, weight_decay.
    """
    device = tensors[0].device
    index = rows.to(device, non_blocking=True)
    parts = [None if t is None else t.index_select(0, index) for t in tensors]
    t = counts.to(device, non_blocking=True)[:, None]
    updated = _update(*parts, t, columns, **numbers)
    for part, new in zip([tensors[0], *tensors[2:]], updated, strict=True):
        if part is not None:
            part.index_copy_(0, index, new)


def count_runs(counts: Tensor) -> list[tuple[int, int, int]] | None:
    """(begin, end, count) of the neighbouring rows that share a positive count; None: too many."""
    active = (counts > 0).nonzero().flatten()
    t = counts[active]
    breaks = ((active[1:] != active[:-1] + 1) | (t[1:] != t[:-1])).nonzero().flatten() + 1
    if len(breaks) >= MAX_VIEWS:
        return None
    if len(active) == 0:
        return []
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(active)]
    return [
        (int(active[s]), int(active[e - 1]) + 1, int(t[s]))
        for s, e in zip(starts, ends, strict=True)
    ]


def _update(p, g, m, v, count, t, mask, *, lr, beta1, beta2, eps, weight_decay):
    """AdamW's new (param, exp_avg, exp_avg_sq, update_count), old ones where ``mask`` is False."""
    storage = p.dtype
    wide = torch.float64 if storage == torch.float64 else torch.float32
    new_count = None
    if count is not None:
        new_count = count + (1 if mask is None else mask.to(count.dtype))
        t = new_count.clamp(min=1)
    t = t.to(torch.float64)
    negative_step = (-(lr / (1 - beta1**t))).to(wide)
    denominator_scale = (1 - beta2**t).sqrt().to(wide)
    g = g.to(wide)
    new_m = torch.lerp(m.to(wide), g, 1 - beta1)
    new_v = v.to(wide) * beta2 + (1 - beta2) * g * g
    new_p = p.to(wide) * (1 - lr * weight_decay)
    new_p = new_p + negative_step * new_m / (new_v.sqrt() / denominator_scale + eps)
    new = [x.to(storage) for x in (new_p, new_m, new_v)]
    if mask is not None:
        new = [torch.where(mask, x, old) for x, old in zip(new, (p, m, v), strict=True)]
    return (*new, new_count)
