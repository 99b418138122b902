"""P@1 against a plain Hugging Face loop, splits, sharding over ranks, held-out loss, the CLI."""

import json
import math
import shutil
from collections import defaultdict

import pytest
import torch
from multiprocess import run_ranks
from tiny_corpus import byte_level_tokenizer, write_tiny_corpus
from transformers import AutoModelForMaskedLM, AutoTokenizer

from trelm_ds import evaluate_cli
from trelm_ds.backbone import MaskedLanguageModel, build_backbone, load_pretrained
from trelm_ds.config import load_config
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import DataError
from trelm_ds.evaluate import (
    evaluate_heldout,
    evaluate_probes,
    heldout_mlm_loss,
    is_selection_fact,
    load_probes,
    probe_accuracy,
    read_probe,
    single_tokens,
)

SHAPE = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 16,
    "model.max_position_embeddings": 48,
    "data.max_seq_length": 32,
    "train.per_device_train_batch_size": 4,
    "train.eval_batches": 3,
}


def _config(**overrides):
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("mlm", overrides=SHAPE | flat)


def _save_model(folder, data, model_type="bert"):
    """A random model with strong opinions, and the data's tokenizer, as a Hugging Face folder."""
    tokenizer = load_tokenizer(data / "tokenizer")
    torch.manual_seed(1)
    config = _config(model__model_type=model_type)
    backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        backbone.get_input_embeddings().weight.add_(
            torch.randn_like(backbone.get_input_embeddings().weight)
        )
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny_corpus(folder, train=8, heldout=21)
    return folder


@pytest.fixture(scope="module")
def hf_folder(data, tmp_path_factory):
    return _save_model(tmp_path_factory.mktemp("model") / "hf", data)


@pytest.fixture(scope="module")
def model(hf_folder):
    return MaskedLanguageModel(load_pretrained(hf_folder))


