"""Eq. 1 against a loop over single sentences, batching, and the written table."""

import hashlib
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from model.model_batches import make_config
from multiprocess import run_ranks
from tiny_corpus import MASK, PAD, UNK, write_tiny_corpus

from trelm_ds.backbone import MaskedLanguageModel, build_backbone
from trelm_ds.data.shards import load_manifest, write_manifest
from trelm_ds.data.table_files import save_array
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.distributed import World, cpu_group
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.knowledge import importance
from trelm_ds.knowledge.importance import score_importance, score_samples, semantic_importance


def _model(vocab_size, model_type="bert"):
    torch.manual_seed(0)
    config = make_config(model__model_type=model_type, model__hidden_dropout_prob=0.5)
    model = MaskedLanguageModel(build_backbone(config, vocab_size, PAD))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.word_embeddings.weight.mul_(20)  # a mention must matter to its sentence
    return model


def _loop(model, samples, num_entities, replacement, pooling):
    """Eq. 1 sentence by sentence through Hugging Face's own forward."""
    scores = []

    def vector(ids):
        ids = torch.tensor([ids.tolist()])
        with torch.no_grad():
            states = model.backbone.base_model(input_ids=ids)[0][0].double()
        return states[0] if pooling == "first" else states.mean(0)

    for sample in samples:
        h_o = vector(sample.ids)
        for left, right, key in sample.spans.tolist():
            if key >= num_entities:
                scores.append(1.0)
                continue
            ids = sample.ids.copy()
            for i in range(left, right):
                ids[i] = replacement
            h_rep = vector(ids)
            cosine = float(h_o @ h_rep) / math.sqrt(float(h_o @ h_o) * float(h_rep @ h_rep))
            scores.append(1 / max(cosine, 1e-3))
    return np.array(scores)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize(("name", "replacement"), [("unk", UNK), ("mask", MASK)])
def test_table_is_eq_1(tmp_path, pooling, name, replacement):
    corpus = write_tiny_corpus(tmp_path, train=20, heldout=2)
    model = _model(len(corpus.words)).train()
    report = score_importance(model, tmp_path, replacement=name, pooling=pooling, batch_tokens=150)
    assert model.training  # scored without dropout, then put back
    expected = _loop(model.eval(), corpus.samples["train"], 24, replacement, pooling)
    actual = np.load(tmp_path / "tables" / "importance.npy")
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual - 1, expected - 1, rtol=1e-3, atol=1e-6)
    keys = np.concatenate([s.spans[:, 2] for s in corpus.samples["train"]])
    assert (actual[keys >= 24] == 1).all() and np.median(actual[keys < 24]) > 1.0003
    written = json.loads((tmp_path / "tables" / "importance.json").read_text())
    assert written == report
    assert report["model_sha256"] == model.fingerprint() and report["spans"] == len(expected)
    assert len(KnowledgeTables.load(tmp_path).importance) == len(expected)
    assert not list((tmp_path / "tables").glob(".*"))


