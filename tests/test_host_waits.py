"""A training step on a GPU goes from the batch to the optimizer without waiting for the device."""

import pytest
import torch
from host_waits import DEVICE, HostWait, host_waits
from model.model_batches import ONES, make_batch, make_memory, make_model

from trelm_ds import unpadding
from trelm_ds.memory.bank import MemoryRows
from trelm_ds.model import parameter_groups
from trelm_ds.optim import PathAdamW, RoutedFragment
from trelm_ds.routing.controller import RoutingController

BLOCK = {"routing__form": "block", "routing__rotation_steps": 1}
IN_BACKWARD = {"routing__form": "in_backward"}
CASES = {
    "dkplm": {"memory__enabled": False},
    "dkplm-encoder": {"memory__enabled": False, "injection__form": "encoder"},
    "memory": {},
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
    "truncated": {
        "routing__truncated_depth": 0.5,
        "routing__truncate_start": 0.0,
        **IN_BACKWARD,
    },
}


class DeviceStep:
    """One training step of a tiny model on the stand-in for a GPU, phase by phase."""

    def __init__(self, dtype=torch.float32, **overrides):
        overrides = {"routing__form": "none", "routing__kept_fraction": 0.34} | overrides
        self.model = make_model(routing__multiple_of=1, **overrides).to(dtype).train().to(DEVICE)
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

    def begin(self) -> list[str]:
        with host_waits() as found:
            self.routing.begin_step(0)
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
    assert step.sent == []
    step.begin()
    assert step.forward_and_backward() == []
    step.update()
