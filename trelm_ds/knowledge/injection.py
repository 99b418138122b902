"""Knowledge injection: h_e of Eq. 7, the vector that stands in for a mention's word embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from trelm_ds.data.schema import ROLE_HEAD


class TransETables(nn.Module):
    """Frozen entity and relation vectors of the training triples; row 0 is the zero pad.

    Non-persistent buffers: not trained, so neither the optimizer nor a checkpoint holds a copy
    (3M entities x 100 are 1.2 GB in float32), and gathering on the device needs no host sync.

    Args:
        entity_embeddings: float32 [entities + 1, dim]; entity e is row e + 1.
        relation_embeddings: float32 [relations + 1, dim].
    """

    def __init__(self, entity_embeddings: np.ndarray, relation_embeddings: np.ndarray):
        super().__init__()
        # np.array copies: the tables are memory-mapped and read-only, buffers must not be.
        for name, table in (("entity", entity_embeddings), ("relation", relation_embeddings)):
            self.register_buffer(name, torch.from_numpy(np.array(table)), persistent=False)

    @property
    def dim(self) -> int:
        return self.entity.shape[1]

    def forward(self, entity: torch.Tensor, relation: torch.Tensor):
        """Rows of int64 [M] entities and relations: two tensors [M, dim]."""
        return self.entity[entity + 1], self.relation[relation + 1]


class KnowledgeInjection(nn.Module):
    """h_e = P(other - relation) for a head mention, P(other + relation) for a tail mention.

    TransE says head + relation = tail, so both are estimates of the mention's own entity. P is a
    Linear and a LayerNorm whose gain starts at ``output_rms``, the RMS of the word embeddings. The
    vector takes the place of a word embedding before position and type embeddings are added and
    normalised. At the usual gain of 1, 50 times BERT's initial embeddings, an injected token
    loses its position: moving it changes its normalised embedding by 3%, against 83% for a word
    or an injected vector at the words' scale (hidden 192; measured in
    tests/model/test_injection.py).

    Args:
        input_size: of ``other`` and ``relation``: the TransE dimension, or the encoder's hidden
            size in form ``encoder``.
        hidden_size: of the word embeddings.
        output_rms: RMS of an entry of the word embedding table.
    """

    def __init__(self, input_size: int, hidden_size: int, output_rms: float):
        super().__init__()
        self.projection = nn.Linear(input_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        # No bias at the start: a shared one would make all entities alike after the LayerNorm.
        nn.init.normal_(self.projection.weight, std=input_size**-0.5)
        nn.init.zeros_(self.projection.bias)
        nn.init.constant_(self.norm.weight, output_rms)

    def forward(
        self, other: torch.Tensor, relation: torch.Tensor, role: torch.Tensor
    ) -> torch.Tensor:
        """Args: float [M, input] twice, int64 [M] roles. Returns: float [M, hidden]."""
        sign = torch.where(role == ROLE_HEAD, -1.0, 1.0).to(other.dtype)
        combined = other + sign[:, None] * relation
        return self.norm(self.projection(combined.to(self.projection.weight.dtype)))
