"""Configuration: layers, unknown keys, ranges, and every shipped file."""

import json

import pytest
import yaml

from trelm_ds.arguments import build_parser, parse_arguments
from trelm_ds.config import PRESET_DIR, known_keys, load_config, preset_names
from trelm_ds.engine import read_deepspeed_config, resolve_deepspeed_config, zero_stage
from trelm_ds.errors import ConfigError


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("routing: {kept_fraction: 0.5}\ntrain: {learning_rate: 3e-4, max_steps: 7}\n")
    argv = ["--method", "trelm", "--config", str(file), "--learning_rate", "1e-3"]
    config, _ = parse_arguments([*argv, "--set", "routing.rotation_steps=9"])
    assert config.routing.kept_fraction == 0.5  # the file's, not the preset's 0.25
    assert config.routing.form == "block"  # the preset's
    assert config.train.learning_rate == 1e-3  # the flag's
    assert config.train.max_steps == 7
    assert config.routing.rotation_steps == 9
    assert config.memory.half_window == 16  # the default


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--kept_fraction", "1"], "'--set routing.kept_fraction=...'"),
        (["--lr", "1"], "'--learning_rate'"),
        (["--learning-rate=1"], "'--learning_rate'"),
        (["--num_train_epochs", "1"], "'--max_steps'"),
        (["--batch_size", "1"], "'--per_device_train_batch_size'"),
        (["--zzz", "1"], "unknown argument '--zzz'"),
        (["--set", "routing.kept=.1"], "routing.kept_fraction"),
        (["--method", "trelmm"], "'trelm'"),
        (["--learning_rate", "fast"], "not float"),
        (["--learning_rate", "nan"], "not a finite number"),
        (["--max_steps", "0"], "at least 1"),
        (["--max_steps", "1.5"], "not int"),
        (["--set", "routing.form=blok"], "'block'"),
        (["--set", "routing.form=block", "--set", "routing.paths=full"], "block"),
        (["--set", "memory.discount=1"], "memory.discount"),
        (["--set", "memory.virtual_epochs=0"], "memory.virtual_epochs must be at least 1"),
        (["--set", "memory.max_gib=-1"], "memory.max_gib must be positive"),
        (["--set", "decoding.max_triples=0"], "decoding.max_triples must be at least 1"),
        (["--set", "decoding.scale=0"], "decoding.scale must not be 0"),
        (["--set", "decoding.unigram_power=-1"], "decoding.unigram_power must not be negative"),
        (["--set", "decoding.max_tokens=9"], "keep that many of a name"),
        (["--set", "injection.text_length=11"], "must be 3 to 10: prepared folders keep 8 tokens"),
        (["--config", "missing.yaml"], "no such file"),
        (["--model_name_or_path", "x", "--num_hidden_layers", "2"], "model.num_hidden_layers is"),
        (["--model_name_or_path", "x", "--set", "model.model_type=bert"], "model.model_type is"),
    ],
)
def test_bad_flags_are_one_line_that_names_the_fix(argv, said):
    with pytest.raises(ConfigError) as error:
        parse_arguments(argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_help_says_what_each_key_is_its_choices_and_the_default_method_s_value():
    parser = build_parser()
    texts = {action.dest: action.help for action in parser._actions if action.metavar == "VALUE"}
    assert len(texts) > 40 and all(len(text.split("; default ")[0]) > 5 for text in texts.values())
    assert texts["mlm_probability"].endswith("; default 0.15 (trelm: 0.3)")
    assert texts["object_loss_share"].endswith("; default none (trelm: 0.25)")
    assert texts["export"].endswith("; default true")
    assert "linear | cosine | constant" in texts["lr_scheduler_type"]
    said = " ".join(parser.format_help().split())
    assert "docs/routing.md" in said and "default trelm" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {learning_rat: 1}", "train.learning_rate"),
        ("trian: {}", "did you mean"),
        ("[1, 2]", "mapping"),
        ("train: 3", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_name_the_file_and_the_nearest_key(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(None, file)
    assert said in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_to_its_own_name(name):
    config = load_config(name)
    assert config.method == name
    tree = yaml.safe_load((PRESET_DIR / f"{name}.yaml").read_text())
    assert tree["method"] == name


def test_the_promised_methods_are_shipped():
    promised = {"trelm-paper", "trelm", "dkplm", "dkplm-encoder", "mlm", "trelm-no-injection"}
    promised |= {"trelm-no-memory", "trelm-no-routing"}
    assert promised <= set(preset_names())


def test_a_saved_configuration_loads_to_the_same(tmp_path):
    config = load_config("trelm-paper", overrides={"train.max_steps": 12})
    config.save(tmp_path / "config.json")
    assert load_config(None, tmp_path / "config.json") == config
    # It has the keys of a model from scratch too, which then are not asked for.
    argv = ["--config", str(tmp_path / "config.json"), "--model_name_or_path", "x"]
    assert parse_arguments(argv)[0].model.model_name_or_path == "x"


def test_known_keys_are_unique():
    keys = known_keys()
    assert len(keys) == len(set(keys)) and "routing.form" in keys


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_deepspeed_config_resolves(repo, world_size):
    from deepspeed.runtime.config import DeepSpeedConfig

    files = sorted((repo / "ds_configs").glob("*.json"))
    assert {f.stem for f in files} >= {"zero0", "zero1", "zero2", "zero3"}
    for file in files:
        config = load_config("trelm", overrides={"train.gradient_accumulation_steps": 2})
        resolved = resolve_deepspeed_config(read_deepspeed_config(file), config, world_size, True)
        micro = config.train.per_device_train_batch_size
        assert resolved["train_batch_size"] == micro * 2 * world_size
        assert resolved["bf16"]["enabled"] is True
        assert "auto" not in json.dumps(resolved)
        assert zero_stage(resolved) == int(file.stem[4])
        if world_size == 1:
            DeepSpeedConfig(resolved)  # DeepSpeed's own validation


def test_deepspeed_conflicts_are_listed_in_one_error():
    config = load_config("trelm")
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 3.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam"},
    }
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(given, config, 1, bf16=False)
    for part in ("train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "optimizer"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer is not supported"),
        ({"datastates_ckpt": {}}, "datastates_ckpt is not supported"),
        ({"zero_optimization": 2}, "zero_optimization is not a JSON object"),
        ({"bf16": True}, "bf16 is not a JSON object"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm has to be true"),
    ],
)
def test_what_would_write_behind_a_checkpoints_back_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        resolve_deepspeed_config(given, load_config("trelm"), 1, bf16=False)


def test_a_misspelt_section_is_named():
    given = {"zero_optimisation": {"stage": 2}, "bfloat16": {"enabled": False}, "comms_logger": {}}
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(given, load_config("trelm"), 1, bf16=False)
    assert str(error.value).endswith("zero_optimisation: did you mean 'zero_optimization'?")


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        ("zero_optimization", {"overlap_com": True}, "overlap_com: Extra"),
        ("zero_optimization", {"reduce_bucket_size": "5e8x"}, "reduce_bucket_size: Input should"),
        ("zero_optimization", {"offload_optimizer": {"devise": "cpu"}}, "offload_optimizer.devise"),
        ("bf16", {"enable": True}, "enable: Extra"),
    ],
)
def test_what_deepspeed_does_not_know_is_named_before_anything_is_built(section, given, said):
    given = {"zero_optimization": {"stage": 2}} | {section: given}
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(given, load_config("trelm"), 1, bf16=False)
    assert f": {section}.{said}" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_broken_deepspeed_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_deepspeed_config(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_deepspeed_config(tmp_path / "bad.json")
