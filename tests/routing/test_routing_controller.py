"""The controller's steps: which form does what when, counts, audits, resume, scope, refusals."""

import copy
import math

import pytest
import torch
from multiprocess import run_ranks
from routing.routing_models import routed_pair, tiny_batch
from routing.routing_ranks import chosen_paths

from trelm_ds.config import Config, RoutingConfig
from trelm_ds.errors import CheckpointError, ConfigError
from trelm_ds.routing.attribution import integrated_gradients
from trelm_ds.routing.controller import RoutingController, refuse_unsupported
from trelm_ds.routing.paths import PathScores
from trelm_ds.routing.scope import apply_scope


def make(form, total_steps=10, seed=3, **values):
    model, _ = routed_pair()
    config = RoutingConfig(**({"form": form, "kept_fraction": 0.25, "multiple_of": 2} | values))
    controller = RoutingController(config, model.ffns, model.context, total_steps, seed)
    return model, controller


def run_step(model, controller, step, micro_batches=1, applied=True, lr=0.0):
    """One training step; returns the layers' path rows as the optimizer would read them."""
    controller.begin_step(step)
    model.zero_grad()
    for i in range(micro_batches):
        batch = tiny_batch(seed=100 * step + i)
        controller.before_micro_batch(model, batch, None, 0.0)
        model(batch).backward()
    counts = [controller.row_counts(i) for i in range(2)]
    grads = [f.up_weight.grad for f in model.ffns]
    for count, grad in zip(counts, grads, strict=True):
        assert grad is not None and (grad[count == 0] == 0).all()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    controller.end_step(applied)
    assert not model.context.active
    return counts


FORMS = ("block", "in_backward", "exact", "quadrature", "random", "activation")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_gradient", ["exact", "path"])
def test_every_form_keeps_its_share_in_every_layer(form, input_gradient):
    model, controller = make(form, input_gradient=input_gradient, attribution_steps=2)
    counts = run_step(model, controller, 0, micro_batches=2)
    for layer in range(2):
        assert 0 < (counts[layer] > 0).sum() <= 6
        assert controller.active_inputs(layer) is None
    metrics = controller.metrics()
    assert 0 < metrics["routing/kept_fraction"] <= 0.25
    assert metrics["time/attribution_s"] >= 0
    run_step(model, controller, 1)
    jaccard = controller.metrics().get("routing/jaccard")
    assert jaccard is None if form == "block" else 0 <= jaccard <= 1


@pytest.mark.parametrize("form", [f for f in FORMS if f != "block"])
def test_full_paths_restrict_inputs_and_outputs(form):
    model, controller = make(form, paths="full", attribution_steps=2)
    controller.begin_step(0)
    batch = tiny_batch()
    controller.before_micro_batch(model, batch, None, 0.0)
    model(batch).backward()
    for layer, ffn in enumerate(model.ffns):
        rows = controller.row_counts(layer) > 0
        inputs, outputs = controller.active_inputs(layer), controller.active_outputs(layer)
        assert inputs.dtype == torch.bool and 0 < inputs.sum() <= 4 and 0 < outputs.sum() <= 4
        assert (ffn.up_weight.grad != 0).sum() <= rows.sum() * inputs.sum()
        assert (ffn.up_weight.grad[rows][:, inputs] != 0).any()
        assert (ffn.up_weight.grad[:, ~inputs] == 0).all()
        assert (ffn.down_weight.grad[:, ~outputs] == 0).all()
        assert (ffn.down_bias.grad[~outputs] == 0).all()
    controller.end_step(True)
    kept = controller.metrics()
    assert kept["routing/kept_weight_fraction"] < kept["routing/kept_fraction"]


def test_forms_none_and_frozen_are_dense():
    for form in ("none", "frozen"):
        model, controller = make(form)
        counts = run_step(model, controller, 0)
        assert (counts[0] == 1).all() and controller.metrics() == {}


