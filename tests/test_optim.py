"""PathAdamW against torch.optim.AdamW, without DeepSpeed."""

import copy

import pytest
import torch

from trelm_ds import optim
from trelm_ds.errors import ConfigError
from trelm_ds.ops import reference
from trelm_ds.optim import WHOLE, PathAdamW, RoutedFragment

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
F, D = 10, 6
SHAPES = {"up_weight": (F, D), "up_bias": (F,), "down_weight": (F, D), "down_bias": (D,)}


@pytest.fixture(params=["piece by piece", "runs at once", "rows at once"], autouse=True)
def batches(request, monkeypatch):
    """A CPU's way to step paths, and a GPU's two; theirs are torch's own on a CPU too."""
    monkeypatch.setattr(optim, "_batches", lambda tensor: request.param != "piece by piece")
    if request.param == "rows at once":
        monkeypatch.setattr(reference, "MAX_VIEWS", 0)


class FixedPaths:
    """Counts updates as a controller would; ``rows``, ``inputs``, ``outputs`` are set by tests."""

    def __init__(self):
        self.updates = torch.zeros(F, dtype=torch.int64)
        self.rows = torch.ones(F, dtype=torch.bool)
        self.inputs = self.outputs = None
        self.frozen_layers = set()

    def frozen(self, layer):
        return layer in self.frozen_layers

    def choose(self, rows, inputs=None, outputs=None):
        self.rows = torch.zeros(F, dtype=torch.bool)
        self.rows[rows] = True
        self.inputs, self.outputs = inputs, outputs

    def advance(self):
        self.updates += self.rows

    def row_counts(self, layer):
        return torch.where(self.rows, self.updates, 0)

    def active_inputs(self, layer):
        return self.inputs

    def active_outputs(self, layer):
        return self.outputs


def _parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ffn = {
        kind: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for kind, shape in SHAPES.items()
    }
    return ffn, torch.nn.Parameter(torch.randn(7, 3, generator=generator))


def _fragments(ffn):
    return [
        RoutedFragment(p, 0, p.numel(), 0, kind, 0, p.shape[1] if p.dim() == 2 else 1)
        for kind, p in ffn.items()
    ]


def _set_gradients(step, *parameter_lists):
    """The same gradients for each list of parameters."""
    for parameters in parameter_lists:
        generator = torch.Generator().manual_seed(100 + step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)


def _bound(paths, element_counts=False):
    ffn, other = _parameters()
    optimizer = PathAdamW([{"params": list(ffn.values())}, {"params": [other]}], **SETTINGS)
    optimizer.bind(_fragments(ffn), paths, element_counts=element_counts)
    return ffn, other, optimizer


def _snapshot(optimizer, p):
    state = optimizer.state[p]
    return [t.detach().clone() for t in (p, state["exp_avg"], state["exp_avg_sq"])]


