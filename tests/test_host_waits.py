"""A training step on a GPU goes from the batch to the optimizer without waiting for the device."""

import pytest
import torch
from host_waits import DEVICE, HostWait, host_waits
from model.model_batches import ONES, make_batch, make_memory, make_model

from trelm_ds import unpadding
from trelm_ds.config import MemoryConfig
from trelm_ds.interval import Interval
from trelm_ds.memory.bank import MemoryBank, MemoryRows
from trelm_ds.model import parameter_groups
from trelm_ds.optim import PathAdamW, RoutedFragment
from trelm_ds.routing.controller import RoutingController

BLOCK = {"routing__form": "block", "routing__rotation_steps": 2}
IN_BACKWARD = {"routing__form": "in_backward"}
CASES = {
    "dkplm": {"memory__enabled": False},
    "dkplm-encoder": {"memory__enabled": False, "injection__form": "encoder"},
    "memory": {},
    "literal memory": {"memory__rescale": "literal", "memory__paper_norm": True},
    "roberta": {"model__model_type": "roberta"},
    "checkpointed": {"model__gradient_checkpointing": True, **IN_BACKWARD},
    "entities": {"decoding__entity_weight": 0.5},
    "objects": {"train__object_loss_share": 0.5},
    "no decoding": {"decoding__enabled": False, "decoding__loss_weight": 1.0},
    "block": BLOCK,
    "block-path": {"routing__input_gradient": "path", **BLOCK},
    "random": {"routing__form": "random"},
    "in_backward": IN_BACKWARD,
    "in_backward-path": {"routing__input_gradient": "path", **IN_BACKWARD},
    "threshold": {"routing__threshold": 0.3, **IN_BACKWARD},
    "absolute": {"routing__score": "abs_gradient", **IN_BACKWARD},
    "activation": {"routing__form": "activation"},
    "full": {"routing__paths": "full", **IN_BACKWARD},
    "full-path": {"routing__paths": "full", "routing__input_gradient": "path", **IN_BACKWARD},
    "truncated": {
        "routing__truncated_depth": 0.5,
        "routing__truncate_start": 0.0,
        **IN_BACKWARD,
    },
}


class DeviceStep:
    """One training step of a tiny model on the stand-in for a GPU, phase by phase."""

    def __init__(self, dtype=torch.float32, **overrides):
        shape = {"model__intermediate_size": 64, "model__attention_probs_dropout_prob": 0.1}
        routing = {"routing__form": "none", "routing__kept_fraction": 0.34}
        overrides = shape | routing | {"routing__multiple_of": 1} | overrides
        self.model = make_model(**overrides).to(dtype).train().to(DEVICE)
        self.model.backbone.tie_weights()
        config = self.model.config
        self.routing = RoutingController(
            *(config.routing, self.model.ffns, self.model.routing_context, 10),
            seed=1,
            truncation=self.model.truncation,
        )
        self.optimizer = PathAdamW(parameter_groups(self.model, 0.01))
        fragments = [
            RoutedFragment(p, 0, p.numel(), layer, kind, 0, p[0].numel())
            for layer, kind, p in self.model.routed_parameters()
            if config.routing.form != "none"
        ]
        element_counts = config.routing.paths == "full"
        self.optimizer.bind(fragments, self.routing, element_counts=element_counts)
        host = make_batch(text_length=8 if config.injection.form == "encoder" else 0)
        with host_waits() as self.sent:
            self.batch = host.to(DEVICE, non_blocking=True)
        self.memory = None
        if config.memory.enabled:
            self.memory = MemoryRows(*(t.to(DEVICE) for t in vars(make_memory(host)).values()))

    def begin(self, step: int) -> list[str]:
        with host_waits() as found:
            self.routing.begin_step(step)
            self.model.refresh_embedding_rms()
        return found

    def forward_and_backward(self) -> list[str]:
        with host_waits() as found:
            output = self.model(self.batch, self.memory, 0.5 if self.memory else 0.0, ONES)
            output.loss.backward()
        return found

    def update(self) -> list[str]:
        with host_waits() as found:
            self.optimizer.step()
            self.routing.end_step(True)
        return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_between_the_batch_and_the_optimizer(case):
    step = DeviceStep(**CASES[case])
    form = step.model.config.routing.form
    assert step.sent == []
    begun = step.begin(0)  # a block is chosen on the host, once a rotation
    assert len(begun) == (form == "block") and all(
        "copy to the host at paths.py" in w for w in begun
    )
    assert step.forward_and_backward() == []
    # What the device has chosen comes to the host once, all layers together.
    updated = step.update()
    chosen_there = form not in ("none", "block")
    assert len(updated) == chosen_there and all("copy to the host" in w for w in updated)
    assert step.begin(1) == []  # no rotation is due
    assert step.forward_and_backward() == []


