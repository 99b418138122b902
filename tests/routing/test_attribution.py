"""Integrated gradients against loops written from the paper, captum, and completeness."""

import contextlib

import pytest
import torch
from captum.attr import IntegratedGradients
from routing.routing_models import routed_pair, tiny_batch

from trelm_ds.evaluation_mode import evaluation_mode
from trelm_ds.routing.attribution import integrated_gradients, integration_rule


@pytest.fixture(scope="module")
def models():
    routed, plain = routed_pair()
    return routed.eval(), plain.eval(), tiny_batch()


@contextlib.contextmanager
def replaced(layer, row, left, right, value):
    """Hugging Face's own layer with ``value`` as its FFN activation at one mention."""

    def hook(module, args, output):
        output = output.clone()
        output[row, left:right] = value
        return output

    handle = layer.intermediate.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def gold_probability(model, batch, mention):
    """P of one mention by the whole unrouted model on the whole batch: sum over its tokens."""
    states = model.encode(batch)
    rows = (batch.decode_mention == mention).nonzero()[:, 0]
    spans = batch.mention_spans[batch.decode_mention[rows]]
    p = model.log_probability(states, spans, rows, batch).exp()
    return (p * (batch.decode_tokens[rows] >= 0)).sum()


def activation_at(model, batch, index, row, left, right):
    kept = {}
    layer = model.backbone.base_model.encoder.layer[index]
    handle = layer.intermediate.register_forward_hook(
        lambda module, args, output: kept.update(value=output)
    )
    with torch.no_grad():
        model.encode(batch)
    handle.remove()
    return kept["value"][row, left:right]


def paper_loop(model, batch, m):
    """Eqs. 9 and 11 literally: v_j / m * sum_k dP(k/m v)/dv_j, one mention and layer at a time."""
    layers = model.backbone.base_model.encoder.layer
    scores = torch.zeros(len(layers), model.backbone.config.intermediate_size).double()
    for mention in batch.decode_mention.unique().tolist():
        row, left, right = batch.mention_spans[mention].tolist()
        for index, layer in enumerate(layers):
            v = activation_at(model, batch, index, row, left, right)
            for k in range(1, m + 1):
                scaled = (k / m * v).requires_grad_()
                with replaced(layer, row, left, right, scaled):
                    p = gold_probability(model, batch, mention)
                (gradient,) = torch.autograd.grad(p, scaled)
                scores[index] += (v * gradient / m).sum(0)
    return scores


def test_riemann_sum_equals_the_papers_equations(models):
    routed, plain, batch = models
    got = integrated_gradients(routed.attribution_problem(batch, None, 0.0), "riemann_right", 5)
    expected = paper_loop(plain, batch, 5)
    torch.testing.assert_close(got.mid, expected, rtol=1e-9, atol=1e-12)
    assert got.mid.dtype == torch.float64 and expected.abs().max() > 1e-3


def test_equals_captum(models):
    routed, plain, batch = models
    layers = plain.backbone.base_model.encoder.layer
    expected = torch.zeros(len(layers), 24, dtype=torch.float64)
    for mention in batch.decode_mention.unique().tolist():
        row, left, right = batch.mention_spans[mention].tolist()
        for index, layer in enumerate(layers):
            v = activation_at(plain, batch, index, row, left, right)

            def probability(values, layer=layer, mention=mention, place=(row, left, right)):
                result = []
                for value in values:
                    with replaced(layer, *place, value):
                        result.append(gold_probability(plain, batch, mention))
                return torch.stack(result)

            attribution = IntegratedGradients(probability).attribute(
                v[None], method="riemann_right", n_steps=20
            )
            expected[index] += attribution[0].sum(0)
    got = integrated_gradients(routed.attribution_problem(batch, None, 0.0), "riemann_right", 20)
    # captum rounds its step sizes to float32, hence the absolute part
    largest = float(expected.abs().max())
    torch.testing.assert_close(got.mid, expected, rtol=1e-6, atol=1e-8 * largest)


@pytest.mark.parametrize("site", ["mid", "inputs", "outputs"])
def test_completeness(models, site):
    """sum_j Attr_j = P(v) - P(0), at the activation and at the FFN's input and output."""
    routed, plain, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    got = getattr(integrated_gradients(problem, "gauss_legendre", 8, full=True), site)
    for index, layer in enumerate(plain.backbone.base_model.encoder.layer):
        module = {"mid": layer.intermediate, "inputs": layer.intermediate}.get(
            site, layer.output.dense
        )
        change = 0.0
        for mention in batch.decode_mention.unique().tolist():
            row, left, right = batch.mention_spans[mention].tolist()

            def zero_output(m, args, output, place=(row, slice(left, right))):
                output = output.clone()
                output[place] = 0
                return output

            def zero_input(m, args, place=(row, slice(left, right))):
                value = args[0].clone()
                value[place] = 0
                return (value,)

            with torch.no_grad():
                change += gold_probability(plain, batch, mention)
                if site == "inputs":
                    handle = module.register_forward_pre_hook(zero_input)
                else:
                    handle = module.register_forward_hook(zero_output)
                change -= gold_probability(plain, batch, mention)
                handle.remove()
        assert abs(float(change)) > 1e-3
        assert abs(float(got[index].sum() - change)) < 1e-6


