"""The two scripts: exit codes, one line per error, summaries, and a look-up."""

import json
import subprocess
import sys

import pytest
from prepare.corpora import own_corpus, write_lines, write_own_graph

from trelm_ds.prepare import cli, lookup
from trelm_ds.prepare.cli import READERS, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_lines(folder / "corpus.jsonl", own_corpus())
    write_own_graph(folder / "graph")
    line = prepare(
        ["jsonl", f"--input={folder / 'corpus.jsonl'}", f"--graph={folder / 'graph'}"]
        + [f"--output={folder / 'data'}", "--dim=4", "--epochs=2"]
    )
    assert "54 training and 6 held-out samples" in line and "6 triples" in line
    return folder / "data"


def run(main, argv, capsys):
    """(exit code, stdout, stderr)."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "KIND"),
        (["owl"], "invalid choice: 'owl'"),
        (["jsonl", "--output", "OUT"], "--input is needed"),
        (["jsonl", "--imput", "IN", "--output", "OUT"], "did you mean '--input'?"),
        (["jsonl", "--input", "OUT/none.jsonl", "--output", "OUT"], "no such file or folder"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--max_seq_len", "9"], "--max_seq_len"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--max_seq_length", "9"], "16 to 4096"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--heldout_fraction", "1"], "in [0, 1)"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--limit", "0"], "at least 1"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--dim", "0"], "at least 1"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--graph", "gone"], "gone: no such file"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--vocab", "gone"], "gone: no such file"),
        (["jsonl", "--input", "IN", "--output", "IN/under/a/file"], "Not a directory"),
        (["sample", "--input", "IN", "--output", "OUT"], "takes no --input"),
        (["sample", "--output", "OUT", "--limit", "5"], "sample: takes no --limit"),
        (["sample", "--output", "OUT", "--heldout_fraction", "0.5"], "no --heldout_fraction"),
        (["sample", "--output", "OUT", "--graph_only_fraction", "0"], "trex alone"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--text_only_fraction", "0"], "trex alone"),
        (["trex", "--input", "IN", "--output", "OUT", "--text_only_fraction", "1"], "in [0, 1)"),
        (["jsonl", "--input", "IN", "--output", "OUT", "--also", "rebel=IN"], "trex alone"),
        (["trex", "--input", "IN", "--output", "OUT"], "must be one folder"),
        (["verify", "--output", "OUT"], "not found"),
        (["embed", "--output", "OUT"], "not found"),
        (["score", "--output", "OUT"], "--model --random_init is required"),
        (["score", "--output", "OUT", "--random_init", "--batch_tokens", "0"], "at least 1"),
        (["sample", "--output", "OUT", "--seed", f"{2**63}"], "must be in [-2^63, 2^63)"),
        (["embed", "--output", "OUT", "--seed", f"{-(2**63) - 1}"], "must be in [-2^63, 2^63)"),
        (["score", "--output", "OUT", "--random_init", "--seed", f"{10**20}"], "must be in [-2"),
    ],
)
def test_every_user_error_is_one_line_and_exit_code_2(tmp_path, capsys, argv, message):
    source = write_lines(tmp_path / "in.jsonl", own_corpus(20))
    names = {"OUT": tmp_path / "out", "IN": source}
    argv = [word.replace("OUT", str(names["OUT"])).replace("IN", str(source)) for word in argv]
    code, out, err = run(cli.main, argv, capsys)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_script_itself(repo, tmp_path):
    command = [sys.executable, "launch/prepare.py", "verify", "--output", str(tmp_path / "none")]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "manifest.json: not found" in result.stderr


def test_steps_sum_up_in_one_line(prepared, capsys):
    code, out, _ = run(cli.main, ["verify", "--output", prepared], capsys)
    assert code == 0 and out.count("\n") == 1 and "ok: train 54 samples" in out


def test_score_step_writes_the_importance_of_entity_spans(prepared, capsys):
    argv = ["score", "--output", prepared, "--random_init", "--seed", 1]
    code, out, err = run(cli.main, argv, capsys)
    assert code == 0, err
    import numpy as np

    from trelm_ds.data.tables import KnowledgeTables

    importance = KnowledgeTables.load(prepared).importance
    assert (importance >= 1).all() and (importance > 1).sum() == 108  # entity spans alone
    assert f"scored {len(importance)} spans" in out
    assert json.loads((prepared / "tables" / "importance.json").read_text())["spans"] == 118
    first = np.array(importance)
    assert run(cli.main, argv, capsys)[0] == 0
    np.testing.assert_array_equal(KnowledgeTables.load(prepared).importance, first)


def test_ranks_of_torchrun_score_together(prepared, repo, capsys):
    argv = ["score", "--output", str(prepared), "--random_init", "--batch_tokens", "512"]
    assert run(cli.main, argv, capsys)[0] == 0
    scores = prepared / "tables" / "importance.npy"
    alone = scores.read_bytes()
    scores.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", "launch/prepare.py", *argv]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and "scored 118 spans" in result.stdout
    assert scores.read_bytes() == alone
    assert not list(scores.parent.glob(".*"))


def test_score_step_takes_a_local_model_of_the_same_vocabulary(prepared, tmp_path, capsys):
    from transformers import BertConfig, BertForMaskedLM

    from trelm_ds.data.shards import load_manifest

    size = load_manifest(prepared)["tokenizer"]["vocab_size"]
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for words, expected in ((size, 0), (size + 1, 2)):
        BertForMaskedLM(
            BertConfig(vocab_size=words, intermediate_size=16, **shape)
        ).save_pretrained(tmp_path / "model")
        argv = ["score", "--output", prepared, "--model", tmp_path / "model"]
        code, out, err = run(cli.main, argv, capsys)
        assert code == expected, err
    assert f"vocabulary of {size + 1}" in err and err.startswith("error: ")
    assert run(cli.main, [*argv[:3], "--model", tmp_path / "none"], capsys)[0] == 2


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_least_and_the_largest_seed_work(prepared, capsys, seed):
    argv = ["embed", "--output", prepared, "--dim=4", "--epochs=1", f"--seed={seed}"]
    code, _, err = run(cli.main, argv, capsys)
    assert code == 0, err


def test_help_names_every_kind_and_step(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in (*READERS, "score", "index", "embed", "stats", "verify"):
        assert f"\n    {name}" in text


def test_help_of_a_kind_has_what_the_kind_uses_with_defaults(capsys):
    said = {}
    for kind in (*READERS, "score", "embed"):
        with pytest.raises(SystemExit):
            prepare([kind, "--help"])
        said[kind] = " ".join(capsys.readouterr().out.split())
    assert [kind for kind in READERS if "--input PATH" not in said[kind]] == ["sample"]
    for flag in ("--also", "--graph_only_fraction", "--text_only_fraction"):
        assert [kind for kind in READERS if flag in said[kind]] == ["trex"]
    for text in ("default 128", "default 42", "default 0.05", "default 100", "default 50"):
        assert text in said["jsonl"]
    assert "default 42" in said["score"] and "default 100" in said["embed"]


def test_lookup(prepared, capsys):
    code, out, _ = run(lookup.main, ["pariss", "--data", prepared], capsys)
    assert code == 0 and "Q90 Paris" in out and "France | capital | Paris" in out
    argv = ["Lyon and Tokyo", "--data", prepared, "--k", 1, "--json"]
    code, out, _ = run(lookup.main, argv, capsys)
    result = json.loads(out)
    assert [e["id"] for e in result["entities"]] == ["Q456", "Q1490"]
    assert result["entities"][0]["triples"] == [["Lyon", "country", "France"]]
    assert result["entities"][1]["mention"] == "Tokyo" and result["entities"][1]["start"] == 9
    assert run(lookup.main, ["zzzz", "--data", prepared], capsys)[1] == "no entity found\n"


def test_lookup_errors(tmp_path, capsys):
    for argv in (["x"], ["x", "--data", tmp_path], ["x", "--data", tmp_path, "--k", "-1"]):
        code, out, err = run(lookup.main, argv, capsys)
        assert code == 2 and out == "" and err.count("\n") == 1
