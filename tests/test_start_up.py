"""What a run checks about its data folder and its own before it trains."""

import json

import numpy as np
import pytest
import torch
from model.model_batches import make_config
from multiprocess import run_ranks
from tiny_corpus import PAD, write_tiny_corpus

import trelm_ds.pretrain as pretrain
import trelm_ds.start_up as start_up
from trelm_ds.backbone import MaskedLanguageModel, build_backbone
from trelm_ds.config import load_config
from trelm_ds.data.shards import ShardReader, load_manifest
from trelm_ds.data.table_files import save_array
from trelm_ds.distributed import World, cpu_group
from trelm_ds.errors import ConfigError, DataError, TrelmError
from trelm_ds.start_up import check_knowledge, ensure_importance

ALONE = World(0, 1, 0, "none")


def check(folder):
    return check_knowledge(folder, load_manifest(folder), ALONE, None)


@pytest.mark.parametrize("name", ["graph/triples.npy", "graph/entities.tsv", "tokenizer"])
def test_a_flipped_bit_in_graph_or_tokenizer_is_found(tmp_path, name):
    write_tiny_corpus(tmp_path)
    check(tmp_path)
    path = tmp_path / name
    path = path / "tokenizer.json" if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name.split('/')[0]}: not the manifest's"):
        check(tmp_path)


def test_the_digest_of_the_tables_changes_with_any_of_them(tmp_path):
    write_tiny_corpus(tmp_path)
    digests = {check(tmp_path)}
    for name in ("importance", "entity_embeddings", "two_hop"):
        path = tmp_path / "tables" / f"{name}.npy"
        save_array(path, np.load(path) + 1)
        digests.add(check(tmp_path))
    (tmp_path / "tables" / "importance.npy").unlink()
    digests.add(check(tmp_path))
    assert len(digests) == 5


def two_machines(rank, world_size, folders):
    world = World(rank, world_size, 0, "launcher")
    found = []
    for folder in folders[rank]:
        try:
            found.append(check_knowledge(folder, load_manifest(folder), world, cpu_group()))
        except DataError as error:
            found.append(str(error))
    return found


def test_machines_with_other_tables_stop_on_every_rank(tmp_path):
    for name in ("a", "b", "c"):
        write_tiny_corpus(tmp_path / name)
    path = tmp_path / "c" / "tables" / "importance.npy"
    save_array(path, np.load(path) * 2)
    a, b, c = (tmp_path / name for name in "abc")
    (same, other), theirs = run_ranks(two_machines, 2, [[a, a], [b, c]])
    assert len(same) == 64 and "not the same on every machine" in other
    assert theirs == [same, other.replace(str(a), str(c))]


def check_shards_of(rank, world_size, folders, local_ranks, host):
    """The shards that this rank checked of its machine's folder, or what it ended with."""
    start_up.platform.node = lambda: host[rank]
    start_up.CHECK_ROUND_S = 0.0  # one shard a round
    world = World(rank, world_size, local_ranks[rank], "launcher")
    reader = ShardReader(folders[rank], load_manifest(folders[rank]), "train", verify=False)
    try:
        start_up.check_shards(reader, world, cpu_group())
    except DataError as error:
        return str(error), error.everywhere
    return sorted(reader._verified), len(reader._open_shards)


