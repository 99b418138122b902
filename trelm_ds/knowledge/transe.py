"""TransE (Bordes et al. 2013) on the training triples: the vectors of the injected knowledge.

Triples of facts that a run must not see are kept out by the caller: what is passed here is learned.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import nn

log = logging.getLogger(__name__)

_FILTER_ROUNDS = 4  # a corrupted triple that is still true after so many draws is left as it is
_CHUNK = 1 << 18


class _KnownTriples:
    """Membership of (head, relation, tail) in the training set: sorted codes, 8 bytes a triple."""

    def __init__(self, triples: torch.Tensor, num_entities: int, num_relations: int):
        if num_entities**2 * num_relations >= 2**63:
            raise ValueError("too many entities and relations for 64-bit triple codes")
        self._entities, self._relations = num_entities, num_relations
        self._codes = torch.sort(self._code(triples)).values

    def _code(self, triples: torch.Tensor) -> torch.Tensor:
        head, relation, tail = triples.unbind(1)
        return (head * self._relations + relation) * self._entities + tail

    def contains(self, triples: torch.Tensor) -> torch.Tensor:
        """bool [n] of int64 [n, 3]."""
        codes = self._code(triples)
        place = torch.searchsorted(self._codes, codes).clamp_(max=len(self._codes) - 1)
        return self._codes[place] == codes


def corrupt(
    triples: torch.Tensor, known: _KnownTriples, num_entities: int, generator: torch.Generator
) -> torch.Tensor:
    """One false triple for each true one: head or tail (evenly) replaced by a uniform entity.

    Args:
        triples: int64 [n, 3] rows (head, relation, tail).

    Returns:
        int64 [n, 3], drawn again where the result is a known triple.
    """
    side = torch.randint(0, 2, (len(triples),), generator=generator) * 2
    negatives = triples.clone()
    rows = torch.arange(len(triples))
    for _ in range(_FILTER_ROUNDS):
        drawn = torch.randint(0, num_entities, (len(rows),), generator=generator)
        negatives[rows, side[rows]] = drawn
        rows = rows[known.contains(negatives[rows])]
        if not len(rows):
            break
    return negatives


def train_transe(
    triples: np.ndarray,
    num_entities: int,
    num_relations: int,
    *,
    dim: int = 100,
    epochs: int = 50,
    margin: float = 1.0,
    learning_rate: float = 0.01,
    batch_size: int = 4096,
    seed: int = 42,
) -> tuple[np.ndarray, np.ndarray]:
    """Entity and relation vectors with e_head + r close to e_tail.

    Minimises max(0, margin + d(true) - d(false)) with d the L1 distance, entities on the unit
    sphere, one filtered uniform negative per triple and epoch, and Adam on the rows a batch
    touches. Equal arguments give equal vectors.

    Args:
        triples: int [T, 3] rows (head, relation, tail).
        num_entities: N.
        num_relations: R.
        dim: length of a vector.
        epochs: passes over the triples.
        batch_size: triples of an update; small graphs use smaller ones, at least 16 a pass.

    Returns:
        float32 [N+1, dim] and [R+1, dim]: row 0 is zeros (no entity), entity e is row e+1.
        Entities without a triple keep their random direction.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 6 / dim**0.5

    def table(rows: int) -> nn.Embedding:
        weights = torch.empty(rows, dim).uniform_(-bound, bound, generator=generator)
        normalized = nn.functional.normalize(weights, dim=1)
        return nn.Embedding.from_pretrained(normalized, freeze=False, sparse=True)

    entities, relations = table(num_entities), table(num_relations)
    if len(triples) and num_entities > 1:
        data = torch.from_numpy(np.asarray(triples, np.int64))
        known = _KnownTriples(data, num_entities, num_relations)
        # Sparse: a step costs what its batch touches, not the size of the tables.
        optimizer = torch.optim.SparseAdam(
            [entities.weight, relations.weight], lr=learning_rate, betas=(0.9, 0.99)
        )
        batch_size = max(64, min(batch_size, len(data) // 16))
        started = time.perf_counter()
        for epoch in range(epochs):
            order = torch.randperm(len(data), generator=generator)
            total = torch.zeros(())
            for group in optimizer.param_groups:  # linear decay to a tenth
                group["lr"] = learning_rate * (1 - 0.9 * epoch / max(1, epochs - 1))
            for rows in order.split(batch_size):
                true = data[rows]
                false = corrupt(true, known, num_entities, generator)
                ends = torch.cat([true[:, 0], true[:, 2], false[:, 0], false[:, 2]])
                with torch.no_grad():
                    touched = ends.unique()
                    entities.weight[touched] = nn.functional.normalize(entities.weight[touched])
                head, tail, false_head, false_tail = entities(ends).chunk(4)
                relation = relations(true[:, 1])
                near = (head + relation - tail).abs().sum(1)
                far = (false_head + relation - false_tail).abs().sum(1)
                loss = torch.relu(margin + near - far)
                optimizer.zero_grad(set_to_none=True)
                loss.mean().backward()
                optimizer.step()
                total += loss.detach().sum()
            if epoch in (0, epochs // 2, epochs - 1):
                log.info(
                    "TransE epoch %d/%d | loss %.4f | %.0f s",
                    epoch + 1,
                    epochs,
                    total.item() / len(data),
                    time.perf_counter() - started,
                )
    with torch.no_grad():
        for start in range(0, num_entities, _CHUNK):
            block = entities.weight[start : start + _CHUNK]
            block.copy_(nn.functional.normalize(block, dim=1))
    zero = np.zeros((1, dim), np.float32)
    return tuple(
        np.concatenate([zero, module.weight.detach().numpy()]) for module in (entities, relations)
    )
