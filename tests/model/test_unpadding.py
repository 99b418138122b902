"""The encoder on real tokens only: equal to the padded one, and pads really left out."""

import math

import pytest
import torch
from model.model_batches import (
    ONES,
    PAD,
    VOCAB,
    make_batch,
    make_config,
    make_memory,
    make_model,
)

from trelm_ds import unpadding
from trelm_ds.backbone import MaskedLanguageModel, build_backbone, encode
from trelm_ds.data.collate import Batch
from trelm_ds.routing.attribution import integrated_gradients
from trelm_ds.routing.controller import RoutingController
from trelm_ds.unpadding import Packing, packed_attention

ROUTED = {"routing__kept_fraction": 0.34, "routing__multiple_of": 1}
CASES = {
    "bert": {},
    "roberta": {"model__model_type": "roberta"},
    "encoder": {"injection__form": "encoder"},
    "encoder-roberta": {"injection__form": "encoder", "model__model_type": "roberta"},
    "checkpointed": {"model__gradient_checkpointing": True},
    "block": {"routing__form": "block", "routing__rotation_steps": 1, **ROUTED},
    "in_backward": {"routing__form": "in_backward", **ROUTED},
    "full": {"routing__form": "in_backward", "routing__paths": "full", **ROUTED},
    "absolute": {"routing__form": "in_backward", "routing__score": "abs_gradient", **ROUTED},
    "truncated": {
        "routing__form": "in_backward",
        "routing__truncated_depth": 0.5,
        "routing__truncate_start": 0.0,
        **ROUTED,
    },
    "path-encoder": {
        "routing__form": "in_backward",
        "routing__input_gradient": "path",
        "injection__form": "encoder",
        "model__gradient_checkpointing": True,
        **ROUTED,
    },
    "routed-encoder": {
        "routing__form": "in_backward",
        "injection__form": "encoder",
        "model__gradient_checkpointing": True,
        **ROUTED,
    },
}
MENTION = [(0, 2, 5, 3, 1, 1, 2, 6)]
SHAPES = {
    "one sequence": {"lengths": (12,), "mentions": MENTION, "decode": [(0, 2, [11, 12])]},
    "equal lengths": {"lengths": (15, 15, 15)},
    "one token": {"lengths": (14, 2, 20, 1), "mentions": MENTION, "decode": [(0, 2, [11])]},
}


def pair(**overrides):
    """The same float64 model without and with unpadding, in training mode, dropout 0."""
    overrides = {"routing__form": "none"} | overrides
    models = [make_model(model__unpad=flag, **overrides).double().train() for flag in (False, True)]
    assert [model._unpad for model in models] == [False, True]
    return models


def run_step(model: torch.nn.Module, batch: Batch, controller: RoutingController | None, step=0):
    """One forward and backward: the output, the gradients by name, the layers' paths."""
    memory = make_memory(batch)
    if controller is not None:
        controller.begin_step(step)
        controller.before_micro_batch(model, batch, memory, 0.5)
    model.zero_grad()
    output = model(batch, memory, 0.5, ONES)
    output.loss.backward()
    paths = None
    if controller is not None:
        paths = [p and p.rows.tolist() for p in model.routing_context.paths]
        controller.end_step(True)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output, grads, paths


def assert_equal(actual, expected):
    (ours, our_grads, our_paths), (theirs, their_grads, their_paths) = actual, expected
    for name, value in theirs._asdict().items():
        exact = value.dtype == torch.float64
        tolerance = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(getattr(ours, name), value, **tolerance, msg=name)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-9, atol=1e-10, msg=name)
    assert our_paths == their_paths