def test_a_machines_ranks_deal_the_shards_out(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write_tiny_corpus(a, samples_per_shard=16)
    write_tiny_corpus(b, samples_per_shard=16)
    shards = list(range(len(load_manifest(a)["splits"]["train"]["shards"])))
    assert len(shards) >= 4
    found = run_ranks(check_shards_of, 3, [a, a, b], [0, 1, 0], "xxy")
    assert found == [(shards[::2], 0), (shards[1::2], 0), (shards, 0)]
    # Machines of one name, each with a copy, check all of it too.
    assert run_ranks(check_shards_of, 2, [a, b], [0, 0], "xx") == [(shards, 0)] * 2
    tar = b / "shards" / "train-00001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(bytes(content))
    found = run_ranks(check_shards_of, 3, [a, b, b], [0, 0, 1], "xyy")
    assert (
        found
        == [
            (
                f"rank 2: {tar}: sha256 is not the manifest's; the file is corrupt or was changed",
                True,
            )
        ]
        * 3
    )


def score_two_machines(rank, world_size, folders):
    folder, world = folders[rank], World(rank, world_size, 0, "launcher")
    manifest, config = load_manifest(folder), make_config()
    torch.manual_seed(0)
    vocab_size = manifest["tokenizer"]["vocab_size"]
    model = MaskedLanguageModel(build_backbone(config, vocab_size, PAD))
    group = cpu_group()
    ensure_importance(model, config, folder, manifest, world, group)
    return check_knowledge(folder, manifest, world, group)


def test_machines_with_copies_of_the_folder_score_it_for_all(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_tiny_corpus(folder)
    before = check(folders[0])
    one, two = run_ranks(score_two_machines, 2, folders)
    assert one == two != before  # the tables of both, and both are scored
    assert all((folder / "tables" / "importance.json").exists() for folder in folders)
    assert not any(list((folder / "tables").glob(".*")) for folder in folders)


def start_with(rank, world_size, folder, cases):
    """What each of ``cases``, (data folder, model) by rank, begins to train or ends with."""
    from integration.runs import make_trainer

    found = []
    for number, case in enumerate(cases):
        data, model = case[rank]
        own = {} if model is None else {"model__model_name_or_path": str(model)}
        try:
            make_trainer(data, folder / str(number), method="mlm", **own).engine.destroy()
            found.append(None)
        except TrelmError as error:
            found.append((type(error).__name__, str(error), error.everywhere))
    return found


def test_a_rank_that_cannot_begin_stops_them_all(tmp_path):
    for name in ("a", "b"):
        write_tiny_corpus(tmp_path / name)
    (tmp_path / "b" / "probe").mkdir(exist_ok=True)
    (tmp_path / "b" / "probe" / "broken.jsonl").write_text("no JSON\n")
    a, b, missing = (tmp_path / name for name in ("a", "b", "missing"))
    cases = [
        [(a, None), (a, None)],
        [(a, None), (a, missing)],  # one node without the model
        [(a, missing), (a, missing)],
        [(a, None), (b, None)],
    ]
    one, two = run_ranks(start_with, 2, tmp_path, cases)
    assert one == two
    began, alone, alike, broken = one
    says = f"model {missing}: no such folder (a local folder is needed)"
    assert began is None
    assert alone == ("ConfigError", f"rank 1: {says}", True)
    assert alike == ("ConfigError", says, True)
    assert broken[0] == "DataError" and broken[2] is True
    assert broken[1].startswith("rank 1: ") and "broken.jsonl:1" in broken[1]


def test_one_job_at_a_time_has_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LOCK_WAIT_S", 0.1)
    pretrain._lock(tmp_path)
    with pytest.raises(ConfigError, match="in use by another run"):
        pretrain._lock(tmp_path)
    pretrain._held_locks.pop().close()  # as the end of its process does
    pretrain._lock(tmp_path)
    pretrain._held_locks.pop().close()


def test_a_run_keeps_where_and_by_which_commit_it_was_trained_before(tmp_path, monkeypatch):
    config, backbone = load_config("mlm"), build_backbone(make_config(), 60, PAD).config
    config.train.output_dir = str(tmp_path)

    def start(commit, step):
        record = {"commit": commit, "hardware": {"cpu": commit.upper()}, "versions": {}}
        monkeypatch.setattr("trelm_ds.environment.describe", lambda: dict(record))
        pretrain._write_records(config, {"zero_optimization": {}}, backbone, step)
        return json.loads((tmp_path / "environment.json").read_text())

    assert start("a", 0)["starts"] == [
        {"step": 0, "commit": "a", "hardware": {"cpu": "A"}, "versions": {}}
    ]
    found = start("b", 5)
    assert found["commit"] == "b" and found["backbone"]["vocab_size"] == 60
    assert [(s["step"], s["commit"]) for s in found["starts"]] == [(0, "a"), (5, "b")]
    assert [s["commit"] for s in start("c", 5)["starts"]] == ["a", "c"]  # nothing came of b
    assert [s["commit"] for s in start("d", 0)["starts"]] == ["d"]
    (tmp_path / "environment.json").write_text("[")
    assert [s["commit"] for s in start("e", 5)["starts"]] == ["e"]


def test_who_only_looks_does_not_write_the_sample_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="name --data_dir, or write the sample corpus first: "):
        pretrain.data_folder(None, only_look=True)
    assert not list(tmp_path.iterdir())
    assert pretrain.data_folder("named", only_look=True).name == "named"
    write_tiny_corpus(tmp_path / pretrain.SAMPLE_DIR)
    assert str(pretrain.data_folder(None, only_look=True)) == pretrain.SAMPLE_DIR


def test_folders_named_by_themselves_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("dkplm")
    names = [str(pretrain.choose_output_dir(config)) for _ in range(3)]
    assert names == ["outputs/dkplm", "outputs/dkplm-2", "outputs/dkplm-3"]
