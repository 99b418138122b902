"""torch.compile of a routed model: the same losses, gradients, paths and scores as without."""

from types import SimpleNamespace

import pytest
import torch
from model.model_batches import ONES, make_batch, make_memory, make_model
from routing.routing_ranks import LENGTH, ROWS, VOCABULARY, Model

from trelm_ds.config import RoutingConfig
from trelm_ds.ops import load_kernels
from trelm_ds.routing.controller import RoutingController


def _run(form, compile_with=None):
    """Five steps, two rotations of a block; everything that training takes from a step."""
    model = Model()
    load_kernels()
    config = RoutingConfig(form=form, kept_fraction=0.25, multiple_of=2, rotation_steps=2)
    controller = RoutingController(config, model.ffns, model.context, 10, 0)
    forward = model if compile_with is None else torch.compile(model, backend=compile_with)
    seen = []
    for step in range(5):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)
        batch = SimpleNamespace(input_ids=ids, gold=torch.randint(VOCABULARY, (ROWS,), generator=g))
        model.zero_grad(set_to_none=True)
        controller.begin_step(step)
        loss = None
        for _ in range(2):  # micro-batches
            loss = forward(batch)
            loss.backward()
        seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen += [controller.row_counts(layer) for layer in range(2)]
        controller.end_step(True)
        if model.context.score_sums is not None:
            seen.append(model.context.score_sums.clone())
    return seen


def _assert_compiled_equals_eager(form, backend):
    torch._dynamo.reset()
    expected = _run(form)
    found = _run(form, backend)
    torch._dynamo.reset()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["block", "in_backward"])
def test_compiled_equals_eager(form):
    _assert_compiled_equals_eager(form, "aot_eager")


@pytest.mark.parametrize("overrides", [{}, {"injection__form": "encoder"}], ids=["kge", "encoder"])
def test_a_dense_forward_is_one_graph(overrides):
    torch._dynamo.reset()
    model = make_model(routing__form="none", **overrides)
    batch = make_batch(text_length=8 if overrides else 0)
    memory = make_memory(batch)

    def loss():
        return model(batch, memory, 0.5, ONES).loss.detach()

    found = torch.compile(loss, backend="eager", fullgraph=True)()
    torch._dynamo.reset()
    assert torch.equal(found, loss())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["none", "random", "block", "in_backward"])
def test_compiled_by_inductor_equals_eager(form):
    _assert_compiled_equals_eager(form, "inductor")