@pytest.mark.parametrize("element_counts", [False, True])
def test_equals_torch_adamw_when_every_row_is_active(element_counts):
    paths = FixedPaths()
    ffn, other, optimizer = _bound(paths, element_counts)
    twin_ffn, twin_other = _parameters()
    twins = [*twin_ffn.values(), twin_other]
    torch_optimizer = torch.optim.AdamW(twins, fused=True, **SETTINGS)
    for step in range(8):
        for group in [*optimizer.param_groups, *torch_optimizer.param_groups]:
            group["lr"] = 1e-2 / (step + 1)
        paths.advance()
        _set_gradients(step, [*ffn.values(), other], twins)
        optimizer.step()
        torch_optimizer.step()
    for p, twin in zip([*ffn.values(), other], twins, strict=True):
        expected = _snapshot(torch_optimizer, twin)
        for found, wanted in zip(_snapshot(optimizer, p), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
        assert optimizer.state[p]["step"] == 8


def test_off_path_entries_keep_their_bits_and_late_rows_start_fresh():
    paths = FixedPaths()
    ffn, other, optimizer = _bound(paths)
    chosen = [[0, 1, 2], [2, 5], [2, 5], [8]]
    for step, rows in enumerate(chosen):
        paths.choose(rows)
        paths.advance()
        _set_gradients(step, [*ffn.values(), other])
        before = {kind: _snapshot(optimizer, p) for kind, p in ffn.items()}
        optimizer.step()
        off = ~paths.rows
        for kind in ("up_weight", "up_bias", "down_weight"):
            after = _snapshot(optimizer, ffn[kind])
            for now, then in zip(after, before[kind], strict=True):
                assert torch.equal(now[off], then[off])
                assert (now[paths.rows] != then[paths.rows]).all()
        assert (ffn["down_bias"] != before["down_bias"][0]).all()

    # row 8 at step 4 is a fresh AdamW; row 2 has seen three of the gradients, row 5 two
    generator_steps = {8: [3], 2: [0, 1, 2], 5: [1, 2], 0: [0]}
    for row, steps in generator_steps.items():
        twin_ffn, twin_other = _parameters()
        twin = torch.nn.Parameter(twin_ffn["up_weight"][row].detach().clone())
        torch_optimizer = torch.optim.AdamW([twin], **SETTINGS)
        for step in steps:
            _set_gradients(step, [*twin_ffn.values(), twin_other])
            twin.grad = twin_ffn["up_weight"].grad[row]
            torch_optimizer.step()
        torch.testing.assert_close(
            ffn["up_weight"][row].detach(), twin.detach(), rtol=1e-6, atol=1e-8
        )


def test_full_paths_restrict_columns_and_count_per_element():
    paths = FixedPaths()
    ffn, _, optimizer = _bound(paths, element_counts=True)
    inputs = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    outputs = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool)
    masks = {}
    for step, rows in enumerate([[1, 4], [4, 7]]):
        paths.choose(rows, inputs, outputs)
        paths.advance()
        _set_gradients(step, ffn.values())
        before = {kind: _snapshot(optimizer, p) for kind, p in ffn.items()}
        optimizer.step()
        on = {
            "up_weight": paths.rows[:, None] & inputs,
            "up_bias": paths.rows,
            "down_weight": paths.rows[:, None] & outputs,
            "down_bias": outputs,
        }
        for kind, mask in on.items():
            masks[kind] = masks.get(kind, 0) + mask.float()
            for now, then in zip(_snapshot(optimizer, ffn[kind]), before[kind], strict=True):
                assert torch.equal(now[~mask], then[~mask])
                assert (now[mask] != then[mask]).all()
            assert torch.equal(optimizer.state[ffn[kind]]["update_count"], masks[kind])
    # an element reached twice is AdamW after two updates, though its row's neighbour saw none
    twin = torch.nn.Parameter(_parameters()[0]["up_weight"][4, 5].detach().clone())
    torch_optimizer = torch.optim.AdamW([twin], **SETTINGS)
    for step in range(2):
        _set_gradients(step, ffn.values())
        twin.grad = ffn["up_weight"].grad[4, 5]
        torch_optimizer.step()
    torch.testing.assert_close(ffn["up_weight"][4, 5].detach(), twin.detach())


def _flat(ffn, other, cut):
    """Everything in two flat tensors, cut anywhere, as ZeRO's partitions do it."""
    pieces = {kind: p.detach().flatten() for kind, p in ffn.items()}
    everything = torch.cat([other.detach().flatten(), *pieces.values(), torch.zeros(5)])
    tensors = [torch.nn.Parameter(t.clone()) for t in (everything[:cut], everything[cut:])]
    fragments, position = [], other.numel()
    for kind, piece in pieces.items():
        width = D if kind.endswith("weight") else 1
        for tensor, begin in zip(tensors, (0, cut), strict=True):
            first = max(position, begin)
            last = min(position + piece.numel(), begin + tensor.numel())
            if first < last:
                fragments.append(
                    RoutedFragment(
                        tensor, first - begin, last - first, 0, kind, first - position, width
                    )
                )
        position += piece.numel()
    return tensors, fragments


