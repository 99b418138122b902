"""Which parameters a run trains at all: ``routing.scope`` and ``routing.form: frozen``."""

from __future__ import annotations

import logging

from torch import nn

from trelm_ds.config import RoutingConfig
from trelm_ds.routing.ffn import RoutedFFN

logger = logging.getLogger(__name__)

HEAD_MODULES = ("cls", "lm_head")  # the MLM heads of Hugging Face's BERT and RoBERTa


def apply_scope(model: nn.Module, config: RoutingConfig) -> None:
    """Sets ``requires_grad`` of every parameter; before the optimizer is built.

    ``scope: ffn``: everything trains. ``scope: strict``: of the backbone only the FFN paths and
    the MLM head do; so do injection and decoder, which lie outside the backbone. The word
    embeddings are frozen, and with them the head's decoder matrix where the two are tied (what
    is left of the head is its transform and bias). The FFN's output bias belongs to a path only
    with ``paths: full`` (Eq. 12's b2[S_out]). ``form: frozen`` (a control): no FFN weight
    trains, whatever the scope.

    Args:
        model: has ``backbone``, a Hugging Face model with routed FFNs installed.
    """
    backbone = model.backbone
    ffns = [m for m in backbone.modules() if isinstance(m, RoutedFFN)]
    model.requires_grad_(True)
    if config.scope == "strict":
        backbone.requires_grad_(False)
        for name in HEAD_MODULES:
            head = getattr(backbone, name, None)
            if head is not None:
                head.requires_grad_(True)
        for ffn in ffns:
            ffn.requires_grad_(True)
            ffn.down_bias.requires_grad_(config.paths == "full")
        embedding = backbone.get_input_embeddings().weight
        embedding.requires_grad_(False)
        output = backbone.get_output_embeddings()
        if output is not None and output.weight is embedding:
            logger.info(
                "routing.scope strict: the word embeddings are frozen, and the MLM head's "
                "decoder matrix with them, because the two are tied"
            )
    if config.form == "frozen":
        for ffn in ffns:
            ffn.requires_grad_(False)