def test_start_trains_densely_first_and_counts_go_on():
    model, controller = make("random", total_steps=10, start=0.3)
    for step in range(3):
        counts = run_step(model, controller, step)
        assert (counts[0] == step + 1).all()
        assert controller.metrics()["routing/kept_fraction"] == 1.0
    counts = run_step(model, controller, 3)
    assert sorted(counts[0].unique().tolist()) == [0, 4]


def test_counts_are_updates_of_each_neuron_and_skipped_steps_do_not_count():
    model, controller = make("random")
    expected = torch.zeros(24, dtype=torch.int64)
    for step in range(8):
        applied = step != 2
        counts = run_step(model, controller, step, applied=applied)
        kept = counts[0] > 0
        assert torch.equal(counts[0][kept], expected[kept] + 1)
        expected += kept * applied
        assert torch.equal(controller.counts[0], expected)


@pytest.mark.parametrize("form", ["exact", "quadrature"])
def test_integrated_paths_come_from_the_first_micro_batch_and_are_the_best(form):
    model, controller = make(form, attribution_steps=4, quadrature_nodes=3)
    model.eval()
    counts = run_step(model, controller, 0, micro_batches=2)
    problem = model.attribution_problem(tiny_batch(seed=0), None, 0.0)
    rule = {"exact": ("riemann_right", 4), "quadrature": ("gauss_legendre", 3)}[form]
    scores = integrated_gradients(problem, *rule).mid
    for layer in range(2):
        best = [j for j in scores[layer].topk(6).indices.tolist() if scores[layer, j] > 0]
        assert (counts[layer] > 0).nonzero()[:, 0].tolist() == sorted(best)
    mass = controller.metrics()["routing/captured_mass"]
    positive = scores.clamp(min=0)
    kept = sum(float(positive[i][counts[i] > 0].sum()) for i in range(2))
    assert mass == pytest.approx(kept / float(positive.sum()))


def test_threshold_is_a_share_of_the_largest_score_of_all_layers():
    model, controller = make("quadrature", threshold=0.5, kept_fraction=1.0)
    model.eval()
    counts = run_step(model, controller, 0)
    problem = model.attribution_problem(tiny_batch(seed=0), None, 0.0)
    scores = integrated_gradients(problem, "gauss_legendre", 2).mid
    assert torch.equal(torch.stack(counts) > 0, scores >= 0.5 * scores.max())


def test_negative_attribution_is_never_selected_and_absolute_fills_the_share():
    model, controller = make("in_backward", kept_fraction=1.0)
    counts = run_step(model, controller, 0)
    assert 0 < sum(int((c > 0).sum()) for c in counts) < 48
    model, controller = make("in_backward", kept_fraction=1.0, score="abs_gradient")
    assert all((c > 0).all() for c in run_step(model, controller, 0))


def test_blocks_rotate_by_the_scores_gathered_in_between():
    model, controller = make("block", rotation_steps=3, floor=0.0)
    model.eval()
    blocks, jaccards = [], []
    for step in range(6):
        counts = run_step(model, controller, step)
        jaccards.append(controller.metrics().get("routing/jaccard"))
        rows = (counts[1] > 0).nonzero()[:, 0]
        assert rows.tolist() == list(range(int(rows[0]), int(rows[0]) + 6))
        blocks.append(int(rows[0]))
        if step == 2:
            sums = model.context.score_sums.clone()
    assert blocks[:3] == [0, 0, 0] and blocks[3:] == [blocks[3]] * 3
    mass = [float(sums[1, s : s + 6].clamp(min=0).sum()) for s in (0, 6, 12, 18)]
    assert blocks[3] == 6 * mass.index(max(mass))
    assert "routing/captured_mass" in controller.metrics()
    firsts = controller.blocks.previous_starts(), controller.blocks.current_starts()
    kept = sum(a == b for a, b in zip(*firsts, strict=True))
    assert firsts[0] == [0, 0] and kept < 2  # of the rotation before, all through this one
    assert jaccards == [None] * 3 + [kept / 2] * 3


