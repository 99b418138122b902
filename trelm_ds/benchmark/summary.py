"""``benchmark.py summary``: the README's table of results, written from the committed JSON files.

A figure on the first screen that nobody can trace goes stale. So the table between two marks of
the README is made from ``benchmarks/results`` alone, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from trelm_ds.benchmark.report import ratio_cell
from trelm_ds.benchmark.targets import JOINT, METRICS, least_gains
from trelm_ds.errors import EXIT_DONE, DataError
from trelm_ds.files import write_text
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

BEGIN = "<!-- results: python launch/benchmark.py summary -->"
END = "<!-- /results -->"
HEADER = "| measured | against | result | report |\n|---|---|---|---|"
# Of a study: facts with the text kept, facts alone, text alone.
SHOWN = (*JOINT[:2], *METRICS[1:3], METRICS[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Writes the table between the README's marks."""
    text = args.readme.read_text(encoding="utf-8") if args.readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f"{args.readme}: needs the lines {BEGIN} and {END}, once each")
    before, _, rest = text.partition(BEGIN)
    table = summary_table(args.results, args.readme.parent)
    write_text(args.readme, f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
    logger.info("written  %s", args.readme)
    return EXIT_DONE


def summary_table(results: Path, readme: Path) -> str:
    """The Markdown table of all results, newest first.

    Args:
        results: folder of JSON files and of folders with one; names begin with a date.
        readme: folder that the links start from.
    Raises:
        DataError: a file is not JSON.
    """
    rows = []
    for path in sorted(results.rglob("*.json"), key=lambda p: p.relative_to(results), reverse=True):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path}: not valid JSON") from None
        if not isinstance(result, dict):
            raise DataError(f"{path}: not a result, a JSON object was expected")
        report = path.with_name("REPORT.md")
        link = os.path.relpath(report if report.is_file() else path, readme)
        name = path.relative_to(results).parts[0].removesuffix(".json")
        lines = {"convergence": _study_lines, "step": _step_lines}.get(result.get("kind"))
        for cells in lines(result) if lines else ():
            rows.append(f"| {' | '.join(cells)} | [{name}]({link}) |")
    return "\n".join([HEADER, *rows])


def _study_lines(result: dict) -> Iterator[tuple[str, str, str]]:
    """TRELM's time to a baseline's scores, that of the least gain. The rest is in the report."""
    study = result["study"]
    seeds = len(study["seeds"])
    headline = least_gains(result["ratios"])  # older files have another rule's
    for metric in SHOWN:
        for (method, key), row in headline.items():
            if key != metric.key or method == row["baseline"] or not method.startswith("trelm"):
                continue
            cell = ratio_cell(row)
            if metric in METRICS[1:] and None not in (row["mlm_loss"], row["baseline_mlm_loss"]):
                cell += f"; MLM loss then {row['mlm_loss']:.3f}, its {row['baseline_mlm_loss']:.3f}"
            yield (
                f"time of `{method}` to {metric.label}, {study['data']}, {seeds} seeds",
                f"`{row['baseline']}`'s own",
                cell,
            )


def _step_lines(result: dict) -> Iterator[tuple[str, str, str]]:
    """Step times of one machine in one line; only whole models."""
    rows = [r for r in result["rows"] if r.get("layers", 0) >= 12 and r["arm"] != "dense"]
    if rows:
        first = rows[0]
        cells = ", ".join(f"`{row['arm']}` {row['ratio_to_dense']:.2f}" for row in rows)
        yield (
            f"step time, {first['layers']} layers, {first['batch_size']} x "
            f"{first['sequence_length']} tokens, {first['dtype']}, {first['device']}",
            "`dense`",
            cells,
        )
