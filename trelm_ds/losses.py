"""Training losses: MLM, contrastive knowledge assessing (Eq. 2) and their total (Eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TokenPrior(nn.Module):
    """log Q(y) of Eq. 2 for every token of the vocabulary, in float32 whatever the model's dtype.

    Args:
        log_q: float32 [vocabulary]; tokens outside the support of Q get its smallest log
            probability, so that a gold token can never be infinitely likely.
    """

    def __init__(self, log_q: torch.Tensor):
        super().__init__()
        log_q = log_q.detach().float()
        finite = log_q[torch.isfinite(log_q)]
        floor = finite.min() if finite.numel() else torch.tensor(0.0)
        self.register_buffer("log_q", log_q.clamp(min=floor.item()), persistent=False)

    def _apply(self, fn, recurse=True):
        # DeepSpeed's bf16 mode casts every floating buffer, and log Q rounded to 8 bits of
        # mantissa moves the corrected scores by up to 0.03: follow the device, keep the dtype.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.log_q[tokens]


def mlm_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log P(token) at each masked position, of bf16 scores too in float32.

    Args:
        logits: float [K, vocabulary], of the masked positions only.
        labels: int64 [K].
    Returns:
        float32 [K] (float64 for float64 scores); empty, still connected to ``logits``, when K is 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, reduction="none")


def mlm_split_sums(losses: torch.Tensor, is_object: torch.Tensor) -> torch.Tensor:
    """Losses summed over text targets and over object targets.

    Args:
        losses: float32 [K], ``mlm_losses``.
        is_object: bool [K], tokens of entity mentions masked whole.
    Returns:
        float32 [2]: text, objects; 0, still connected, for a side without targets.
    """
    return torch.stack([losses.masked_fill(side, 0.0).sum() for side in (is_object, ~is_object)])


def split_weights(share: float, text: float, objects: float) -> tuple[float, float]:
    """What a text and an object target weigh in (1 - s) * text mean + s * object mean.

    Args:
        share: s.
        text, objects: targets of the GLOBAL batch, in whatever unit the sums are averaged in. A
            side without any gives its weight to the other: the split is of what there is.
    """
    if not (text and objects):
        share = float(not text)
    return (1.0 - share) / (text or 1.0), share / (objects or 1.0)


@torch.no_grad()
def mention_probability(losses: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """p(gold) of every mention that was masked whole: the mean over its masked tokens.

    Args:
        losses: float32 [K], ``mlm_losses``.
        group: int64 [K], the mention of each position; -1: text.
        num_groups: G; each mention has a position.
    Returns:
        float32 [G] in [0, 1], bit by bit the same in any order of the positions.
    """
    # Whole numbers of 2^-40 add up exactly, so a GPU's order of adding does not matter. Text goes
    # to one entry more.
    whole = (losses.neg().exp().clamp(max=1.0).double() * 2.0**40).round().long()
    place = torch.where(group < 0, num_groups, group)
    sums = whole.new_zeros(num_groups + 1).index_add_(0, place, whole)
    counts = whole.new_zeros(num_groups + 1).index_add_(0, place, torch.ones_like(whole))
    return (sums[:num_groups].double() / 2.0**40 / counts[:num_groups]).float()


def gold_log_probability(
    states: torch.Tensor,
    gold_tokens: torch.Tensor,
    gold_embeddings: torch.Tensor,
    negative_tokens: torch.Tensor,
    negative_embeddings: torch.Tensor,
    prior: TokenPrior,
) -> torch.Tensor:
    """Log softmax of the gold token over {gold} + N shared negatives (the summand of Eq. 2).

    The score is f(h, y) = h . E[y] - log Q(y). A negative equal to the row's gold token is an
    accidental hit and is left out of that row's softmax.

    Args:
        states: float [..., hidden], decoded states h_d.
        gold_tokens: int64 [...].
        gold_embeddings: float [..., hidden], E[gold].
        negative_tokens: int64 [N].
        negative_embeddings: float [N, hidden], E[negative].
        prior: log Q.
    Returns:
        float32 [...] (float64 for float64 states), at most 0.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    # The differences of these scores are small against their size, and the products are tiny next
    # to the encoder's: float32 costs nothing here even in a bf16 run.
    with torch.autocast(states.device.type, enabled=False):
        states = states.to(dtype)
        gold = (states * gold_embeddings.to(dtype)).sum(-1) - prior(gold_tokens)
        negative = states @ negative_embeddings.to(dtype).T - prior(negative_tokens)
        hit = gold_tokens[..., None] == negative_tokens
        scores = torch.cat([gold[..., None], negative.masked_fill(hit, float("-inf"))], dim=-1)
        return scores.log_softmax(-1)[..., 0]


def entity_scores(
    states: torch.Tensor,
    candidates: torch.Tensor,
    log_q: torch.Tensor,
    gold: torch.Tensor,
    hits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled softmax of whole entities: the token-wise one of Eq. 2, with names for tokens.

    Entity e scores h . v[e] - log Q(e), v[e] the mean embedding of its name's tokens, as a token
    scores h . E[y] - log Q(y): there is no temperature of its own, so for a name of one token the
    two losses ask for the same. The prediction is the candidate of highest h . v[e]: the
    correction belongs to the estimate of the loss.

    Args:
        states: float [D, hidden].
        candidates: float [C, hidden], v.
        log_q: float32 [C].
        gold: int64 [D], the answers' columns.
        hits: int64 [H], flat into D * C: other right answers, left out of their row's softmax.
    Returns:
        float32 [D] (float64 for float64 states) log P(gold), and bool [D] whether no other
        candidate of the row scores higher, detached.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        scores = states.to(dtype) @ candidates.to(dtype).T
        hit = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(hit.index_fill_(0, hits, True).view_as(scores), float("-inf"))
        log_p = (scores - log_q).log_softmax(-1).gather(1, gold[:, None])[:, 0]
        with torch.no_grad():
            first = (scores <= scores.gather(1, gold[:, None])).all(1)
    return log_p, first


def total_loss(mlm: torch.Tensor, cka: torch.Tensor, loss_weight: float) -> torch.Tensor:
    """L = theta * L_MLM + (1 - theta) * L_CKA (Eq. 3; theta multiplies MLM, as it is printed)."""
    return loss_weight * mlm + (1.0 - loss_weight) * cka
