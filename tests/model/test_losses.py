"""Eqs. 2 and 3 against loops written from the paper."""

import math

import pytest
import torch

from trelm_ds.losses import (
    TokenPrior,
    entity_scores,
    gold_log_probability,
    mention_probability,
    mlm_losses,
    mlm_split_sums,
    split_weights,
    total_loss,
)


def test_mlm_loss_is_the_sum_over_masked_positions():
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64)
    labels = torch.tensor([3, 0, 10, 3, 7])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected -= math.log(math.exp(row[label]) / sum(math.exp(x) for x in row))
    assert mlm_losses(logits, labels).sum().item() == pytest.approx(expected, rel=1e-6)


def test_the_probability_of_a_mention_is_the_mean_over_its_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 11, requires_grad=True), torch.tensor([3, 0, 10, 3, 7, 1, 1])
    group = torch.tensor([-1, 0, 0, 1, -1, 2, 2])
    losses = mlm_losses(logits, labels)
    found = mention_probability(losses, group, 3)
    p = logits.detach().softmax(1)
    expected = [(p[1, 0] + p[2, 10]) / 2, p[3, 3], (p[5, 1] + p[6, 1]) / 2]
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.dtype == torch.float32 and not found.requires_grad
    order = torch.tensor([6, 1, 3, 0, 2, 5, 4])
    again = mention_probability(losses[order], group[order], 3)
    assert torch.equal(again, found)
    assert mention_probability(losses[:1], group[:1], 0).shape == (0,)
    assert mention_probability(losses[:0], group[:0], 0).shape == (0,)


def test_mlm_loss_is_float32_for_bf16_logits():
    torch.manual_seed(0)
    logits = torch.randn(7, 1000).bfloat16()
    labels = torch.arange(7)
    loss = mlm_losses(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mlm_losses(logits.float(), labels), rtol=0, atol=0)


def test_mlm_loss_without_targets_is_zero_and_connected():
    logits = torch.zeros(0, 11, requires_grad=True)
    loss = mlm_losses(logits, torch.zeros(0, dtype=torch.int64)).sum()
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None


@pytest.mark.parametrize("objects", [[1, 3], [], [0, 1, 2, 3, 4]])
def test_the_split_of_text_and_objects_against_a_loop(objects):
    torch.manual_seed(0)
    logits = torch.randn(5, 11, requires_grad=True)
    labels = torch.tensor([3, 0, 10, 3, 7])
    is_object = torch.tensor([i in objects for i in range(5)])
    sums = mlm_split_sums(mlm_losses(logits, labels), is_object)
    each = [-logits[i].log_softmax(0)[labels[i]].item() for i in range(5)]
    text = [x for i, x in enumerate(each) if i not in objects]
    of_objects = [x for i, x in enumerate(each) if i in objects]
    assert sums.tolist() == pytest.approx([sum(text), sum(of_objects)])
    weights = split_weights(0.3, len(text), len(of_objects))
    loss = weights[0] * sums[0] + weights[1] * sums[1]
    if text and of_objects:
        expected = 0.7 * sum(text) / len(text) + 0.3 * sum(of_objects) / len(of_objects)
    else:  # one side is empty: the other has all the weight
        expected = sum(each) / 5
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.any()


