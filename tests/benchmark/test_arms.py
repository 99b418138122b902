"""The table of arms: every arm is a configuration, and mistakes in it are named."""

import pytest

from trelm_ds.benchmark.arms import load_table
from trelm_ds.config import build_config, known_keys, preset_names
from trelm_ds.errors import ConfigError

TABLE = load_table()


@pytest.mark.parametrize("name", sorted(TABLE.arms))
def test_every_arm_is_a_configuration(name):
    arm = TABLE.arms[name]
    config = arm.config({"train.max_steps": 7})
    assert config.train.max_steps == 7
    assert config.method == arm.preset and arm.preset in preset_names()
    assert arm.about


def test_presets_are_arms_and_no_two_arms_of_a_study_are_the_same():
    assert set(preset_names()) <= set(TABLE.arms)
    for plan in TABLE.studies.values():
        seen = {}
        for name in plan.arms:
            tree = TABLE.arms[name].config().to_dict()
            tree.pop("method")
            twin = seen.setdefault(repr(tree), name)
            assert twin == name, f"{name} is {twin} by another name"


def test_roles_name_arms_of_the_study():
    for plan in TABLE.studies.values():
        for role in (plan.baselines, plan.ablations, plan.modules):
            assert set(role) <= set(plan.arms)


def test_an_arm_differs_from_its_base_only_in_what_it_declares():
    random = TABLE.arms["random.25"].config()
    dense = TABLE.arms["dense"].config()
    assert random.routing.form == "random" and random.routing.kept_fraction == 0.25
    assert random.routing.input_gradient == "exact"  # dense's, not the preset trelm's
    assert random.memory == dense.memory and random.train == dense.train
    late = TABLE.arms["in_backward.1-abs-start.5"].config().routing
    assert (late.form, late.score, late.start) == ("in_backward", "abs_gradient", 0.5)


def test_sweeps_name_keys_and_legal_values():
    for sweep in TABLE.sweeps.values():
        assert sweep.key in known_keys()
        for value in sweep.values:
            build_config({sweep.key: value})


def test_patterns_select_in_the_order_given():
    names = [arm.name for arm in TABLE.find(["block.25*", "dense", "block*R50"])]
    assert names[0].startswith("block.25") and names.index("dense") < names.index(
        "block.125+path-R50"
    )
    assert len(names) == len(set(names))
    among = TABLE.studies["convergence"].arms
    assert {a.name for a in TABLE.find(["dkplm*"], among)} == {
        name for name in among if name.startswith("dkplm")
    }
    with pytest.raises(ConfigError, match="did you mean 'dkplm'"):
        TABLE.find(["dkpm"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: {base: trelm, routing: {frm: block}}}", "routing.form"),
        ("arms: {a: {base: trelm, routing: {form: blok}}}", "'block'"),
        ("arms: {a: {base: trellm}}", "'trelm'"),
        ("arms: {a: {base: b}, b: {base: a}}", "leads back"),
        ("arms: {trelm: {base: mlm}}", "name of a preset"),
        ("arm: {}", "unknown section"),
        ("arms: [", "not valid YAML"),
        ("studies: {x: {arms: [nobody]}}", "nobody"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, said):
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_table(path)
    assert said in str(error.value) and "\n" not in str(error.value)
