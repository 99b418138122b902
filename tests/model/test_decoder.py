"""The relational decoder's recurrence against a loop."""

import math

import torch

from trelm_ds.knowledge.decoder import RelationalDecoder


def test_recurrence_is_the_papers():
    torch.manual_seed(0)
    decoder = RelationalDecoder(6, num_relations=3, scale=0.7).double()
    pooled = torch.randn(2, 6, dtype=torch.float64)
    relation = torch.tensor([1, 3 + 2])
    actual = decoder(pooled, relation, steps=4)
    weight, table = decoder.transition.tolist(), decoder.relation.weight.tolist()
    for row in range(2):
        h, r = pooled[row].tolist(), table[int(relation[row])]
        for step in range(4):
            h = [
                math.tanh(0.7 * r[j] * sum(w * x for w, x in zip(weight[j], h, strict=True)))
                for j in range(6)
            ]
            expected = torch.tensor(h, dtype=torch.float64)
            torch.testing.assert_close(actual[row, step], expected, rtol=1e-12, atol=1e-12)


def test_each_relation_has_its_own_inverse():
    decoder = RelationalDecoder(8, num_relations=3)
    assert decoder.relation.weight.shape == (6, 8)
    pooled = torch.randn(1, 8)
    forward, inverse = (decoder(pooled, torch.tensor([r]), 1) for r in (1, 3 + 1))
    assert not torch.allclose(forward, inverse)


def test_state_does_not_vanish_over_eight_steps():
    torch.manual_seed(0)
    decoder = RelationalDecoder(192, num_relations=2)
    states = decoder(torch.randn(64, 192), torch.zeros(64, dtype=torch.int64), 8)
    size = states.pow(2).mean((0, 2)).sqrt()
    assert size[-1] > 0.25 and (size[1:] < size[:-1]).all()  # tanh contracts, slowly
    grad = torch.autograd.grad(states[:, -1].sum(), decoder.transition)[0]
    assert grad.abs().mean() > 1e-3


def test_no_rows():
    decoder = RelationalDecoder(8, num_relations=2)
    states = decoder(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 3)
    assert states.shape == (0, 3, 8)
    states.sum().backward()
    assert not decoder.transition.grad.any() and not decoder.relation.weight.grad.any()
