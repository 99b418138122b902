"""Batches are a function of the step: of no rank, worker, split into micro-batches, or restart."""

import itertools
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from tiny_corpus import CLS, SEP, damage

from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.heldout import heldout_batches
from trelm_ds.data.loader import StepLoader
from trelm_ds.data.order import stream_position
from trelm_ds.data.shards import write_manifest
from trelm_ds.data.special import SpecialTokens
from trelm_ds.data.tables import KnowledgeTables
from trelm_ds.errors import ConfigError, DataError, LoaderError

BUSY = {
    "injection__probability": 0.6,
    "decoding__triple": "all",
    "data__mention_mask_probability": 0.3,
}


def loader(corpus, graph, tables, config, rank=0, world=1, **options) -> StepLoader:
    return StepLoader(config, corpus.folder, rank, world, graph=graph, tables=tables, **options)


def steps_of(loader, start, count):
    return list(itertools.islice(loader.iterate(start), count))


def assert_equal_steps(a, b):
    assert len(a) == len(b)
    for batch_a, batch_b in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert vars(batch_a).keys() == vars(batch_b).keys()
        for name, value in vars(batch_a).items():
            other = getattr(batch_b, name)
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


def sequences(batches) -> dict:
    """Stream position -> everything a batch says about that sequence, without padding."""
    found = {}
    for batch in batches:
        width = batch.input_ids.shape[1]
        for row, position in enumerate(batch.stream_positions.tolist()):
            length = int(batch.attention_mask[row].sum())
            targets = [
                (p % width, label, mention)
                for p, label, mention in zip(
                    batch.mlm_positions.tolist(),
                    batch.mlm_labels.tolist(),
                    batch.mlm_mention.tolist(),
                    strict=True,
                )
                if p // width == row
            ]
            knowledge = []
            for i, (at, left, right) in enumerate(batch.mention_spans.tolist()):
                if at == row:
                    decoded = [
                        (relation, [t for t in tokens if t >= 0])
                        for mention, relation, tokens in zip(
                            batch.decode_mention.tolist(),
                            batch.decode_relation.tolist(),
                            batch.decode_tokens.tolist(),
                            strict=True,
                        )
                        if mention == i
                    ]
                    fields = ("keys", "injected")
                    numbers = [int(getattr(batch, f"mention_{f}")[i]) for f in fields]
                    fields = ("role", "relation", "other")
                    numbers += [int(getattr(batch, f"injection_{f}")[i]) for f in fields]
                    knowledge.append((left, right, *numbers, decoded))
            assert position not in found
            found[position] = (
                batch.original_ids[row, :length].tolist(),
                batch.input_ids[row, :length].tolist(),
                targets,
                knowledge,
            )
    return found


def test_the_global_batch_is_the_same_for_every_split_of_it(corpus, graph, tables, configure):
    expected = None
    for world, accumulation, micro in ((1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 2, 1)):
        config = configure(
            train__per_device_train_batch_size=micro,
            train__gradient_accumulation_steps=accumulation,
            **BUSY,
        )
        ranks = [loader(corpus, graph, tables, config, rank, world) for rank in range(world)]
        assert {r.global_batch for r in ranks} == {8}
        per_rank = [steps_of(r, 11, 3) for r in ranks]  # 96 samples: an epoch ends in between
        found = []
        for step, micro_batches in enumerate(zip(*per_rank, strict=True), 11):
            assert {len(m) for m in micro_batches} == {accumulation}
            batches = list(itertools.chain(*micro_batches))
            assert len({tuple(b.negatives.tolist()) for b in batches}) == 1
            content = sequences(batches)
            assert sorted(content) == list(range(8 * step, 8 * step + 8))
            found.append((content, batches[0].negatives.tolist()))
        assert expected is None or found == expected
        expected = found
        # Micro-batch a of rank r starts at (a W + r) micro.
        for rank, steps in enumerate(per_rank):
            for a, batch in enumerate(steps[0]):
                assert batch.stream_positions[0] == 88 + (a * world + rank) * micro
    assert expected[0][1] != expected[1][1]


def test_resuming_from_a_step_equals_going_on(corpus, graph, tables, configure):
    config = configure(train__gradient_accumulation_steps=2, **BUSY)
    uninterrupted = steps_of(loader(corpus, graph, tables, config), 0, 15)
    for k in (1, 7, 12):
        resumed = steps_of(loader(corpus, graph, tables, config), k, 15 - k)
        assert_equal_steps(uninterrupted[k:], resumed)


