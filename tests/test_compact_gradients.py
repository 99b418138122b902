"""Compact averaging against DeepSpeed's own, and what a frozen parameter costs, on two ranks."""

import logging

import pytest
import torch
import torch.distributed as dist
from multiprocess import run_ranks
from plain_ffn import FFN
from torch import nn

from trelm_ds.optim import WHOLE, PathAdamW
from trelm_ds.routing.paths import LayerPaths

LAYERS, F, D, STEPS = 2, 12, 8, 3
MATRICES, BIASES = 2 * F * D, F + D


class Routing:
    """The step's paths as the controller tells them."""

    def __init__(self, kind):
        self.kind, self.cut, self.step = kind, 0, 0

    def begin_step(self, step):
        self.step = step
        self.cut = int(self.kind == "cut" and step > 0)

    def frozen(self, layer):
        return layer < self.cut if self.cut else False

    def layer_paths(self, layer):
        first = (3 * self.step + layer) % 8
        rows = torch.tensor([first, first + 2, first + 3])
        if self.kind in ("dense", "cut"):
            return None
        if self.kind == "block":
            return LayerPaths.block(first, 4, "cpu")
        if self.kind == "empty" and layer == 0:
            return LayerPaths(rows[:0])
        if self.kind == "full":
            return LayerPaths(rows, torch.tensor([0, 5]), torch.tensor([1, 2, 7]))
        return LayerPaths(rows)


class Model(nn.Module):
    """Its gradients are masked by hooks, as a routed backward leaves them."""

    def __init__(self, routing):
        super().__init__()
        torch.manual_seed(0)
        self.routing = routing
        self.embed = nn.Linear(5, D)
        self.ffns = nn.ModuleList(FFN(F, D) for _ in range(LAYERS))
        self.head = nn.Linear(D, 1)
        self.only_rank_0 = nn.Parameter(torch.ones(3))
        for layer, kind, p in self.routed():
            p.register_hook(lambda g, layer=layer, kind=kind: g * self.mask(layer, kind, g))

    def routed(self):
        return [(i, k, p) for i, ffn in enumerate(self.ffns) for k, p in ffn.named_parameters()]

    def mask(self, layer, kind, like):
        paths = self.routing.layer_paths(layer)
        if paths is None:
            return torch.ones_like(like)
        rows, columns = torch.zeros(F), torch.ones(D)
        rows[paths.rows] = 1
        side = {"up_weight": paths.inputs, "down_weight": paths.outputs, "down_bias": paths.outputs}
        if side.get(kind) is not None:
            columns = torch.zeros(D)
            columns[side[kind]] = 1
        mask = {"up_bias": rows, "down_bias": columns}.get(kind, rows[:, None] * columns)
        return mask.to(like.dtype)

    def forward(self, x):
        with torch.set_grad_enabled(self.routing.cut == 0):
            x = self.embed(x)
            for ffn in self.ffns[: self.routing.cut]:
                x = ffn(x)
        for ffn in self.ffns[self.routing.cut :]:
            x = ffn(x)
        loss = self.head(x).square().mean()
        return loss + self.only_rank_0.sum() if dist.get_rank() == 0 else loss


def start(model, stage=0, bf16=False, **settings):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.05,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = PathAdamW(parameters, lr=1e-2, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | settings)[0]


def train(kind, compact, **settings):
    """Every parameter after each step, and the mebibytes of each step where they are counted."""
    from trelm_ds.compact_gradients import CompactGradients
    from trelm_ds.zero_layout import routed_fragments

    routing = Routing(kind)
    model = Model(routing)
    engine = start(model, **settings)
    below = {p: -1 for p in model.embed.parameters()}
    below |= {p: 0 for p in model.ffns[0].parameters()}
    if kind == "cut":  # DeepSpeed gives zeros where there is no gradient, which must move nothing
        named = [(p, layer, WHOLE) for p, layer in below.items()]
        engine.optimizer.bind(routed_fragments(engine, named), routing)
    reducer = None
    if compact:
        reducer = CompactGradients(engine, model.routed(), routing, below)
    values, sent = [], []
    for step in range(STEPS):
        routing.begin_step(step)
        for micro in range(2):
            g = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
            x = torch.randn(4, 5, generator=g).to(next(model.parameters()).dtype)
            engine.backward(engine(x))
            if reducer is not None and engine.is_gradient_accumulation_boundary():
                reducer.reduce()
                sent.append(reducer.metrics()["communication/gradient_mib"] * 2**20)
            engine.step()
        values.append([p.detach().clone() for p in model.parameters()])
    return values, sent


