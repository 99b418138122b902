"""Export: equal logits after a round trip, atomicity, refusals, the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_corpus import write_tiny_corpus
from transformers import AutoModelForMaskedLM, AutoTokenizer

from trelm_ds import export, export_cli
from trelm_ds.config import load_config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import CheckpointError, ConfigError
from trelm_ds.export import EXTRAS, export_model, last_evaluation
from trelm_ds.model import TrelmModel

SHAPE = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 24,
    "model.max_position_embeddings": 48,
    "data.max_seq_length": 32,
    "routing.form": "none",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny_corpus(folder, train=8, heldout=2)
    return folder


def _checkpoint(folder, data, model_type="bert"):
    """A perturbed model and the files a checkpoint holds beside the weights."""
    config = load_config(
        "trelm",
        overrides=SHAPE | {"model.model_type": model_type, "data.data_dir": str(data)},
    )
    torch.manual_seed(0)
    model = TrelmModel.build(config, data, KnowledgeGraph.load(data), KnowledgeTables.load(data))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "backbone.json").write_text(model.backbone.config.to_json_string())
    load_tokenizer(data / "tokenizer").save_pretrained(folder / "tokenizer")
    return model.eval()


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("tied_names", ["both", "one"])
def test_round_trip_gives_equal_logits(data, tmp_path, model_type, tied_names):
    model = _checkpoint(tmp_path / "step_1", data, model_type)
    state = model.state_dict()
    if tied_names == "one":  # what some of DeepSpeed's conversions leave
        state = {k: v for k, v in state.items() if "decoder" not in k.split(".")[1:]}
        assert len(state) == len(model.state_dict()) - 2
    folder = export_model(state, tmp_path / "step_1", tmp_path / "hf")

    loaded, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = tokenizer("name1 " * 99, truncation=True, return_tensors="pt")
    assert longest["input_ids"].shape[1] == tokenizer.model_max_length == 48
    loaded(**longest)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    texts = ["name1 was born in the [MASK] .", "the old city of name3 [MASK]"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == tokenizer.mask_token_id).any(1).all()
    with torch.no_grad():
        theirs = loaded.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        positions = inputs["attention_mask"].flatten().nonzero()[:, 0]
        ours = model.mlm_logits(inputs["input_ids"], inputs["attention_mask"], positions)
    torch.testing.assert_close(theirs.flatten(0, 1)[positions], ours, rtol=0, atol=2e-6)
    assert ours.std() > 0.1  # not a comparison of zeros

    extras = load_file(folder / EXTRAS)
    assert {name.split(".")[0] for name in extras} == {"injection", "decoder"}
    for name, tensor in extras.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)


def test_fingerprint_survives_export(data, tmp_path):
    from trelm_ds.backbone import MaskedLanguageModel, load_pretrained

    model = _checkpoint(tmp_path / "step_1", data)
    folder = export_model(model.state_dict(), tmp_path / "step_1", tmp_path / "hf")
    before = model.fingerprint()
    assert MaskedLanguageModel(load_pretrained(folder)).fingerprint() == before
    with torch.no_grad():
        model.ffns[0].down_weight[0, 0] += 1
    assert model.fingerprint() != before


def test_model_card_tells_method_data_and_scores(data, tmp_path):
    model = _checkpoint(tmp_path / "step_00000100", data)
    folder = export_model(
        model.state_dict(),
        tmp_path / "step_00000100",
        tmp_path / "hf",
        metrics={"eval/mlm_loss": 2.5},
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("`trelm`", f"`{data.name}`", "step_00000100", "| `eval/mlm_loss` | 2.5000 |"):
        assert part in card
    assert str(data) not in card  # names, not paths of this machine


def test_nothing_is_left_when_export_fails(data, tmp_path, monkeypatch):
    model = _checkpoint(tmp_path / "step_1", data)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(model.state_dict(), tmp_path / "step_1", tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_an_export(data, tmp_path):
    model = _checkpoint(tmp_path / "step_1", data)
    arguments = (model.state_dict(), tmp_path / "step_1", tmp_path / "hf")
    export_model(*arguments)
    with pytest.raises(ConfigError, match="exists.* with --overwrite"):
        export_model(*arguments)
    (tmp_path / "hf" / "stale").touch()
    export_model(*arguments, overwrite=True)
    assert not (tmp_path / "hf" / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="exists.* remove it first"):
        export_model(*arguments[:2], tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_weights_that_do_not_fit_are_refused(data, tmp_path):
    model = _checkpoint(tmp_path / "step_1", data)
    state = model.state_dict()
    name = "backbone.bert.encoder.layer.1.output.dense.up_weight"
    for broken in (
        {k: v for k, v in state.items() if k != name},
        state | {"backbone.bert.encoder.layer.7.output.LayerNorm.bias": torch.zeros(16)},
        state | {name: torch.zeros(3, 3)},
    ):
        with pytest.raises(CheckpointError) as error:
            export_model(broken, tmp_path / "step_1", tmp_path / "hf")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_last_evaluation_reads_the_step_of_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 100, "eval/mlm_loss": 3.0, "time_s": 1.0},
        {"step": 200, "eval/mlm_loss": 2.0, "eval/probe_p1": 0.5},
        {"step": 200, "train/loss": 9.0},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 200, "eval/mlm')
    assert last_evaluation(file, 200) == {"eval/mlm_loss": 2.0, "eval/probe_p1": 0.5}
    assert last_evaluation(file, 300) == {} == last_evaluation(tmp_path / "none", 1)


def test_command_line(repo, data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000007"
    model = _checkpoint(checkpoint, data)
    (checkpoint / "state.json").write_text('{"step": 7}')
    (run / "checkpoints" / "LATEST").write_text("step_00000007\n")
    (run / "metrics.jsonl").write_text('{"step": 7, "eval/probe_p1": 0.25}\n')
    asked = []

    def load(folder):
        asked.append(folder)
        return model.state_dict()

    monkeypatch.setattr(export_cli, "load_model_state", load)
    assert export_cli.main([str(checkpoint), str(tmp_path / "a")]) == 0
    assert export_cli.main([str(run), str(tmp_path / "b")]) == 0
    assert asked == [checkpoint, checkpoint]
    assert "| `eval/probe_p1` | 0.2500 |" in (tmp_path / "b" / "README.md").read_text()
    capsys.readouterr()
    assert export_cli.main([str(run), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