def _brute_force(hf_folder, data, candidates=None):
    """P@1 with nothing of this package: one sentence at a time, plain Hugging Face."""
    model = AutoModelForMaskedLM.from_pretrained(hf_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    hits = defaultdict(lambda: defaultdict(list))
    if candidates is None:
        candidates = (data / "probe" / "candidates.txt").read_text().split()
    allowed = [tokenizer.convert_tokens_to_ids(word) for word in candidates]
    for file in (data / "probe").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            inputs = tokenizer(row["text"], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0]
            mask = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
            best = max(allowed, key=lambda token: logits[mask, token].item())
            hit = tokenizer.convert_ids_to_tokens(best) == row["answer"]
            splits = [row["set"], *(k for k in ("tail", "graph_only", "text_only") if row[k])]
            reported = ["report", *(f"report_{name}" for name in splits)]
            part = ["select"] if is_selection_fact(row) else reported
            for split in ["all", *splits, *part]:
                hits[split][row["relation"]].append(hit)
    return hits


def test_p_at_1_equals_a_plain_loop(model, hf_folder, data):
    probe = load_probes(data, model)
    result = probe_accuracy(model, probe, "cpu", batch_size=7)
    expected = _brute_force(hf_folder, data)
    splits = {"all", "tail", "graph_only", "text_only", "template"}
    parts = {"select", "report", *(f"report_{name}" for name in splits - {"all"})}
    assert set(result["splits"]) == set(expected) == splits | parts
    for split, by_relation in expected.items():
        scores = [sum(hits) / len(hits) for hits in by_relation.values()]
        every = [hit for hits in by_relation.values() for hit in hits]
        found = result["splits"][split]
        assert found["p1"] == pytest.approx(sum(scores) / len(scores)), split
        assert found["p1_micro"] == pytest.approx(sum(every) / len(every)), split
        assert (found["facts"], found["relations"]) == (len(every), len(scores))
    for relation, hits in expected["all"].items():
        assert result["relations"][relation]["p1"] == pytest.approx(sum(hits) / len(hits))
    # The comparison says nothing if the model is always or never right.
    assert 0 < result["splits"]["all"]["p1_micro"] < 1
    assert result["splits"]["all"]["p1"] != result["splits"]["all"]["p1_micro"]


def test_metric_names(model, data):
    values = evaluate_probes(model, load_probes(data, model), "cpu")
    assert {"eval/probe_p1", "eval/probe_p1_tail", "eval/probe_p1_graph_only"} <= set(values)
    assert "eval/probe_p1_text_only" in values
    assert {"eval/select_p1", "eval/report_p1", "eval/report_p1_tail"} <= set(values)
    assert evaluate_probes(model, None, "cpu") == {}


def test_facts_of_selection_and_of_report_are_disjoint():
    facts = [
        {"relation": f"P{i % 7}", "subject": i, "object": 3 * i + 1, "text": f"{i}", "answer": "a"}
        for i in range(4000)
    ]
    chosen = [is_selection_fact(fact) for fact in facts]
    assert 0.22 < sum(chosen) / len(chosen) < 0.28
    # A fact is on one side whatever the sentence that asks for it.
    assert chosen == [is_selection_fact(f | {"text": "other", "answer": "b"}) for f in facts]
    # Where they are named by id, their numbers in the folder do not matter.
    named = [f | {"subject_id": f"Q{f['subject']}", "object_id": "Q1"} for f in facts]
    by_id = [is_selection_fact(fact) for fact in named]
    assert 0.22 < sum(by_id) / len(by_id) < 0.28
    assert by_id == [is_selection_fact(f | {"subject": 1, "object": 2}) for f in named]
    # Without entities the question and its answer stand for the fact.
    bare = [{k: f[k] for k in ("relation", "text", "answer")} for f in facts]
    assert 0.22 < sum(is_selection_fact(f) for f in bare) / len(bare) < 0.28


def test_limit_spreads_over_the_facts(model, data):
    every = load_probes(data, model).rows
    some = load_probes(data, model, limit=5).rows
    assert len(some) == 5 and some[0] is not every[0]
    assert {row.relation for row in some} == {row.relation for row in every}


def test_a_folder_without_probe_has_none(model, tmp_path):
    assert load_probes(tmp_path, model) is None


def _probe_file(folder, tokenizer_from, rows, candidates=None):
    (folder / "probe").mkdir(parents=True)
    defaults = {"relation": "P1", "set": "context", "tail": False, "graph_only": False}
    lines = [json.dumps(defaults | row) for row in rows]
    (folder / "probe" / "P1.jsonl").write_text("\n".join(lines) + "\n")
    if candidates is not None:
        (folder / "probe" / "candidates.txt").write_text("\n".join(candidates))
    return load_tokenizer(tokenizer_from / "tokenizer")


def test_facts_that_cannot_be_asked_are_counted(data, tmp_path):
    rows = [
        {"text": "the city of [MASK] .", "answer": "name1"},
        {"text": "the city of [MASK] .", "answer": "name1 name2"},  # two tokens
        {"text": "the city of [MASK] .", "answer": "zebra"},  # unknown
        {"text": "the city of [MASK] .", "answer": "name4"},  # no candidate
        {"text": "the city of [MASK] " + "the " * 40, "answer": "name1"},
    ]
    tokenizer = _probe_file(tmp_path, data, rows, ["name1", "name2", "not a token"])
    probe = read_probe(tmp_path, tokenizer, max_length=32)
    assert probe.skipped == {"not_one_token": 2, "not_a_candidate": 1, "too_long": 1}
    assert len(probe.rows) == 1 and probe.rows[0].splits[:2] == ("all", "context")
    assert len(probe.candidates[True]) == 2


def test_without_candidates_every_token_but_the_specials_competes(data, tmp_path):
    tokenizer = _probe_file(tmp_path, data, [{"text": "[MASK] was old .", "answer": "name1"}])
    probe = read_probe(tmp_path, tokenizer)
    assert len(probe.candidates[False]) == len(tokenizer) - 5


def test_the_record_of_the_documentation_is_one(repo, data, tmp_path):
    tokenizer = load_tokenizer(data / "tokenizer")
    with pytest.raises(DataError, match="docs/evaluation.md"):
        read_probe(tmp_path, tokenizer)
    lines = (repo / "docs" / "evaluation.md").read_text().splitlines()
    (record,) = (line for line in lines if line.startswith('{"relation": "P36"'))
    (tmp_path / "own.jsonl").write_text(record.replace('"Paris"', '"name1"') + "\n")
    assert read_probe(tmp_path, tokenizer).rows[0].relation == "P36"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("not json", "not valid JSON"),
        ('{"relation": "P1"}', "'text' is missing"),
        ('["a list"]', "expected a JSON object"),
        (
            '{"relation": "P1", "text": "no mask", "answer": "a", "set": "template", '
            '"tail": false, "graph_only": false}',
            "exactly once",
        ),
        (
            '{"relation": "P1", "text": "no [MASK]", "answer": "a", "set": "template", '
            '"tail": false, "graph_only": false, "text_only": 1}',
            "'text_only' is not bool",
        ),
    ],
)
def test_bad_probe_lines_name_file_and_line(data, tmp_path, text, problem):
    tokenizer = load_tokenizer(data / "tokenizer")
    (tmp_path / "P1.jsonl").write_text("\n" + text + "\n")
    with pytest.raises(DataError, match=rf"P1\.jsonl:2: .*{problem}"):
        read_probe(tmp_path, tokenizer)


