"""Shards: what is written is read, by us and by plain webdataset, and no damage goes unseen."""

import errno
import json
import os
import pickle
import shutil
import tarfile

import msgpack
import numpy as np
import pytest

from trelm_ds.data import shards
from trelm_ds.data.schema import Sample
from trelm_ds.data.shards import (
    INDEX_RECORD,
    ShardReader,
    ShardSetWriter,
    load_manifest,
    write_manifest,
)
from trelm_ds.errors import DataError


def sample(length=6) -> Sample:
    ids = np.array([2, *range(5, 5 + length - 2), 3], dtype=np.int32)
    return Sample(0, "doc", ids, np.array([[1, 2, 0]], dtype=np.int32), 0)


def read_all(folder, verify=True) -> list[Sample]:
    reader = ShardReader(folder, load_manifest(folder), "train", verify=verify)
    return [reader[i] for i in range(len(reader))]


@pytest.fixture
def folder(corpus, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(corpus.folder, tmp_path / "data")
    return tmp_path / "data"


def test_round_trip(corpus):
    for split in ("train", "heldout"):
        reader = ShardReader(corpus.folder, corpus.manifest, split)
        assert len(reader) == len(corpus.samples[split])
        first_span = 0
        for i in np.random.default_rng(0).permutation(len(reader)).tolist():
            expected = corpus.samples[split][i]
            found = reader[i]
            assert (found.id, found.doc) == (i, expected.doc)
            assert found.first_span == expected.first_span
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.spans, expected.spans)
        for expected in corpus.samples[split]:
            assert expected.first_span == first_span
            first_span += len(expected.spans)
        entry = corpus.manifest["splits"][split]
        assert entry["spans"] == first_span
        assert entry["tokens"] == sum(len(s.ids) for s in corpus.samples[split])
        with pytest.raises(IndexError):
            reader[len(reader)]


def test_plain_webdataset_reads_the_shards(corpus):
    import webdataset

    names = [shard["name"] for shard in corpus.manifest["splits"]["train"]["shards"]]
    assert len(names) == 3
    urls = [str(corpus.folder / "shards" / name) for name in names]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in found] == [f"{i:08d}" for i in range(96)]
    for raw, expected in zip(found, corpus.samples["train"], strict=True):
        fields = msgpack.unpackb(raw["msgpack"])
        ids = np.frombuffer(fields["ids"], {2: "<u2", 4: "<i4"}[fields["w"]])
        np.testing.assert_array_equal(ids, expected.ids)