def test_every_layer_is_scored_once_in_each_rotation_however_short():
    for rotation_steps, score_steps, readings in ((3, 5, 1), (6, 2, 3), (4, 1, 4)):
        model, controller = make("block", rotation_steps=rotation_steps, score_steps=score_steps)
        model.eval()
        read = torch.zeros(2)
        for step in range(rotation_steps):
            before = model.context.score_sums
            before = torch.zeros(2, 24) if before is None else before.clone()
            run_step(model, controller, step)
            after = model.context.score_sums
            read += 0 if after is None else (after != before).any(1)
        assert read.tolist() == [readings] * 2


def test_a_fixed_block_stays_and_gathers_nothing():
    model, controller = make("block", rotation_steps=0)
    rows = {tuple(run_step(model, controller, s)[0].clamp(max=1).tolist()) for s in range(4)}
    assert len(rows) == 1 and model.context.score_sums is None


def test_repeating_a_step_does_not_rotate_again():
    model, controller = make("block", rotation_steps=2)
    run_step(model, controller, 0)
    controller.begin_step(2)
    controller.begin_step(2)
    assert controller.blocks.count == 2


def test_audit_compares_paths_with_quadrature():
    model, controller = make("random", audit_steps=2)
    model.eval()
    run_step(model, controller, 0)
    audited = controller.metrics()
    assert 0 <= audited["routing/audit_jaccard"] < 1
    assert 0 <= audited["routing/audit_captured_mass"] < 1
    assert audited["time/attribution_s"] > 0
    run_step(model, controller, 1)
    later = controller.metrics()
    assert later["time/attribution_s"] == 0 and not any("audit" in key for key in later)
    model, controller = make("quadrature", audit_steps=1)
    model.eval()
    run_step(model, controller, 0)
    same = controller.metrics()
    assert same["routing/audit_jaccard"] == 1.0
    assert same["routing/audit_captured_mass"] == pytest.approx(1.0)


@pytest.mark.parametrize("audit_form", ["quadrature", "exact"])
def test_audits_report_each_layer_against_the_form_asked_for(audit_form):
    model, controller = make(
        "random", audit_steps=2, audit_form=audit_form, attribution_steps=4, quadrature_nodes=3
    )
    model.eval()
    reported = []
    for step in range(3):
        counts = run_step(model, controller, step)
        metrics = controller.metrics()
        if step == 1:
            assert not any("layer_" in key or "audit" in key for key in metrics)
            continue
        rule = {"exact": ("riemann_right", 4), "quadrature": ("gauss_legendre", 3)}[audit_form]
        problem = model.attribution_problem(tiny_batch(seed=100 * step), None, 0.0)
        scores = integrated_gradients(problem, *rule).mid.clamp(min=0)
        jaccards, masses = [], torch.zeros(2)
        for layer in range(2):
            kept = set((counts[layer] > 0).nonzero()[:, 0].tolist())
            best = set(scores[layer].topk(len(kept)).indices.tolist())
            mass = torch.tensor([float(scores[layer, sorted(s)].sum()) for s in (kept, best)])
            jaccards.append(len(kept & best) / len(kept | best))
            masses += mass
            of_layer = {
                "kept_fraction": len(kept) / 24,
                "audit_jaccard": jaccards[-1],
                "audit_captured_mass": float(mass[0] / mass[1]),
            }
            for name, value in of_layer.items():
                assert metrics[f"routing/layer_{layer}/{name}"] == pytest.approx(value)
        assert metrics["routing/audit_jaccard"] == pytest.approx(sum(jaccards) / 2)
        assert metrics["routing/audit_captured_mass"] == pytest.approx(float(masses[0] / masses[1]))
        assert 0 < 2 * metrics["routing/audit_s_per_layer"] <= metrics["time/attribution_s"]
        reported.append(masses)
    assert len(reported) == 2


