"""Injection embeddings: both directions, the scale they start at, frozen tables."""

import numpy as np
import torch
from model.model_batches import make_batch, make_config, make_model, make_tables

from trelm_ds.backbone import build_backbone
from trelm_ds.knowledge.injection import KnowledgeInjection, TransETables


def test_tables_are_frozen_and_offset_by_the_pad_row():
    tables = make_tables()
    module = TransETables(tables.entity_embeddings, tables.relation_embeddings)
    entity, relation = module(torch.tensor([0, 6]), torch.tensor([2, 0]))
    np.testing.assert_array_equal(entity, tables.entity_embeddings[[1, 7]])
    np.testing.assert_array_equal(relation, tables.relation_embeddings[[3, 1]])
    assert not list(module.parameters()) and not module.state_dict()
    module.entity.zero_()  # a copy, not the memory map
    assert tables.entity_embeddings.any()


def test_head_subtracts_and_tail_adds_the_relation():
    torch.manual_seed(0)
    injection = KnowledgeInjection(4, 6, output_rms=0.5).double()
    torch.nn.init.normal_(injection.projection.bias)
    torch.nn.init.normal_(injection.norm.bias)
    other, relation = torch.randn(2, 2, 4, dtype=torch.float64)
    actual = injection(other, relation, torch.tensor([1, 2]))
    weight, bias = injection.projection.weight, injection.projection.bias
    for i, combined in enumerate((other[0] - relation[0], other[1] + relation[1])):
        x = torch.stack([sum(w * c for w, c in zip(row, combined, strict=True)) for row in weight])
        x = x + bias
        variance = ((x - x.mean()) ** 2).mean()
        normal = (x - x.mean()) / (variance + injection.norm.eps).sqrt()
        expected = injection.norm.weight * normal + injection.norm.bias
        torch.testing.assert_close(actual[i], expected, rtol=1e-6, atol=1e-6)


def test_injected_vectors_start_at_the_scale_of_word_embeddings():
    model = make_model(model__initializer_range=0.02)
    other, relation = model.tables(torch.arange(7), torch.arange(7) % 3)
    injected = model.injection(other, relation, torch.ones(7, dtype=torch.int64))
    # make_model perturbs the embeddings after injection is built; compare with a fresh one.
    gain = model.injection.norm.weight[0].item()
    assert 0.015 < gain < 0.025  # BERT's initial embeddings: N(0, .02)
    torch.testing.assert_close(
        injected.pow(2).mean(1).sqrt(), torch.full((7,), gain), rtol=1e-3, atol=0
    )


def test_a_gain_of_one_would_drown_the_position():
    """The measured reason for ``output_rms``: what is left of the position after the LayerNorm."""
    torch.manual_seed(0)
    config = make_config(
        model__hidden_size=192, model__max_position_embeddings=64, model__initializer_range=0.02
    )
    embeddings = build_backbone(config, 1000, 1).bert.embeddings.eval()
    word = embeddings.word_embeddings.weight[10:42]
    normal = torch.nn.functional.layer_norm(word, word.shape[-1:])

    def share_of_position(vectors):
        here, there = (
            embeddings(inputs_embeds=vectors[None], position_ids=torch.arange(i, i + 32)[None])
            for i in (0, 32)
        )
        return ((here - there).norm() / here.norm()).item()

    assert share_of_position(word) > 0.7
    assert share_of_position(normal * word.pow(2).mean().sqrt()) > 0.7
    assert share_of_position(normal) < 0.05


def test_only_the_word_embeddings_of_injected_mentions_change():
    model = make_model().eval()
    batch = make_batch()
    plain = model.word_embeddings(batch.input_ids)
    embedded = model._embed(batch, None, 0.0)
    changed = (embedded != plain).any(-1)
    expected = torch.zeros_like(changed)
    expected[0, 2:5] = expected[0, 7:8] = True  # not the word (role 0), not the uninjected one
    torch.testing.assert_close(changed, expected)
    injected = model.injection(
        *model.tables(batch.injection_other, batch.injection_relation), batch.injection_role
    )
    for column in (2, 3, 4):  # every token of the span gets the same vector
        torch.testing.assert_close(embedded[0, column], injected[0], rtol=0, atol=0)
    torch.testing.assert_close(embedded[0, 7], injected[1], rtol=0, atol=0)