def test_shards_are_plain_ustar_and_the_index_points_at_payloads(corpus):
    path = corpus.folder / "shards" / "train-00001.tar"
    data = path.read_bytes()
    records = np.frombuffer(path.with_suffix(".idx").read_bytes(), INDEX_RECORD)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{i:08d}.msgpack" for i in range(40, 80)]
    for member, record in zip(members, records, strict=True):
        assert member.isreg() and not member.pax_headers and member.mtime == 0
        assert data[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
        assert (member.offset_data, member.size) == (record["offset"], record["size"])


def test_equal_corpora_give_equal_files(tmp_path):
    entries = []
    for name in "ab":
        with ShardSetWriter(tmp_path / name, "train", 2) as writer:
            for length in (5, 6, 7):
                writer.add(sample(length))
        entries.append(writer.close())
    assert entries[0] == entries[1]
    assert [s["samples"] for s in entries[0]["shards"]] == [2, 1]


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(DataError, match="token ids"):
        with ShardSetWriter(tmp_path, "train", 2) as writer:
            for _ in range(3):
                writer.add(sample())
            writer.add(Sample(0, "bad", np.array([-1, 2]), np.zeros((0, 3), np.int32), 0))
    assert os.listdir(tmp_path / "shards") == []
    with pytest.raises(ValueError, match="closed"):
        writer.add(sample())


@pytest.mark.parametrize("failing_rename", [0, 1, 3])
def test_nothing_is_left_when_publishing_fails(tmp_path, monkeypatch, failing_rename):
    calls = []
    replace = os.replace

    def full_disk(source, target):
        if len(calls) == failing_rename:
            raise OSError(28, "No space left on device")
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(shards.os, "replace", full_disk)
    writer = ShardSetWriter(tmp_path, "train", 2)
    for _ in range(3):
        writer.add(sample())
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert len(calls) == failing_rename and os.listdir(tmp_path / "shards") == []


def test_an_empty_split_has_no_shards(tmp_path):
    with ShardSetWriter(tmp_path, "heldout") as writer:
        entry = writer.close()
    assert entry == {"samples": 0, "tokens": 0, "spans": 0, "shards": []}
    assert os.listdir(tmp_path / "shards") == []


# --- damage ---------------------------------------------------------------------------------


def flip(path, offset) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def header_of(path, member) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[member].offset


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda p: flip(p, header_of(p, 3) + 512 + 20), "train-00001.tar"),
        (lambda p: flip(p, header_of(p, 3) + 100), "train-00001.tar"),  # tar header
        (lambda p: flip(p.with_suffix(".idx"), 5 * 16 + 1), "train-00001.idx"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5000]), "train-00001.tar"),
        # At a member's end, the cut that a tar reader does not see.
        (lambda p: p.write_bytes(p.read_bytes()[: header_of(p, 20)]), "train-00001.tar"),
        (lambda p: p.write_bytes(b""), "train-00001.tar"),
        (lambda p: p.with_suffix(".idx").write_bytes(b""), "train-00001.idx"),
        (lambda p: p.unlink(), "train-00001.tar: No such file"),
        (lambda p: p.with_suffix(".idx").unlink(), "train-00001.idx: No such file"),
        (lambda p: (p.unlink(), p.mkdir()), "train-00001.tar"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "train-00001.tar"),  # must not hang either
    ],
)
def test_damage_is_one_clear_error(folder, damage, named):
    damage(folder / "shards" / "train-00001.tar")
    with pytest.raises(DataError, match=named) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=named):
        ShardReader(folder, load_manifest(folder), "train").verify_all()


def test_payload_and_index_are_checked_without_the_sha256(folder):
    """The crc32 of each sample stands when whole files were verified by another process."""
    path = folder / "shards" / "train-00001.tar"
    flip(path, header_of(path, 3) + 512 + 20)
    flip(folder / "shards" / "train-00002.idx", 0)
    reader = ShardReader(folder, load_manifest(folder), "train", verify=False)
    for i in range(96):
        if i in (43, 80):
            with pytest.raises(DataError, match=rf"train-0000\d.tar: sample {i:08d}: crc32"):
                reader[i]
        else:
            assert reader[i].id == i


def test_a_failed_open_is_tried_again(folder, monkeypatch):
    waited, left = [], [3]

    def opening(*args, real=os.open):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr("trelm_ds.files.time.sleep", waited.append)
    reader = ShardReader(folder, load_manifest(folder), "train")
    reader.verify_all()
    assert waited == list(shards.READ_WAITS_S)
    left[0] = 9
    with pytest.raises(DataError, match="train-00000.tar: Input/output error"):
        ShardReader(folder, load_manifest(folder), "train").verify_all()
    reader.close()


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_failed_read_is_tried_again_on_open_files(folder, monkeypatch, failures):
    reader = ShardReader(folder, load_manifest(folder), "train", verify=False)
    expected = reader[40].ids.tolist()
    waited, left = [], [failures]

    def pread(descriptor, size, offset, real=os.pread):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, size, offset)

    opened = []
    monkeypatch.setattr(
        shards, "_open", lambda *a, real=shards._open: (opened.append(a), real(*a))[1]
    )
    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("trelm_ds.files.time.sleep", waited.append)
    if failures <= len(shards.READ_WAITS_S):
        assert reader[40].ids.tolist() == expected
    else:
        with pytest.raises(DataError, match="sample 00000040: Stale file handle"):
            reader[40]
        assert reader[40].ids.tolist() == expected  # the next request tries again
    assert waited == list(shards.READ_WAITS_S[:failures])
    assert len(opened) == 2 * failures  # shard and index, anew after each
    reader.close()


