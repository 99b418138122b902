"""The common form of benchmark results."""

import json

import pytest

from trelm_ds.benchmark.results import HEADER, read_result, require_folder, write_result
from trelm_ds.errors import ConfigError, DataError


def test_a_result_has_the_header_and_no_number_that_json_lacks(tmp_path):
    path = tmp_path / "step.json"
    rows = [{"arm": "dense", "step_ms": float("nan"), "parts": [1.0, float("inf")]}]
    written = write_result(path, "step", rows, note="more")
    assert path.read_text().count("NaN") == 0
    result = read_result(path)
    assert list(result)[: len(HEADER)] == list(HEADER)
    assert result["kind"] == "step" and result["note"] == "more"
    assert result["rows"] == [{"arm": "dense", "step_ms": None, "parts": [1.0, None]}]
    assert {"cpu", "cores", "memory_gib"} <= set(result["hardware"])
    assert {"python", "torch"} <= set(result["versions"])
    assert set(result) == set(written)
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


@pytest.mark.parametrize("content", ["{", json.dumps({"rows": []}), None])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_result(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_is_found_before_anything_runs(tmp_path):
    require_folder(None)
    require_folder(tmp_path / "ok.json")
    with pytest.raises(ConfigError, match="no such folder"):
        require_folder(tmp_path / "missing" / "result.json")
