"""Output layer and cross-entropy of the masked positions in one.

Scores of K positions over a vocabulary V are by far the widest tensor of a step, and the plain form
makes up to five of that size: scores, their float32 copy, log probabilities and two gradients. Here
what is left of a forward is one, the gradient with respect to the scores in the model's dtype,
and the float32 ones exist a block of rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trelm_ds.losses import mlm_losses

BLOCK_SCORES = 2**26  # scores in float32 at a time: 256 MiB


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, labels, block_rows):
        loss_dtype = torch.promote_types(states.dtype, torch.float32)
        needs_gradient = any(ctx.needs_input_grad)
        losses, grads = [], []
        blocks = zip(states.split(block_rows), labels[:, None].split(block_rows), strict=True)
        for block, gold in blocks:  # without positions, one empty block
            log_p = F.linear(block, weight, bias).to(loss_dtype).log_softmax(1)
            losses.append(-log_p.gather(1, gold)[:, 0])
            if needs_gradient:  # d loss / d scores = p - 1 at the gold token, in log p's place
                grad = log_p.exp_().scatter_add_(1, gold, log_p.new_full(gold.shape, -1.0))
                grads.append(grad.to(states.dtype))
        if needs_gradient:
            grads = torch.cat(grads) if len(grads) > 1 else grads[0]
            ctx.save_for_backward(states, weight, grads)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        states, weight, grads = ctx.saved_tensors
        rows = grad_losses.to(states.dtype)  # to the narrow side of each product
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        return (
            (grads @ weight).mul_(rows[:, None]) if wants_states else None,
            grads.T @ (states * rows[:, None]) if wants_weight else None,
            torch.mv(grads.T, rows) if wants_bias else None,
            None,
            None,
        )


def linear_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    block_rows: int | None = None,
) -> torch.Tensor:
    """-log softmax(states . weight^T + bias) at each label.

    Args:
        states: float [K, hidden]; K may be 0.
        weight: float [V, hidden], of the dtype of states.
        bias: float [V], of the same dtype.
        labels: int64 [K].
        block_rows: positions whose scores are float32 at a time; None: by the vocabulary.
    Returns:
        float32 [K] (float64 for float64 states).
    """
    if torch.compiler.is_compiling():  # which fuses the plain form itself
        return mlm_losses(F.linear(states, weight, bias), labels)
    block_rows = block_rows or max(1, BLOCK_SCORES // len(weight))
    return _LinearCrossEntropy.apply(states, weight, bias, labels, block_rows)


class OutputLayer(nn.Linear):
    """The last Linear of an MLM head, that goes on to the losses when it is given labels.

    In this module's own forward, because there ZeRO-3 has its weights.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> OutputLayer:
        """The same layer with the same Parameter objects, tied ones included."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, states, labels=None):
        """Scores [..., V]; with labels ``linear_cross_entropy``, [K].

        Evaluation's scores are at least float32: those of bf16 are often equal, and a prediction
        is then the lowest token id, the most frequent word of many vocabularies.
        """
        if labels is not None:
            return linear_cross_entropy(states, self.weight, self.bias, labels)
        if self.training:
            return super().forward(states)
        dtype = torch.promote_types(states.dtype, torch.float32)
        return F.linear(states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def install_output_layer(backbone: nn.Module) -> None:
    """Puts an ``OutputLayer`` in the place of the decoder of a BERT's or RoBERTa's MLM head."""
    head = mlm_head(backbone)
    head = getattr(head, "predictions", head)
    head.decoder = OutputLayer.of(head.decoder)


def mlm_head(backbone: nn.Module) -> nn.Module:
    """Hidden states [..., hidden] to scores [..., V]."""
    return backbone.lm_head if backbone.config.model_type == "roberta" else backbone.cls


def masked_token_losses(
    backbone: nn.Module, states: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """-log P(token) at masked positions by a head with an ``OutputLayer``.

    Args:
        backbone: after ``install_output_layer``.
        states: float [K, hidden], last states of the masked positions only.
        labels: int64 [K].
    Returns:
        float32 [K]; empty, still connected to ``states``, when K is 0.
    """
    head = mlm_head(backbone)
    if backbone.config.model_type == "roberta":  # as RobertaLMHead.forward, up to its decoder
        return head.decoder(head.layer_norm(F.gelu(head.dense(states))), labels)
    return head.predictions.decoder(head.predictions.transform(states), labels)
