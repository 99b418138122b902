"""Files are whole or not there, whatever happens while they are written."""

import hashlib

import pytest

from trelm_ds.files import file_sha256, whole_file, write_text


def test_a_file_takes_its_place_at_the_end_and_an_error_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old ä")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "old ä" and temporary.suffix == ".json"
    assert path.read_text() == "new"
    with pytest.raises(OSError, match="full"), whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "full")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nothing"):
        pass


def test_digest(tmp_path):
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
