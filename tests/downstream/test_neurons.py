"""Knowledge neurons against plain loops over an unrouted Hugging Face model."""

import copy
import itertools
import json

import pytest
import torch
from downstream.downstream_models import load_tiny, save_tiny_model, write_lines
from routing.routing_models import tiny_backbone

from trelm_ds import evaluate_cli
from trelm_ds.backbone import MaskedLanguageModel
from trelm_ds.downstream.neurons import (
    NODES,
    THRESHOLD,
    KnowledgeNeurons,
    knowledge_neuron_report,
    random_like,
)
from trelm_ds.evaluate import Probe, ProbeRow, read_probe


def make_rows():
    g = torch.Generator().manual_seed(5)
    rows = []
    for i, relation in enumerate(["P1", "P1", "P1", "P2", "P2", "P3"]):
        ids = torch.randint(5, 40, (6 + i,), generator=g).tolist()
        rows.append(ProbeRow(relation, ids, 2 + i % 3, 7 + 2 * i, True, ("all", "template")))
    return rows


@pytest.fixture(scope="module", params=["bert", "roberta"])
def models(request):
    plain = tiny_backbone(request.param, pad_token_id=1).eval()
    return plain, MaskedLanguageModel(copy.deepcopy(plain))


def layers(plain):
    return plain.base_model.encoder.layer


def p_gold(plain, row, edits):
    """P(answer) of Hugging Face's model; ``edits``: {layer: function of the activation [f]}."""

    def hook(change):
        def edit(module, args, output):
            output = output.clone()
            output[0, row.mask] = change(output[0, row.mask])
            return output

        return edit

    handles = [layers(plain)[i].intermediate.register_forward_hook(hook(f))
               for i, f in edits.items()]  # fmt: skip
    try:
        logits = plain(input_ids=torch.tensor([row.ids])).logits[0, row.mask]
    finally:
        for handle in handles:
            handle.remove()
    return logits.softmax(0)[row.answer]


def plain_attribution(plain, row):
    scores = []
    for index in range(len(layers(plain))):
        kept = {}
        with torch.no_grad():
            p_gold(plain, row, {index: lambda v, kept=kept: kept.setdefault("v", v.clone())})
        v = kept["v"]
        total = torch.zeros_like(v)
        for k in range(1, NODES + 1):
            scaled = (k / NODES * v).requires_grad_()
            p = p_gold(plain, row, {index: lambda _, scaled=scaled: scaled})
            total += torch.autograd.grad(p, scaled)[0]
        scores.append(v * total / NODES)
    return torch.stack(scores)


def plain_neurons(plain, row):
    scores = plain_attribution(plain, row)
    largest = scores.max()
    return {
        (i, j) for i, layer in enumerate(scores) for j, s in enumerate(layer)
        if s > 0 and s >= THRESHOLD * largest
    }  # fmt: skip


def test_attribution_equals_a_plain_loop(models):
    plain, model = models
    neurons = KnowledgeNeurons(model)
    for row in make_rows()[:3]:
        expected = plain_attribution(plain, row)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(neurons.attribution(row), expected, rtol=1e-8, atol=1e-12)
        found = {tuple(place) for place in neurons.find(row).nonzero().tolist()}
        assert found == plain_neurons(plain, row) and found


def scaled(chosen, factor):
    return {
        i: lambda v, on=on: torch.where(on, v * factor, v) for i, on in enumerate(chosen)
    }  # fmt: skip


def test_edits_equal_hooks_on_the_plain_model(models):
    plain, model = models
    neurons = KnowledgeNeurons(model)
    row = make_rows()[4]
    chosen = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    scale = torch.ones(3, 2, 24).double()
    scale[1, chosen], scale[2, chosen] = 0.0, 2.0
    with torch.no_grad():
        expected = [p_gold(plain, row, scaled(chosen, factor)).item() for factor in (1.0, 0.0, 2.0)]
    found = neurons.edited_probability(row, scale)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert len({round(p, 6) for p in expected}) == 3
    again = neurons.edited_probability(row, scale[:1])  # the hooks are gone
    assert again.item() == pytest.approx(expected[0], rel=1e-9)


