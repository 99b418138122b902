import pytest
import torch

from trelm_ds.ops import neuron_scores

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _case(dtype, rows=23, width=301, positions=17):
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(rows, width, generator=generator).to(dtype)
    gradient = torch.randn(rows, width, generator=generator).to(dtype)
    index = torch.randint(rows, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator)
    return activation, gradient, index, weights


def _loop(activation, gradient, positions, weights, absolute):
    """Sum over positions, one neuron at a time, in double precision."""
    scores = torch.zeros(activation.shape[1], dtype=torch.float64)
    for p, w in zip(positions.tolist(), weights.double(), strict=True):
        for j in range(activation.shape[1]):
            a, g = activation[p, j].double(), gradient[p, j].double()
            scores[j] += w * g.abs() if absolute else w * a * -g
    return scores.float()


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_loop_over_positions(ops, dtype, absolute):
    case = _case(dtype, rows=7, width=37, positions=9)
    scores = ops.neuron_scores(*case, absolute)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, _loop(*case, absolute), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("absolute", [False, True])
def test_non_contiguous_inputs(ops, absolute):
    activation, gradient, positions, weights = _case(torch.float32)
    expected = ops.neuron_scores(activation, gradient, positions, weights, absolute)
    by_columns = activation.t().contiguous().t()
    padded = torch.randn(gradient.shape[0], gradient.shape[1] + 5)[:, 2:-3].copy_(gradient)
    every_other = torch.stack([positions, positions + 100], dim=1)[:, 0]
    scores = ops.neuron_scores(by_columns, padded, every_other, weights, absolute)
    assert torch.equal(scores, expected)


def test_no_positions_and_one_row(ops):
    activation, gradient, _, _ = _case(torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(
        ops.neuron_scores(activation, gradient, none, torch.zeros(0), False), torch.zeros(301)
    )
    one = ops.neuron_scores(
        activation[:1], gradient[:1], torch.tensor([0]), torch.tensor([0.5]), False
    )
    torch.testing.assert_close(one, -0.5 * activation[0] * gradient[0])


def test_huge_and_nan_values_stay_in_their_neuron(ops):
    activation, gradient, positions, weights = _case(torch.float32)
    expected = ops.neuron_scores(activation, gradient, positions, weights, False)
    activation[positions[0], 3] = torch.nan
    activation[positions[0], 200] = 3e38
    gradient[positions[0], 200] = 3e38
    scores = ops.neuron_scores(activation, gradient, positions, weights, False)
    assert scores[3].isnan() and scores[200] == -torch.inf
    others = torch.ones(301, dtype=torch.bool).index_fill(0, torch.tensor([3, 200]), False)
    assert torch.equal(scores[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_values_of_each_dtype(ops, dtype):
    """fp16 and bf16 are summed in float32: a product beyond fp16's range is no infinity; beyond
    float32's it is one, with its sign, and of opposite ones NaN: never selected."""
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    activation = torch.tensor([[1.0, 1, -1, 1], [1, 1, 1, 1]], dtype=dtype) * largest
    gradient = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, -1]], dtype=dtype) * largest
    arguments = (activation, gradient, torch.tensor([0, 1]), torch.ones(2), False)
    scores = ops.neuron_scores(*arguments)
    if dtype == torch.float16:
        square = 65504.0**2
        assert scores.tolist() == [-2 * square, -square, 0, 0]
    elif dtype == torch.float64:
        assert scores.tolist() == [-torch.inf, -torch.inf, 0, 0]  # rounded to float32 at the end
    else:
        assert scores[:2].tolist() == [-torch.inf] * 2 and scores[2:].isnan().all()


def test_a_layer_without_neurons(ops):
    empty = torch.zeros(3, 0)
    assert ops.neuron_scores(empty, empty, torch.tensor([1]), torch.ones(1), True).shape == (0,)


@pytest.mark.parametrize("bad", [-1, 23])
def test_a_position_outside_is_an_error(kernels, bad):
    activation, gradient, _, _ = _case(torch.float32)
    with pytest.raises(IndexError, match=f"position {bad} is outside"):
        kernels.neuron_scores(activation, gradient, torch.tensor([bad]), torch.ones(1), False)


def test_does_not_depend_on_the_number_of_threads(kernels):
    case = _case(torch.float32, rows=600, width=1037, positions=700)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernels.neuron_scores(*case, False)
        torch.set_num_threads(2)
        assert torch.equal(kernels.neuron_scores(*case, False), alone)
    finally:
        torch.set_num_threads(threads)


def test_scores_carry_no_gradient(kernels):
    activation, gradient, positions, weights = _case(torch.float32)
    activation.requires_grad_()
    assert not neuron_scores(activation, gradient, positions, weights).requires_grad


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(kernels, dtype, absolute):
    torch.library.opcheck(torch.ops.trelm.neuron_scores.default, (*_case(dtype), absolute))
