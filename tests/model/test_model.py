"""The composed model: input mixing, losses, gradients, both architectures, empty batches."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from entity_names import entity_tokens
from model.model_batches import (
    CLS,
    MASK,
    MENTIONS,
    ONES,
    PAD,
    RELATIONS,
    SEP,
    VOCAB,
    make_batch,
    make_config,
    make_log_q,
    make_memory,
    make_model,
    make_tables,
    sample_batch_without,
)
from tiny_corpus import byte_level_tokenizer

from trelm_ds.backbone import build_backbone, encode, load_backbone
from trelm_ds.config import FROM_SCRATCH, ModelConfig, build_config
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.model import Normalizers, TrelmModel, parameter_groups, span_mean
from trelm_ds.output_layer import mlm_head

WORDS = {f"w{i}": i for i in range(VOCAB)}
BOTH = pytest.mark.parametrize("model_type", ["bert", "roberta"])


# -- spans --------------------------------------------------------------------------------------


def test_span_means_against_a_loop():
    spans = torch.tensor([[0, 1, 4], [2, 0, 1], [1, 5, 7]])
    states = torch.randn(3, 8, 5, dtype=torch.float64)
    for i, (row, left, right) in enumerate(spans.tolist()):
        torch.testing.assert_close(span_mean(states, spans)[i], states[row, left:right].mean(0))
    assert torch.equal(span_mean(states, spans, 3), span_mean(states, spans))
    assert span_mean(states, spans[:0]).shape == (0, 5)


# -- backbone and head --------------------------------------------------------------------------


@BOTH
def test_encoding_embeddings_equals_hugging_face_on_ids(model_type):
    model = make_model(model__model_type=model_type).eval()
    batch = make_batch()
    ours = encode(model.backbone, model.word_embeddings(batch.input_ids), batch.attention_mask)
    theirs = model.backbone.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    )[0]
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-6, atol=1e-6)


@BOTH
def test_masked_only_head_equals_full_head(model_type):
    model = make_model(model__model_type=model_type).eval()
    batch = make_batch()
    full = model.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ours = model.mlm_logits(batch.input_ids, batch.attention_mask, batch.mlm_positions)
    assert len(ours) > 5
    torch.testing.assert_close(ours, full.flatten(0, 1)[batch.mlm_positions], rtol=1e-5, atol=1e-5)


def test_roberta_positions_are_not_part_of_max_seq_length():
    config = make_config(model__model_type="roberta", model__max_position_embeddings=32)
    backbone = load_backbone(config, WORDS, PAD)
    assert backbone.config.max_position_embeddings == 32 + PAD + 1
    ids = torch.full((1, 32), 9)
    encode(backbone, backbone.get_input_embeddings()(ids), torch.ones_like(ids))


def test_sequences_longer_than_the_position_table_are_refused():
    config = make_config(model__max_position_embeddings=31)
    with pytest.raises(ConfigError, match="32 is above the model's 31 positions"):
        load_backbone(config, WORDS, PAD)


@BOTH
def test_backbone_from_a_local_folder(model_type, tmp_path):
    torch.manual_seed(0)
    saved = build_backbone(make_config(model__model_type=model_type), VOCAB, PAD)
    saved.save_pretrained(tmp_path / "model")
    config = make_config(model__model_name_or_path=str(tmp_path / "model"))
    loaded = load_backbone(config, WORDS, PAD)
    assert loaded.config._attn_implementation == "sdpa"
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(DataError, match="vocabulary of 60 but .* one of 61"):
        load_backbone(config, WORDS | {"one more": VOCAB}, PAD)
    unasked = {f"model.{name}": getattr(ModelConfig, name) for name in FROM_SCRATCH}
    folder = {"model.model_name_or_path": str(tmp_path / "model"), "data.max_seq_length": 32}
    load_backbone(build_config(unasked, folder), WORDS, PAD)
    for name, asked in (("hidden_size", 32), ("hidden_dropout_prob", 0.1)):
        with pytest.raises(ConfigError, match=f"model.{name} {asked} is for a model from scratch"):
            load_backbone(build_config(folder, {f"model.{name}": asked}), WORDS, PAD)


def test_a_model_of_another_vocabulary_of_equal_size_is_refused(tmp_path, caplog):
    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    words, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    config = make_config(model__model_type="roberta")
    build_backbone(config, len(words), pad).save_pretrained(folder)
    config = make_config(model__model_name_or_path=str(folder))
    load_backbone(config, words, pad)
    assert not caplog.records
    last, before = sorted(words, key=words.get)[:-3:-1]
    swapped = words | {last: words[before], before: words[last]}
    named = rf"{words[before]} is '{re.escape(before)}'; 2 differ"
    with pytest.raises(DataError, match=named):
        load_backbone(config, swapped, pad)
    (folder / "tokenizer.json").unlink()
    load_backbone(config, swapped, pad)
    assert "no tokenizer in its folder" in caplog.text


def test_unusable_model_folders_are_one_line_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such folder") as missing:
        load_backbone(make_config(model__model_name_or_path=str(tmp_path / "none")), WORDS, PAD)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2' is not one of bert, roberta") as other:
        load_backbone(make_config(model__model_name_or_path=str(tmp_path / "gpt2")), WORDS, PAD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as empty:
        load_backbone(make_config(model__model_name_or_path=str(tmp_path / "empty")), WORDS, PAD)
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text('{"model_type": "bert"}')
    path = str(tmp_path / "no_weights")
    with pytest.raises(ConfigError) as no_weights:
        load_backbone(make_config(model__model_name_or_path=path), WORDS, PAD)
    for error in (missing, other, empty, no_weights):
        assert "\n" not in str(error.value)


# -- input: Eq. 7 and Eq. 8's use ---------------------------------------------------------------


@pytest.mark.parametrize("rescale", ["rms", "literal"])
@pytest.mark.parametrize("weight", [0.5, 0.125])
def test_memory_mixing_is_eq_7(rescale, weight):
    model = make_model(memory__rescale=rescale).double().eval()
    # Of those before it not all are injected: a row of the memory is not a row of the mentions.
    mentions = [MENTIONS[0][:4] + (0, *MENTIONS[0][5:]), *MENTIONS[1:]]
    batch = make_batch(mentions=mentions)
    memory = make_memory(batch)
    rows = zip(memory.local.double(), memory.global_.double(), strict=True)
    model.refresh_embedding_rms()  # the trainer does, once a step
    actual = model._embed(batch, memory, weight)
    plain = model.word_embeddings(batch.input_ids)
    injected = model.injection(
        *model.tables(batch.injection_other, batch.injection_relation), batch.injection_role
    )
    table = model.word_embeddings.weight.flatten().tolist()
    table_rms = math.sqrt(sum(x * x for x in table) / len(table))
    expected = plain.clone()
    for i, (row, left, right) in enumerate(batch.mention_spans.tolist()):
        if not batch.mention_injected[i]:
            continue
        local, global_ = next(rows)
        if rescale == "rms":
            local = local * table_rms / local.pow(2).mean().sqrt()
            global_ = global_ * table_rms / global_.pow(2).mean().sqrt()
        for column in range(left, right):
            # role 0, a long-tail word: its own embedding in place of h_e
            h_e = injected[i] if batch.injection_role[i] else plain[row, column]
            expected[row, column] = (1 - weight) * h_e + weight / 2 * (local + global_)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_weight_zero_leaves_memory_out():
    model = make_model().eval()
    batch = make_batch()
    memory = make_memory(batch)
    memory.local[0] = math.nan  # evaluation and the end of a run: nothing of the bank gets in
    without = model._embed(batch, None, 0.0)
    torch.testing.assert_close(model._embed(batch, memory, 0.0), without, rtol=0, atol=0)


def test_memory_scales_the_gradient_of_the_injection_and_keeps_its_dtype():
    """Of Eq. 7 only (1 - lambda) h_e has a gradient: the rows are constants."""
    model = make_model().eval()
    batch = make_batch()
    trained = list(model.injection.parameters())
    weight, memory = 0.25, make_memory(batch)
    mixed = torch.autograd.grad(model._embed(batch, memory, weight).sum(), trained)
    alone = torch.autograd.grad(model._embed(batch, None, 0.0).sum(), trained)
    for with_memory, without in zip(mixed, alone, strict=True):
        torch.testing.assert_close(with_memory, (1 - weight) * without)
        assert without.any()
    assert model.bfloat16()._embed(batch, memory, weight).dtype == torch.bfloat16


def test_memory_mixes_in_without_injection_too():
    model = make_model(injection__form="none").eval()
    assert model.injection is None
    batch = make_batch()
    batch.injection_role.zero_()  # what the collator gives in this form
    plain = model.word_embeddings(batch.input_ids)
    torch.testing.assert_close(model._embed(batch, None, 0.0), plain, rtol=0, atol=0)
    changed = (model._embed(batch, make_memory(batch), 0.5) != plain).any(-1)
    assert changed.sum() == 3 + 1 + 3


# -- losses -------------------------------------------------------------------------------------


@BOTH
def test_step_output_against_loops(model_type):
    model = make_model(model__model_type=model_type).double().eval()
    batch = make_batch()
    memory = make_memory(batch)
    output = model(batch, memory, 0.25, Normalizers(mlm=3.0, cka=5.0))

    states = encode(model.backbone, model._embed(batch, memory, 0.25), batch.attention_mask)
    logits = mlm_head(model.backbone)(states).flatten(0, 1)
    mlm = 0.0
    for position, label in zip(batch.mlm_positions, batch.mlm_labels, strict=True):
        mlm -= logits[position].log_softmax(0)[label].item()
    assert output.mlm_loss.item() == pytest.approx(mlm / 3, rel=1e-5)

    table = model.word_embeddings.weight
    log_q = make_log_q()
    cka, probabilities = 0.0, []
    for mention, relation, tokens in zip(
        batch.decode_mention.tolist(),
        batch.decode_relation.tolist(),
        batch.decode_tokens.tolist(),
        strict=True,
    ):
        row, left, right = batch.mention_spans[mention].tolist()
        h = sum(states[row, c] for c in range(left, right)) / (right - left)
        found = []
        for token in tokens:
            r, w = model.decoder.relation.weight[relation], model.decoder.transition
            h = torch.tanh(1.0 * r * (w @ h))
            if token < 0:
                continue
            candidates = [token] + [n for n in batch.negatives.tolist() if n != token]
            scores = torch.stack([h @ table[y] - log_q[y] for y in candidates])
            found.append(scores.softmax(0)[0].item())
        cka -= sum(math.log(p) for p in found)
        probabilities.append(sum(found) / len(found))
    assert output.cka_loss.item() == pytest.approx(cka / 5, rel=1e-6)
    torch.testing.assert_close(
        output.gold_probability, torch.tensor(probabilities), rtol=1e-6, atol=1e-7
    )
    assert output.loss.item() == pytest.approx(0.5 * mlm / 3 + 0.5 * cka / 5, rel=1e-5)

    for i, (row, left, right) in enumerate(batch.mention_spans.tolist()):
        low, high = max(0, left - 3), min(int(batch.attention_mask[row].sum()), right + 3)
        torch.testing.assert_close(
            output.local_memory[i], states[row, low:high].mean(0).float(), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(output.cls, states[:, 0].float())
    for name in ("local_memory", "cls", "gold_probability", "mlm_loss", "cka_loss"):
        assert not getattr(output, name).requires_grad
    assert output.local_memory.dtype == output.cls.dtype == torch.float32


def test_object_loss_share_splits_the_mlm_loss():
    batch = make_batch()
    batch.mlm_mention = torch.where(torch.arange(len(batch.mlm_labels)) % 3 == 0, 5, -1)
    is_object = batch.mlm_mention >= 0
    model = make_model(train__object_loss_share=0.2).double().eval()
    normalizers = Normalizers(mlm=5.5, cka=1.0, text=4.0, objects=1.5)
    output = model(batch, None, 0.0, normalizers)
    states = encode(model.backbone, model._embed(batch, None, 0.0), batch.attention_mask)
    logits = mlm_head(model.backbone)(states.flatten(0, 1)[batch.mlm_positions])
    each = -logits.log_softmax(-1).gather(1, batch.mlm_labels[:, None])[:, 0]
    text, objects = each[~is_object].sum().item(), each[is_object].sum().item()
    assert output.mlm_sums.tolist() == pytest.approx([text, objects], rel=1e-5)
    assert output.mlm_loss.item() == pytest.approx(0.8 * text / 4 + 0.2 * objects / 1.5, rel=1e-5)
    plain = make_model().double().eval()(batch, None, 0.0, normalizers)
    assert plain.mlm_loss.item() == pytest.approx((text + objects) / 5.5, rel=1e-5)
    assert not plain.mlm_sums.any()


def test_entity_loss_against_a_loop():
    model = make_model(decoding__entity_weight=0.3).double().eval()
    batch = make_batch()
    output = model(batch, None, 0.0, Normalizers(mlm=3.0, cka=5.0, entity=7.0))
    states = encode(model.backbone, model._embed(batch, None, 0.0), batch.attention_mask)
    table, loss, first = model.word_embeddings.weight, 0.0, 0
    names = entity_tokens(batch.entity_words, batch.entity_names).tolist()
    vectors = [table[[t for t in name if t >= 0]].mean(0) for name in names]
    for i, (mention, relation) in enumerate(
        zip(batch.decode_mention.tolist(), batch.decode_relation.tolist(), strict=True)
    ):
        row, left, right = batch.mention_spans[mention].tolist()
        h = model.decoder.transition @ states[row, left:right].mean(0)
        h = torch.tanh(model.decoder.relation.weight[relation] * h)
        hits = {h - 12 * i for h in batch.entity_hits.tolist()}
        kept = [c for c in range(12) if c not in hits]
        score = {c: (h @ vectors[c]).item() for c in kept}
        weight = {c: math.exp(score[c] - batch.entity_log_q[c].item()) for c in kept}
        own = batch.entity_gold[i].item()
        loss -= math.log(weight[own] / sum(weight.values()))
        first += own == max(kept, key=score.get)
    assert output.entity_sums.tolist() == pytest.approx([loss, first], rel=1e-6)
    plain = make_model().double().eval()(batch, None, 0.0, Normalizers(mlm=3.0, cka=5.0))
    assert output.cka_loss == plain.cka_loss and output.mlm_loss == plain.mlm_loss
    torch.testing.assert_close(output.gold_probability, plain.gold_probability, rtol=0, atol=0)
    expected = 0.5 * plain.mlm_loss + 0.5 * (0.7 * plain.cka_loss + 0.3 * loss / 7)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_a_weight_entities_are_not_looked_at():
    batch = make_batch()
    batch.entity_words = batch.entity_names = batch.entity_log_q = batch.entity_gold = (
        batch.entity_hits
    ) = None
    assert not make_model().eval()(batch, None, 0.0, ONES).entity_sums.any()


def test_theta_weighs_the_losses():
    batch = make_batch()
    model = make_model(decoding__loss_weight=0.8).eval()
    output = model(batch, None, 0.0, ONES)
    expected = 0.8 * output.mlm_loss + 0.2 * output.cka_loss
    torch.testing.assert_close(output.loss.detach(), expected)


def test_without_decoding_the_loss_is_mlm():
    model = make_model(decoding__enabled=False).eval()
    assert model.decoder is None
    output = model(make_batch(decode=[]), None, 0.0, ONES)
    torch.testing.assert_close(output.loss.detach(), output.mlm_loss, rtol=0, atol=0)
    assert output.cka_loss.item() == 0


def test_bf16_weights_give_float32_outputs_close_to_float32s():
    batch = make_batch()
    memory = make_memory(batch)
    exact = make_model().eval()(batch, memory, 0.5, ONES)
    rounded = make_model().eval().bfloat16()(batch, memory, 0.5, ONES)
    assert rounded.loss.dtype == rounded.local_memory.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)


# -- gradients ----------------------------------------------------------------------------------

FORMS = {
    "kge": {},
    "encoder": {"injection__form": "encoder"},
    "no-injection": {"injection__form": "none"},
    "no-decoding": {"decoding__enabled": False},
    "checkpointed": {"model__gradient_checkpointing": True},
    "roberta": {"model__model_type": "roberta"},
    "strict": {"routing__scope": "strict", "routing__form": "block"},
    "entities": {"decoding__entity_weight": 0.5, "train__object_loss_share": 0.4},
}


def _batch_for(form, **without):
    batch = make_batch(text_length=8 if form == "encoder" else 0)
    if form == "no-injection":
        batch.injection_role.zero_()
    return sample_batch_without(batch, **without) if without else batch


@pytest.mark.parametrize("form", FORMS)
def test_every_trained_parameter_gets_a_gradient(form):
    model = make_model(**FORMS[form]).train()
    batch = _batch_for(form)
    model(batch, make_memory(batch), 0.5, ONES).loss.backward()
    still = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert still == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", ["mentions", "targets", "both"])
def test_every_trained_parameter_has_a_gradient_in_an_empty_batch(form, missing):
    """ZeRO reduces whatever has a gradient: all ranks must agree, whatever is in their batch."""
    model = make_model(**FORMS[form]).train()
    batch = _batch_for(form, mentions=missing != "targets", targets=missing != "mentions")
    output = model(batch, make_memory(batch), 0.5, ONES)
    output.loss.backward()
    absent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert absent == []
    assert torch.isfinite(output.loss)
    if missing == "both":
        assert output.loss.item() == 0
        assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_zero_normalizers_do_not_make_nan():
    model = make_model()
    batch = sample_batch_without(make_batch(), mentions=True, targets=True)
    assert model(batch, None, 0.0, Normalizers(0.0, 0.0)).loss.item() == 0


def test_gradient_checkpointing_changes_nothing():
    batch = make_batch()
    plain, saving = (
        make_model(model__gradient_checkpointing=flag, model__hidden_dropout_prob=0.1).train()
        for flag in (False, True)
    )
    layers = saving.backbone.base_model.encoder.layer
    assert all(layer.gradient_checkpointing for layer in layers)
    losses = []
    for model in (plain, saving):
        torch.manual_seed(5)
        output = model(batch, make_memory(batch), 0.5, ONES)
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == losses[1]
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=name)


# -- encoder form -------------------------------------------------------------------------------


def test_encoder_form_pools_the_texts_of_the_triple():
    model = make_model(injection__form="encoder").double().eval()
    batch = make_batch(text_length=8)
    other, relation = model._knowledge(batch)
    for texts, vectors in zip(batch.text_ids[batch.text_index], (other, relation), strict=True):
        for i, text in enumerate(texts.tolist()):
            if not batch.injection_role[i]:
                continue
            real = [token for token in text if token != PAD]
            assert real[0] == CLS and real[-1] == SEP
            ids = torch.tensor([real])
            states = model.last_hidden_states(ids, torch.ones_like(ids))
            torch.testing.assert_close(vectors[i], states[0].mean(0), rtol=1e-9, atol=1e-9)
    embedded = model._embed(batch, None, 0.0)
    expected = model.injection(other, relation, batch.injection_role)
    torch.testing.assert_close(embedded[0, 3], expected[0])
    torch.testing.assert_close(embedded[0, 7], expected[1])
    plain = model.word_embeddings(batch.input_ids)
    torch.testing.assert_close(embedded[1], plain[1], rtol=0, atol=0)  # role 0


def test_encoder_form_sends_gradients_through_the_texts():
    model = make_model(injection__form="encoder").eval()
    batch = make_batch(text_length=8)
    elsewhere = torch.cat([batch.input_ids.flatten(), batch.decode_tokens.flatten()])
    elsewhere = set(elsewhere.tolist()) | set(batch.negatives.tolist())
    token = min(set(batch.text_ids[batch.text_index[0, :2]].flatten().tolist()) - elsewhere)
    batch.mlm_positions, batch.mlm_labels = batch.mlm_positions[:0], batch.mlm_labels[:0]
    model(batch, None, 0.0, ONES).loss.backward()
    assert model.word_embeddings.weight.grad[token].abs().max() > 1e-6


# -- routing and attribution --------------------------------------------------------------------


@pytest.mark.parametrize("unpad", [True, False])
def test_routing_targets_are_the_tokens_of_decoded_mentions(unpad):
    model = make_model(model__unpad=unpad).eval()
    batch = make_batch()
    output = model(batch, None, 0.0, ONES)
    positions, weights = model.routing_context._positions, model.routing_context._weights
    # Rows of the third sequence begin after two sequences, pads and all or not.
    third = 14 + 9 if unpad else 2 * batch.input_ids.shape[1]
    # Mention 0 is decoded twice (rows 0 and 3), mention 2 not at all.
    p = output.gold_probability
    expected = [(c, (p[0] + p[3]) / 2) for c in (2, 3, 4)] + [(7, p[1])]
    expected += [(third + c, p[2]) for c in (10, 11)]
    assert positions.tolist() == [position for position, _ in expected]
    torch.testing.assert_close(weights, torch.stack([weight for _, weight in expected]))
    assert not weights.requires_grad


def test_routing_targets_are_empty_without_decoding():
    model = make_model(decoding__enabled=False).eval()
    model(make_batch(decode=[]), None, 0.0, ONES)
    assert not model.routing_context.has_targets


def test_attribution_problem_gives_the_probability_of_the_gold_tokens():
    model = make_model().double().eval()
    batch = make_batch()
    memory = make_memory(batch)
    problem = model.attribution_problem(batch, memory, 0.5)
    assert problem.mentions.tolist() == [0, 1, 3]
    assert len(problem.layers) == 2
    states = problem.encode()
    output = model(batch, memory, 0.5, ONES)
    mentions = torch.tensor([0, 3, 0, 1])
    rows = batch.mention_spans[mentions, 0]
    hidden = states.detach()[rows].requires_grad_()
    probability = problem.gold_probability(hidden, mentions)
    counts = (batch.decode_tokens >= 0).sum(1)
    per_row = output.gold_probability * counts
    expected = torch.stack(
        [per_row[0] + per_row[3], per_row[2], per_row[0] + per_row[3], per_row[1]]
    )
    torch.testing.assert_close(probability.float(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.autograd.grad(probability[0], hidden)[0]
    assert grad[0, 2:5].any() and not grad[0, 5:].any() and not grad[1:].any()


# -- parameters ---------------------------------------------------------------------------------


def test_parameter_groups_cover_everything_once():
    model = make_model()
    groups = parameter_groups(model, 0.01)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert by_name[name] is parameter
            is_ffn = name.rpartition(".")[2] in ("up_weight", "up_bias", "down_weight", "down_bias")
            assert group["routed"] == is_ffn
            plain = "bias" in name or "LayerNorm" in name or ".norm." in name
            assert group["weight_decay"] == (0.0 if plain else 0.01), name
    assert sum(group["routed"] for group in groups) == 2


def test_parameter_counts():
    model = make_model()
    counts = model.parameter_counts()
    assert counts["total"] == counts["trained"] == sum(p.numel() for p in model.parameters())
    assert counts["routed"] == 2 * (2 * 24 * 16 + 24 + 16)
    strict = make_model(routing__scope="strict", routing__form="block").parameter_counts()
    assert strict["trained"] < strict["total"]
    assert strict["routed"] == 2 * (2 * 24 * 16 + 24)


# -- start-up -----------------------------------------------------------------------------------


def test_build_and_train_one_real_batch(tmp_path):
    from tiny_corpus import write_tiny_corpus

    from trelm_ds.data.graph import KnowledgeGraph
    from trelm_ds.data.loader import StepLoader
    from trelm_ds.data.tables import KnowledgeTables

    corpus = write_tiny_corpus(tmp_path)
    graph, tables = KnowledgeGraph.load(tmp_path), KnowledgeTables.load(tmp_path)
    config = make_config(
        data__data_dir=str(tmp_path), data__num_workers=0, train__per_device_train_batch_size=4
    )
    torch.manual_seed(0)
    model = TrelmModel.build(config, tmp_path, graph, tables)
    assert model.backbone.config.vocab_size == len(corpus.words)
    loader = StepLoader(config, tmp_path, rank=0, world_size=1, graph=graph, tables=tables)
    (batch,) = next(loader.iterate(0))
    counts = batch.counts()
    output = model(batch, None, 0.0, Normalizers(counts["mlm"], max(1, counts["cka"])))
    # A random model: near the uniform distribution over the vocabulary.
    assert output.mlm_loss.item() == pytest.approx(math.log(len(corpus.words)), rel=0.1)
    output.loss.backward()

    names = model.name_embeddings(tables)
    words = {word: i for i, word in enumerate(corpus.words)}
    table = model.word_embeddings.weight
    rows = names(torch.tensor([3, 24]))  # entity 3 has a name of two words; 24 is the first word
    expected = torch.stack([table[words[w]] for w in corpus.entity_names[3].split()]).mean(0)
    torch.testing.assert_close(rows[0], expected.detach())
    torch.testing.assert_close(rows[1], table[words["rareword0"]].detach())


def test_a_long_tail_word_starts_at_its_own_token_also_in_a_byte_level_vocabulary(tmp_path):
    vocabulary = byte_level_tokenizer(tmp_path / "tokenizer").get_vocab()
    backbone = build_backbone(make_config(), VOCAB, PAD)
    model = TrelmModel(backbone, make_config(), make_tables(), RELATIONS, make_log_q())
    tables = SimpleNamespace(
        folder=tmp_path,
        num_entities=1,
        entity_names=np.full((1, 8), -1, np.int32),
        long_tail_words=[("Ġcd", 3), ("cd", 2)],
    )
    rows = model.name_embeddings(tables)(torch.tensor([1, 2]))
    table = model.word_embeddings.weight.detach()
    assert rows.equal(table[[vocabulary["Ġcd"], vocabulary["cd"]]])
    tables.long_tail_words = [("Ġcdab", 3)]
    with pytest.raises(DataError, match="'Ġcdab' is no token"):
        model.name_embeddings(tables)


def test_tables_do_not_reach_the_checkpoint():
    model = TrelmModel(
        build_backbone(make_config(), VOCAB, PAD),
        make_config(),
        make_tables(),
        RELATIONS,
        make_log_q(),
    )
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"backbone", "injection", "decoder"}


def test_batch_helper_masks_no_injected_token():
    batch = make_batch()
    assert MASK in batch.input_ids
    assert len(batch.injected_positions)
    assert not set(batch.injected_positions.tolist()) & set(batch.mlm_positions.tolist())
