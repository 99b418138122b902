"""Memory bank: Eqs. 5 and 6 against plain loops, and the same state for any number of ranks."""

import itertools
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess import run_ranks

from trelm_ds.config import MemoryConfig
from trelm_ds.distributed import cpu_group
from trelm_ds.errors import CheckpointError, ConfigError, DataError, TrelmError
from trelm_ds.memory import bank as bank_module
from trelm_ds.memory.bank import MemoryBank
from trelm_ds.memory.budget import require_memory, required_bytes
from trelm_ds.memory.layout import KeyLayout
from trelm_ds.memory.shard_files import visited_rows

NUM_KEYS, HIDDEN, SHARDS, STEPS = 61, 8, 16, 4


def name_rows(keys):
    """Initial rows: a function of the key alone."""
    rows = torch.sin(keys[:, None] * 0.7 + torch.arange(HIDDEN) * 1.3)
    return rows.requires_grad_()  # as rows of the embedding table do


def make_bank(num_keys=NUM_KEYS, hidden=HIDDEN, device="cpu", control=None, **config):
    config = MemoryConfig(**({"virtual_shards": SHARDS} | config))
    bank = MemoryBank(num_keys, hidden, config, device=device, control=control)
    bank.initialise(name_rows if hidden == HIDDEN else lambda keys: torch.zeros(len(keys), hidden))
    return bank


def global_step(step):
    """All mentions of a step: keys, sequence ids, window means, <cls> states.

    Twelve sequences; keys repeat within a sequence, within a micro-batch and across ranks. In
    step 3 only sequence 0 has mentions, so all ranks but the first have none; step 4 has none.
    """
    rng = np.random.Generator(np.random.Philox(key=step))
    keys, sequences, local, cls = [], [], [], []
    for sequence in range({3: 1, 4: 0}.get(step, 12)):
        state = rng.standard_normal(HIDDEN)
        for key in rng.zipf(1.3, size=7) % NUM_KEYS:
            keys.append(key)
            sequences.append(12 * step + sequence)
            local.append(rng.standard_normal(HIDDEN) * 10.0 ** rng.integers(-6, 5))
            cls.append(state)
    rows = [
        torch.tensor(np.array(x).reshape(-1, HIDDEN), dtype=torch.float32) for x in (local, cls)
    ]
    return torch.tensor(keys).long(), torch.tensor(sequences).long(), *rows


