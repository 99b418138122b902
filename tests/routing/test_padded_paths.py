"""Paths as a GPU gets them, of a size known beforehand: the same updates as those of the CPU."""

import pytest
import torch
from routing.test_routed_ffn import F, make_ffn, routed_grads
from routing.test_routing_controller import make, run_step

from trelm_ds import ops
from trelm_ds.routing.paths import LayerPaths, PathScores


def padded(scores, fraction, multiple_of, *, positive_only, threshold=None):
    """``select_layer_paths`` of a GPU, with lists twice as long as they need to be."""
    sides = [
        (None, None)
        if values is None
        else ops.select_paths_padded(values, len(values) // 2, positive_only, threshold or 0.0)
        for values in (scores.mid, scores.inputs, scores.outputs)
    ]
    (rows, inputs, outputs), used = zip(*sides, strict=True)
    return LayerPaths(rows, inputs, outputs, None, *used)


def scores_with_few_positive(full):
    """Scores of which fewer than half are positive, so that half of them list others too."""
    g = torch.Generator().manual_seed(5)
    mid, inputs, outputs = (torch.randn(n, generator=g) for n in (F, 6, 6))
    mid[:10] = -1
    inputs[2:] = outputs[:5] = -1
    return PathScores(mid, inputs.abs(), outputs) if full else PathScores(mid)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_are_those_of_the_compact_paths(exact, full, empty):
    ffn, context, x, out_grad = make_ffn()
    context.exact_input_gradient, context.full = exact, full
    scores = scores_with_few_positive(full)
    if empty:
        scores.mid.fill_(-1)
    paths = padded(scores, 0, 0, positive_only=True)
    compact = paths.compact()
    assert len(compact.rows) == (scores.mid > 0).sum() < len(paths.rows) == F // 2
    assert compact.rows_used is None
    want = routed_grads(ffn, x, out_grad, compact)
    for got, expected in zip(routed_grads(ffn, x, out_grad, paths), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(got == 0, expected == 0)  # zeros off the path are exact


def test_what_is_listed_off_the_path_stays_zero_where_the_activations_are_not_finite():
    ffn, _, x, out_grad = make_ffn()
    with torch.no_grad():
        ffn.up_bias[3] = torch.inf
    paths = LayerPaths(torch.tensor([2, 3]), rows_used=torch.tensor([True, False]))
    for got in routed_grads(ffn, x, out_grad, paths)[1:4]:
        assert (got[3] == 0).all() and got[2].isfinite().all()


@pytest.mark.parametrize("score", ["signed", "abs_gradient"])
@pytest.mark.parametrize("paths", ["mid", "full"])
def test_steps_count_and_report_the_same(monkeypatch, paths, score):
    def run():
        model, controller = make("in_backward", paths=paths, score=score, kept_fraction=0.5)
        seen = []
        for step in range(3):
            counts = run_step(model, controller, step, lr=0.1)
            metrics = controller.metrics()
            metrics.pop("time/attribution_s")
            seen.append((counts, metrics, controller.state_dict()["previous_paths"]))
        return seen, [p.detach() for p in model.parameters()]

    expected, wanted = run()
    monkeypatch.setattr("trelm_ds.routing.controller.select_layer_paths", padded)
    found, parameters = run()
    for (counts, metrics, previous), (want, want_metrics, want_previous) in zip(
        found, expected, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(counts, want, strict=True))
        assert metrics == pytest.approx(want_metrics) and torch.equal(previous, want_previous)
    for a, b in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_optimizer_reads_the_step_s_masks_and_not_the_last_one_s():
    model, controller = make("random", paths="full")
    seen = []
    for step in range(2):
        controller.begin_step(step)
        seen.append([controller.row_counts(0) > 0, controller.active_inputs(0)])
        controller.end_step(False)
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])
