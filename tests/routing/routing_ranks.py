"""What several ranks run in the routing tests: torch alone, so that processes start quickly."""

from types import SimpleNamespace

import torch
from torch import nn

from trelm_ds.config import RoutingConfig
from trelm_ds.routing.attribution import AttributionProblem
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.controller import RoutingController
from trelm_ds.routing.ffn import RoutedFFN

ROWS, LENGTH, HIDDEN, SIZE, VOCABULARY = 4, 5, 8, 24, 11
SPAN = (1, 3)  # each row's mention


class Output(nn.Module):
    """The part of Hugging Face's layer output that attribution uses."""

    def __init__(self, context, index):
        super().__init__()
        self.dense = RoutedFFN(HIDDEN, SIZE, "gelu", context, index, dtype=torch.float64)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        nn.init.normal_(self.dense.up_weight, std=0.5)
        nn.init.normal_(self.dense.down_weight, std=0.5)


class Layer(nn.Module):
    """Mixes positions without weights, then the feed-forward."""

    def __init__(self, context, index):
        super().__init__()
        self.output = Output(context, index)

    def forward(self, hidden_states):
        mixed = hidden_states + hidden_states.mean(1, keepdim=True)
        output = self.output
        return output.LayerNorm(output.dropout(output.dense(mixed)) + mixed)


class Model(nn.Module):
    """Predicts one gold token per row from its mention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.context = RoutingContext()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
        self.layers = nn.ModuleList(Layer(self.context, i) for i in range(2))
        self.ffns = [layer.output.dense for layer in self.layers]

    def encode(self, batch):
        states = self.embedding(batch.input_ids)
        for layer in self.layers:
            states = layer(states)
        return states

    def log_probability(self, states, gold):
        logits = states[:, slice(*SPAN)].mean(1) @ self.embedding.weight.t()
        return logits.log_softmax(-1).gather(1, gold[:, None])[:, 0]

    def forward(self, batch):
        log_p = self.log_probability(self.encode(batch), batch.gold)
        row = torch.arange(len(log_p))[:, None]
        positions = (row * LENGTH + torch.arange(*SPAN)).flatten()
        self.context.set_targets(positions, log_p.exp().repeat_interleave(SPAN[1] - SPAN[0]))
        return -log_p.sum()

    def attribution_problem(self, batch, memory, memory_weight):
        rows = torch.arange(len(batch.gold))
        spans = torch.stack([rows, *(torch.full_like(rows, end) for end in SPAN)], 1)
        return AttributionProblem(
            encode=lambda: self.encode(batch),
            layers=self.layers,
            spans=spans,
            mentions=rows,
            gold_probability=lambda states, m: self.log_probability(states, batch.gold[m]).exp(),
        )


def chosen_paths(rank, world_size, forms):
    """Path rows per form, step and layer when each step's rows are split over the ranks."""
    mine = {1: slice(0, ROWS), 2: [slice(0, 1), slice(1, ROWS)][rank]}[world_size]
    result = []
    for form in forms:
        model = Model()
        config = RoutingConfig(form=form, kept_fraction=0.25, multiple_of=2, rotation_steps=2)
        controller = RoutingController(config, model.ffns, model.context, 10, 0)
        steps = []
        for step in range(6):
            g = torch.Generator().manual_seed(step)
            ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)[mine]
            gold = torch.randint(VOCABULARY, (ROWS,), generator=g)[mine]
            batch = SimpleNamespace(input_ids=ids, gold=gold)
            controller.begin_step(step)
            controller.before_micro_batch(model, batch, None, 0.0)
            model(batch).backward()
            counts = [controller.row_counts(layer) for layer in range(2)]
            steps.append([(c > 0).nonzero()[:, 0].tolist() for c in counts])
            controller.end_step(True)
        state = controller.state_dict()
        scores = state.pop("block.scores", torch.zeros(1))
        result.append({"steps": steps, "state": state, "scores": scores.sum(0)})
    return result
