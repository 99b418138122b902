"""The routed FFN: exact forward, path-restricted backward, Hugging Face layout and back."""

import copy

import pytest
import torch
from routing.routing_models import routed_pair, targets, tiny_backbone, tiny_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trelm_ds import ops
from trelm_ds.errors import ConfigError
from trelm_ds.routing.context import ACCUMULATE, SELECT, RoutingContext
from trelm_ds.routing.ffn import (
    ACTIVATIONS,
    RoutedFFN,
    install_routed_ffn,
    to_hf_state_dict,
)
from trelm_ds.routing.paths import LayerPaths, PathScores, select_layer_paths

N, D, F = 9, 6, 16
POSITIONS = torch.tensor([1, 2, 6])
WEIGHTS = torch.tensor([0.5, 0.5, 0.125])
ROWS = torch.tensor([0, 3, 4, 11])


def make_ffn(dtype=torch.float64, activation="gelu", seed=0):
    torch.manual_seed(seed)
    context = RoutingContext()
    ffn = RoutedFFN(D, F, activation, context, 0, dtype=dtype)
    context.num_layers = 1
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_()
    x = torch.randn(3, 3, D, dtype=dtype, requires_grad=True)
    out_grad = torch.randn(3, 3, D, dtype=dtype)
    return ffn, context, x, out_grad


def dense_grads(ffn, x, out_grad):
    """Gradients of x and of every parameter by plain autograd."""
    assert not ffn.context.active
    inputs = [x, *ffn.parameters()]
    return torch.autograd.grad(ffn(x), inputs, out_grad)


def routed_grads(ffn, x, out_grad, paths, mode=None, select=None, give_targets=True):
    ffn.context.begin([paths], mode, select)
    output = ffn(x)
    if give_targets:
        ffn.context.set_targets(POSITIONS, WEIGHTS)
    grads = torch.autograd.grad(output, [x, *ffn.parameters()], out_grad)
    ffn.context.end()
    return grads


def row_mask(rows, size=F):
    mask = torch.zeros(size, dtype=torch.float64)
    mask[rows] = 1
    return mask


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    "paths", [LayerPaths(ROWS), LayerPaths.block(4, 8, "cpu")], ids=["rows", "block"]
)
def test_exact_form_masks_the_dense_weight_gradient(activation, paths):
    """Eq. 12 for S_mid: dW1, db1, dW2 are the masked dense ones; dX and db2 stay exact."""
    ffn, _, x, out_grad = make_ffn(activation=activation)
    assert torch.equal(ffn(x), ffn.project(ffn.intermediate(x)))
    dense = dense_grads(ffn, x, out_grad)
    routed = routed_grads(ffn, x, out_grad, paths)
    keep = row_mask(paths.rows)
    expected = [
        dense[0],
        dense[1] * keep[:, None],
        dense[2] * keep,
        dense[3] * keep[:, None],
        dense[4],
    ]
    for got, want in zip(routed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for got in routed[1:4]:  # dense tensors, exact zeros off the path
        assert got.is_contiguous() and (got[keep == 0] == 0).all() and (got[keep == 1] != 0).any()


def test_forward_is_that_of_the_dense_layer():
    ffn, context, x, _ = make_ffn(torch.float32)
    dense = ffn(x)
    context.begin([LayerPaths(ROWS)])
    torch.testing.assert_close(ffn(x), dense, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), dense, rtol=1e-6, atol=1e-6)


