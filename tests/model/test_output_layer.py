"""Output layer and loss in one, against the plain form and a loop."""

import pytest
import torch
import torch.nn.functional as F
from model.model_batches import make_model

from trelm_ds.losses import mlm_losses
from trelm_ds.output_layer import OutputLayer, linear_cross_entropy, masked_token_losses, mlm_head


def make_problem(rows=7, vocab=11, hidden=5, dtype=torch.float64):
    torch.manual_seed(0)
    states = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    bias = torch.randn(vocab).to(dtype).requires_grad_()
    return states, weight, bias, torch.randint(vocab, (rows,))


@pytest.mark.parametrize("block_rows", [None, 1, 3, 7, 100])
def test_losses_against_a_loop_and_gradients_against_differences(block_rows):
    states, weight, bias, labels = make_problem()
    losses = linear_cross_entropy(states, weight, bias, labels, block_rows)
    for k, label in enumerate(labels.tolist()):
        scores = [sum(a * b for a, b in zip(states[k], row, strict=True)) for row in weight]
        scores = torch.stack(scores) + bias
        expected = scores.exp().sum().log() - scores[label]
        torch.testing.assert_close(losses[k], expected)

    def function(*parts):
        return linear_cross_entropy(*parts, labels, block_rows)

    assert torch.autograd.gradcheck(function, (states, weight, bias))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_it_is_the_plain_form_up_to_rounding(dtype, tolerance):
    states, weight, bias, labels = make_problem(200, 1000, 32, dtype)
    row_weights = torch.rand(200)
    found, expected = [], []
    for losses, grads in (
        (linear_cross_entropy(states, weight, bias, labels, 64), found),
        (mlm_losses(F.linear(states, weight, bias), labels), expected),
    ):
        assert losses.dtype == torch.float32
        grads.append(losses.detach())
        grads.extend(torch.autograd.grad((losses * row_weights).sum(), (states, weight, bias)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def test_no_targets_are_no_loss_and_stay_connected():
    states, weight, bias, labels = make_problem(rows=0)
    linear_cross_entropy(states, weight, bias, labels).sum().backward()
    assert states.grad.shape == states.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_frozen_tensors_have_no_gradient_and_inference_keeps_nothing():
    states, weight, bias, labels = make_problem()
    losses = linear_cross_entropy(states.detach(), weight.detach(), bias, labels)
    losses.sum().backward()
    p = F.linear(states, weight, bias).softmax(1)
    torch.testing.assert_close(bias.grad, (p - F.one_hot(labels, 11)).sum(0).detach())
    with torch.no_grad():
        again = linear_cross_entropy(states, weight, bias, labels)
    assert torch.equal(again, losses.detach()) and not again.requires_grad


def test_extreme_and_nan_scores_are_the_plain_forms():
    states = torch.tensor([[1.0], [1.0], [float("nan")]], requires_grad=True)
    weight, bias = torch.tensor([[1e30], [-1e30], [0.0]]), torch.zeros(3)
    labels = torch.tensor([0, 1, 2])
    found = linear_cross_entropy(states, weight, bias, labels)
    expected = mlm_losses(F.linear(states, weight, bias), labels)
    torch.testing.assert_close(found, expected, equal_nan=True)
    gradients = [torch.autograd.grad(x.sum(), states)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_the_backward_keeps_one_tensor_of_the_scores_size():
    states, weight, bias, labels = make_problem(64, 500, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(states, weight, bias, labels)
    assert [t.shape for t in kept if t.numel() >= 64 * 500] == [(64, 500)]


def test_under_compile_it_is_the_plain_form():
    states, weight, bias, labels = make_problem()
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    found = compiled(states, weight, bias, labels)
    torch.testing.assert_close(found, linear_cross_entropy(states, weight, bias, labels))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_head_in_a_model_is_hugging_faces(model_type):
    model = make_model(model__model_type=model_type).double().eval()
    backbone = model.backbone
    output = backbone.get_output_embeddings()
    assert type(output) is OutputLayer and output.weight is model.word_embeddings.weight
    states = torch.randn(6, model.hidden_size, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 3, 3, 1, 2])
    losses = masked_token_losses(backbone, states, labels)
    plain = F.cross_entropy(mlm_head(backbone)(states), labels, reduction="none")
    torch.testing.assert_close(losses, plain)
    parameters = [p for p in mlm_head(backbone).parameters() if p.requires_grad]
    ours = torch.autograd.grad(losses.sum(), [states, *parameters])
    theirs = torch.autograd.grad(plain.sum(), [states, *parameters])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_has_scores_that_differ_where_bf16_has_ties():
    torch.manual_seed(0)
    layer = OutputLayer(64, 2000).to(torch.bfloat16)
    states = 20 * torch.randn(30, 64).to(torch.bfloat16)
    rounded = layer.train()(states)
    assert rounded.dtype == torch.bfloat16
    assert any(len(row.unique()) < len(row) for row in rounded)
    scores = layer.eval()(states)
    expected = F.linear(states.float(), layer.weight.float(), layer.bias.float())
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    top = scores.topk(2).values
    assert (top[:, 0] > top[:, 1]).all()
    assert layer.double()(states.double()).dtype == torch.float64
