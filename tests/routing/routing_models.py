"""A tiny BERT with a linear knowledge decoder, routed or not, and batches for it."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from trelm_ds.routing.attribution import AttributionProblem
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.ffn import install_routed_ffn

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def tiny_backbone(kind="bert", activation="gelu", seed=0, std=0.3, **overrides):
    """A float64 masked-LM with weights large enough for P to be far from linear in alpha."""
    torch.manual_seed(seed)
    config, model = {
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
    }[kind]
    values = SIZES | {"hidden_act": activation, "initializer_range": std} | overrides
    backbone = model(config(**values)).double()
    with torch.no_grad():  # Hugging Face starts biases at zero, which would hide mistakes
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return backbone


class TinyKnowledgeModel(nn.Module):
    """MLM-free stand-in for the trained model: loss = -sum log P(gold), decoded in one step."""

    def __init__(self, backbone, context=None):
        super().__init__()
        self.backbone = backbone
        self.context = context
        self.ffns = install_routed_ffn(backbone, context) if context is not None else []
        self.decoder = nn.Linear(
            backbone.config.hidden_size, backbone.config.hidden_size, dtype=torch.float64
        )

    def encode(self, batch):
        output = self.backbone.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )
        return output.last_hidden_state

    def log_probability(self, states, spans, rows, batch):
        """log P of the tokens of decode rows ``rows`` [q], pooled from ``states``: [q, T]."""
        pooled = torch.stack(
            [states[i, left:right].mean(0) for i, left, right in spans.tolist()]
        ).view(len(spans), -1)
        embeddings = self.backbone.get_input_embeddings().weight
        decoded = torch.tanh(self.decoder(pooled))  # [q, d]
        gold = (decoded[:, None] * embeddings[batch.decode_tokens[rows].clamp(min=0)]).sum(-1)
        negative = decoded @ embeddings[batch.negatives].t()  # [q, N]
        both = torch.cat([gold[..., None], negative[:, None].expand(-1, gold.shape[1], -1)], -1)
        return both.log_softmax(-1)[..., 0]

    def forward(self, batch):
        states = self.encode(batch)
        rows = torch.arange(len(batch.decode_mention))
        spans = batch.mention_spans[batch.decode_mention]
        log_p = self.log_probability(states, spans, rows, batch)
        real = (batch.decode_tokens >= 0).to(log_p.dtype)
        if self.context is not None:
            p = (log_p.detach().exp() * real).sum(1) / real.sum(1)
            self.context.set_targets(*targets(batch, p))
        return -(log_p * real).sum()

    def attribution_problem(self, batch, memory, memory_weight):
        def gold_probability(states, mentions):
            copies, rows = (mentions[:, None] == batch.decode_mention[None]).nonzero(as_tuple=True)
            spans = batch.mention_spans[batch.decode_mention[rows]].clone()
            spans[:, 0] = copies
            p = self.log_probability(states, spans, rows, batch).exp()
            p = (p * (batch.decode_tokens[rows] >= 0)).sum(1)
            return p.new_zeros(len(mentions)).index_add(0, copies, p)

        return AttributionProblem(
            encode=lambda: self.encode(batch),
            layers=self.backbone.base_model.encoder.layer,
            spans=batch.mention_spans,
            mentions=batch.decode_mention.unique(),
            gold_probability=gold_probability,
        )


def targets(batch, p):
    """Positions and weights of the decoded mentions' tokens, as the model has to give them."""
    length = batch.input_ids.shape[1]
    positions, weights = [], []
    for mention in batch.decode_mention.unique().tolist():
        row, left, right = batch.mention_spans[mention].tolist()
        weight = p[batch.decode_mention == mention].mean()
        for position in range(left, right):
            positions.append(row * length + position)
            weights.append(weight)
    return torch.tensor(positions), torch.stack(weights).float()


def tiny_batch(seed=0, rows=3, length=10):
    """Padded sequences; two mentions in row 0, one decoded twice, one mention not decoded."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[1, 7:] = 0
    return SimpleNamespace(
        input_ids=torch.randint(5, SIZES["vocab_size"], (rows, length), generator=g),
        attention_mask=mask,
        mention_spans=torch.tensor([[0, 1, 3], [0, 5, 6], [1, 2, 5], [2, 4, 7]]),
        decode_mention=torch.tensor([0, 0, 1, 3]),
        decode_tokens=torch.tensor([[6, 7], [8, -1], [9, 10], [11, -1]]),
        negatives=torch.randint(5, SIZES["vocab_size"], (8,), generator=g),
    )


def routed_pair(kind="bert", activation="gelu", **overrides):
    """The same model twice: with routed FFNs, and Hugging Face's own."""
    backbone = tiny_backbone(kind, activation, **overrides)
    plain = TinyKnowledgeModel(copy.deepcopy(backbone))
    routed = TinyKnowledgeModel(backbone, RoutingContext())
    routed.decoder.load_state_dict(plain.decoder.state_dict())
    return routed, plain