@pytest.mark.parametrize("cut", [3, 21, 40, 85, 91, 150])
def test_flat_partitions_equal_whole_parameters(cut):
    """Padding, other parameters and pieces of matrices in one tensor; sub-groups one at a time."""
    paths, flat_paths = FixedPaths(), FixedPaths()
    ffn, other, optimizer = _bound(paths)
    tensors, fragments = _flat(ffn, other, cut)
    flat_optimizer = PathAdamW([{"params": [t]} for t in tensors], **SETTINGS)
    flat_optimizer.bind(fragments, flat_paths)
    groups = flat_optimizer.param_groups
    for step in range(3):
        for p in (paths, flat_paths):
            p.choose([1, 2, 7] if step != 1 else [0, 7])
            p.advance()
        _set_gradients(step, [*ffn.values(), other])
        gradients = [other.grad, *(p.grad for p in ffn.values()), torch.zeros(5)]
        gradient = torch.cat([g.flatten() for g in gradients])
        optimizer.step()
        for i, tensor in enumerate(tensors):
            tensor.grad = (gradient[:cut], gradient[cut:])[i].clone()
            held = [group["params"] for group in groups]
            for j, group in enumerate(groups):
                group["params"] = held[j] if i == j else []
            flat_optimizer.step()
            for group, params in zip(groups, held, strict=True):
                group["params"] = params
    whole = [
        torch.cat([t.flatten() for t in parts])
        for parts in zip(*(_snapshot(optimizer, p) for p in (other, *ffn.values())), strict=True)
    ]
    flat = [
        torch.cat(parts)
        for parts in zip(*(_snapshot(flat_optimizer, t) for t in tensors), strict=True)
    ]
    for found, wanted in zip(flat, whole, strict=True):
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-6, atol=1e-8)
    assert all(flat_optimizer.state[t]["step"] == 3 for t in tensors)


