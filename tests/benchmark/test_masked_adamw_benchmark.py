"""The masked AdamW's benchmark measures every arm and writes the common form."""

from trelm_ds.benchmark.cli import main
from trelm_ds.benchmark.results import read_result


def test_every_arm_is_measured_against_torch(tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--elements", "4000", "--row", "40", "--repeats", "3", "--json", str(path)]
    assert main(["masked-adamw", *arguments]) == 0
    result = read_result(path)
    assert result["elements"] == 4000 and len(result["rows"]) == 6
    assert result["rows"][0]["arm"] == "torch fused" and result["rows"][0]["median_ratio"] == 1
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in result["rows"])