def test_byte_level_answers_depend_on_the_space_before_them(tmp_path):
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    vocabulary = tokenizer.get_vocab()
    assert single_tokens(tokenizer, ["ab", "zz"], True) == [vocabulary["Ġab"], -1]
    assert single_tokens(tokenizer, ["ab", "zz"], False) == [vocabulary["ab"], -1]
    rows = [
        {"text": "ab [MASK] ab", "answer": "ab"},
        {"text": "ab ([MASK]) ab", "answer": "ab"},
        {"text": "[MASK] ab", "answer": "ab"},
    ]
    _probe_file(tmp_path, tmp_path, rows, ["ab", "cd"])
    probe = read_probe(tmp_path, tokenizer)
    assert [row.spaced for row in probe.rows] == [True, False, False]
    assert [row.answer for row in probe.rows] == [
        vocabulary["Ġab"], vocabulary["ab"], vocabulary["ab"],
    ]  # fmt: skip
    # The mask token takes the space with it, as Hugging Face's RoBERTa does.
    assert tokenizer.convert_ids_to_tokens(probe.rows[0].ids) == [
        "<s>",
        "ab",
        "<mask>",
        "Ġab",
        "</s>",
    ]


# -- held-out loss ------------------------------------------------------------------------------


def _heldout(data, rank=0, world_size=1):
    from trelm_ds.data.graph import KnowledgeGraph
    from trelm_ds.data.heldout import heldout_batches
    from trelm_ds.data.tables import KnowledgeTables

    tables, graph = KnowledgeTables.load(data), KnowledgeGraph.load(data)
    return heldout_batches(_config(), data, rank, world_size, graph, tables)


def test_heldout_loss_equals_a_plain_loop(model, hf_folder, data):
    batches = _heldout(data)
    plain = AutoModelForMaskedLM.from_pretrained(hf_folder).eval()
    total = count = 0
    for batch in batches:
        assert not len(batch.mention_spans)
        with torch.no_grad():
            logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits
        for position, label in zip(batch.mlm_positions, batch.mlm_labels, strict=True):
            row, column = divmod(int(position), batch.input_ids.shape[1])
            total -= logits[row, column].log_softmax(0)[label].item()
            count += 1
    model.train()
    loss, tokens = heldout_mlm_loss(model, batches, "cpu")
    assert model.training
    model.eval()
    assert tokens == count > 20
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert evaluate_heldout(model, batches, "cpu") == {"eval/mlm_loss": loss}


def test_nothing_held_out(model):
    loss, tokens = heldout_mlm_loss(model, [], "cpu")
    assert math.isnan(loss) and tokens == 0
    assert evaluate_heldout(model, [], "cpu") == {}


def _evaluate_on_rank(rank, world_size, data, hf_folder):
    from pathlib import Path

    data = Path(data)
    model = MaskedLanguageModel(load_pretrained(hf_folder))
    calls = []
    model.register_forward_hook(lambda *_: None)
    model.backbone.base_model.register_forward_hook(lambda *_: calls.append(1))
    batches = _heldout(data, rank, world_size)
    values = evaluate_heldout(model, batches, "cpu")
    probe = load_probes(data, model)
    values |= evaluate_probes(model, probe, "cpu", rank=rank, world_size=world_size)
    return values, len(batches), len(calls)


