"""The fine-tuning loop: toy tasks are learned, a seed fixes a run, padding changes nothing."""

import copy
import dataclasses
import json
import random
from collections import Counter

import pytest
import torch
from downstream.downstream_models import (
    load_tiny,
    save_tiny_model,
    write_glue,
    write_relation,
    write_typing,
)

from trelm_ds import evaluate_cli
from trelm_ds.downstream.entity_typing import read_typing
from trelm_ds.downstream.examples import Example, encode_examples
from trelm_ds.downstream.finetune import (
    DownstreamModel,
    collate,
    finetune,
    length_bucketed,
    predict,
    task_loss,
    train,
)
from trelm_ds.downstream.glue import read_glue
from trelm_ds.downstream.relations import read_relation
from trelm_ds.downstream.settings import DEFAULTS, FineTuning
from trelm_ds.errors import ConfigError, DataError

QUICK = FineTuning(epochs=10, batch_size=8, learning_rate=3e-3, seeds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("downstream")
    save_tiny_model(root / "hf")
    save_tiny_model(root / "roberta", "roberta")
    write_typing(root / "typing")
    write_relation(root / "relation")
    write_glue(root / "glue")
    return root


@pytest.fixture(scope="module")
def tiny(folder):
    return load_tiny(folder / "hf")


def encoded(task, tiny, split=None):
    backbone, tokenizer = tiny
    examples = task.train if split is None else task.evals[split]
    return encode_examples(
        examples, tokenizer, task.labels, backbone.config.vocab_size, 40, Counter()
    )


def test_a_separable_typing_task_is_learned(tiny, folder):
    backbone, tokenizer = tiny
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    random_state = torch.get_rng_state()
    task = read_typing(folder / "typing")
    settings = dataclasses.replace(QUICK, epochs=1, learning_rate=1e-9)
    untrained = finetune(backbone, tokenizer, task, settings)
    result = finetune(backbone, tokenizer, task, QUICK)
    assert untrained["scores"]["dev"]["micro_f1"]["mean"] < 0.8
    assert result["scores"]["dev"]["micro_f1"]["mean"] > 0.95
    assert result["metric"] == "micro_f1" and result["labels"] == 3
    assert result["counts"] == {"truncated": 0, "train": 128, "dev": 48}
    assert result["settings"]["max_seq_length"] == 40  # the model's positions
    # neither the model nor the caller's random numbers are touched
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_markers_tell_head_from_tail(tiny, folder):
    backbone, tokenizer = tiny
    task = read_relation(folder / "relation")
    settings = dataclasses.replace(QUICK, seeds=2)
    result = finetune(backbone, tokenizer, task, settings)
    accuracy = result["scores"]["val"]["accuracy"]
    assert min(accuracy["seeds"]) > 0.9 and len(accuracy["seeds"]) == 2
    a, b = accuracy["seeds"]
    assert accuracy["mean"] == pytest.approx((a + b) / 2)
    assert accuracy["std"] == pytest.approx(abs(a - b) / 2**0.5)


def test_sentences_and_pairs_are_learned(tiny, folder):
    backbone, tokenizer = tiny
    tasks = {task.name: task for task in read_glue(folder / "glue")}
    settings = dataclasses.replace(QUICK, max_train_samples=96, max_eval_samples=32)
    result = finetune(backbone, tokenizer, tasks["SST-2"], settings)
    assert result["scores"]["dev"]["accuracy"]["mean"] > 0.9
    assert result["scores"]["dev"]["accuracy"]["std"] is None
    assert result["counts"] == {"truncated": 0, "train": 96, "dev": 32}
    result = finetune(backbone, tokenizer, tasks["STS-B"], settings)
    assert result["scores"]["dev"]["pearson"]["mean"] > 0.8


def trained(tiny, task, seed):
    backbone, tokenizer = tiny
    torch.manual_seed(seed)
    model = DownstreamModel(copy.deepcopy(backbone.base_model), task.spans, len(task.labels))
    settings = dataclasses.replace(QUICK, epochs=1)
    train(model, encoded(task, tiny)[:32], task.kind, settings, tokenizer.pad_token_id, seed)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_seed_fixes_the_run(tiny, folder):
    task = read_relation(folder / "relation")
    first = trained(tiny, task, 0)
    assert torch.equal(first, trained(tiny, task, 0))
    assert not torch.equal(first, trained(tiny, task, 1))


@pytest.mark.parametrize("kind", ["hf", "roberta"])
def test_padding_and_order_change_no_answer(folder, kind):
    backbone, tokenizer = load_tiny(folder / kind)
    task = read_relation(folder / "relation")
    torch.manual_seed(0)
    model = DownstreamModel(backbone.base_model, task.spans, len(task.labels)).eval()
    torch.nn.init.normal_(model.output.weight)
    examples = encoded(task, (backbone, tokenizer), "val")
    pad = tokenizer.pad_token_id
    with torch.no_grad():  # so that both answers occur
        model.output.bias -= model(**collate(examples, pad, "cpu")).mean(0)
        alone = torch.cat([model(**collate([e], pad, "cpu")) for e in examples])
        together = model(**collate(examples, pad, "cpu"))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    answers = [task.labels[i] for i in alone.argmax(1).tolist()]
    assert predict(model, examples, task, pad, 5) == answers and len(set(answers)) == 2


def test_the_head_reads_the_markers_of_head_and_tail(tiny, folder):
    backbone, tokenizer = tiny
    task = read_relation(folder / "relation")
    torch.manual_seed(0)
    model = DownstreamModel(backbone.base_model, 2, 2).eval()
    batch = encoded(task, tiny)[:6]
    inputs = collate(batch, tokenizer.pad_token_id, "cpu")
    states = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    size = len(tokenizer)
    for row, example in enumerate(batch):
        head, tail = example.ids.index(size), example.ids.index(size + 2)
        picked = torch.cat([states[row, head], states[row, tail]])
        expected = model.output(torch.tanh(model.dense(picked)))
        torch.testing.assert_close(model(**inputs)[row], expected, rtol=1e-4, atol=1e-6)


def test_every_example_once_an_epoch_in_batches_of_like_length():
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(203)]
    examples = [Example([7] * n, [0] * n, [0], i) for i, n in enumerate(lengths)]
    batches = list(length_bucketed(examples, 8, random.Random(1)))
    assert sorted(e.target for batch in batches for e in batch) == list(range(203))
    assert max(map(len, batches)) == 8 and len(batches) == 26
    padded = sum(max(len(e.ids) for e in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)
    first = [e.target for e in next(length_bucketed(examples, 8, random.Random(1)))]
    assert first == [e.target for e in batches[0]]
    assert first != [e.target for e in next(length_bucketed(examples, 8, random.Random(2)))]


def test_losses_against_plain_loops():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64)
    targets = [[0, 2], [], [3]]
    batch = [Example([], [], [], target) for target in targets]
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for i, value in enumerate(row):
            p = torch.sigmoid(value)
            total -= (p if i in target else 1 - p).log().item()
    assert task_loss(logits, batch, "multilabel").item() == pytest.approx(total / 12, rel=1e-5)
    batch = [Example([], [], [], target) for target in (1, 0, 3)]
    total = sum(-(row.exp()[e.target] / row.exp().sum()).log().item()
                for row, e in zip(logits, batch, strict=True))  # fmt: skip
    assert task_loss(logits, batch, "multiclass").item() == pytest.approx(total / 3, rel=1e-5)
    total = sum((row[0].item() - e.target) ** 2 for row, e in zip(logits, batch, strict=True))
    assert task_loss(logits, batch, "regression").item() == pytest.approx(total / 3, rel=1e-5)


