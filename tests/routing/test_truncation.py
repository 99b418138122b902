"""A cut backward against one cut by hand: gradients, kept activations, what stands still."""

import copy

import pytest
import torch
from routing.routing_models import TinyKnowledgeModel, tiny_backbone, tiny_batch

from trelm_ds.config import RoutingConfig
from trelm_ds.errors import ConfigError
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.truncation import INPUT, BackwardTruncation, truncated_layers

LAYERS, CUT = 4, 2


def make(kind="bert", form="none", truncated_depth=0.5, **values):
    """A model of four layers, its truncation and its controller."""
    model = TinyKnowledgeModel(
        tiny_backbone(kind, num_hidden_layers=LAYERS, std=0.1), RoutingContext()
    )
    model.injection = torch.nn.Linear(2, 2)
    given = {"kept_fraction": 0.25, "multiple_of": 2, "truncate_start": 0.5}
    config = RoutingConfig(form=form, truncated_depth=truncated_depth, **(given | values))
    truncation = BackwardTruncation(model, config)
    controller = RoutingController(
        config, model.ffns, model.context, 8, seed=1, truncation=truncation
    )
    return model, truncation, controller


def gradients(model, batch):
    model.zero_grad()
    model(batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_gradients_are_those_of_hidden_states_detached_by_hand(kind, checkpointing):
    model, truncation, _ = make(kind)
    plain = copy.deepcopy(model)  # its hooks belong to a truncation of its own, never active
    below = {id(p) for p, _ in truncation.parameters()}
    layer = plain.backbone.base_model.encoder.layer[CUT]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    if checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    plain.train()
    for m in (*model.modules(), *plain.modules()):
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    truncation.active = True
    found, wanted = gradients(model, tiny_batch()), gradients(plain, tiny_batch())
    assert torch.is_grad_enabled()
    named = dict(model.named_parameters())
    for name, gradient in wanted.items():
        assert torch.equal(found.pop(name), gradient), name
        assert id(named[name]) not in below, name
    assert not found
    words = f"backbone.{kind}.embeddings.word_embeddings.weight"
    assert wanted[words].abs().sum() > 0
    everything = {n for n, p in named.items() if id(p) in below}
    lower = {
        n
        for n in named
        if ".embeddings." in n and n != words or ".layer.0." in n or ".layer.1." in n
    }
    assert everything == lower | {"injection.weight", "injection.bias"}


def test_layers_of_the_frozen_parameters():
    model, truncation, _ = make()
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, layer in truncation.parameters():
        name = names[id(parameter)]
        assert f".layer.{layer}." in name if layer != INPUT else ".layer." not in name
    # untied and without a decoder, nothing above the cut uses the word embeddings
    model.backbone.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(40, 16))
    words = model.backbone.get_input_embeddings().weight
    assert all(p is not words for p, _ in truncation.parameters())
    model.decoder = None
    assert sum(p is words for p, _ in truncation.parameters()) == 1


def saved_elements(model, batch):
    """Elements of the activations that autograd keeps in one forward."""
    kept = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr(), tensor.shape] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)
    assert loss.requires_grad
    return sum(t.numel() for t in kept.values())


def test_nothing_of_the_lower_layers_is_kept_for_backward():
    model, truncation, controller = make(form="block")
    batch = tiny_batch()
    kept = {}
    for cut in (False, True):
        controller.begin_step(8 * cut)
        assert truncation.active is cut
        kept[cut] = saved_elements(model, batch)
        controller.end_step(True)
    shallow = TinyKnowledgeModel(
        tiny_backbone(num_hidden_layers=LAYERS - CUT, std=0.1), RoutingContext()
    )
    shallow.backbone.base_model.embeddings.requires_grad_(False)
    shallow.backbone.get_input_embeddings().weight.requires_grad_(True)
    layer = shallow.backbone.base_model.encoder.layer[0]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    paths = RoutingController(RoutingConfig(form="block"), shallow.ffns, shallow.context, 8, 1)
    paths.begin_step(0)
    upper = saved_elements(shallow, batch)
    # what the shallow model's embeddings keep is all that it keeps more
    embeddings = 3 * batch.input_ids.numel() * 16
    assert kept[True] <= upper <= kept[True] + embeddings < kept[False]


def test_an_error_in_a_lower_layer_leaves_gradients_enabled():
    model, truncation, _ = make()
    truncation.active = True

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.backbone.base_model.encoder.layer[1].attention.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tiny_batch())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("form", ["none", "block", "in_backward", "quadrature", "random"])
def test_layers_below_the_cut_are_neither_scored_nor_counted(form):
    model, truncation, controller = make(form=form, rotation_steps=1, audit_steps=1)
    scored = []
    receive = model.context.receive_scores
    model.context.receive_scores = lambda layer, scores: (
        scored.append(layer),
        receive(layer, scores),
    )
    for step in range(6):
        cut = CUT if step >= 4 else 0
        controller.begin_step(step)
        assert controller.cut == cut
        scored.clear()
        batch = tiny_batch(seed=step)
        controller.before_micro_batch(model, batch, None, 0.0)
        model.zero_grad()
        model(batch).backward()
        before = controller.counts.clone()
        for layer in range(LAYERS):
            below = layer < cut
            assert controller.frozen(layer) is below
            assert (model.ffns[layer].up_weight.grad is None) is below
            assert bool((controller.row_counts(layer) == 0).all()) is below
        assert controller.frozen(INPUT) is bool(cut)
        assert all(layer >= cut for layer in scored)
        controller.end_step(True)
        assert torch.equal(controller.counts[:cut], before[:cut])
        assert (controller.counts[cut:].sum(1) > before[cut:].sum(1)).all()
        metrics = controller.metrics()
        assert metrics["routing/truncated_layers"] == cut
        if form != "none":
            most = 0.25 * (LAYERS - cut) / LAYERS
            assert 0 < metrics["routing/kept_fraction"] <= most
            assert 0 <= metrics["routing/audit_jaccard"] <= 1
        if form == "quadrature":
            assert metrics["routing/audit_jaccard"] == 1
            assert metrics["routing/audit_captured_mass"] == pytest.approx(1)
    assert truncation.active is False  # evaluations in between are not cut


@pytest.mark.parametrize("form", ["block", "in_backward"])
def test_scores_above_the_cut_are_those_of_the_whole_backward(form):
    """The exact gradient above layer n does not depend on what happens below it."""
    rows = []
    for start in (0.0, 1.0):
        model, _, controller = make(form=form, truncate_start=start, rotation_steps=2)
        model.eval()
        steps = []
        for step in range(3):
            controller.begin_step(step)
            model(tiny_batch(seed=step)).backward()
            counts = [controller.row_counts(layer) > 0 for layer in range(CUT, LAYERS)]
            steps.append([c.nonzero()[:, 0].tolist() for c in counts])
            controller.end_step(True)
        rows.append(steps)
    assert rows[0] == rows[1]


def test_progress_decides_and_shares_round_down():
    _, truncation, controller = make(truncate_start=0.5)
    for step, progress, cut in ((0, 0.5, CUT), (7, 0.49, 0), (4, None, CUT), (3, None, 0)):
        controller.begin_step(step, progress)
        assert controller.cut == cut
        controller.end_step(True)
    config = RoutingConfig(truncated_depth=0.3)
    assert truncated_layers(config, 10) == 3 and truncated_layers(config, 12) == 3
    with pytest.raises(ConfigError, match="0.3 of 2 layers"):
        truncated_layers(config, 2)
    with pytest.raises(ConfigError, match="must leave a layer"):
        RoutingConfig(truncated_depth=1.0)
