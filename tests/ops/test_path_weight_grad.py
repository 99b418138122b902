import pytest
import torch

from trelm_ds.ops import path_weight_grad

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROWS = {
    "scattered": [0, 3, 4, 9, 28],
    "block": list(range(8, 19)),
    "first": [0],
    "last": [28],
    "all": list(range(29)),
    "none": [],
}


def _case(dtype=torch.float64, tokens=31, width=29, depth=13):
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(tokens, width, generator=generator).to(dtype)
    return grad_out, torch.randn(tokens, depth, generator=generator).to(dtype)


def _rows(name):
    return torch.tensor(ROWS[name], dtype=torch.int64)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_masked_dense_gradient(ops, dtype, name):
    grad_out, inputs = _case(dtype)
    rows = _rows(name)
    out = ops.path_weight_grad(grad_out, inputs, rows)
    expected = torch.zeros(29, 13, dtype=torch.float64)
    expected[rows] = (grad_out.double().t() @ inputs.double())[rows]
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected.to(dtype))
    off = torch.ones(29, dtype=torch.bool).index_fill(0, rows, False)
    assert (out[off] == 0).all()


@pytest.mark.parametrize("name", ["scattered", "block"])
def test_non_contiguous_inputs(ops, name):
    grad_out, inputs = _case()
    expected = ops.path_weight_grad(grad_out, inputs, _rows(name))
    out = ops.path_weight_grad(
        grad_out.t().contiguous().t(), torch.randn(31, 26).double()[:, ::2].copy_(inputs),
        _rows(name),
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_a_block_by_views_equals_the_same_rows_gathered(ops):
    grad_out, inputs = _case()
    block = ops.path_weight_grad(grad_out, inputs, _rows("block"))
    gathered = ops.path_weight_grad(grad_out, inputs, torch.cat([_rows("block"), _rows("last")]))
    torch.testing.assert_close(block[8:19], gathered[8:19], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["scattered", "block", "first"])
def test_one_token(ops, dtype, name):
    grad_out, inputs = _case(dtype, tokens=1)
    out = ops.path_weight_grad(grad_out, inputs, _rows(name))
    expected = (grad_out.t() * inputs).to(dtype)  # one product each: exact in every dtype
    keep = torch.zeros(29, 1, dtype=torch.bool).index_fill(0, _rows(name), True)
    assert torch.equal(out, torch.where(keep, expected, 0))


@pytest.mark.parametrize("name", ["scattered", "block"])
def test_what_is_not_finite_off_the_path_stays_there(ops, name):
    grad_out, inputs = _case(torch.float32)
    expected = ops.path_weight_grad(grad_out, inputs, _rows(name))
    off = torch.ones(29, dtype=torch.bool).index_fill(0, _rows(name), False)
    grad_out[:, off] = torch.tensor([torch.nan, torch.inf, 3e38]).repeat(10)[: int(off.sum())]
    assert torch.equal(ops.path_weight_grad(grad_out, inputs, _rows(name)), expected)
    grad_out[0, _rows(name)[0]] = torch.inf
    out = ops.path_weight_grad(grad_out, inputs, _rows(name))
    assert not out[_rows(name)[0]].isfinite().any()  # on the path it shows, in its own row
    assert torch.equal(out[_rows(name)[1:]], expected[_rows(name)[1:]])


def test_a_matrix_without_columns(ops):
    for name in ("scattered", "block", "none"):
        assert ops.path_weight_grad(*_case(depth=0), _rows(name)).shape == (29, 0)
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.path_weight_grad(torch.zeros(3, 0), torch.zeros(3, 4), none).shape == (0, 4)


def test_no_tokens(ops):
    for name in ("scattered", "block"):
        out = ops.path_weight_grad(torch.zeros(0, 29), torch.zeros(0, 13), _rows(name))
        assert torch.equal(out, torch.zeros(29, 13))


@pytest.mark.parametrize("rows", [[-1], [29], [3, 2], [3, 3]])
def test_rows_outside_or_out_of_order_are_an_error(kernels, rows):
    with pytest.raises(IndexError, match="ascend strictly"):
        kernels.path_weight_grad(*_case(), torch.tensor(rows))


@pytest.mark.parametrize("name", ["scattered", "block", "none"])
def test_gradcheck(kernels, name):
    grad_out, inputs = (t.requires_grad_() for t in _case(tokens=5))
    assert torch.autograd.gradcheck(
        lambda g, x: path_weight_grad(g, x, _rows(name)), (grad_out, inputs)
    )
    assert torch.autograd.gradgradcheck(
        lambda g, x: path_weight_grad(g, x, _rows(name)), (grad_out, inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["scattered", "block", "none"])
def test_opcheck(kernels, name, dtype):
    """Schema, autograd registration, fake tensor and dispatch under AOT."""
    grad_out, inputs = (t.requires_grad_() for t in _case(dtype))
    torch.library.opcheck(torch.ops.trelm.path_weight_grad.default, (grad_out, inputs, _rows(name)))


def test_traces_without_a_graph_break(kernels):
    from trelm_ds.ops import neuron_scores, select_paths

    def step(grad_out, inputs, positions, weights):
        scores = neuron_scores(grad_out, grad_out, positions, weights, absolute=True)
        return path_weight_grad(grad_out, inputs, select_paths(scores, 5))

    grad_out, inputs = _case(torch.float32)
    arguments = (grad_out, inputs, torch.arange(4), torch.ones(4))
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*arguments), step(*arguments))