def test_the_two_audit_forms_differ():
    seen = []
    for audit_form in ("quadrature", "exact"):
        model, controller = make(
            "random", audit_steps=1, audit_form=audit_form, attribution_steps=2
        )
        model.eval()
        run_step(model, controller, 0)
        seen.append(controller.metrics()["routing/audit_captured_mass"])
    assert seen[0] != seen[1]


def test_attribution_leaves_training_as_it_was():
    """An audited run with dropout takes the same steps as one without audits."""

    def run(audit_steps):
        model, controller = make("in_backward", audit_steps=audit_steps)
        model.train()
        torch.manual_seed(0)
        for step in range(2):
            run_step(model, controller, step, lr=0.1)
        return model.state_dict()

    plain, audited = run(0), run(1)
    assert all(torch.equal(plain[name], audited[name]) for name in plain)


@pytest.mark.parametrize("form", ["block", "in_backward", "random"])
def test_resumed_run_takes_the_same_paths(form):
    def start():
        model, controller = make(form, rotation_steps=3, total_steps=20)
        model.eval()
        return model, controller

    model, controller = start()
    for step in range(5):
        run_step(model, controller, step, lr=0.01)
    routing = controller.state_dict()
    weights = copy.deepcopy(model.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in routing.values())
    straight = [run_step(model, controller, step, lr=0.01) for step in range(5, 11)]

    model, controller = start()
    model.load_state_dict(weights)
    controller.load_state_dict({name: value.clone() for name, value in routing.items()})
    resumed = [run_step(model, controller, step, lr=0.01) for step in range(5, 11)]
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    if form == "block":
        assert controller.blocks.count == 4  # it rotated twice more after the resume


def test_state_of_another_shape_is_refused():
    _, block = make("block")
    state = block.state_dict()
    _, smaller = make("block", kept_fraction=0.5)
    with pytest.raises(CheckpointError, match="2 x 4 blocks .* the run has 2 x 2"):
        smaller.load_state_dict(state)
    with pytest.raises(CheckpointError, match="neurons"):
        block.load_state_dict(state | {"counts": torch.zeros(3, 24, dtype=torch.int64)})
    _, random = make("random")
    with pytest.raises(CheckpointError, match="no state of routing.form block"):
        block.load_state_dict(random.state_dict())


def test_block_state_of_another_number_of_ranks_is_added_up():
    _, block = make("block")
    state = block.state_dict()
    state["block.scores"] = scores = torch.arange(2 * 2 * 24.0).view(2, 2, 24)
    block.load_state_dict(state)
    torch.testing.assert_close(block.context.score_sums, scores[0] + scores[1])
    state["block.scores"] = scores.view(2, 4, 12)
    with pytest.raises(CheckpointError, match="block scores"):
        block.load_state_dict(state)


def test_a_skipped_step_leaves_no_trace_in_a_block_s_scores():
    _, block = make("block")
    for applied, value in ((True, 1.0), (False, math.nan), (True, 2.0)):
        block.begin_step(block._steps)
        for layer in range(2):
            block.context.receive_scores(layer, PathScores(torch.full((24,), value)))
        block.end_step(applied)
    assert torch.equal(block.context.score_sums, torch.full((2, 24), 3.0))
    block.begin_step(0)
    block.end_step(False)
    assert torch.equal(block.context.score_sums, torch.full((2, 24), 3.0))


RANK_FORMS = ["in_backward", "quadrature", "activation", "block"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(chosen_paths, 2, RANK_FORMS)  # one start for every form: starting is slow


@pytest.mark.parametrize("form", RANK_FORMS)
def test_two_ranks_choose_the_paths_of_the_joint_batch(form, two_ranks):
    (alone,) = chosen_paths(0, 1, [form])
    for layer in zip(*alone["steps"], strict=True):
        assert len({tuple(rows) for rows in layer}) > 1  # the batches differ, and so do the paths
    for rank in two_ranks:
        found = rank[RANK_FORMS.index(form)]
        assert found["steps"] == alone["steps"] and found["state"].keys() == alone["state"].keys()
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=0, atol=0, msg=name)
        # every rank's running sums travel with the state; together they are the joint batch's
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-5, atol=1e-7)