def test_path_form_sends_the_input_gradient_through_the_path_alone():
    ffn, context, x, out_grad = make_ffn()
    context.exact_input_gradient = False
    for paths in (LayerPaths(ROWS), LayerPaths.block(4, 8, "cpu")):
        routed = routed_grads(ffn, x, out_grad, paths)
        keep = row_mask(paths.rows)
        # reference: the same layer whose other neurons are constants
        hidden = torch.nn.functional.linear(x, ffn.up_weight, ffn.up_bias)
        hidden = torch.where(keep.bool(), hidden, hidden.detach())
        output = ffn.project(ffn.activation(hidden))
        (grad_x,) = torch.autograd.grad(output, x, out_grad)
        dense = dense_grads(ffn, x, out_grad)
        torch.testing.assert_close(routed[0], grad_x, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(routed[0], dense[0])
        torch.testing.assert_close(routed[1], dense[1] * keep[:, None])
        torch.testing.assert_close(routed[2], dense[2] * keep)
        torch.testing.assert_close(routed[3], dense[3] * keep[:, None])
        torch.testing.assert_close(routed[4], dense[4])


@pytest.mark.parametrize("exact", [True, False])
def test_full_paths_restrict_every_matrix_and_bias(exact):
    """Eq. 12 entry by entry, in Hugging Face's orientation W1 [f, d], W2 [d, f]."""
    ffn, context, x, out_grad = make_ffn()
    context.exact_input_gradient = exact
    inputs, outputs = torch.tensor([1, 4]), torch.tensor([0, 2, 5])
    dense = dense_grads(ffn, x, out_grad)
    routed = routed_grads(ffn, x, out_grad, LayerPaths(ROWS, inputs, outputs))
    grad_w1, grad_b1, grad_w2, grad_b2 = routed[1], routed[2], routed[3].t(), routed[4]
    dense_w2 = dense[3].t()
    for j in range(F):
        on_path = j in ROWS
        assert float(grad_b1[j]) == pytest.approx(float(dense[2][j]) if on_path else 0)
        for i in range(D):
            want = float(dense[1][j, i]) if on_path and i in inputs else 0
            assert float(grad_w1[j, i]) == pytest.approx(want)
            want = float(dense_w2[i, j]) if on_path and i in outputs else 0
            assert float(grad_w2[i, j]) == pytest.approx(want)
    for i in range(D):
        assert float(grad_b2[i]) == pytest.approx(float(dense[4][i]) if i in outputs else 0)
    if exact:
        torch.testing.assert_close(routed[0], dense[0], rtol=1e-12, atol=1e-12)


def test_gradcheck_with_every_row_kept():
    ffn, context, x, _ = make_ffn()
    context.begin([LayerPaths(torch.arange(F))])
    parameters = [p.detach().clone().requires_grad_() for p in ffn.parameters()]

    def function(x, *parameters):
        named = dict(zip(dict(ffn.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(ffn, named, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))
    context.exact_input_gradient = False
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_empty_path_gives_zeros():
    ffn, context, x, out_grad = make_ffn()
    dense = dense_grads(ffn, x, out_grad)
    for exact in (True, False):
        context.exact_input_gradient = exact
        routed = routed_grads(ffn, x, out_grad, LayerPaths(torch.zeros(0, dtype=torch.int64)))
        assert all(g.abs().sum() == 0 for g in routed[1:4])
        torch.testing.assert_close(routed[0], dense[0] if exact else torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_parameters(dtype):
    ffn, context, x, out_grad = make_ffn(dtype)
    for exact in (True, False):
        context.exact_input_gradient = exact
        routed = routed_grads(ffn, x, out_grad, LayerPaths(ROWS))
        wide = copy.deepcopy(ffn).double()
        wide.context.end()
        dense = dense_grads(wide, x.detach().double().requires_grad_(), out_grad.double())
        assert all(g.dtype == dtype for g in routed)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        want = dense[1] * row_mask(ROWS)[:, None]
        torch.testing.assert_close(
            routed[1].double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max())
        )


def test_frozen_parameters_get_no_gradient():
    ffn, context, x, out_grad = make_ffn()
    ffn.up_weight.requires_grad_(False)
    ffn.down_bias.requires_grad_(False)
    context.begin([LayerPaths(ROWS)])
    ffn(x.detach()).backward(out_grad)
    assert ffn.up_weight.grad is None and ffn.down_bias.grad is None
    wide = make_ffn()[0]
    dense = dense_grads(wide, x, out_grad)
    torch.testing.assert_close(ffn.up_bias.grad, dense[2] * row_mask(ROWS))
    torch.testing.assert_close(ffn.down_weight.grad, dense[3] * row_mask(ROWS)[:, None])


# ---- scores read off the backward ----------------------------------------------------------------


def hooked_scores(model, batch, mode):
    """-p A dL/dA (or |dL/dA|, or |A|) from autograd on Hugging Face's own model: [L, f]."""
    kept = []
    handles = []
    for layer in model.backbone.base_model.encoder.layer:

        def hook(module, args, output):
            output.retain_grad()
            kept.append(output)

        handles.append(layer.intermediate.register_forward_hook(hook))
    states = model.encode(batch)
    rows = torch.arange(len(batch.decode_mention))
    spans = batch.mention_spans[batch.decode_mention]
    log_p = model.log_probability(states, spans, rows, batch)
    real = (batch.decode_tokens >= 0).double()
    (-(log_p * real).sum()).backward()
    for handle in handles:
        handle.remove()
    p = ((log_p.exp() * real).sum(1) / real.sum(1)).detach()
    positions, weights = targets(batch, p)
    result = []
    for activation in kept:
        a, g = activation.detach().flatten(0, 1), activation.grad.flatten(0, 1)
        score = torch.zeros(a.shape[1]).double()
        if mode == "abs_gradient":
            score = g.abs().sum(0)
        else:
            for position, weight in zip(positions.tolist(), weights.double(), strict=True):
                if mode == "signed":
                    score += weight * a[position] * -g[position]
                else:
                    score += a[position].abs()
        result.append(score)
    return torch.stack(result)


@pytest.mark.parametrize("mode", ["signed", "abs_gradient", "activation"])
@pytest.mark.parametrize("exact", [True, False])
def test_backward_scores_equal_autograd_on_the_unrouted_model(mode, exact):
    routed, plain = routed_pair()
    batch = tiny_batch()
    routed.eval(), plain.eval()
    received = {}
    context = routed.context
    context.score, context.exact_input_gradient = mode, exact

    def select(scores):
        received[len(received)] = scores.mid
        return LayerPaths(torch.arange(24))  # everything, so that lower layers see exact gradients

    context.begin([None, None], SELECT, select)
    routed(batch).backward()
    got = torch.stack([received[1], received[0]])  # the upper layer's backward comes first
    torch.testing.assert_close(
        got.double(), hooked_scores(plain, batch, mode), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("exact", [True, False])
def test_full_scores_at_input_and_output(exact):
    """S_in: -p x dL/dx through the FFN alone, not the residual; S_out: -p y dL/dy."""
    ffn, context, x, out_grad = make_ffn()
    context.full, context.exact_input_gradient = True, exact
    dense = dense_grads(ffn, x, out_grad)
    received = []

    def select(scores):
        received.append(scores)
        return select_layer_paths(scores, 0.5, 1, positive_only=True)

    routed_grads(ffn, x, out_grad, None, SELECT, select)
    (scores,) = received
    flat_x, flat_grad_x = x.detach().flatten(0, 1), dense[0].flatten(0, 1)
    y, grad_y = ffn(x).detach().flatten(0, 1), out_grad.flatten(0, 1)
    weights = WEIGHTS.double()[:, None]
    for got, value, grad in (
        (scores.inputs, flat_x, flat_grad_x),
        (scores.outputs, y, grad_y),
    ):
        want = (weights * value[POSITIONS] * -grad[POSITIONS]).sum(0)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    context.score = "activation"
    routed_grads(ffn, x, out_grad, None, SELECT, select)
    want = y[POSITIONS].abs().sum(0)
    torch.testing.assert_close(received[1].outputs.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_blocks_accumulate_scores_over_micro_batches(exact):
    ffn, context, x, out_grad = make_ffn()
    context.exact_input_gradient = exact
    received = []

    def select(scores):
        received.append(scores.mid)
        return LayerPaths(ROWS)

    routed_grads(ffn, x, out_grad, None, SELECT, select)
    context.begin([LayerPaths.block(4, 8, "cpu")], ACCUMULATE)
    for _ in range(3):
        output = ffn(x)
        context.set_targets(POSITIONS, WEIGHTS)
        output.backward(out_grad)
    torch.testing.assert_close(context.score_sums[0], 3 * received[0])


def test_no_targets_still_selects():
    """A rank without knowledge in its batch must take part, and adds nothing."""
    ffn, context, x, out_grad = make_ffn()
    received = []

    def select(scores):
        received.append(scores.mid)
        return LayerPaths(ROWS)

    routed_grads(ffn, x, out_grad, None, SELECT, select, give_targets=False)
    assert received[0].shape == (F,) and received[0].abs().sum() == 0
    context.begin([LayerPaths(ROWS)], ACCUMULATE)
    ffn(x).backward(out_grad)
    assert context.score_sums is None


def test_accumulation_shares_the_first_micro_batchs_path():
    ffn, context, x, out_grad = make_ffn()
    calls = []

    def select(scores):
        calls.append(scores)
        return select_layer_paths(scores, 0.25, 1, positive_only=True)

    context.begin([None], SELECT, select)
    total = torch.zeros_like(ffn.up_weight)
    for i in range(2):
        other = (x + i).detach().requires_grad_()
        output = ffn(other)
        context.set_targets(POSITIONS, WEIGHTS)
        output.backward(out_grad)
        inactive = copy.deepcopy(ffn)
        inactive.context.end()
        total += dense_grads(inactive, other, out_grad)[1]
    assert len(calls) == 1
    keep = row_mask(context.paths[0].rows)
    assert 0 < keep.sum() <= 4
    torch.testing.assert_close(ffn.up_weight.grad, total * keep[:, None])


def test_an_earlier_pass_of_the_same_forward_is_not_scored():
    """Texts of injected entities go through the same FFNs; their tokens are no knowledge."""
    ffn, context, x, out_grad = make_ffn()
    alone = []
    routed_grads(ffn, x, out_grad, None, SELECT, lambda s: alone.append(s.mid) or LayerPaths(ROWS))
    both = []
    context.begin([None], SELECT, lambda s: both.append(s.mid) or LayerPaths(ROWS))
    text = torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True)
    injected = ffn(text)
    output = ffn(x + 0 * injected.sum())
    context.set_targets(POSITIONS, WEIGHTS)
    output.backward(out_grad)
    assert len(both) == 1 and torch.equal(both[0], alone[0])
    assert text.grad is not None
    context.begin([LayerPaths(ROWS)], ACCUMULATE)
    output = ffn(x + 0 * ffn(text).sum())
    context.set_targets(POSITIONS, WEIGHTS)
    output.backward(out_grad)
    assert torch.equal(context.score_sums[0], alone[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("form", ["select", "block"])
def test_activation_checkpointing_changes_nothing(use_reentrant, form):
    def run(wrap):
        ffn, context, x, out_grad = make_ffn()

        def select(scores):
            return select_layer_paths(scores, 0.25, 1, positive_only=True)

        if form == "select":
            context.begin([None], SELECT, select)
        else:
            context.exact_input_gradient = False
            context.begin([LayerPaths.block(8, 4, "cpu")], ACCUMULATE)
        output = wrap(ffn, x)
        context.set_targets(POSITIONS, WEIGHTS)
        output.backward(out_grad)
        sums = context.score_sums
        return [output, x.grad, *(p.grad for p in ffn.parameters())] + (
            [] if sums is None else [sums]
        )

    plain = run(lambda ffn, x: ffn(x))
    checkpointed = run(lambda ffn, x: checkpoint(ffn, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_deterministic_ties_and_operators_agree_with_a_sort():
    scores = PathScores(torch.tensor([0.0, 2.0, -1.0, 2.0, 2.0, 1.0]))
    paths = select_layer_paths(scores, 0.34, 2, positive_only=True)  # ceil(2.04 / 2) * 2 = 4
    assert paths.rows.tolist() == [1, 3, 4, 5]
    paths = select_layer_paths(scores, 0.3, 1, positive_only=True)
    assert paths.rows.tolist() == [1, 3] and paths.inputs is None
    paths = select_layer_paths(scores, 1.0, 1, positive_only=True, threshold=0.75)
    assert paths.rows.tolist() == [1, 3, 4]
    assert len(ops.select_paths(torch.zeros(4), 2, True, 0.0)) == 0


# ---- Hugging Face -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_installed_model_computes_what_hugging_faces_does(kind, activation):
    backbone = tiny_backbone(kind, activation).float().eval()
    original = copy.deepcopy(backbone)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    ffns = install_routed_ffn(backbone, RoutingContext())
    assert [f.layer_index for f in ffns] == [0, 1] and ffns[0].context is ffns[1].context
    assert isinstance(backbone.base_model.encoder.layer[0].intermediate, nn.Identity)
    batch = tiny_batch()
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = original(**arguments).logits
        torch.testing.assert_close(backbone(**arguments).logits, expected, rtol=1e-5, atol=1e-5)
        ffns[0].context.begin([LayerPaths(ROWS)] * 2)
        torch.testing.assert_close(backbone(**arguments).logits, expected, rtol=1e-5, atol=1e-5)

    exported = to_hf_state_dict(backbone.state_dict())
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)
    original.load_state_dict(exported)
    # under the trainer's prefix too
    again = to_hf_state_dict({f"backbone.{n}": t for n, t in backbone.state_dict().items()})
    assert again.keys() == {f"backbone.{name}" for name in state}


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(ConfigError, match="hidden_act 'silu'"):
        install_routed_ffn(tiny_backbone(activation="silu"), RoutingContext())
    with pytest.raises(ConfigError, match="chunk_size_feed_forward"):
        install_routed_ffn(tiny_backbone(chunk_size_feed_forward=2), RoutingContext())

    class Other(nn.Module):
        config = type("Config", (), {"hidden_act": "gelu"})()

    with pytest.raises(ConfigError, match="not a BERT or RoBERTa"):
        install_routed_ffn(Other(), RoutingContext())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hugging_faces_gradient_checkpointing(use_reentrant):
    batch = tiny_batch()

    def run(checkpointing):
        routed, _ = routed_pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        routed.train()
        if checkpointing:
            routed.backbone.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            embeddings = routed.backbone.get_input_embeddings()
            embeddings.register_forward_hook(lambda m, a, o: o.requires_grad_())

        def select(scores):
            return select_layer_paths(scores, 0.25, 1, positive_only=True)

        routed.context.begin([None, None], SELECT, select)
        routed(batch).backward()
        return [p.grad for p in routed.parameters() if p.grad is not None]

    plain, checkpointed = run(False), run(True)
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("paths", "exact", "kept"),
    [
        (LayerPaths.block(4, 8, "cpu"), False, 8),  # the block's columns of hidden
        (LayerPaths.block(0, F, "cpu"), False, F),  # a view of everything must not be overwritten
        (LayerPaths(ROWS), False, 4),
        (LayerPaths.block(4, 8, "cpu"), True, F),  # hidden; the block's activations again
        (LayerPaths(ROWS), True, 2 * F),
    ],
)
def test_a_forward_keeps_what_its_backward_reads(activation, paths, exact, kept):
    ffn, context, x, out_grad = make_ffn(activation=activation)
    dense = dense_grads(ffn, x, out_grad)
    context.exact_input_gradient = exact
    parameters = {p.data_ptr() for p in ffn.parameters()} | {x.data_ptr()}
    sizes = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        context.begin([paths])
        output = ffn(x)
    torch.testing.assert_close(output, ffn.project(ffn.intermediate(x)))
    grads = torch.autograd.grad(output, [x, *ffn.parameters()], out_grad)
    assert sum(sizes) == N * kept
    mask = row_mask(paths.rows)
    for found, wanted in zip(grads[1:4], dense[1:4], strict=True):
        torch.testing.assert_close(found, wanted * (mask[:, None] if wanted.dim() == 2 else mask))
    if exact or len(paths.rows) == F:
        torch.testing.assert_close(grads[0], dense[0])


@pytest.mark.parametrize("exact", [True, False])
def test_layers_take_turns_at_being_scored(exact):
    ffn, context, x, out_grad = make_ffn()
    context.exact_input_gradient = exact
    for layer, turns in ((0, [0, 3]), (2, [1, 4])):
        ffn.layer_index, context.num_layers = layer, 3
        scored = []
        for turn in range(6):
            paths = [LayerPaths.block(4, 8, "cpu")] * 3
            context.score_sums = None
            context.begin(paths, ACCUMULATE, turn=turn, turns=3)
            output = ffn(x)
            context.set_targets(POSITIONS, WEIGHTS)
            output.backward(out_grad)
            if context.score_sums is not None:
                assert context.score_sums[layer].abs().sum() > 0
                scored.append(turn)
        assert scored == turns