def test_the_split_of_no_targets_is_zero_and_connected():
    logits = torch.zeros(0, 11, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    weights = split_weights(0.3, 0.0, 0.0)
    loss = (mlm_split_sums(mlm_losses(logits, none), none > 0) * torch.tensor(weights)).sum()
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None


def _loop(states, gold, embedding, negatives, log_q):
    """Eq. 2 for one decoded token, without accidental hits."""

    def score(token):
        return sum(
            h * e for h, e in zip(states.tolist(), embedding[token].tolist(), strict=True)
        ) - float(log_q[token])

    others = [score(n) for n in negatives if n != gold]
    top = math.exp(score(gold))
    return math.log(top / (top + sum(math.exp(s) for s in others)))


def test_sampled_softmax_is_eq_2():
    torch.manual_seed(1)
    embedding = torch.randn(30, 6, dtype=torch.float64)
    log_q = torch.randn(30).log_softmax(0)
    states = torch.randn(2, 3, 6, dtype=torch.float64)
    gold = torch.tensor([[4, 5, 6], [7, 7, 29]])
    negatives = torch.tensor([1, 2, 5, 5, 29, 8])  # 5 and 29 are gold tokens of some rows
    actual = gold_log_probability(
        states, gold, embedding[gold], negatives, embedding[negatives], TokenPrior(log_q)
    )
    expected = torch.tensor(
        [
            [
                _loop(states[i, j], int(gold[i, j]), embedding, negatives.tolist(), log_q)
                for j in range(3)
            ]
            for i in range(2)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_accidental_hits_get_no_gradient_and_only_hits_give_certainty():
    prior = TokenPrior(torch.zeros(10))
    states = torch.ones(1, 4)
    negatives = torch.tensor([3, 3])
    embeddings = torch.ones(2, 4, requires_grad=True)
    gold = torch.tensor([3])
    log_p = gold_log_probability(states, gold, torch.ones(1, 4), negatives, embeddings, prior)
    assert log_p.item() == 0.0
    log_p.sum().backward()
    assert not embeddings.grad.any() and torch.isfinite(embeddings.grad).all()


def test_scores_are_computed_in_float32_for_bf16_states():
    torch.manual_seed(2)
    table = torch.randn(50, 32).bfloat16()
    states = torch.randn(4, 32).bfloat16()
    gold, negatives = torch.arange(4), torch.arange(10, 30)
    prior = TokenPrior(torch.randn(50))
    arguments = (gold, table[gold], negatives, table[negatives], prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gold_log_probability(states, *arguments)
    arguments = (gold, table[gold].double(), negatives, table[negatives].double(), prior)
    expected = gold_log_probability(states.double(), *arguments)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_prior_keeps_float32_when_the_model_is_cast():
    log_q = torch.randn(20) * 9
    prior = TokenPrior(log_q).bfloat16()
    assert prior.log_q.dtype == torch.float32
    torch.testing.assert_close(prior.log_q, log_q, rtol=0, atol=0)


def test_prior_gives_tokens_outside_its_support_the_smallest_probability():
    prior = TokenPrior(torch.tensor([-1.0, float("-inf"), -7.0]))
    assert prior(torch.tensor([1])).item() == -7.0


def test_entity_softmax_against_a_loop():
    torch.manual_seed(3)
    states = torch.randn(4, 6, dtype=torch.float64)
    vectors = torch.randn(5, 6, dtype=torch.float64)
    log_q = torch.rand(5).log()
    gold = torch.tensor([2, 0, 4, 1])
    answers = {0: {1, 4}, 3: {0, 2, 3, 4}}  # other right answers; row 3 has nothing else
    hits = torch.tensor([row * 5 + c for row, others in answers.items() for c in others])
    log_p, first = entity_scores(states, vectors, log_q, gold, hits)
    for row in range(4):
        score = (vectors @ states[row]).tolist()
        kept = [c for c in range(5) if c not in answers.get(row, ())]
        weight = {c: math.exp(score[c] - float(log_q[c])) for c in kept}
        own = int(gold[row])
        assert log_p[row].item() == pytest.approx(math.log(weight[own] / sum(weight.values())))
        assert bool(first[row]) == (own == max(kept, key=lambda c: score[c]))
    assert log_p[3].item() == 0 and first[3] and not first.all()


def test_entity_softmax_of_no_triples_and_of_bf16_states():
    vectors = torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    log_p, first = entity_scores(torch.zeros(0, 6), vectors, torch.zeros(5), none, none)
    assert log_p.shape == first.shape == (0,)
    log_p.sum().backward()
    assert not vectors.grad.any()  # connected: under ZeRO every rank has a gradient
    states = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    gold, hits = torch.tensor([0, 1, 1]), torch.tensor([1, 6 + 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p, _ = entity_scores(states, vectors, torch.zeros(5), gold, hits)
    expected, _ = entity_scores(states.double(), vectors.double(), torch.zeros(5), gold, hits)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-5)
    log_p.sum().backward()
    assert torch.isfinite(states.grad).all() and torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
def test_total_loss_is_eq_3(theta):
    mlm, cka = torch.tensor(2.5), torch.tensor(4.0)
    assert total_loss(mlm, cka, theta).item() == pytest.approx(theta * 2.5 + (1 - theta) * 4.0)