# ---- what trains at all --------------------------------------------------------------------------


def trained(kind, **routing):
    model, _ = routed_pair(kind)
    model.injection = torch.nn.Linear(2, 2)
    apply_scope(model, RoutingConfig(**routing))
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_scope_strict_trains_paths_injection_decoder_and_head(kind):
    everything = trained(kind, form="block")
    strict = trained(kind, form="block", scope="strict")
    outside = {n for n in everything if n.startswith(("injection.", "decoder."))}
    assert outside and outside <= strict
    inside = {n.removeprefix(f"backbone.{kind}.encoder.layer.") for n in strict - outside}
    ffn = {n for n in inside if n[0].isdigit()}
    assert ffn == {
        f"{i}.output.dense.{p}" for i in range(2) for p in ("up_weight", "up_bias", "down_weight")
    }
    head = "backbone.cls." if kind == "bert" else "backbone.lm_head."
    assert all(n.startswith(head) for n in inside - ffn) and len(inside - ffn) >= 5
    assert "backbone." + kind + ".embeddings.word_embeddings.weight" in everything - strict
    full = trained(kind, form="random", scope="strict", paths="full")
    assert {n for n in full - strict if "down_bias" in n} == full - strict and len(
        full - strict
    ) == 2
    frozen = trained(kind, form="frozen")
    assert everything - frozen == {
        n for n in everything if ".output.dense.up_" in n or "down_" in n
    }


def test_frozen_scope_still_trains_the_rest():
    model, _ = routed_pair()
    apply_scope(model, RoutingConfig(form="frozen"))
    controller = RoutingController(RoutingConfig(form="frozen"), model.ffns, model.context, 2, 0)
    controller.begin_step(0)
    model(tiny_batch()).backward()
    assert all(p.grad is None for f in model.ffns for p in f.parameters())
    assert model.backbone.get_input_embeddings().weight.grad.abs().sum() > 0


def test_refusals_name_the_keys():
    def config(**routing):
        return Config(routing=RoutingConfig(**routing))

    for form in ("exact", "quadrature"):
        with pytest.raises(ConfigError, match=f"routing.form {form} .*ZeRO-3"):
            refuse_unsupported(config(form=form), 3)
        refuse_unsupported(config(form=form), 2)
    for stage in (1, 2, 3):
        with pytest.raises(ConfigError, match=f"compact_gradients .*stage {stage}"):
            refuse_unsupported(config(compact_gradients=True), stage)
    refuse_unsupported(config(form="block", compact_gradients=True), 0)
    with pytest.raises(ConfigError, match="routing.audit_steps .*ZeRO-3"):
        refuse_unsupported(config(form="in_backward", audit_steps=10), 3)
    for form in ("block", "in_backward", "random", "activation", "frozen", "none"):
        refuse_unsupported(config(form=form), 3)
    for form in ("block", "random", "frozen", "none"):
        with pytest.raises(ConfigError, match=f"routing.threshold .*form {form} does not"):
            refuse_unsupported(config(form=form, threshold=0.1), 0)
    for form in ("frozen", "none"):
        with pytest.raises(ConfigError, match=f"routing.audit_steps .*form {form} has none"):
            refuse_unsupported(config(form=form, audit_steps=10), 0)
    refuse_unsupported(config(form="in_backward", threshold=0.1, audit_steps=10), 0)

    def without_decoding(**routing):
        result = config(**routing)
        result.decoding.enabled = False
        return result

    for form in ("exact", "quadrature", "in_backward", "activation"):
        with pytest.raises(ConfigError, match="decoding.enabled"):
            refuse_unsupported(without_decoding(form=form), 2)
    refuse_unsupported(without_decoding(form="in_backward", score="abs_gradient"), 2)
    refuse_unsupported(without_decoding(form="block"), 2)
    refuse_unsupported(without_decoding(form="random"), 2)