def test_nothing_waits_with_flash_attention(monkeypatch):
    monkeypatch.setattr(unpadding, "_has_flash", lambda query: True)
    step = DeviceStep(torch.bfloat16, **BLOCK)
    step.begin(0)
    assert step.forward_and_backward() == []
    assert step.update() == []


def test_a_padded_encoder_waits_for_hugging_face_s_mask_alone():
    step = DeviceStep(model__unpad=False)
    assert [wait.split(":")[0] for wait in step.forward_and_backward()] == [
        "item at masking_utils.py"
    ]


@pytest.mark.parametrize("bank_device", ["cpu", DEVICE], ids=["on the CPU", "on the device"])
def test_nothing_waits_for_the_memory_bank_before_its_commit(bank_device, monkeypatch):
    monkeypatch.setattr("trelm_ds.interval.peak_flops", lambda device: 1.0)
    bank, interval = MemoryBank(10, 16, MemoryConfig(), device=bank_device), Interval(DEVICE, 1)
    step = DeviceStep()
    host = make_batch()
    with host_waits() as found:
        output = step.model(step.batch, step.memory, 0.5, ONES)
        rows = bank.lookup(host.mention_keys[host.injected_mentions], DEVICE)
        sequences = host.mention_spans[:, 0]
        cls = output.cls[step.batch.mention_spans[:, 0]]
        bank.stage(host.mention_keys, host.stream_positions[sequences], output.local_memory, cls)
        interval.add(output)
    assert found == [] and rows.local.device == rows.global_.device == DEVICE
    if bank_device == "cpu":
        with host_waits() as found:
            bank.commit(1)
        assert len(found) == 2 and all("copy to the host" in wait for wait in found)


X, ROWS = torch.zeros(6, 5, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
ANSWERED = {
    "a number": lambda: float(X.sum()),
    "a condition": lambda: 1 if (X > 0).all() else 0,
    "a list": lambda: X.tolist(),
    "a copy to the host": lambda: X.cpu(),
    "a copy into a host tensor": lambda: torch.zeros(6, 5).copy_(X),
    "a slice's end": lambda: X[: ROWS.max()],
    "data sent": lambda: torch.ones(5).to(DEVICE),
    "data sent into a tensor": lambda: X[0].copy_(torch.ones(5)),
    "a tensor made there": lambda: torch.tensor([1.0], device=DEVICE),
    "a new tensor": lambda: X.new_tensor([1.0]),
    "host indices": lambda: X[torch.zeros(2, dtype=torch.int64)],
    "indices in a list": lambda: X[[0, 1]],
    "a scalar set by index": lambda: X.clone().__setitem__(ROWS, 1.0),
}
UNANSWERED = {
    "a mask": lambda: X[X > 0],
    "values set by a mask": lambda: X.clone().__setitem__(X > 0, 1.0),
    "nonzero": lambda: X.nonzero(),
    "unique": lambda: torch.unique(ROWS),
    "unique rows": lambda: torch.unique(X, dim=0),
    "bincount": lambda: torch.bincount(ROWS, minlength=6),
    "repeats": lambda: torch.repeat_interleave(ROWS, ROWS),
    "equality": lambda: torch.equal(X, X),
    "an operator of ours": lambda: torch.ops.trelm.select_paths(X[0], 2, True, 0.0),
}
FREE = {
    "data sent on its way": lambda: torch.ones(5).to(DEVICE, non_blocking=True),
    "repeats of a known number": lambda: torch.repeat_interleave(ROWS, ROWS, output_size=7),
    "rows": lambda: X[ROWS],
    "a scalar set by slice": lambda: X.clone().__setitem__((slice(None), 0), 1.0),
    "the host's own": lambda: torch.ones(3).nonzero().tolist(),
}


@pytest.mark.parametrize("what", [*ANSWERED, *UNANSWERED])
def test_waits_are_found(what):
    if what in UNANSWERED:
        with pytest.raises(HostWait), host_waits():
            UNANSWERED[what]()
        return
    with host_waits() as found:
        ANSWERED[what]()
    assert len(found) == 1 and "test_host_waits.py" in found[0]


def test_backward_is_watched_too():
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    with host_waits() as found:
        Asks.apply(X.clone().requires_grad_()).sum().backward()
    assert len(found) == 1


@pytest.mark.parametrize("what", FREE)
def test_what_does_not_wait_is_let_through(what):
    with host_waits() as found:
        FREE[what]()
    assert found == []