KINDS = ("dense", "block", "rows", "full", "empty", "cut")
SETTINGS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "prescaled": {"prescale_gradients": True},
    "predivided": {"gradient_predivide_factor": 4.0},
}


def frozen_costs():
    """Elements with optimizer state on this rank, and elements given to reductions, by stage."""
    found = {}
    names = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
    for stage in (0, 1, 2):
        model = Model(Routing("dense"))
        model.embed.requires_grad_(False)
        model.ffns[0].requires_grad_(False)
        model.only_rank_0.requires_grad_(False)
        engine = start(model, stage)
        sent, kept = [], {name: getattr(dist, name) for name in names}

        def counted(name, kept=kept, sent=sent):
            def call(tensor, *args, **kwargs):
                if tensor.numel() > 1:  # not the norm, nor flags
                    sent.append(tensor.numel())
                return kept[name](tensor, *args, **kwargs)

            return call

        try:
            for name in names:
                setattr(dist, name, counted(name))
            for _ in range(2):
                engine.backward(engine(torch.randn(4, 5)) * (1 + dist.get_rank()))
                engine.step()
        finally:
            for name in names:
                setattr(dist, name, kept[name])
        optimizer = engine.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        found[stage] = (held, sum(sent))
    return found


def run_all(rank, world_size):
    import deepspeed.ops

    # else DeepSpeed compiles an all-reduce that only its inference code uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    found = {"frozen": frozen_costs()}
    for name, settings in SETTINGS.items():
        for kind in KINDS if name == "fp32" else ("block", "rows"):
            found[name, kind] = [train(kind, compact, **settings) for compact in (False, True)]
    unclipped = {"gradient_clipping": 0.0}
    found["unclipped", "cut"] = [train("cut", compact, **unclipped) for compact in (False, True)]
    return found


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("deepspeed")
    return run_ranks(run_all, 2)


# The norm of a clipped cut is a sum without the zeros that DeepSpeed puts there: another order.
CASES = [("fp32", kind) for kind in KINDS if kind != "cut"] + [("unclipped", "cut")]
CASES += [(name, kind) for name in SETTINGS if name != "fp32" for kind in ("block", "rows")]


def test_a_clipped_cut_differs_by_the_rounding_of_its_norm(ranks):
    for found in ranks:
        (dense, _), (compact, _) = found["fp32", "cut"]
        for one, other in zip(dense, compact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_updates_are_those_of_the_dense_communication_to_the_bit(ranks, case):
    start_values = [p.detach() for p in Model(Routing("dense")).parameters()]
    for found in ranks:
        (dense, _), (compact, _) = found[case]
        for one, other in zip(dense, compact, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        moved = [
            not torch.equal(a.float(), b) for a, b in zip(dense[-1], start_values, strict=True)
        ]
        assert sum(moved) >= (len(moved) - 3 if case[1] == "empty" else len(moved))
    values = [found[case][1][0][-1] for found in ranks]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_only_path_entries_are_sent(ranks):
    rest = (5 * D + D) + (D + 1) + 3
    elements = {
        "dense": rest + LAYERS * (MATRICES + BIASES),
        "block": rest + LAYERS * (2 * 4 * D + 4 + D),
        "rows": rest + LAYERS * (2 * 3 * D + 3 + D),
        "full": rest + LAYERS * (3 * 2 + 3 * 3 + 3 + 3),
        "empty": rest + (2 * 3 * D + 3 + D) + D,
    }
    for kind, count in elements.items():
        assert ranks[0]["fp32", kind][1][1] == [4 * count] * STEPS
    assert ranks[0]["bf16", "rows"][1][1] == [2 * elements["rows"]] * STEPS
    above = (D + 1) + 3 + MATRICES + BIASES
    assert ranks[0]["fp32", "cut"][1][1] == [4 * n for n in (elements["dense"], above, above)]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_parameters_have_no_state_and_are_not_communicated(ranks, stage):
    trained = MATRICES + BIASES + D + 1
    held = [found["frozen"][stage][0] for found in ranks]
    if stage == 0:
        assert held == [trained, trained]
    else:  # partitions are padded to an even share
        assert trained <= sum(held) <= trained + 8
    for found in ranks:
        assert 0 < found["frozen"][stage][1] <= (2 if stage == 2 else 1) * (trained + 8)