@pytest.mark.parametrize("element_counts", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_frozen_layers_keep_their_bits_and_the_rest_goes_on_as_if_alone(element_counts, flat):
    """Layer 0 with its paths and a whole parameter of layer -1 stand still from step 2 on."""
    paths = FixedPaths()
    ffn, other = _parameters()
    last = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    tensors = [other, *ffn.values(), last]
    kinds = [(-1, WHOLE), *((0, kind) for kind in ffn)]
    if flat:
        sizes = [t.numel() for t in tensors]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        held = torch.nn.Parameter(torch.cat([t.detach().flatten() for t in tensors]))
        places = [(held, start) for start in starts]
        stepped = [held]
    else:
        places = [(t, 0) for t in tensors]
        stepped = tensors
    fragments = [
        RoutedFragment(
            *(tensor, start, t.numel(), layer, kind, 0, D if kind.endswith("_weight") else 1)
        )
        for (tensor, start), t, (layer, kind) in zip(places, tensors, kinds, strict=False)
    ]
    optimizer = PathAdamW(stepped, **SETTINGS)
    optimizer.bind(fragments, paths, element_counts=element_counts)
    twin = torch.nn.Parameter(last.detach().clone())
    torch_optimizer = torch.optim.AdamW([twin], fused=True, **SETTINGS)

    def snapshot(i):
        tensor, start = places[i]
        cut = slice(start, start + tensors[i].numel())
        return [t.flatten()[cut] for t in _snapshot(optimizer, tensor)]

    for step in range(4):
        if step == 2:
            paths.frozen_layers = {-1, 0}
        else:
            paths.advance()
        _set_gradients(step, tensors)
        twin.grad = last.grad.clone()
        if flat:
            held.grad = torch.cat([t.grad.flatten() for t in tensors])
        before = [snapshot(i) for i in range(len(tensors))]
        optimizer.step()
        torch_optimizer.step()
        for i, old in enumerate(before):
            still = step >= 2 and i < len(tensors) - 1
            for then, now in zip(old, snapshot(i), strict=True):
                assert torch.equal(then, now) if still else (then != now).all()
    for found, wanted in zip(snapshot(-1), _snapshot(torch_optimizer, twin), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    steps = [int(optimizer.state[t]["step"]) for t in stepped]
    assert steps == ([4] if flat else [2] * 5 + [4])  # a frozen tensor counts its own updates


def test_a_first_step_with_zero_gradients_neither_decays_nor_counts():
    """DeepSpeed steps once with zero gradients to create the optimizer's states."""
    ffn, other = _parameters()
    parameters = [*ffn.values(), other]
    before = [p.detach().clone() for p in parameters]
    optimizer = PathAdamW(parameters, **SETTINGS)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)
        assert optimizer.state[p]["step"] == 0
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    # once bound, a zero gradient is a gradient
    optimizer.bind([])
    optimizer.step()
    torch.testing.assert_close(other.detach(), before[-1] * (1 - 1e-2 * 0.1))
    assert optimizer.state[other]["step"] == 1


@pytest.mark.parametrize("element_counts", [False, True])
def test_state_dict_round_trip_continues_to_the_bit(element_counts):
    paths = FixedPaths()
    ffn, other, optimizer = _bound(paths, element_counts)
    columns = torch.arange(D) % 2 == 0 if element_counts else None

    def run(steps, ffn, other, optimizer):
        for step in steps:
            paths.choose([step % F, 3], columns, columns)
            paths.advance()
            _set_gradients(step, [*ffn.values(), other])
            optimizer.step()

    run(range(3), ffn, other, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    counts = paths.updates.clone()
    twin_ffn, twin_other, twin = _bound(paths, element_counts)
    for p, t in zip([*ffn.values(), other], [*twin_ffn.values(), twin_other], strict=True):
        t.data.copy_(p.data)
    twin.load_state_dict(saved)
    run(range(3, 6), ffn, other, optimizer)
    paths.updates = counts
    run(range(3, 6), twin_ffn, twin_other, twin)
    for p, t in zip([*ffn.values(), other], [*twin_ffn.values(), twin_other], strict=True):
        for found, wanted in zip(_snapshot(twin, t), _snapshot(optimizer, p), strict=True):
            assert torch.equal(found, wanted)


def test_a_step_tensor_shared_by_several_states_counts_once():
    """What DeepSpeed leaves behind when it loads a universal checkpoint under ZeRO 3."""
    ffn, other, optimizer = _bound(FixedPaths())
    shared = torch.tensor(4.0)
    for state in optimizer.state.values():
        state["step"] = shared
    _set_gradients(0, [*ffn.values(), other])
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [5.0] * 5


def test_non_contiguous_gradients_and_closures():
    paths = FixedPaths()
    ffn, other, optimizer = _bound(paths)
    twin_ffn, twin_other, twin = _bound(paths)
    paths.choose([0, 4])
    paths.advance()
    _set_gradients(0, [*ffn.values(), other], [*twin_ffn.values(), twin_other])
    ffn["up_weight"].grad = ffn["up_weight"].grad.t().contiguous().t()

    def closure():
        assert torch.is_grad_enabled()
        return 7.0

    assert optimizer.step(closure) == 7.0
    twin.step()
    assert torch.equal(ffn["up_weight"], twin_ffn["up_weight"])


def test_wrong_bindings_and_settings_are_refused():
    ffn, other, optimizer = _bound(FixedPaths())
    fragment = _fragments(ffn)[0]
    with pytest.raises(ValueError, match="fragments need paths"):
        optimizer.bind([fragment])
    with pytest.raises(ValueError, match="overlap"):
        optimizer.bind([fragment, fragment], FixedPaths())
    with pytest.raises(ConfigError, match="betas in \\[0, 1\\)"):
        PathAdamW([other], betas=(0.9, 1.0))
