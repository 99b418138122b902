"""Matrix products of the backward against the arithmetic: what is saved is not computed at all.

Counted by the profiler, which sees products inside operators of this project too.
"""

import pytest
import torch
from routing.routing_models import TinyKnowledgeModel, tiny_backbone, tiny_batch
from torch.profiler import ProfilerActivity, profile

from trelm_ds.config import RoutingConfig
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.scope import apply_scope
from trelm_ds.routing.truncation import BackwardTruncation

L, D, F, V = 4, 16, 24, 40
B, S = 3, 10
N = B * S
MASKED = 7  # positions of the MLM head
DECODED, NEGATIVES = 4, 8
KNOWLEDGE = 6  # tokens of the mentions that tiny_batch decodes
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}


def matmul_flops(run):
    """2 per multiply-add of every dense product that ``run`` makes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    total = 0
    for event in record.events():
        if event.name in PRODUCTS:
            left, right = (event.input_shapes[i] for i in PRODUCTS[event.name])
            flops = 2 * right[-1]
            for size in left:
                flops *= size
            total += flops
    return total


class Model(TinyKnowledgeModel):
    """With the MLM head on a few positions; ``injected``: a trained vector in the embeddings."""

    def __init__(self, injected):
        backbone = tiny_backbone(num_hidden_layers=L, std=0.1, attn_implementation="eager")
        super().__init__(backbone, RoutingContext())
        if injected:
            self.injection = torch.nn.Linear(1, D, dtype=torch.float64)
            backbone.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output + self.injection.bias
            )

    def encode(self, batch):
        self.states = super().encode(batch)
        return self.states

    def forward(self, batch):
        loss = super().forward(batch)
        return loss + self.backbone.cls(self.states.flatten(0, 1)[:MASKED]).square().sum()


def backward_flops(injected=False, progress=0.0, **routing):
    model = Model(injected).train()
    config = RoutingConfig(multiple_of=1, truncate_start=0.5, **routing)
    apply_scope(model, config)
    controller = RoutingController(
        config, model.ffns, model.context, 10, 0, truncation=BackwardTruncation(model, config)
    )
    controller.begin_step(0, progress)
    batch = tiny_batch()
    loss = model(batch)
    found = matmul_flops(loss.backward)
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    if not progress and not injected:
        assert not without
    return found


def expected(*, dw=1.0, dx=1.0, strict=False, first=0, input_gradient=True, scored=0):
    """Products of the backward by the cost model.

    Args:
        dw, dx: share of the FFN's neurons in dW1 and dW2, and in dA and dX.
        strict: no weight gradient of attention and embeddings.
        first: lowest layer that the backward enters.
        input_gradient: whether anything below layer ``first`` needs a gradient.
        scored: knowledge positions whose dA is computed apart, per layer.
    """
    product = 2 * N * F * D  # one of the FFN's four
    projections, attention = 4 * 2 * N * D * D, 4 * 2 * B * S * S * D
    total = 0
    for layer in range(first, L):
        total += 2 * product * dw
        total += 2 * scored * F * D
        if layer > first or input_gradient:
            total += 2 * product * dx + projections + attention
        elif strict:  # nothing below the FFN trains: dA of the path's neurons is enough
            total += product * dw
        else:  # the attention trains, its input does not
            total += 2 * product * dx + projections / 4 + attention
        if not strict:
            total += projections
    head, tied = 2 * MASKED * D * D, 2 * MASKED * V * D
    decoder, negatives = 2 * DECODED * D * D, 2 * DECODED * NEGATIVES * D
    total += 2 * head + tied + 2 * decoder + negatives
    if not strict:
        total += tied + negatives
    return total


BLOCK = {"form": "block", "kept_fraction": 0.25, "rotation_steps": 0}


def test_dense_and_paths():
    dense = backward_flops(form="none")
    assert dense == expected()
    assert backward_flops(**BLOCK) == expected(dw=0.25)
    assert backward_flops(**BLOCK, input_gradient="path") == expected(dw=0.25, dx=0.25)
    assert backward_flops(form="random", kept_fraction=0.25) == expected(dw=0.25)
    scoring = BLOCK | {"rotation_steps": 2}
    assert backward_flops(**scoring) == expected(dw=0.25)  # scores are read off dA
    found = backward_flops(**scoring, input_gradient="path")
    assert found == expected(dw=0.25, dx=0.25, scored=KNOWLEDGE)


@pytest.mark.parametrize("injected", [False, True])
def test_strict_computes_no_weight_gradient_of_attention_and_embeddings(injected):
    strict = dict(strict=True, input_gradient=injected)
    options = BLOCK | {"scope": "strict", "injected": injected}
    assert backward_flops(**options) == expected(dw=0.25, **strict)
    path = backward_flops(**options, input_gradient="path")
    assert path == expected(dw=0.25, dx=0.25, **strict)


@pytest.mark.parametrize("form", ["none", "block"])
def test_a_truncated_backward_computes_nothing_below_the_cut(form):
    options = {"truncated_depth": 0.5, "progress": 0.5, "injected": True}
    options |= BLOCK | {"form": form}
    kept = 1.0 if form == "none" else 0.25
    found = backward_flops(**options)
    assert found == expected(dw=kept, first=2, input_gradient=False)
    if form == "block":
        found = backward_flops(**options, scope="strict", input_gradient="path")
        assert found == expected(dw=0.25, dx=0.25, first=2, input_gradient=False, strict=True)
    options["progress"] = 0.0
    assert backward_flops(**options) == expected(dw=kept)