def test_errors_of_the_user(tiny, folder):
    backbone, tokenizer = tiny
    task = read_typing(folder / "typing")
    with pytest.raises(ConfigError, match="lower --learning_rate"):
        finetune(backbone, tokenizer, task, dataclasses.replace(QUICK, learning_rate=1e38))
    with pytest.raises(ConfigError, match="--max_seq_length 41 is above the model's 40 positions"):
        finetune(backbone, tokenizer, task, dataclasses.replace(QUICK, max_seq_length=41))
    tokenizer = load_tiny(folder / "hf")[1]
    tokenizer.add_tokens(["another"])
    with pytest.raises(DataError, match="tokenizer has 28 tokens, the model 27"):
        finetune(backbone, tokenizer, task, QUICK)


# -- command line -------------------------------------------------------------------------------


FEW = ["--epochs", "1", "--seeds", "1", "--max_train_samples", "8", "--max_eval_samples", "8"]


@pytest.mark.parametrize("task", ["typing", "relation", "glue"])
def test_command_line(repo, task, folder, tmp_path, capsys):
    file = tmp_path / "result.json"
    argv = [task, "--model", str(folder / "hf"), "--data", str(folder / task), "--json", str(file)]
    assert evaluate_cli.main([*argv, "--device", "cpu", *FEW]) == 0
    result = json.loads(file.read_text())
    assert result == json.loads(capsys.readouterr().out)
    named = result["task"], result["model"], result["data"]
    assert named == (task, str(folder / "hf"), str(folder / task))
    if task == "glue":
        parts = result["tasks"]
        assert set(parts) == {"SST-2", "STS-B"}
        means = [part["scores"]["dev"][part["metric"]]["mean"] for part in parts.values()]
        assert result["average"] == pytest.approx(sum(means) / 2)
    else:
        (split,) = result["scores"].values()
        assert 0 <= split[result["metric"]]["mean"] <= 1
        assert result["counts"]["train"] == 8
        assert result["settings"]["batch_size"] == DEFAULTS[task].get("batch_size", 32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["typing", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["typing", "--max_seq_length", "4"], "--max_seq_length 4: must be at least 8"),
        (["typing", "--max_seq_length", "41"], "above the model's 40 positions"),
        (["relation", "--learning_rate", "nan"], "--learning_rate nan: must be positive"),
        (["relation", "--seeds", "x"], "invalid int value: 'x'"),
        (["relation", "--data", "none"], "none: no such folder"),
        (["glue", "--max_train_samples", "0"], "--max_train_samples 0: must be at least 1"),
        (["glue"], "no folder of a GLUE task in it"),
        (["typing", "--eval_batches", "3"], "unknown argument '--eval_batches'"),
        (["neurons", "--epochs", "3"], "unknown argument '--epochs'"),
        (["neurons", "--max_eval_samples", "0"], "--max_eval_samples 0: must be at least 1"),
        (["neurons"], "dev.jsonl:1: 'relation' is missing"),
    ],
)
def test_command_line_errors_are_one_line(repo, folder, capsys, arguments, said):
    task, *more = arguments
    argv = [task, "--model", str(folder / "hf"), "--data", str(folder / "typing"), *more]
    assert evaluate_cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and said in err and not out
