"""``benchmark.py summary``: the README's table of results, written from the committed JSON files.

A figure on the first screen that nobody can trace goes stale. So the table between two marks of
the README is made from ``benchmarks/results`` alone, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trelm_ds.benchmark.arms import load_table
from trelm_ds.benchmark.report import against_cell
from trelm_ds.benchmark.targets import JOINT, METRICS, least_gains
from trelm_ds.config import ModelConfig
from trelm_ds.errors import EXIT_DONE, DataError
from trelm_ds.files import write_text
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

BEGIN = "<!-- results: python launch/benchmark.py summary -->"
END = "<!-- /results -->"
# Of a study: facts with the text kept, facts alone, text alone. The rest is in its report.
SHOWN = (JOINT[0], METRICS[1], METRICS[0])
STUDIES = (
    "time to a baseline's own quality, as a share of its time",
    *(metric.label for metric in SHOWN),
    "report",
)
STEPS = ("time of a training step, as a share of `dense`'s", "arms", "report")


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
    """Markdown tables of the results, newest first: studies, then step times.

    Of results that answer one question (method, data, start and model; shapes and device) the
    newest is shown, and an older one that had another baseline.

    Args:
        results: folder of JSON files and of folders with one; names begin with a date.
        readme: folder that the links start from.
    Raises:
        DataError: a file is not JSON.
    """
    studies: list[tuple[str, ...]] = []
    steps: list[tuple[str, ...]] = []
    answered: dict[tuple, set] = {}  # question -> the baselines asked against
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
        if result.get("kind") == "convergence":
            found, lines = studies, _study_lines(result)
        elif result.get("kind") == "step":
            found, lines = steps, _step_lines(result)
        else:
            continue
        for question, cells in lines:
            baselines = set(result.get("study", {}).get("baselines", ["dense"]))
            if not baselines <= answered.setdefault(question, set()):
                answered[question] |= baselines
                found.append((*cells, f"[{name}]({link})"))
    parts = ((STUDIES, studies), (STEPS, steps))
    return "\n\n".join(_table(header, rows) for header, rows in parts if rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _study_lines(result: dict) -> Iterator[tuple[tuple, tuple[str, ...]]]:
    """A line for each form of TRELM: its time to the scores of the baseline of least gain.

    Yields:
        The question that it answers, and its cells.
    """
    study, arms = result["study"], load_table().arms
    if len(study["seeds"]) < 2:
        return  # of one seed: in docs/experiments.md, with its caveats
    asked = f"{study['data']}, {_start(study)}"
    told = f"{len(study['seeds'])} seeds"
    raced = study.get("raced") and len(study["learning_rates"]) > 1
    if raced and not study.get("baselines_raced"):
        # Before 2026-12-01: the arms alone had the rate that is first at the targets.
        told += "; rates of the baselines not raced"
    headline = least_gains(result["ratios"])  # older files have another rule's
    for method in dict.fromkeys(row["method"] for row in result["ratios"]):
        rows = [headline.get((method, metric.key)) for metric in SHOWN]
        if method not in arms:
            continue  # of an earlier version: nobody can run it again
        is_trelm = arms[method].preset.startswith("trelm")
        if is_trelm and any(row and row["baseline"] != method for row in rows):
            cells = (against_cell(row, len(study["seeds"]), "of `{}`'s") for row in rows)
            yield (method, asked), (f"`{method}`, {asked}, {told}", *cells)


def _start(study: dict) -> str:
    """What the runs went on from, and from scratch the model's size."""
    start, settings = study.get("start"), study["settings"]
    folder = (start or {}).get("from") or settings.get("model.model_name_or_path")
    shape = (settings.get(f"model.{key}") for key in ("num_hidden_layers", "hidden_size"))
    layers, width = (
        given or default
        for given, default in zip(
            shape, (ModelConfig.num_hidden_layers, ModelConfig.hidden_size), strict=True
        )
    )
    size = "" if folder else f" ({layers} layers, {width} wide)"
    if start is None:
        return f"from {folder}" if folder else f"from scratch{size}"
    trained = f"from {start['steps']} steps of `{start['method']}`{size}"
    return f"{trained} after {folder}" if folder else trained


def _step_lines(result: dict) -> Iterator[tuple[tuple, tuple[str, str]]]:
    """Step times of one machine in one line; only whole models. Yields as ``_study_lines``."""
    rows = [r for r in result["rows"] if r.get("layers", 0) >= 12 and r["arm"] != "dense"]
    if rows:
        first = rows[0]
        asked = (
            f"{first['layers']} layers, {first['batch_size']} x {first['sequence_length']} tokens, "
            f"{first['dtype']}, {first['device']}"
        )
        arms = ", ".join(f"`{row['arm']}` {row['ratio_to_dense']:.2f}" for row in rows)
        yield (asked,), (asked, arms)
