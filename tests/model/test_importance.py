"""Eq. 1 against a loop over single sentences, batching, and the written table."""

import json
import math

import numpy as np
import pytest
import torch
from model.model_batches import make_config
from multiprocess import run_ranks
from tiny_corpus import MASK, PAD, UNK, write_tiny_corpus

from trelm_ds.distributed import cpu_group
from trelm_ds.errors import ConfigError
from trelm_ds.knowledge.graph import KnowledgeTables
from trelm_ds.knowledge.importance import score_importance, score_samples, semantic_importance
from trelm_ds.model import MaskedLanguageModel, build_backbone


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


def score(rank, world_size, folder, vocab_size):
    model = _model(vocab_size)
    return score_importance(model, folder, rank=rank, world_size=world_size, group=cpu_group())


def test_two_ranks_write_what_one_writes(tmp_path):
    corpus = write_tiny_corpus(tmp_path, train=9, heldout=2)
    tables, vocab_size = tmp_path / "tables", len(corpus.words)
    alone = score_importance(_model(vocab_size), tmp_path)
    scores = np.load(tables / "importance.npy")
    (tables / "importance.npy").unlink()
    main, other = run_ranks(score, 2, tmp_path, vocab_size)
    assert other is None and main == alone | {"mean": main["mean"]}
    np.testing.assert_allclose(np.load(tables / "importance.npy"), scores, rtol=1e-5)
    assert not list(tables.glob(".tmp*"))


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