def test_quadrature_approaches_the_fine_riemann_sum(models):
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    fine = integrated_gradients(problem, "riemann_right", 400).mid
    error = {
        n: (integrated_gradients(problem, "gauss_legendre", n).mid - fine).abs().max()
        for n in (2, 8)
    }
    twenty = (integrated_gradients(problem, "riemann_right", 20).mid - fine).abs().max()
    assert error[8] < error[2] and error[8] < twenty / 4


def test_mentions_do_not_disturb_one_another(models):
    """Two mentions of one sequence: the batch's scores are the sum of each one's alone."""
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    together = integrated_gradients(problem, "gauss_legendre", 2, full=True)
    assert problem.mentions.tolist() == [0, 1, 3] and (batch.mention_spans[:2, 0] == 0).all()
    alone = []
    for mention in problem.mentions:
        problem.mentions = mention[None]
        alone.append(integrated_gradients(problem, "gauss_legendre", 2, full=True))
    for site in ("mid", "inputs", "outputs"):
        total = sum(getattr(a, site) for a in alone)
        torch.testing.assert_close(getattr(together, site), total, rtol=1e-9, atol=1e-14)


def test_inner_batch_size_changes_nothing_but_memory(models):
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    small = integrated_gradients(problem, "riemann_right", 3, inner_batch_size=1)
    large = integrated_gradients(problem, "riemann_right", 3, inner_batch_size=100)
    torch.testing.assert_close(small.mid, large.mid, rtol=1e-9, atol=1e-14)


def test_max_targets_spreads_over_the_batch(models):
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    two = integrated_gradients(problem, "gauss_legendre", 2, max_targets=2).mid
    problem.mentions = torch.tensor([0, 1])
    expected = integrated_gradients(problem, "gauss_legendre", 2).mid
    torch.testing.assert_close(two, expected, rtol=1e-9, atol=1e-14)
    problem.mentions = torch.zeros(0, dtype=torch.int64)
    assert integrated_gradients(problem, "gauss_legendre", 2).mid.abs().sum() == 0


def test_leaves_no_trace():
    """No .grad, no hook, no changed mode or random state, though the model trains with dropout."""
    routed, _ = routed_pair()
    batch = tiny_batch()
    routed.train()
    routed.backbone.base_model.embeddings.eval()
    modes = [m.training for m in routed.modules()]
    before = torch.get_rng_state()

    def scores():
        with evaluation_mode(routed), routed.context.dense():
            problem = routed.attribution_problem(batch, None, 0.0)
            return integrated_gradients(problem, "gauss_legendre", 2).mid

    assert torch.equal(scores(), scores())
    assert [m.training for m in routed.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in routed.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in routed.modules())


def test_hooks_go_when_the_forward_fails(models):
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)

    def fail():
        raise RuntimeError("no forward")

    problem.encode = fail
    with pytest.raises(RuntimeError, match="no forward"):
        integrated_gradients(problem, "gauss_legendre", 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in routed.modules())


def test_layers_called_by_keyword_that_return_tuples(models):
    """Transformers before 5 returns a tuple from each layer; hidden states may be a keyword."""
    routed, _, batch = models
    problem = routed.attribution_problem(batch, None, 0.0)
    expected = integrated_gradients(problem, "gauss_legendre", 2).mid
    base = routed.backbone.base_model
    mask = batch.attention_mask[:, None, None, :].bool().expand(-1, 1, 10, -1)
    forwards = [layer.forward for layer in problem.layers]

    def encode():
        states = base.embeddings(batch.input_ids)
        for layer in problem.layers:
            (states,) = layer(hidden_states=states, attention_mask=mask)

    problem.encode = encode
    try:
        for layer, forward in zip(problem.layers, forwards, strict=True):
            layer.forward = lambda *a, forward=forward, **k: (forward(*a, **k),)
        got = integrated_gradients(problem, "gauss_legendre", 2).mid
    finally:
        for layer in problem.layers:
            del layer.forward
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_rules():
    alphas, weights = integration_rule("riemann_right", 4)
    assert alphas == [0.25, 0.5, 0.75, 1.0] and weights == [0.25] * 4
    alphas, weights = integration_rule("gauss_legendre", 3)
    for power in range(6):  # three nodes are exact up to degree 5
        value = sum(w * a**power for a, w in zip(alphas, weights, strict=True))
        assert value == pytest.approx(1 / (power + 1))