def test_every_sample_is_seen_once_an_epoch_and_masked_anew(corpus, graph, tables, configure):
    config = configure(train__per_device_train_batch_size=8)
    steps = steps_of(loader(corpus, graph, tables, config), 0, 24)
    ids_of = {tuple(s.ids.tolist()): s.id for s in corpus.samples["train"]}
    assert len(ids_of) == 96
    orders, masks = [], []
    for epoch in range(2):
        found = sequences(itertools.chain(*steps[12 * epoch : 12 * epoch + 12]))
        orders.append([ids_of[tuple(found[p][0])] for p in sorted(found)])
        masks.append({ids_of[tuple(f[0])]: f[2] for f in found.values()})
        assert sorted(orders[-1]) == list(range(96))
    assert orders[0] != orders[1]
    assert sum(masks[0][i] != masks[1][i] for i in range(96)) > 80


def test_injected_spans_are_never_targets(corpus, graph, tables, configure):
    config = configure(
        train__per_device_train_batch_size=8,
        data__mlm_probability=0.9,
        data__mention_mask_probability=0.9,
        injection__selection="all",
        injection__probability=0.5,
    )
    special = SpecialTokens.load(corpus.folder, len(corpus.words))
    injected = free_targets = 0
    for (batch,) in steps_of(loader(corpus, graph, tables, config), 0, 24):
        is_target = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        is_target[batch.mlm_positions] = True
        assert (batch.mlm_positions.diff() > 0).all()
        is_target = is_target.view_as(batch.input_ids)
        assert torch.equal(batch.original_ids[is_target], batch.mlm_labels)
        assert torch.equal(batch.input_ids[~is_target], batch.original_ids[~is_target])
        assert not np.isin(batch.mlm_labels, special.all).any()
        spans = batch.mention_spans.tolist()
        for (row, left, right), here in zip(spans, batch.mention_injected.tolist(), strict=True):
            assert not (here and is_target[row, left:right].any())
            injected += here
            free_targets += not here and bool(is_target[row, left:right].all())
    assert injected > 100 and free_targets > 100


