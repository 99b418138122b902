"""The unpadding's benchmark measures both arms on a prepared folder and counts its pads."""

from tiny_corpus import write_tiny_corpus

from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.results import read_result


def test_both_arms_are_measured_on_the_same_batches(tmp_path):
    write_tiny_corpus(tmp_path)
    path = tmp_path / "result.json"
    shape = ["--hidden_size", "16", "--intermediate_size", "24", "--batch", "4", "--steps", "2"]
    assert main(["unpad", "--data_dir", str(tmp_path), *shape, "--json", str(path)]) == 0
    result = read_result(path)
    assert [row["arm"] for row in result["rows"]] == ["padded", "unpadded"]
    assert result["rows"][0]["median_ratio"] == 1 and 0 < result["pads"] < 1
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in result["rows"])