def test_report_equals_plain_loops(models):
    plain, model = models
    rows = make_rows()
    context = ProbeRow("P9", [5, 6, 7], 1, 8, True, ("all", "context"))  # not a template: unused
    report = knowledge_neuron_report(model, Probe([*rows, context], {}, 1, {"too_long": 2}))
    sets = [plain_neurons(plain, row) for row in rows]
    width = 24
    assert (report["facts"], report["relations"], report["skipped"]) == (6, 3, {"too_long": 2})
    assert report["neurons"]["mean"] == pytest.approx(sum(map(len, sets)) / 6)
    per_layer = [sum(i == layer for s in sets for i, _ in s) / 6 for layer in range(2)]
    assert report["neurons"]["per_layer"] == pytest.approx(per_layer)

    pairs = {"within": [], "across": []}
    for (a, one), (b, other) in itertools.combinations(zip(rows, sets, strict=True), 2):
        sizes = [[sum(i == layer for i, _ in s) for layer in range(2)] for s in (one, other)]
        chance = sum(x * y / width for x, y in zip(*sizes, strict=True))
        kind = "within" if a.relation == b.relation else "across"
        pairs[kind].append((len(one & other), chance))
    for kind, found in pairs.items():
        assert report["overlap"][kind]["pairs"] == len(found)
        shared, chance = (sum(values) / len(found) for values in zip(*found, strict=True))
        assert report["overlap"][kind]["shared"] == pytest.approx(shared)
        assert report["overlap"][kind]["chance"] == pytest.approx(chance)

    generator = torch.Generator().manual_seed(0)
    probabilities = {}
    for row, places in zip(rows, sets, strict=True):
        chosen = torch.zeros(2, width, dtype=torch.bool)
        chosen[tuple(zip(*places, strict=True))] = True
        drawn = random_like(chosen, generator)
        assert drawn.sum(1).tolist() == chosen.sum(1).tolist()
        with torch.no_grad():
            values = [p_gold(plain, row, {}).item()]
            for factor in (0.0, 2.0):
                values += [p_gold(plain, row, scaled(c, factor)).item() for c in (chosen, drawn)]
        probabilities.setdefault(row.relation, []).append(values)
    changes = []
    for relation, values in probabilities.items():
        before, *after = (sum(column) for column in zip(*values, strict=True))
        changes.append([p / before - 1 for p in after])
        assert report["by_relation"][relation]["p_gold"] == pytest.approx(before / len(values))
    means = [sum(column) / len(changes) for column in zip(*changes, strict=True)]
    effect = report["effect"]
    found = [effect[k][e] for e in ("suppress", "amplify") for k in ("knowledge", "random")]
    assert found == pytest.approx(means, rel=1e-6)
    assert effect["knowledge"]["suppress"] < effect["random"]["suppress"]


def test_limits_and_missing_pairs(models):
    _, model = models
    row = make_rows()[0]
    report = knowledge_neuron_report(model, Probe([row] * 3, {}, 1), max_facts=1)
    assert report["facts"] == 1 and report["overlap"] == {"within": None, "across": None}


def test_random_neurons_are_drawn_evenly():
    chosen = torch.zeros(2, 10, dtype=torch.bool)
    chosen[0, :3] = True
    generator = torch.Generator().manual_seed(0)
    uses = sum(random_like(chosen, generator).int() for _ in range(400))
    assert uses[1].sum() == 0 and uses[0].sum() == 1200
    assert 80 < uses[0].min() and uses[0].max() < 160


def test_command_line(repo, tmp_path, capsys):
    save_tiny_model(tmp_path / "hf")
    rows = [
        {"relation": f"P{i % 2}", "text": f"person{i} word1 [MASK]", "answer": f"place{i}",
         "set": "template", "tail": False, "graph_only": False} for i in range(6)
    ]  # fmt: skip
    write_lines(tmp_path / "probe" / "template.jsonl", rows)
    argv = ["neurons", "--model", str(tmp_path / "hf"), "--data", str(tmp_path)]
    assert evaluate_cli.main([*argv, "--max_eval_samples", "4", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["facts"], result["relations"]) == ("neurons", 4, 2)
    backbone, tokenizer = load_tiny(tmp_path / "hf")
    probe = read_probe(tmp_path, tokenizer)
    expected = knowledge_neuron_report(MaskedLanguageModel(backbone), probe, 4)
    assert {key: result[key] for key in expected} == json.loads(json.dumps(expected))