def stage_share(bank, mentions, rank, world_size, micro_batches=2):
    """Stages the mentions of this rank's sequences in shuffled order."""
    keys, sequences, local, cls = mentions
    for micro in range(micro_batches):
        place = sequences % 12
        mine = (place % world_size == rank) & (place // world_size % micro_batches == micro)
        index = mine.nonzero().squeeze(1)
        index = index[torch.randperm(len(index))]
        bank.stage(keys[index], sequences[index], local[index], cls[index])


def staged_value(x):
    """What a float32 becomes on its way to the owner."""
    return float(np.float16(np.clip(x, -65504, 65504)))


def reference_after(steps, discount, ema="per_occurrence"):
    """The bank by plain loops: Eq. 5 in its order-free form and Eq. 6 as a mean over a set."""
    start = name_rows(torch.arange(NUM_KEYS)).detach().numpy()
    local = {key: start[key].copy() for key in range(NUM_KEYS)}
    global_ = {key: start[key].copy() for key in range(NUM_KEYS)}
    count = dict.fromkeys(range(NUM_KEYS), 0)
    for step in range(1, steps + 1):
        windows, contexts = defaultdict(list), defaultdict(dict)
        for key, sequence, x, h in zip(*(t.tolist() for t in global_step(step)), strict=True):
            windows[key].append([staged_value(v) for v in x])
            contexts[key][sequence] = [staged_value(v) for v in h]
        for key, xs in windows.items():
            keep = (1 - discount) ** (len(xs) if ema == "per_occurrence" else 1)
            hs = list(contexts[key].values())
            for j in range(HIDDEN):
                mean = math.fsum(x[j] for x in xs) / len(xs)
                local[key][j] = np.float32(keep * float(local[key][j]) + (1 - keep) * mean)
                seen = count[key] * float(global_[key][j]) + math.fsum(h[j] for h in hs)
                global_[key][j] = np.float32(seen / (count[key] + len(hs)))
            count[key] += len(hs)
    stack = [torch.from_numpy(np.stack([d[k] for k in range(NUM_KEYS)])) for d in (local, global_)]
    return *stack, torch.tensor([count[k] for k in range(NUM_KEYS)])


def visits(bank, keys):
    """Distinct contexts behind the global memory of each key, of a bank on one rank."""
    return bank._count[bank.layout.slots(keys)]


def flip_bit(path, offset=-20):
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def scenario(rank, world_size, folder):
    """Commits, faults and snapshots on ``world_size`` ranks; what it saw, for comparison."""
    torch.manual_seed(rank)  # other shuffles on other ranks
    folder = Path(folder)
    seen = {"digest": [], "rows": []}
    # Numbers of rows travel on a group of their own, as beside a GPU's.
    bank = make_bank(control=cpu_group())
    for step in range(1, STEPS + 1):
        mentions = global_step(step)
        mine = mentions[0][mentions[1] % 12 % world_size == rank]
        rows = bank.lookup(mine)
        seen["rows"].append((mine, rows.local, rows.global_))
        stage_share(bank, mentions, rank, world_size)
        bank.commit(step)
        seen["digest"].append(bank.digest())
    seen["visited"] = bank.visited()

    # Faults. Each must raise on all ranks alike and leave the state as it was.
    faults = seen["faults"] = {}
    stage_share(bank, global_step(1), rank, world_size)
    faults["replayed"] = error_of(bank.commit, STEPS)
    faults["one rank late"] = error_of(bank.commit, STEPS + (rank == 0) * 5 + 1)
    exchange_counts = bank._exchange_counts
    if rank == world_size - 1:
        bank._exchange_counts = lambda send: [n + 1 for n in exchange_counts(send)]
    faults["lost rows"] = error_of(bank.commit, STEPS + 1)
    bank._exchange_counts = exchange_counts
    bank.drop()
    seen["after faults"] = bank.digest()
    seen["version"] = bank.version

    # Non-finite rows on the last rank alone: refused there, counted everywhere.
    keys, sequences, local, cls = global_step(1)
    if rank == world_size - 1:
        broken = local.clone()
        broken[0, 3], broken[1, 0], broken[2, 7] = math.nan, math.inf, -math.inf
        bank.stage(keys[:4], sequences[:4], broken[:4], cls[:4])
    bank.commit(STEPS + 1)
    seen["rejected"] = bank.rejected_rows
    seen["after rejection"] = bank.digest()
    if rank == 0:
        bank.stage(keys[:2], sequences[:2], local[:2] * math.nan, cls[:2])
    bank.max_rejected_rows = 4
    faults["over budget"] = error_of(bank.commit, STEPS + 2)
    bank.drop()
    seen["after budget"] = bank.digest()

    # Snapshots: this one's own, and one written by two ranks.
    own = folder / f"of-{world_size}"
    own.mkdir(exist_ok=True)
    bank.save_shards(own)
    restored = make_bank()
    restored.digest()  # a collective: every rank has written when it returns
    restored.load_shards(own)
    seen["reloaded"] = restored.digest()
    if (folder / "of-2").is_dir():
        restored = make_bank()
        restored.load_shards(folder / "of-2")
        seen["resharded"] = restored.digest()
    if rank == 0:
        shutil.copytree(own, folder / f"bad-{world_size}")
        flip_bit(sorted((folder / f"bad-{world_size}").iterdir())[-1])
    bank.digest()
    faults["flipped bit"] = error_of(bank.load_shards, folder / f"bad-{world_size}")

    # Ranks that own no key at all.
    lean = make_bank(virtual_shards=1)
    for step in (1, 2):
        stage_share(lean, global_step(step), rank, world_size)
        lean.commit(step)
    seen["one shard"] = lean.digest()
    return seen


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The scenario on 2, 3 and 1 ranks."""
    folder = tmp_path_factory.mktemp("bank")
    two = run_ranks(scenario, 2, str(folder))
    three = run_ranks(scenario, 3, str(folder))
    return {1: [scenario(0, 1, str(folder))], 2: two, 3: three}


def test_state_is_bit_identical_for_any_number_of_ranks(worlds):
    single = worlds[1][0]
    assert len(set(single["digest"])) == STEPS  # also the empty step counts as a version
    for world in worlds.values():
        for seen in world:
            for name in ("digest", "visited", "after faults", "after rejection", "one shard"):
                assert seen[name] == single[name], name


def test_lookup_is_bit_identical_for_any_number_of_ranks(worlds):
    for step in range(1, STEPS + 1):
        expected = reference_after(step - 1, MemoryConfig().discount)
        for world in worlds.values():
            for seen in world:
                keys, local, global_ = seen["rows"][step - 1]
                assert torch.equal(local, expected[0][keys])
                assert torch.equal(global_, expected[1][keys])
    assert len(worlds[2][1]["rows"][2][0]) == 0  # a rank without mentions took part


def test_refused_commits_raise_everywhere_and_change_nothing(worlds):
    for world_size, world in worlds.items():
        for seen in world:
            assert seen["faults"]["replayed"][0] == "ValueError"
            assert f"cannot commit step {STEPS}" in seen["faults"]["replayed"][1]
            assert seen["faults"]["one rank late"][0] == "ValueError"
            assert seen["faults"]["lost rows"][0] == "RuntimeError"
            assert seen["after faults"] == seen["digest"][-1]
            assert seen["version"] == STEPS
            assert seen["rejected"] == 3, world_size
            assert seen["after rejection"] != seen["after faults"]  # the fourth row was fine
            assert seen["faults"]["over budget"][0] == "TrelmError"
            assert seen["after budget"] == seen["after rejection"]


def test_snapshots_load_on_any_number_of_ranks(worlds):
    for world in worlds.values():
        for seen in world:
            assert seen["reloaded"] == seen["after rejection"]
    for world_size in (1, 3):
        for seen in worlds[world_size]:
            assert seen["resharded"] == worlds[2][0]["after rejection"]


def test_one_flipped_bit_fails_the_load_on_all_ranks(worlds):
    for world in worlds.values():
        reports = [seen["faults"]["flipped bit"] for seen in world]
        assert {kind for kind, _ in reports} == {"CheckpointError"}
        assert sum("is not what was saved" in text for _, text in reports) == 1
        assert all("bad-" in text for _, text in reports)


@pytest.mark.parametrize("ema", ["per_occurrence", "per_step"])
def test_bank_equals_plain_loops(ema, monkeypatch):
    monkeypatch.setattr(bank_module, "_CPU_BLOCK", 5)  # an update of several blocks
    bank = make_bank(ema=ema, discount=0.3)
    for step in range(1, STEPS + 1):
        stage_share(bank, global_step(step), 0, 1)
        bank.commit(step)
    expected = reference_after(STEPS, 0.3, ema)
    assert expected[2].max() > 10 and (expected[2] == 0).any()
    keys = torch.arange(NUM_KEYS)
    rows = bank.lookup(keys)
    assert torch.equal(rows.local, expected[0]) and torch.equal(rows.global_, expected[1])
    assert torch.equal(visits(bank, keys), expected[2])
    assert bank.visited() == int((expected[2] > 0).sum())


def test_order_and_micro_batching_do_not_matter():
    digests = set()
    for micro_batches in (1, 3, 12):
        bank = make_bank()
        for step in (1, 2):
            stage_share(bank, global_step(step), 0, 1, micro_batches)
            bank.commit(step)
        digests.add(bank.digest())
    assert len(digests) == 1


def test_local_update_is_eq5_averaged_over_all_orders():
    discount, mentions = 0.1, torch.randn(4, HIDDEN).half().float()
    start = name_rows(torch.tensor([5]))[0].double()
    finals = []
    for order in itertools.permutations(mentions.double()):
        memory = start
        for x in order:
            memory = (1 - discount) * memory + discount * x  # Eq. 5 as printed
        finals.append(memory)
    bank = make_bank(discount=discount)
    bank.stage(torch.full((4,), 5), torch.arange(4), mentions, mentions)
    bank.commit(1)
    got = bank.lookup(torch.tensor([5])).local[0].double()
    torch.testing.assert_close(got, torch.stack(finals).mean(0), rtol=1e-6, atol=1e-7)


def test_global_memory_is_the_mean_over_distinct_contexts():
    """Eq. 6 over three steps, a key named several times in one sequence counts once."""
    bank, states = make_bank(), torch.randn(6, HIDDEN).half().float()
    for step in range(3):
        sequences = torch.tensor([2 * step, 2 * step, 2 * step, 2 * step + 1])
        bank.stage(torch.full((4,), 9), sequences, torch.randn(4, HIDDEN), states[sequences])
        bank.commit(step + 1)
    rows = bank.lookup(torch.tensor([9]))
    assert visits(bank, torch.tensor([9])).tolist() == [6]
    torch.testing.assert_close(rows.global_[0], states.mean(0), rtol=1e-6, atol=1e-6)


def test_local_stands_in_for_global_before_the_first_visit():
    bank = make_bank()
    rows = bank.lookup(torch.tensor([[3], [60]]).flatten())
    assert torch.equal(rows.local, name_rows(torch.tensor([3, 60])))
    assert torch.equal(rows.global_, rows.local) and not rows.local.requires_grad
    assert not visits(bank, torch.arange(NUM_KEYS)).any()


def test_rows_are_clipped_to_the_wire_and_not_rejected():
    bank = make_bank(discount=0.5)
    bank.stage(
        torch.tensor([1]), torch.tensor([0]), torch.full((1, HIDDEN), 1e30), -torch.ones(1, HIDDEN)
    )
    bank.commit(1)
    assert bank.rejected_rows == 0
    start = name_rows(torch.tensor([1])).double()
    assert torch.equal(bank.lookup(torch.tensor([1])).local, (0.5 * start + 32752).float())


def test_staging_keeps_a_copy():
    bank, rows = make_bank(), torch.ones(2, HIDDEN)
    bank.stage(torch.tensor([1, 2]), torch.tensor([0, 1]), rows, rows)
    rows.zero_()
    bank.commit(1)
    assert torch.equal(bank.lookup(torch.tensor([1])).global_, torch.ones(1, HIDDEN))


def test_rejected_rows_are_logged_with_their_keys(caplog):
    bank, rows = make_bank(), torch.ones(3, HIDDEN)
    rows[1, 2] = math.inf
    bank.stage(torch.tensor([4, 17, 8]), torch.arange(3), torch.ones(3, HIDDEN), rows)
    bank.commit(1)
    assert "1 non-finite rows rejected, keys [17]" in caplog.text
    assert visits(bank, torch.tensor([4, 17, 8])).tolist() == [1, 0, 1]


def test_bad_arguments_are_refused():
    bank = make_bank()
    with pytest.raises(DataError, match="keys 0 to 61 asked for, expected 0 to 60"):
        bank.lookup(torch.tensor([0, NUM_KEYS]))
    bank.stage(torch.tensor([-1]), torch.tensor([0]), torch.ones(1, HIDDEN), torch.ones(1, HIDDEN))
    with pytest.raises(DataError, match="-1"):
        bank.commit(1)
    with pytest.raises(RuntimeError, match="save between"):
        bank.save_shards(".")
    with pytest.raises(ValueError, match="expected rows"):
        bank.stage(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 3), torch.ones(1, HIDDEN))
    with pytest.raises(DataError, match="initial row of key"):
        bank.initialise(lambda keys: torch.full((len(keys), HIDDEN), math.nan))
    with pytest.raises(ConfigError, match="keys"):
        make_bank(num_keys=0)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A bank and its snapshot, in many files."""
    monkeypatch.setattr(bank_module, "FILE_BYTES", 1000)
    bank = make_bank()
    stage_share(bank, global_step(1), 0, 1)
    bank.commit(1)
    folder = tmp_path / "memory"
    folder.mkdir()
    assert len(bank.save_shards(folder)) == len(list(folder.iterdir())) > 3
    return bank, folder


def test_a_snapshot_restores_the_bank_and_training_goes_on(snapshot):
    bank, folder = snapshot
    restored = make_bank()
    restored.load_shards(folder)
    assert (restored.digest(), restored.version) == (bank.digest(), 1)
    for b in (bank, restored):
        stage_share(b, global_step(2), 0, 1)
        b.commit(2)
    assert restored.digest() == bank.digest()


def test_more_virtual_shards_than_keys(tmp_path):
    bank = make_bank(virtual_shards=1024)
    stage_share(bank, global_step(1), 0, 1)
    bank.commit(1)
    bank.save_shards(tmp_path)
    restored = make_bank(virtual_shards=1024)
    restored.load_shards(tmp_path)
    assert restored.digest() == bank.digest()


def truncate(folder, files):
    files[1].write_bytes(files[1].read_bytes()[:-100])


def empty(folder, files):
    files[0].write_bytes(b"")


def remove_first(folder, files):
    files[0].unlink()


def remove_middle(folder, files):
    files[2].unlink()


def remove_last(folder, files):
    files[-1].unlink()


def remove_all(folder, files):
    shutil.rmtree(folder)


def mix_versions(folder, files):
    other = make_bank()
    other.commit(1), other.commit(2)
    keep = {path: path.read_bytes() for path in files[1:]}
    other.save_shards(folder)
    for path, data in keep.items():
        path.write_bytes(data)


def flip_data(folder, files):
    flip_bit(files[2])


def flip_header(folder, files):
    data = files[0].read_bytes()
    at = data.index(b'"version":"1"') + len('"version":"')
    files[0].write_bytes(data[:at] + b"x" + data[at + 1 :])


DAMAGES = {
    truncate: "unreadable",
    empty: "unreadable",
    remove_first: "missing",
    remove_middle: "missing",
    remove_last: "missing",
    remove_all: "no memory bank files",
    mix_versions: "another snapshot",
    flip_data: "is not what was saved",
    flip_header: "unreadable",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_snapshot_is_refused(snapshot, damage):
    _, folder = snapshot
    damage(folder, sorted(folder.iterdir()))
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        make_bank().load_shards(folder)


@pytest.mark.parametrize(
    "other", [{"num_keys": 60}, {"hidden": 4}, {"virtual_shards": 8}], ids=lambda x: next(iter(x))
)
def test_a_snapshot_of_another_bank_is_refused(snapshot, other):
    with pytest.raises(CheckpointError, match="was saved with"):
        make_bank(**other).load_shards(snapshot[1])


def test_visited_rows_of_a_snapshot(snapshot):
    bank, folder = snapshot
    num_entities = 20
    count = visits(bank, torch.arange(NUM_KEYS))
    found = {}
    for keys, rows in visited_rows(folder, num_entities):
        found.update(zip(keys.tolist(), rows, strict=True))
    assert set(found) == set((count[:num_entities] > 0).nonzero().flatten().tolist())
    keys = sorted(found)
    assert torch.equal(torch.stack([found[k] for k in keys]), bank.lookup(torch.tensor(keys)).local)


@pytest.mark.parametrize("num_keys", [1, 2, 61, 2654435761 % 2**20, 100_003])
def test_layout_is_a_bijection_and_covers_all_slots(num_keys):
    keys = torch.arange(num_keys)
    for world_size in (1, 3, 8):
        layout = KeyLayout(num_keys, 1024, world_size)
        slots = layout.slots(keys)
        assert torch.equal(slots.sort().values, keys)
        assert torch.equal(layout.keys(slots), keys)
        bounds = layout.rank_bounds()
        assert bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, num_keys)
        assert [s for r in range(world_size) for s in layout.shards_of(r)] == list(range(1024))


def test_frequent_keys_are_spread_over_the_ranks():
    """Keys numbered by frequency, looked up in proportion to 1 / rank, once per step and rank."""
    layout = KeyLayout(100_000, 1024, 8)
    slots = layout.slots(torch.arange(5000))
    owner = torch.bucketize(slots, torch.tensor(layout.rank_bounds()[1:]), right=True)
    load = torch.bincount(owner, minlength=8).double()
    assert load.max() / load.mean() < 1.1


def test_memory_budget():
    bank = make_bank()
    parts = required_bytes(NUM_KEYS, HIDDEN, 1, 10, SHARDS)
    held = sum(t.numel() * t.element_size() for t in (bank._rows, bank._count))
    assert parts["shard"] == held
    # The paper's entity count in float32: 2.37 GB on each of 8 ranks.
    assert required_bytes(3_085_345, 768, 8, 0, 1024)["shard"] == pytest.approx(2.37e9, rel=0.01)
    # Whole virtual shards: of 600 ranks 424 have two of 1,024.
    layout = KeyLayout(3_085_345, 1024, 600)
    fullest = max(b - a for a, b in itertools.pairwise(layout.rank_bounds()))
    per_row = required_bytes(1, 768, 1, 0, 1)["shard"]
    assert 0 <= required_bytes(3_085_345, 768, 600, 0, 1024)["shard"] / per_row - fullest <= 1
    require_memory(3_085_345, 768, 8, 2048, 1024, max_gib=None)
    require_memory(3_085_345, 768, 8, 2048, 1024, max_gib=4)
    with pytest.raises(ConfigError, match=r"needs 2\.\d+ GiB on each of 8 ranks(.|\n)*16 ranks"):
        require_memory(3_085_345, 768, 8, 2048, 1024, max_gib=1)


@pytest.mark.parametrize("device, backend", [("cpu", "nccl"), ("cuda", "gloo")])
def test_a_group_that_cannot_carry_the_bank_is_refused(monkeypatch, device, backend):
    dist = bank_module.dist
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    with pytest.raises(ConfigError, match=f"bank on {device} cannot use the {backend}"):
        MemoryBank(NUM_KEYS, HIDDEN, MemoryConfig(), device=device)


@pytest.mark.gpu
def test_state_is_the_same_on_a_gpu(worlds):
    bank = make_bank(device="cuda")
    for step in range(1, STEPS + 1):
        stage_share(bank, global_step(step), 0, 1)
        bank.commit(step)
        assert bank.digest() == worlds[1][0]["digest"][step - 1]


def test_budget_error_is_for_the_user():
    bank = make_bank()
    bank.max_rejected_rows = 0
    nan = torch.full((1, HIDDEN), math.nan)
    bank.stage(torch.tensor([1]), torch.tensor([0]), nan, nan)
    with pytest.raises(TrelmError, match="1 non-finite rows rejected .limit 0."):
        bank.commit(1)