def test_ranks_share_the_work_and_agree(model, hf_folder, data):
    results = run_ranks(_evaluate_on_rank, 2, str(data), str(hf_folder))
    alone = evaluate_heldout(model, _heldout(data), "cpu")
    alone |= evaluate_probes(model, load_probes(data, model), "cpu")
    for values, _, _ in results:
        assert values == pytest.approx(alone)
    assert [batches for _, batches, _ in results] == [3, 3]  # 21 sequences, 4 at a time
    assert results[0][2] == results[1][2]  # forwards are collectives under ZeRO-3


# -- command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["lama", "heldout"])
def test_command_line(repo, task, model, hf_folder, data, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [task, "--model", str(hf_folder), "--data", str(data), "--json", str(file)]
    arguments += ["--device", "cpu", "--per_device_eval_batch_size", "4", "--eval_batches", "3"]
    assert evaluate_cli.main(arguments) == 0
    result = json.loads(file.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["task"] == task
    assert (result["model"], result["data"]) == (str(hf_folder), str(data))
    if task == "lama":
        expected = probe_accuracy(model, load_probes(data, model), "cpu")
        assert result["splits"] == expected["splits"]
    else:
        expected, tokens = heldout_mlm_loss(model, _heldout(data), "cpu")
        assert result["mlm_loss"] == pytest.approx(expected, rel=1e-6)
        assert result["masked_tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lama", "--model", "none"], "model none: no such folder"),
        (["lama", "--device", "gpu"], "--device gpu: "),
        (["lama", "--device", "cuda:99"], "--device cuda:99: "),
        (["lama", "--device", "meta"], "--device meta: "),
        (["heldout", "--per_device_eval_batch_size", "0"], "eval_batch_size 0: must be at least 1"),
        (["heldout", "--eval_batches", "-1"], "--eval_batches -1: must be at least 1"),
        (["heldout", "--per_device_eval_batch_size", "x"], "invalid int value: 'x'"),
        (["heldout", "--batch_size", "0"], "did you mean '--per_device_eval_batch_size'?"),
        (["chess"], "invalid choice: 'chess'"),
    ],
)
def test_command_line_errors_are_one_line(repo, hf_folder, data, capsys, arguments, said):
    task, *more = arguments
    argv = [task, "--model", str(hf_folder), "--data", str(data), *more]
    assert evaluate_cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and said in err and not out


def test_a_result_is_printed_where_its_file_cannot_be_written(repo, tmp_path, monkeypatch, capsys):
    main = evaluate_cli.main
    monkeypatch.setitem(main.__globals__, "run", lambda args: {"p1": 0.5})
    argv = ["lama", "--model", "m", "--data", "d", "--json", str(tmp_path)]  # a folder, not a file
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"p1": 0.5} and err.count("\n") == 1 and str(tmp_path) in err


def test_heldout_texts_are_for_models_of_their_vocabulary_and_length(
    repo, hf_folder, data, tmp_path, monkeypatch, capsys
):
    argv = ["heldout", "--data", str(data), "--device", "cpu", "--model"]
    assert evaluate_cli.main([*argv, str(hf_folder)]) == 0
    assert json.loads(capsys.readouterr().out)["masked_tokens"] > 0
    other = shutil.copytree(hf_folder, tmp_path / "other")
    (file,) = other.glob("tokenizer.json")
    swapped = file.read_text().replace('"name1"', '"?"').replace('"name2"', '"name1"')
    file.write_text(swapped.replace('"?"', '"name2"'))
    assert evaluate_cli.main([*argv, str(other)]) == 2
    assert "have different vocabularies" in capsys.readouterr().err
    monkeypatch.setattr("trelm_ds.backbone.max_positions", lambda config: 4)
    assert evaluate_cli.main([*argv, str(hf_folder)]) == 2
    assert "positions for 4" in capsys.readouterr().err