def test_cosine_is_clamped():
    h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    expected = torch.tensor([1.0, 1000.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(semantic_importance(h, other), expected)


def test_batching_by_length_changes_nothing():
    rng = np.random.default_rng(0)

    class Sample:
        def __init__(self, length):
            self.ids = rng.integers(5, 40, length).astype(np.int32)
            self.spans = np.array([[1, 3, 0], [4, 5, 1]], dtype=np.int32)

    samples = [Sample(length) for length in (9, 30, 7, 16, 9)]
    model = _model(40).eval()
    settings = dict(num_entities=2, replacement_id=UNK, pad_token_id=PAD)
    together = score_samples(samples, model.last_hidden_states, **settings)
    alone = score_samples(samples, model.last_hidden_states, batch_tokens=1, **settings)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    empty = score_samples([], model.last_hidden_states, **settings)
    assert empty.shape == (0,) and empty.dtype == np.float32


def score(rank, world_size, folders, vocab_size, **settings):
    """A rank's share of scoring; with more than one folder each rank is on its own machine."""
    importance.WINDOW_SAMPLES = 4
    apart = len(folders) > 1
    world = World(rank, world_size, 0 if apart else rank, "launcher")
    folder = folders[rank if apart else 0]
    return score_importance(_model(vocab_size), folder, world=world, group=cpu_group(), **settings)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(importance, "WINDOW_SAMPLES", 4)


def table(folder):
    return (folder / "tables" / "importance.npy").read_bytes()


def parts(folder):
    return sorted(p.name for p in (folder / "tables").glob(".scores-*/*"))


def left_over(folder):
    return [p.name for p in (folder / "tables").glob(".*")]


def test_two_ranks_write_what_one_writes_to_the_bit(tmp_path, small_parts):
    corpus = write_tiny_corpus(tmp_path, train=19, heldout=2)  # five parts: three rounds of two
    vocab_size = len(corpus.words)
    alone = score_importance(_model(vocab_size), tmp_path)
    scores = table(tmp_path)
    for resumable in (False, True):
        (tmp_path / "tables" / "importance.npy").unlink()
        two = run_ranks(partial(score, resumable=resumable), 2, [tmp_path], vocab_size)
        assert two == [alone, None]
        assert table(tmp_path) == scores and not left_over(tmp_path)


class Killed(Exception):
    pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_scoring_goes_on_where_it_was_to_the_bit(
    tmp_path, monkeypatch, small_parts, ranks
):
    corpus = write_tiny_corpus(tmp_path, train=19, heldout=2)
    model = _model(len(corpus.words))
    before = table(tmp_path)
    whole = score_importance(model, tmp_path)
    scores = table(tmp_path)
    (tmp_path / "tables" / "importance.npy").write_bytes(before)
    calls = []

    def three_times(*args, **settings):
        calls.append(args)
        if len(calls) > 3:
            raise Killed
        return score_samples(*args, **settings)

    monkeypatch.setattr(importance, "score_samples", three_times)
    with pytest.raises(Killed):
        score_importance(model, tmp_path, resumable=True)
    assert parts(tmp_path) == [f"part-0000{i}.npy" for i in range(3)]
    assert table(tmp_path) == before  # until all is done
    calls.clear()
    if ranks == 1:
        assert score_importance(model, tmp_path, resumable=True) == whole
        assert len(calls) == 2  # the other three parts are taken as they are
    else:
        resumed = run_ranks(partial(score, resumable=True), 2, [tmp_path], len(corpus.words))
        assert resumed == [whole, None]
    assert table(tmp_path) == scores and not left_over(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        "model",
        "corpus",
        {"replacement": "mask"},
        {"pooling": "first"},
        {"batch_tokens": 64},
        {"bf16": True},
    ],
)
def test_parts_of_another_scoring_are_never_taken(tmp_path, monkeypatch, small_parts, changed):
    corpus = write_tiny_corpus(tmp_path, train=9, heldout=2)
    model = _model(len(corpus.words))
    with monkeypatch.context() as patch:
        patch.setattr(importance, "write_text", lambda *args: 1 / 0)  # ends when all is scored
        with pytest.raises(ZeroDivisionError):
            score_importance(model, tmp_path, resumable=True)
    assert len(parts(tmp_path)) == 3
    if changed == "model":
        with torch.no_grad():
            model.word_embeddings.weight[7, 0] += 1e-3
    elif changed == "corpus":
        manifest = load_manifest(tmp_path)
        write_manifest(tmp_path, manifest | {"name": "other"})
    settings = changed if isinstance(changed, dict) else {}
    scored = []
    monkeypatch.setattr(
        importance, "score_samples", lambda *a, **k: scored.append(0) or score_samples(*a, **k)
    )
    score_importance(model, tmp_path, resumable=True, **settings)
    assert len(scored) == 3 and not left_over(tmp_path)  # the old ones go too


def test_machines_with_copies_of_the_folder_all_have_the_table(tmp_path, small_parts):
    a, b, alone = folders = [tmp_path / name for name in ("a", "b", "alone")]
    for folder in folders:
        corpus = write_tiny_corpus(folder, train=19, heldout=2)
    report = score_importance(_model(len(corpus.words)), alone)
    # Parts wait on each machine; what one of them lacks is scored again.
    identity = {"dataset_id": corpus.manifest["dataset_id"], "bf16": False, "batch_tokens": 4096}
    identity |= {key: report[key] for key in ("model_sha256", "replacement", "pooling")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    ends = np.cumsum([0] + [len(s.spans) for s in corpus.samples["train"]])[::4]
    whole = np.load(alone / "tables" / "importance.npy")
    for folder, part, change in ((a, 0, 0.5), (b, 0, 0.5), (b, 1, 9)):
        scores = whole[ends[part] : ends[part + 1]] + np.float32(change)
        save_array(folder / "tables" / f".scores-{digest}" / f"part-{part:05d}.npy", scores)
    found = run_ranks(partial(score, resumable=True), 2, [a, b], len(corpus.words))
    expected = whole.copy()
    expected[: ends[1]] += np.float32(0.5)  # so the parts were taken, and from each one's folder
    assert found == [report | {"mean": float(expected.mean())}, None]
    for folder in (a, b):
        np.testing.assert_array_equal(np.load(folder / "tables" / "importance.npy"), expected)
        assert json.loads((folder / "tables" / "importance.json").read_text()) == found[0]
        assert not left_over(folder)


def try_to_score(rank, world_size, folders, vocab_size):
    try:
        score(rank, world_size, folders, vocab_size)
    except DataError as error:
        return str(error), error.everywhere


def test_a_rank_that_cannot_read_stops_them_all(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        corpus = write_tiny_corpus(folder, train=19, heldout=2)
    next((folders[1] / "shards").glob("train-*.tar")).write_bytes(b"")
    one, two = run_ranks(try_to_score, 2, folders, len(corpus.words))
    assert one == two and one[1] is True
    assert one[0].startswith("rank 1: ") and "0 bytes, the manifest says" in one[0]


def score_with_another_model(rank, world_size, folder, vocab_size):
    model = _model(vocab_size)
    with torch.no_grad():
        model.word_embeddings.weight[3] += rank
    world = World(rank, world_size, rank, "launcher")
    with pytest.raises(ConfigError, match="the ranks' models, data or settings differ"):
        score_importance(model, folder, world=world, group=cpu_group())


def test_ranks_have_the_same_model(tmp_path):
    corpus = write_tiny_corpus(tmp_path, train=9, heldout=2)
    run_ranks(score_with_another_model, 2, tmp_path, len(corpus.words))


def test_bf16_scores_are_near(tmp_path):
    corpus = write_tiny_corpus(tmp_path, train=9, heldout=2)
    model, scores = _model(len(corpus.words)), []
    for bf16 in (False, True):
        assert score_importance(model, tmp_path, bf16=bf16)["bf16"] is bf16
        scores.append(np.load(tmp_path / "tables" / "importance.npy"))
    assert (scores[0] != scores[1]).any()
    np.testing.assert_allclose(scores[1], scores[0], rtol=0.02)


def test_scores_that_another_run_has_written_meanwhile_stay(tmp_path):
    corpus = write_tiny_corpus(tmp_path, train=9, heldout=2)
    model = _model(len(corpus.words))
    (tmp_path / "tables" / "importance.json").write_text("theirs")
    before = (tmp_path / "tables" / "importance.npy").read_bytes()
    score_importance(model, tmp_path, keep=True)
    assert (tmp_path / "tables" / "importance.json").read_text() == "theirs"
    assert (tmp_path / "tables" / "importance.npy").read_bytes() == before
    score_importance(model, tmp_path)
    assert (tmp_path / "tables" / "importance.json").read_text() != "theirs"


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pooling 'max' must be mean or first"):
        score_importance(None, tmp_path, pooling="max")
