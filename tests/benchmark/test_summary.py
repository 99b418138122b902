"""The README's table: made from results alone, and the committed one is up to date."""

import json
from pathlib import Path

import pytest

from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.summary import BEGIN, END, summary_table

ROOT = Path(__file__).parents[2]


def ratio(method, metric, **changes):
    row = {"method": method, "baseline": "dkplm", "metric": metric, "headline": True}
    row |= {"time_ratio": 0.4, "low": 0.3, "high": 0.5, "pairs": 3, "reached": 3, "at_start": 0}
    return row | {"mlm_loss": 5.1, "baseline_mlm_loss": 5.0} | changes


def write(results, ratios, start=None, seeds=(1, 2, 3), name="2026-01-02-study", **more):
    folder = results / name
    folder.mkdir(parents=True)
    study = {"data": "tiny", "seeds": list(seeds), "settings": {}, "start": start}
    study |= {"baselines": ["dkplm"]} | more
    content = {"kind": "convergence", "ratios": ratios, "study": study}
    (folder / "convergence.json").write_text(json.dumps(content))
    (folder / "REPORT.md").write_text("")
    rows = [
        {"arm": arm, "layers": layers, "ratio_to_dense": 0.7, "batch_size": 8}
        | {"sequence_length": 128, "dtype": "fp32", "device": "cpu"}
        for layers in (4, 12)
        for arm in ("dense", "block.25")
    ]
    (results / "2026-01-01-step.json").write_text(json.dumps({"kind": "step", "rows": rows}))
    (results / "2026-01-01-other.json").write_text(json.dumps({"kind": "unpad", "rows": []}))


def test_a_study_and_whole_models_are_shown_newest_first(tmp_path):
    ratios = [
        ratio("dkplm", "eval/report_p1"),
        ratio("mlm", "eval/report_p1"),
        ratio("trelm", "eval/report_p1", baseline="dkplm-encoder", time_ratio=0.3),
        ratio("trelm", "eval/mlm_loss", time_ratio=None, reached=1),
        ratio("trelm", "eval/report_p1"),
        ratio("trelm", "eval/report_p1+text", time_ratio=0.6, high=None),
    ]
    write(tmp_path / "results", ratios)
    lines = summary_table(tmp_path / "results", tmp_path).splitlines()
    assert [line.count("|") for line in lines] == [6, 6, 6, 0, 4, 4, 4]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "`trelm`, tiny, from scratch (2 layers, 128 wide), 3 seeds",
        "0.60 (0.30 to –) of `dkplm`'s",
        "0.40 (0.30 to 0.50) of `dkplm`'s",
        "not reached (1/3) of `dkplm`'s",
        "[2026-01-02-study](results/2026-01-02-study/REPORT.md)",
    ]
    assert "12 layers" in lines[6] and "`block.25` 0.70" in lines[6] and "dense" not in lines[6]


def test_studies_whose_baselines_had_no_raced_rate_are_marked(tmp_path):
    raced = {"raced": True, "learning_rates": [1, 2]}
    for name, more, marked in (
        ("old", raced, True),
        ("new", raced | {"baselines_raced": True}, False),
        ("one rate", raced | {"learning_rates": [1]}, False),
    ):
        write(tmp_path / name, [ratio("trelm", "eval/report_p1")], **more)
        assert ("not raced" in summary_table(tmp_path / name, tmp_path)) == marked


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (
            {"method": "mlm", "steps": 9, "from": None},
            "from 9 steps of `mlm` (2 layers, 128 wide), 3",
        ),
        ({"method": "mlm", "steps": 9, "from": "base"}, "from 9 steps of `mlm` after base, 3"),
    ],
)
def test_a_study_says_what_its_runs_went_on_from(tmp_path, start, told):
    write(tmp_path / "results", [ratio("trelm", "eval/report_p1")], start)
    assert told in summary_table(tmp_path / "results", tmp_path)


def test_of_studies_that_ask_the_same_the_newest_is_shown(tmp_path):
    larger = {"model.num_hidden_layers": "4", "model.hidden_size": "256"}
    for day, method, settings in (
        (3, "trelm", {}),
        (4, "trelm-theta.8", {}),
        (5, "block.125+path-R50", {}),  # a form of TRELM by another name
        (6, "trelm", larger),
        (7, "trelm", {}),
    ):
        ratios = [ratio(method, "eval/report_p1", time_ratio=day / 100)]
        write(tmp_path, ratios, name=f"2026-01-0{day}-study", settings=settings)
    lines = summary_table(tmp_path, tmp_path).partition("\n\n")[0].splitlines()[2:]
    assert [line.split(" (")[0] for line in lines] == [
        "| `trelm`, tiny, from scratch",
        "| `trelm`, tiny, from scratch",
        "| `block.125+path-R50`, tiny, from scratch",
        "| `trelm-theta.8`, tiny, from scratch",
    ]
    assert "0.07" in lines[0] and "4 layers, 256 wide" in lines[1] and "0.06" in lines[1]


def test_a_later_study_of_fewer_baselines_hides_no_harder_one(tmp_path):
    both = {"baselines": ["dkplm", "dkplm-recipe"]}
    harder = [ratio("trelm", "eval/report_p1", time_ratio=0.7, baseline="dkplm-recipe")]
    write(tmp_path, harder, name="2026-01-02-both", **both)
    write(tmp_path, [ratio("trelm", "eval/report_p1", pairs=2)], name="2026-01-03-one")
    shown = summary_table(tmp_path, tmp_path)
    assert "0.70 (0.30 to 0.50) of `dkplm-recipe`'s" in shown
    assert "0.40 (0.30 to 0.50), 2 of 3 seeds have a pair of `dkplm`'s" in shown


def test_a_study_of_one_seed_is_not_on_the_first_screen(tmp_path):
    write(tmp_path / "results", [ratio("trelm", "eval/report_p1")], seeds=[1])
    assert "`trelm`" not in summary_table(tmp_path / "results", tmp_path)


def test_only_what_lies_between_the_marks_is_replaced(tmp_path, capsys):
    write(tmp_path / "results", [ratio("trelm", "eval/report_p1")])
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    flags = ["summary", "--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert main(flags) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith(f"{END}\nbelow\n") and "old" not in text
    assert "0.40" in text
    assert main(flags) == 0 and readme.read_text() == text
    readme.write_text("no marks")
    assert main(flags) == 2 and "needs the lines" in capsys.readouterr().err
    readme.write_text(text)
    (tmp_path / "results" / "2026-01-03.json").write_text("{")
    assert main(flags) == 2 and readme.read_text() == text


def test_the_committed_readme_has_what_the_committed_results_say():
    text = (ROOT / "README.md").read_text()
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == summary_table(ROOT / "benchmarks" / "results", ROOT)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    from trelm_ds.errors import DataError

    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match="x.json"):
        summary_table(tmp_path, tmp_path)