def test_targets_name_the_entity_mention_they_are_all_tokens_of(corpus, graph, tables, configure):
    config = configure(train__per_device_train_batch_size=8, **BUSY)
    spans_of = {tuple(s.ids.tolist()): s.spans.tolist() for s in corpus.samples["train"]}
    whole = text = 0
    for (batch,) in steps_of(loader(corpus, graph, tables, config), 0, 12):
        width = batch.input_ids.shape[1]
        groups = batch.mlm_mention_group.tolist()
        assert sorted(set(groups) - {-1}) == list(range(batch.num_mlm_mentions))
        found = {}
        for p, mention, group in zip(
            batch.mlm_positions.tolist(), batch.mlm_mention.tolist(), groups, strict=True
        ):
            assert (mention < 0) == (group < 0)
            text += mention < 0
            if group >= 0:
                found.setdefault(group, []).append((p // width, p % width, mention))
        for tokens in found.values():
            row, left, key = tokens[0]
            length = int(batch.attention_mask[row].sum())
            spans = spans_of[tuple(batch.original_ids[row, :length].tolist())]
            assert [left, tokens[-1][1] + 1, key] in spans and key < graph.num_entities
            assert [t[1] for t in tokens] == list(range(left, tokens[-1][1] + 1))
        whole += len(found)
    assert whole > 20 and text > 100


def test_methods_mask_the_same_tokens_elsewhere(corpus, graph, tables, configure):
    """Two methods differ in what they inject; outside of it their inputs are the same."""
    settings = {"train__per_device_train_batch_size": 96, "data__mlm_probability": 0.5}
    plain = configure(
        injection__form="none", memory__enabled=False, decoding__enabled=False, **settings
    )
    ((mlm,),) = steps_of(loader(corpus, graph, tables, plain), 0, 1)
    ((trelm,),) = steps_of(loader(corpus, graph, tables, configure(**settings)), 0, 1)
    assert len(mlm.mention_keys) == len(mlm.negatives) == 0
    outside = torch.ones_like(mlm.input_ids, dtype=torch.bool)
    for (row, left, right), here in zip(
        trelm.mention_spans.tolist(), trelm.mention_injected.tolist(), strict=True
    ):
        if here:
            outside[row, left:right] = False
    assert torch.equal(mlm.original_ids, trelm.original_ids)
    assert torch.equal(mlm.input_ids[outside], trelm.input_ids[outside])


def test_epochs(corpus, graph, tables, configure):
    config = configure(train__gradient_accumulation_steps=4)
    made = loader(corpus, graph, tables, config)  # G = 16, 96 samples
    assert [made.epoch_of_step(s) for s in (0, 5, 6, 11, 12)] == [0, 0, 1, 1, 2]
    assert made.epochs(9) == 1.5
    assert (made.num_samples, made.num_keys) == (96, 24 + 5)


# --- loader processes -----------------------------------------------------------------------


def is_running(pid) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_loader_processes(corpus, graph, tables, configure, tmp_path):
    """Same batches as without; a scheduler's signals do not end them; damage is one clear line.

    One test, since each process takes seconds to start.
    """
    folder = tmp_path / "data"
    shutil.copytree(corpus.folder, folder)
    graph, tables = KnowledgeGraph.load(folder), KnowledgeTables.load(folder)
    expected = steps_of(loader(corpus, graph, tables, configure(**BUSY)), 3, 12)

    config = configure(data__num_workers=2, **BUSY)
    made = StepLoader(config, folder, 0, 1, graph=graph, tables=tables)
    state = torch.get_rng_state()
    batches = made.iterate(3)
    pids = [p.pid for p in made._processes]
    assert len(pids) == 2
    # Before they had time to import anything: the disposition is inherited, not yet installed.
    for pid, number in itertools.product(pids, (signal.SIGTERM, signal.SIGUSR1)):
        os.kill(pid, number)
    found = [next(batches) for _ in range(6)]
    for pid, number in itertools.product(pids, (signal.SIGTERM, signal.SIGUSR1)):
        os.kill(pid, number)
    found += [next(batches) for _ in range(6)]
    assert_equal_steps(expected, found)
    assert torch.equal(state, torch.get_rng_state())  # dropout's stream is not the loader's
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()

    for path in (folder / "shards").glob("train-*.tar"):
        with open(path, "r+b") as file:  # in place, under the open descriptors
            file.write(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"train-0000\d.tar: sample \d{8}: crc32") as caught:
        while True:
            next(batches)
    assert "\n" not in str(caught.value)
    assert made._processes == [] and not any(map(is_running, pids))


def test_a_killed_loader_process_is_an_error(corpus, graph, tables, configure):
    made = loader(corpus, graph, tables, configure(data__num_workers=1))
    batches = made.iterate(0)
    next(batches)
    (process,) = made._processes
    process.kill()
    started = time.monotonic()
    with pytest.raises(LoaderError, match="a loader process: DataLoader worker") as caught:
        while True:
            next(batches)
    assert caught.value.exit_code == 1
    assert time.monotonic() - started < 15
    assert not is_running(process.pid)


# --- held-out data --------------------------------------------------------------------------


def test_heldout_batches_are_fixed(corpus, graph, tables, configure, monkeypatch):
    def batches(rank=0, world=1, **changes):
        config = configure(
            **{"train__per_device_train_batch_size": 5, "data__pad_to_multiple_of": 1} | changes
        )
        return heldout_batches(config, corpus.folder, rank, world, graph, tables)

    all_of = batches()
    assert [len(b.input_ids) for b in all_of] == [5, 5, 5, 5, 4]  # 24 samples
    content = sequences(all_of)
    texts = sorted(f[0] for f in content.values())
    assert texts == sorted(s.ids.tolist() for s in corpus.samples["heldout"])
    assert all(f[2] and not f[3] for f in content.values())  # targets, no mentions
    assert all(len(b.negatives) == len(b.decode_mention) == 0 for b in all_of)
    # The same for every seed and method, and for any number of ranks.
    same = batches(
        train__seed=7,
        injection__form="none",
        decoding__enabled=False,
        memory__enabled=False,
        data__mention_mask_probability=0.9,
        data__mlm_probability=0.4,
    )
    assert sequences(same) == content
    shares = [batches(rank, 3) for rank in range(3)]
    assert [len(s) for s in shares] == [2, 2, 1]
    assert sequences(itertools.chain(*shares)) == content
    monkeypatch.setattr("trelm_ds.data.heldout.HELDOUT_BATCH", 5)
    assert [len(b.input_ids) for b in batches(train__eval_batches=2)] == [5, 5]
    assert batches(rank=2, world=3, train__eval_batches=2) == []
    # As many whatever the run's batch is.
    smaller = batches(train__eval_batches=2, train__per_device_train_batch_size=2)
    assert [len(b.input_ids) for b in smaller] == [2] * 5


# --- what is refused ------------------------------------------------------------------------


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["format"], manifest["dataset_id"]
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m["splits"].update(
                train={"samples": 0, "tokens": 0, "spans": 483, "shards": []}
            ),
            "empty corpus",
        ),
        (lambda m: m["graph"].update(relations=9), "count different entities"),
        (lambda m: m.update(long_tail_words=9), "count different memory keys"),
        (lambda m: m["splits"]["train"].update(spans=500), "does not score the spans"),
    ],
)
def test_folders_that_do_not_fit_together(
    corpus, graph, tables, configure, tmp_path, change, message
):
    shutil.copytree(corpus.folder, tmp_path / "data")
    rewrite(tmp_path / "data", change)
    with pytest.raises(DataError, match=message):
        StepLoader(configure(), tmp_path / "data", 0, 1, graph=graph, tables=tables)


