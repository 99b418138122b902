"""in_backward on several ranks: scores travel while the layer below is differentiated."""

import pytest
import torch
import torch.distributed as dist
from routing.routing_models import routed_pair, tiny_batch

from trelm_ds.routing.context import SELECT
from trelm_ds.routing.paths import select_layer_paths

LAYERS = 3


@pytest.fixture
def group():
    if dist.is_initialized():  # by a test with an engine, before
        yield dist.group.WORLD
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def one_backward(model, batch, group):
    """Gradients of every parameter, the paths, and the order of sending and selecting."""
    context, events = model.context, []
    context.process_group = group
    send, select = context.send_scores, context.select_from

    def spy_send(layer, scores):
        events.append(("send", layer))
        return send(layer, scores)

    def spy_select(layer, pending):
        events.append(("select", layer))
        select(layer, pending)

    context.send_scores, context.select_from = spy_send, spy_select
    context.begin(
        [None] * LAYERS,
        SELECT,
        lambda scores: select_layer_paths(scores, 0.25, 1, positive_only=False),
    )
    model.zero_grad()
    for _ in range(2):  # two micro-batches share the paths of the first
        model(batch).backward()
    paths = [p.rows for p in context.paths]
    context.end()
    del context.send_scores, context.select_from
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return grads, paths, events


def test_the_ranks_agree_while_the_layer_below_goes_on(group):
    model = routed_pair(num_hidden_layers=LAYERS)[0].eval()  # no dropout
    batch = tiny_batch()
    alone, alone_paths, alone_events = one_backward(model, batch, None)
    overlapped, paths, events = one_backward(model, batch, group)
    assert all(torch.equal(a, b) for a, b in zip(alone_paths, paths, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, overlapped, strict=True))
    assert alone_events == [(e, i) for i in (2, 1, 0) for e in ("send", "select")]
    # A layer's paths are chosen when the layer below has sent its own scores; the lowest has none.
    sends = [("send", 2), ("send", 1), ("select", 2), ("send", 0), ("select", 0), ("select", 1)]
    assert events == sends


def test_it_waits_in_place_where_the_order_cannot_be_arranged(group):
    model = routed_pair(num_hidden_layers=LAYERS)[0].eval()  # no dropout
    batch = tiny_batch()
    in_turn = [(e, i) for i in (2, 1, 0) for e in ("send", "select")]
    for attribute, value in (("exact_input_gradient", False), ("checkpointing", True)):
        setattr(model.context, attribute, value)
        assert one_backward(model, batch, group)[2] == in_turn
        setattr(model.context, attribute, not value)