@pytest.mark.parametrize("case", CASES)
def test_unpadded_equals_padded(case):
    models = pair(**CASES[case])
    batch = make_batch(text_length=8 if "encoder" in case else 0)
    controllers = [None, None]
    if "routing__form" in CASES[case]:
        controllers = [
            RoutingController(
                *(m.config.routing, m.ffns, m.routing_context, 10),
                seed=1,
                truncation=m.truncation,
            )
            for m in models
        ]
    for step in range(3 if case == "block" else 1):  # a block is picked by the steps before
        padded, unpadded = (
            run_step(model, batch, controller, step)
            for model, controller in zip(models, controllers, strict=True)
        )
        assert_equal(unpadded, padded)
    if case in ("block", "in_backward", "full"):
        assert unpadded[2] and all(unpadded[2])
    if case == "block":
        sums = [model.routing_context.score_sums for model in models]
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-7)
        assert sums[0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_unpadded_equals_padded_whatever_the_lengths(shape):
    batch = make_batch(**SHAPES[shape])
    padded, unpadded = (run_step(model, batch, None) for model in pair())
    assert_equal(unpadded, padded)


def test_layers_see_real_tokens_only_and_pads_come_back_as_zeros():
    _, model = pair()
    batch = make_batch()
    tokens = []
    for layer in model.backbone.base_model.encoder.layer:
        for module in (layer.attention.self.query, layer.output.dense):
            module.register_forward_hook(lambda m, args, out: tokens.append(args[0].numel() // 16))
    states = model.last_hidden_states(batch.input_ids, batch.attention_mask)
    assert tokens == [14 + 9 + 20] * 4
    real = batch.attention_mask.bool()
    assert not states[~real].any() and states[real].any(-1).all()


def test_attribution_runs_on_padded_states_and_gives_the_same():
    batch = make_batch(text_length=8)
    scores = []
    for model in pair(injection__form="encoder"):
        model.eval()
        model(batch, None, 0.0, ONES)
        problem = model.attribution_problem(batch, None, 0.0)
        scores.append(integrated_gradients(problem, "gauss_legendre", 2, full=True))
    for padded, unpadded in zip(*(s.tensors() for s in scores), strict=True):
        assert padded.any()
        torch.testing.assert_close(unpadded, padded, rtol=1e-10, atol=1e-14)


# -- packing and attention ----------------------------------------------------------------------


def test_packing_against_loops():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    real = [(row, column) for row in range(4) for column in range(4) if mask[row, column]]
    for packing in (Packing.of(mask), Packing.of(mask, len(real))):
        assert packing.index.tolist() == [4 * row + column for row, column in real]
        assert packing.offsets.tolist() == [0, 3, 4, 8, 10]
        assert packing.offsets.dtype == torch.int32
        assert packing.rows(packing.index).tolist() == list(range(10))
        values = torch.randn(4, 4, 3)
        packed = packing.pack(values)
        assert all(packed[i].equal(values[at]) for i, at in enumerate(real))
        assert packing.unpack(packed).equal(values * mask[..., None])


def attention_by_loop(query, key, value, packing):
    """softmax(q k^T / sqrt(head size)) v of each head and sequence: [T, H, head size] each."""
    output = torch.zeros_like(query)
    ends = packing.offsets.tolist()
    scaling = 1 / math.sqrt(query.shape[-1])
    for head in range(query.shape[1]):
        for first, last in zip(ends, ends[1:], strict=False):
            for i in range(first, last):
                scores = [scaling * query[i, head] @ key[j, head] for j in range(first, last)]
                weights = torch.stack(scores).softmax(0)
                output[i, head] = weights @ value[first:last, head]
    return output


@pytest.mark.parametrize("lengths", [(5, 2, 7), (4, 4), (1,)])
def test_packed_attention_stays_within_each_sequence(lengths):
    torch.manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packing = Packing.of(mask)
    query, key, value = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    output = packed_attention(query, key, value, packing)
    torch.testing.assert_close(output, attention_by_loop(query, key, value, packing))


def test_dropout_reaches_the_attention_probabilities():
    _, model = pair(model__attention_probs_dropout_prob=0.5)
    batch = make_batch()

    def states(seed):
        torch.manual_seed(seed)
        return model.last_hidden_states(batch.input_ids, batch.attention_mask)

    assert states(0).equal(states(0)) and not states(0).equal(states(1))
    model.eval()
    assert states(0).equal(states(1))


@pytest.mark.parametrize("flash", [True, False])
def test_nothing_asks_the_device_for_a_value(flash, monkeypatch):
    """On ``meta`` there are shapes and no values: what would wait for a GPU raises here.

    With ``flash`` it also shows that torch's operator is called by its signature and has a
    gradient; its values are the GPU test's.
    """
    monkeypatch.setattr(unpadding, "_has_flash", lambda query: flash)
    _, model = pair()
    backbone = model.backbone.to(device="meta", dtype=torch.bfloat16)
    mask = make_batch().attention_mask.to("meta")
    embeds = torch.empty(3, 20, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    states = encode(backbone, embeds, mask, Packing.of(mask, 43))
    assert states.shape == (3, 20, 16) and states.dtype == torch.bfloat16
    states.sum().backward()
    assert embeds.grad.shape == embeds.shape
    query = backbone.base_model.encoder.layer[0].attention.self.query
    assert query.weight.grad.shape == (16, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_equals_float64_by_loop_without_waiting_for_it(dtype):
    lengths, heads, size = (5, 130, 64, 1), 2, 64
    mask = (torch.arange(136) < torch.tensor(lengths)[:, None]).long().cuda()
    torch.manual_seed(0)
    tokens = sum(lengths)
    qkv = torch.randn(3, tokens, heads, size, device="cuda", dtype=dtype).requires_grad_()
    weights = torch.randn(tokens, heads, size, device="cuda", dtype=dtype)
    assert unpadding._has_flash(qkv) == (dtype == torch.bfloat16)

    def run():
        packing = Packing.of(mask, tokens)
        output = packed_attention(*qkv, packing)
        return output, *torch.autograd.grad((output * weights).sum(), qkv)

    run()  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, grad = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = qkv.detach().cpu().double().requires_grad_()
    packing = Packing.of(mask.cpu())
    expected = attention_by_loop(*exact, packing)
    (exact_grad,) = torch.autograd.grad((expected * weights.cpu()).sum(), exact)
    close = 0.02 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        output.detach().cpu().double(), expected.detach(), rtol=close, atol=close
    )
    torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=close, atol=close)


# -- where it cannot be had ---------------------------------------------------------------------


def test_eager_attention_stays_padded():
    model = make_model(model__attn_implementation="eager").eval()
    assert not model._unpad
    batch = make_batch()
    theirs = make_model().eval()(batch, None, 0.0, ONES)
    torch.testing.assert_close(model(batch, None, 0.0, ONES).loss, theirs.loss)


def test_parameters_keep_their_names_and_masks_their_meaning():
    backbone = build_backbone(make_config(), VOCAB, PAD).eval()
    batch = make_batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    names = list(backbone.state_dict())
    before = backbone(**inputs).logits
    assert MaskedLanguageModel(MaskedLanguageModel(backbone).backbone)._unpad  # also twice
    assert list(backbone.state_dict()) == names
    assert backbone(**inputs).logits.equal(before)
