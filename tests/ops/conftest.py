"""Both implementations of the operators: the C++ kernels and the reference."""

from types import SimpleNamespace

import pytest
import torch

from trelm_ds.ops import load_kernels, reference

NAMES = ("neuron_scores", "select_paths", "path_weight_grad", "masked_adamw_")


@pytest.fixture(scope="session")
def kernels() -> SimpleNamespace:
    if not load_kernels():
        pytest.skip("the C++ kernels cannot be built here")
    return SimpleNamespace(**{name: getattr(torch.ops.trelm, name) for name in NAMES})


@pytest.fixture(params=["kernels", "reference"])
def ops(request) -> SimpleNamespace:
    if request.param == "kernels":
        return request.getfixturevalue("kernels")
    return SimpleNamespace(**{name: getattr(reference, name) for name in NAMES})