def test_configurations_that_do_not_fit(corpus, graph, tables, configure):
    with pytest.raises(ConfigError, match="max_seq_length 16 is below the 32 tokens"):
        loader(corpus, graph, tables, configure(data__max_seq_length=16))
    with pytest.raises(ConfigError, match="rank 2 is not below the world size 2"):
        loader(corpus, graph, tables, configure(), rank=2, world=2)
    with pytest.raises(DataError, match="no split 'dev'"):
        loader(corpus, graph, tables, configure(), split="dev")


def test_damage_is_found_before_the_first_step(corpus, graph, tables, configure, tmp_path):
    shutil.copytree(corpus.folder, tmp_path / "data")
    path = tmp_path / "data" / "shards" / "train-00002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="train-00002.tar: sha256"):
        StepLoader(configure(), tmp_path / "data", 0, 1, graph=graph, tables=tables)


@pytest.mark.parametrize("workers, micro", [(0, 1), (0, 4), (1, 4)])
def test_damaged_samples_up_to_a_number_are_empty_and_the_others_as_ever(
    corpus, graph, tables, configure, tmp_path, caplog, workers, micro
):
    settings = BUSY | {"data__num_workers": workers, "train__per_device_train_batch_size": micro}
    config = configure(data__max_damaged_samples=3, **settings)
    count = len(corpus.samples["train"])
    whole = loader(corpus, graph, tables, config)
    steps = -(-count // micro)
    expected = sequences(itertools.chain(*steps_of(whole, 0, steps)))
    assert whole.damaged == []

    shutil.copytree(corpus.folder, tmp_path / "data")
    damage(tmp_path / "data", [3, count - 1])
    with pytest.raises(DataError, match="sha256"):
        StepLoader(configure(**settings), tmp_path / "data", 0, 1, graph=graph, tables=tables)
    made = StepLoader(config, tmp_path / "data", 0, 1, graph=graph, tables=tables)
    assert len([r for r in caplog.records if "checked one by one" in r.getMessage()]) == 2
    found, said = {}, {}
    for step, batches in enumerate(itertools.islice(made.iterate(0), steps)):
        found |= sequences(batches)
        said |= {message: step for message in made.damaged}
    made.close()
    _, indices = stream_position(np.arange(count), count, config.train.seed)
    where = {int(i): int(p) for p, i in enumerate(indices) if i in (3, count - 1)}
    assert sorted(where.values()) == [p for p in sorted(expected) if found[p] != expected[p]]
    for index, position in where.items():
        (message,) = (m for m in said if f"sample {index:08d}: crc32" in m)
        assert said[message] == position // micro
    for position in where.values():
        assert found[position] == ([CLS, SEP], [CLS, SEP], [], [])

    (tmp_path / "data" / "shards" / "train-00001.tar").unlink()
    options = {"graph": graph, "tables": tables, "verify": False}
    with pytest.raises(DataError, match="train-00001.tar: No such file"):
        steps_of(StepLoader(config, tmp_path / "data", 0, 1, **options), 0, steps)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda f: shutil.rmtree(f), "tokenizer: no such folder"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer: tokenizer not loadable"),
        (lambda f: (f / "tokenizer_config.json").write_text(
            (f / "tokenizer_config.json").read_text().replace('"mask_token"', '"other_token"')
        ), "no mask token"),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_used(corpus, tmp_path, edit, message):
    shutil.copytree(corpus.folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "special_tokens_map.json").unlink()
    edit(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=message) as caught:
        SpecialTokens.load(tmp_path, len(corpus.words))
    assert "\n" not in str(caught.value)


def test_special_tokens(corpus):
    special = SpecialTokens.load(corpus.folder, len(corpus.words))
    assert (special.pad, special.cls, special.sep, special.mask) == (0, 2, 3, 4)
    assert special.all == (0, 1, 2, 3, 4)
    assert np.flatnonzero(special.is_special(50)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="not below 3"):
        SpecialTokens.load(corpus.folder, 3)
