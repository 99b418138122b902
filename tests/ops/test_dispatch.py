"""How the operators are reached: traced by torch.compile, on CUDA tensors, without autograd."""

import pytest
import torch

from trelm_ds import ops
from trelm_ds.ops import load_kernels

NAMES = ("neuron_scores", "select_paths", "path_weight_grad", "masked_adamw_")
NUMBERS = dict(lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1)
N, F, D = 23, 40, 24
ROWS = [0, 3, 4, 5, 30, 39]


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def score(device="cpu", absolute=False):
    positions = torch.tensor([3, 3, 0, 22, 7], device=device)
    weights = torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0], device=device)
    value, grad = (_draw(N, F, seed=i).to(device) for i in range(2))
    return (lambda v, g: ops.neuron_scores(v, g, positions, weights, absolute)), (value, grad)


def select(device="cpu"):
    scores = _draw(F).round(decimals=1).to(device)  # with ties
    scores[7], scores[8], scores[9] = torch.nan, torch.inf, -torch.inf
    return (lambda s: ops.select_paths(s, 9, False, 0.0)), (scores,)


def threshold(device="cpu"):
    return (lambda s: ops.select_paths(s, 9, True, 0.2)), (_draw(F).to(device),)


def scattered(device="cpu", rows=ROWS):
    grad_out, inputs = _draw(N, F).to(device), _draw(N, D).to(device)
    return ops.path_weight_grad, (grad_out, inputs, torch.tensor(rows, device=device))


def block(device="cpu"):
    return scattered(device, list(range(8, 24)))


def update(device="cpu", full=False, start=0):
    size = F * D - start
    param, grad, exp_avg = (_draw(size, seed=i).to(device) for i in range(3))
    exp_avg_sq = _draw(size, seed=3).square().to(device)
    counts = torch.zeros(F, dtype=torch.int64)
    counts[ROWS] = torch.arange(1, len(ROWS) + 1)
    columns = (torch.arange(D, device=device) % 3 != 0).to(torch.uint8) if full else None
    updates = torch.zeros(size, device=device) if full else None

    def step(p, g, m, v):
        state = [t.clone() for t in (p, m, v)]
        count = None if updates is None else updates.clone()
        ops.masked_adamw_(*(state[0], g, *state[1:], start, D, counts, columns, count), **NUMBERS)
        return (*state, count) if full else tuple(state)

    return step, (param, grad, exp_avg, exp_avg_sq)


def update_full(device="cpu"):
    return update(device, full=True)


def update_cut(device="cpu"):
    return update(device, start=D // 2)


def update_cut_full(device="cpu"):
    return update(device, full=True, start=D // 2)


CASES = (score, select, threshold, scattered, block, update, update_full)
CASES += (update_cut, update_cut_full)


@pytest.fixture(autouse=True)
def loaded():
    load_kernels()  # a trace does not build them


def _flat(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_compiles_without_a_graph_break(case, backend):
    torch._dynamo.reset()
    function, arguments = case()
    expected = _flat(function(*arguments))
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for found, wanted in zip(_flat(compiled(*arguments)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_compiled_weight_gradient_can_be_differentiated():
    torch._dynamo.reset()
    _, (grad_out, inputs, rows) = scattered()

    def loss(grad_out, inputs):
        return ops.path_weight_grad(grad_out, inputs, rows).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (grad_out, inputs)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_what_chooses_or_updates_is_outside_autograd():
    """Scores choose paths and the optimizer updates leaves: neither is part of a loss."""
    value, grad = (t.requires_grad_() for t in score()[1])
    scores = ops.neuron_scores(value, grad, torch.tensor([1]), torch.ones(1).requires_grad_())
    assert not scores.requires_grad
    rows = ops.select_paths(_draw(F).requires_grad_(), 3)
    assert not rows.requires_grad and rows.dtype == torch.int64
    step, (param, *rest) = update()
    assert not any(t.requires_grad for t in step(param.requires_grad_(), *rest)[1:])


# ---- CUDA: the same operators through ATen, no source of their own ------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_has_a_path_for_every_backend(name):
    """The reference is registered for all backends; the kernels stand in front on the CPU only."""
    qualified = f"trelm::{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
    for backend in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, backend)
    if load_kernels():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_cuda_equals_the_cpu(case, dtype):
    def cast(tensors, device):
        return [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in tensors]

    function, arguments = case("cpu")
    expected = _flat(function(*cast(arguments, "cpu")))
    function, arguments = case("cuda")
    found = _flat(function(*cast(arguments, "cuda")))
    assert all(t.device.type == "cuda" for t in found)
    # sums in another order; nothing else may differ, path indices least of all
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for t, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(t.cpu(), wanted, equal_nan=True, **tolerance)