def test_swapped_samples_are_noticed(folder):
    """Two valid records in each other's place: every crc32 holds, the ids do not."""
    path = folder / "shards" / "train-00001.idx"
    records = np.frombuffer(path.read_bytes(), INDEX_RECORD).copy()
    records[[2, 3]] = records[[3, 2]]
    path.write_bytes(records.tobytes())
    reader = ShardReader(folder, load_manifest(folder), "train", verify=False)
    with pytest.raises(DataError, match="sample 00000042: holds sample 43"):
        reader[42]


def test_an_index_cannot_point_outside_or_ask_for_much(folder):
    path = folder / "shards" / "train-00000.idx"
    records = np.frombuffer(path.read_bytes(), INDEX_RECORD).copy()
    records["offset"][0] = 2**63
    records["size"][1] = 2**32 - 1
    path.write_bytes(records.tobytes())
    reader = ShardReader(folder, load_manifest(folder), "train", verify=False)
    for i in (0, 1):
        with pytest.raises(DataError, match="points outside the shard"):
            reader[i]


def test_reader_travels_to_other_processes_and_limits_its_open_files(corpus, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(corpus.folder, corpus.manifest, "train")
    reader.verify_all()
    for i in (0, 95, 41, 3):
        assert reader[i].id == i
    assert len(os.listdir("/proc/self/fd")) == before + 2
    copy = pickle.loads(pickle.dumps(reader))
    assert copy[50].id == 50
    copy.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader[1].id == 1  # opens again


# --- manifest -------------------------------------------------------------------------------


def test_manifest_round_trip_and_identity(corpus, tmp_path):
    manifest = load_manifest(corpus.folder)
    assert manifest == corpus.manifest and manifest["format"] == "trelm-v1"
    rest = {k: v for k, v in manifest.items() if k not in ("format", "dataset_id")}
    assert write_manifest(tmp_path, rest)["dataset_id"] == manifest["dataset_id"]
    assert write_manifest(tmp_path, rest | {"name": "b"})["dataset_id"] != manifest["dataset_id"]
    assert os.listdir(tmp_path) == ["manifest.json"]


def edit(*keys_and_value):
    *keys, last, value = keys_and_value

    def apply(manifest):
        tree = manifest
        for key in keys:
            tree = tree[key]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return apply


SHARD = ("splits", "train", "shards", 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (edit("name", "other"), "dataset_id does not match"),
        (edit("format", "trelm-v9"), "format is not 'trelm-v1'"),
        (edit("tokenizer", None), "'tokenizer' is missing"),
        (edit("tokenizer", "vocab_size", "30"), "vocab_size is not of type int"),
        (edit("max_seq_length", -1), "max_seq_length is negative"),
        (edit("max_seq_length", True), "max_seq_length is not of type int"),
        (edit("max_seq_length", 10**12), "max_seq_length is above 4096"),
        (edit("splits", []), "splits is not of type dict"),
        (edit("splits", "train", 5), "splits.train: not a mapping"),
        (edit("splits", "../x", {}), "split name"),
        (edit("splits", "train", "samples", 95), "hold 96 samples, not 95"),
        (edit(*SHARD, "name", "../../etc/passwd"), "unexpected shard name"),
        (edit(*SHARD, "name", "train-00000.tar"), "unexpected shard name"),
        (edit(*SHARD, "first_sample", 39), "not consecutive"),
        (edit(*SHARD, "samples", 0), "not consecutive"),
        (edit(*SHARD, "sha256", None), "'sha256' is missing"),
    ],
)
def test_a_changed_manifest_is_refused(folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        load_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_broken_manifest_is_refused(tmp_path, text):
    with pytest.raises(DataError, match="not found"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="manifest.json"):
        load_manifest(tmp_path)


def test_writing_a_bad_manifest_leaves_the_old_one(folder):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="'max_seq_length' is missing"):
        write_manifest(folder, {"name": "x"})
    assert (folder / "manifest.json").read_bytes() == before


def test_unknown_split(corpus):
    with pytest.raises(DataError, match="no split 'dev'"):
        ShardReader(corpus.folder, corpus.manifest, "dev")
