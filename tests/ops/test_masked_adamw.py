import pytest
import torch

NUMBERS = dict(lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROWS, WIDTH = 12, 40


def _matrix(dtype=torch.float32, rows=ROWS, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(rows * width, generator=generator)
    grad = torch.randn(rows * width, generator=generator)
    exp_avg = torch.randn(rows * width, generator=generator) * 0.1
    exp_avg_sq = torch.rand(rows * width, generator=generator) * 0.01
    return [t.to(dtype) for t in (param, grad, exp_avg, exp_avg_sq)]


def _call(ops, tensors, counts, start=0, width=WIDTH, columns=None, update_count=None):
    ops.masked_adamw_(
        *(*tensors, start, width, torch.as_tensor(counts), columns, update_count),
        *NUMBERS.values(),
    )


def _torch_adamw(param, grad, exp_avg, exp_avg_sq, count):
    """torch.optim.AdamW's update number ``count`` from the given state."""
    parameter = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
    )
    parameter.grad = grad.clone()
    optimizer.state[parameter] = {
        "step": torch.tensor(count - 1.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def _assert_within_an_ulp(found, expected):
    torch.testing.assert_close(
        found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("count", [1, 2, 1000, 10**9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_equal_torch_adamw(ops, dtype, count):
    tensors = _matrix(dtype)
    expected = _torch_adamw(*tensors, count)
    _call(ops, tensors, [count] * ROWS)
    for found, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
        _assert_within_an_ulp(found, wanted)


@pytest.mark.parametrize("rows", [[0, 3, 4, 9, 11], list(range(5, 9)), list(range(ROWS))])
def test_each_row_counts_its_own_updates(ops, rows):
    tensors = _matrix()
    old = [t.clone() for t in tensors]
    counts = torch.zeros(ROWS, dtype=torch.int64)
    counts[rows] = torch.arange(len(rows)) ** 3 + 1
    _call(ops, tensors, counts)
    for row in range(ROWS):
        cut = slice(row * WIDTH, (row + 1) * WIDTH)
        before = [t[cut] for t in old]
        if counts[row]:
            expected = _torch_adamw(*before, int(counts[row]))
        else:
            expected = (before[0], before[2], before[3])
        for found, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
            _assert_within_an_ulp(found[cut], wanted)


def test_many_scattered_rows(ops):
    """More runs of rows than are worth a view each."""
    tensors = _matrix(rows=120, width=8)
    old = [t.clone() for t in tensors]
    counts = (torch.arange(120) % 3 != 0).long() * torch.randint(1, 50, (120,))
    _call(ops, tensors, counts, width=8)
    for row in range(120):
        cut = slice(row * 8, row * 8 + 8)
        before = [t[cut] for t in old]
        expected = _torch_adamw(*before, int(counts[row])) if counts[row] else None
        expected = expected or (before[0], before[2], before[3])
        for found, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
            torch.testing.assert_close(found[cut], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("restricted", ["rows", "columns", "columns and counts"])
def test_off_the_path_nothing_changes_by_a_bit(ops, dtype, restricted):
    tensors = _matrix(dtype)
    on = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    counts = torch.zeros(ROWS, dtype=torch.int64)
    counts[[1, 2, 7]] = 5
    on[[1, 2, 7]] = True
    columns = update_count = None
    if restricted != "rows":
        columns = (torch.arange(WIDTH) % 5 == 0).to(torch.uint8)
        on &= columns.bool()
    if "counts" in restricted:
        update_count = torch.full((ROWS * WIDTH,), 4.0)
    on = on.flatten()
    tensors[1][~on] = torch.nan  # a gradient off the path is not even read into the result
    tensors[3][~on] = torch.finfo(dtype).max
    old = [t.clone() for t in tensors]
    _call(ops, tensors, counts, columns=columns, update_count=update_count)
    for found, before in zip(tensors, old, strict=True):
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(found.view(bits)[~on], before.view(bits)[~on])
    # at 8 bits of mantissa, a step of lr leaves part of the larger weights where they are
    least = 0.6 if dtype == torch.bfloat16 else 0.9
    for found, before in ((tensors[0], old[0]), (tensors[2], old[2])):
        assert (found[on] != before[on]).float().mean() > least
        assert found[on].isfinite().all()
    if update_count is not None:
        assert torch.equal(update_count, 4.0 + on.float())


def test_element_counts_equal_torch_adamw_element_by_element(ops):
    tensors = _matrix()
    old = [t.clone() for t in tensors]
    counts = torch.tensor([1, 0, 1, 1] * 3)
    columns = (torch.arange(WIDTH) % 3 != 0).to(torch.uint8)
    updates = torch.randint(0, 300, (ROWS * WIDTH,)).float()
    before = updates.clone()
    _call(ops, tensors, counts, columns=columns, update_count=updates)
    on = (counts[:, None].bool() & columns.bool()[None]).flatten()
    assert torch.equal(updates, before + on.float())
    for i in on.nonzero().flatten()[::7].tolist():
        expected = _torch_adamw(*(t[i : i + 1] for t in old), int(before[i]) + 1)
        for found, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_a_cut_anywhere_gives_the_same_bits(kernels, masked):
    counts = torch.tensor([3, 3, 0, 1, 1, 7, 0, 0, 2, 2, 2, 9])
    columns = (torch.arange(WIDTH) % 3 != 0).to(torch.uint8) if masked else None
    whole = _matrix()
    updates = torch.arange(ROWS * WIDTH).float() if masked else None
    whole_updates = updates.clone() if masked else None
    _call(kernels, whole, counts, columns=columns, update_count=whole_updates)
    cuts = [0, 1, 57, 58, 160, 333, 479, 480]
    cut = _matrix()
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        pieces = [t[start:end] for t in cut]
        piece_updates = updates[start:end] if masked else None
        _call(kernels, pieces, counts, start, columns=columns, update_count=piece_updates)
    for found, expected in zip(cut, whole, strict=True):
        assert torch.equal(found, expected)
    if masked:
        assert torch.equal(updates, whole_updates)


def test_a_fragment_of_the_reference(kernels):
    """The reference at cuts inside rows, against the kernel on the whole matrix."""
    from trelm_ds.ops import reference

    counts = torch.arange(ROWS) % 4
    for columns in (None, (torch.arange(WIDTH) % 3 != 0).to(torch.uint8)):
        whole = _matrix()
        _call(kernels, whole, counts, columns=columns)
        cut = _matrix()
        for start, end in ((0, 57), (57, 60), (60, 61), (61, 400), (400, 480)):
            _call(reference, [t[start:end] for t in cut], counts, start, columns=columns)
        for found, expected in zip(cut, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_bad_gradient_spoils_its_own_entry_alone(ops, bad, masked):
    columns = torch.ones(WIDTH, dtype=torch.uint8) if masked else None
    tensors, clean = _matrix(), _matrix()
    spoilt = torch.zeros(ROWS * WIDTH, dtype=torch.bool)
    spoilt[[3 * WIDTH + 7, 5 * WIDTH]] = True
    tensors[1][spoilt] = bad
    counts = torch.tensor([0, 1, 2] * 4)
    for t in (tensors, clean):
        _call(ops, t, counts, columns=columns)
    on = counts.repeat_interleave(WIDTH) > 0
    for found, wanted in zip((tensors[0], *tensors[2:]), (clean[0], *clean[2:]), strict=True):
        assert torch.equal(found[~spoilt | ~on], wanted[~spoilt | ~on])
    assert not tensors[3][spoilt & on].isfinite().any()


def test_one_row_and_one_element(ops):
    for width, start, stop in ((40, 0, 40), (40, 3, 4), (1, 0, 1)):
        tensors = [t[start:stop].clone() for t in _matrix(rows=1, width=width)]
        expected = _torch_adamw(*tensors, 9)
        _call(ops, tensors, [9], start, width=width)
        for found, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
            _assert_within_an_ulp(found, wanted)


def test_biases_and_empty_fragments(ops):
    tensors = _matrix(rows=50, width=1)
    expected = _torch_adamw(*tensors, 4)
    old = [t.clone() for t in tensors]
    counts = torch.tensor([4, 0] * 25)
    _call(ops, tensors, counts, width=1)
    for found, wanted, before in zip(
        (tensors[0], *tensors[2:]), expected, (old[0], *old[2:]), strict=True
    ):
        torch.testing.assert_close(found[::2], wanted[::2], rtol=1e-6, atol=1e-8)
        assert torch.equal(found[1::2], before[1::2])
    _call(ops, [t[:0] for t in tensors], counts, width=1)
    _call(ops, tensors, torch.zeros(50, dtype=torch.int64), width=1)


def test_does_not_depend_on_the_number_of_threads(kernels):
    counts = torch.randint(0, 4, (1500,))
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            tensors = _matrix(rows=1500, width=67)
            _call(kernels, tensors, counts, width=67)
            results.append(tensors)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_are_errors(kernels):
    tensors = _matrix()
    with pytest.raises(RuntimeError, match="outside a matrix of 3 rows"):
        _call(kernels, tensors, [1, 1, 1])
    with pytest.raises(RuntimeError, match=f"outside a matrix of {ROWS} rows"):
        _call(kernels, tensors, [1] * ROWS, start=2**63 - 2)
    with pytest.raises(RuntimeError, match=f"outside a matrix of {ROWS} rows"):
        _call(kernels, tensors, [1] * ROWS, start=1)
    with pytest.raises(RuntimeError, match="contiguous, flat"):
        _call(kernels, [t[::2] for t in tensors], [1] * ROWS)
    with pytest.raises(RuntimeError, match="one dtype|one length"):
        _call(kernels, [tensors[0], tensors[1].double(), *tensors[2:]], [1] * ROWS)
    with pytest.raises(RuntimeError, match="columns must be uint8"):
        _call(kernels, tensors, [1] * ROWS, columns=torch.ones(WIDTH))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kernels, dtype, full):
    columns = torch.ones(WIDTH, dtype=torch.uint8) if full else None
    updates = torch.zeros(ROWS * WIDTH) if full else None
    torch.library.opcheck(
        torch.ops.trelm.masked_adamw_.default,
        (*_matrix(dtype), 0, WIDTH, torch.ones(ROWS, dtype=torch.int64), columns, updates)
        + tuple(NUMBERS.values()),
    )
