"""``benchmark.py sweep``: one configuration key over several values, seeds at each of them."""

from __future__ import annotations

import argparse
import difflib
import logging

from trelm_ds.benchmark.arms import Arm, Sweep, load_table
from trelm_ds.benchmark.convergence import declaration
from trelm_ds.benchmark.options import (
    OWN,
    add_study_arguments,
    declared_study,
    ended_early,
    folder_of,
)
from trelm_ds.benchmark.report import write_sweep_report
from trelm_ds.benchmark.results import require_folder, write_result
from trelm_ds.config import known_keys, nearest_key
from trelm_ds.errors import EXIT_DONE, ConfigError
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        required=True,
        metavar="NAME",
        help=f"any section.key, or {', '.join(load_table().sweeps)}",
    )
    parser.add_argument(
        "--values", nargs="+", metavar="V", help="default: those of the named sweep"
    )
    parser.add_argument("--method", default="trelm", help="the arm whose key is swept")
    add_study_arguments(parser, (2e-3,))


def named_sweep(key: str, values: list[str] | None) -> Sweep:
    """The key and the values that ``--key`` and ``--values`` mean.

    Raises:
        ConfigError: an unknown key (the nearest is named), or no values for a key without default.
    """
    known = load_table().sweeps.get(key)
    if known is not None:
        return Sweep(known.key, tuple(values) if values else known.values)
    if key not in known_keys() or key == "method":
        near = difflib.get_close_matches(key, load_table().sweeps, n=1, cutoff=0.6)
        near = near[0] if near else nearest_key(key)
        raise ConfigError(f"--key {key}: unknown key; did you mean {near!r}?")
    if not values:
        raise ConfigError(f"--key {key}: name its --values")
    return Sweep(key, tuple(values))


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Runs what is missing of the sweep, then writes its JSON, its table and its figure."""
    sweep = named_sweep(args.key, args.values)
    section, _, name = sweep.key.partition(".")
    if name in OWN or name == "eval_steps":
        raise ConfigError(f"--key {args.key}: the study decides it for every run, see --help")
    base = load_table().find([args.method])
    if len(args.budget) > 1:
        raise ConfigError("--budget: a sweep compares values at one budget")
    if len(base) != 1:
        raise ConfigError(f"--method {args.method}: names {len(base)} arms, one is swept")
    if args.output_dir is None:
        args.output_dir = folder_of(args) / f"{args.method}-{args.key}"
    require_folder(args.json)
    arms, values = [], {}
    for value in sweep.values:
        overrides = base[0].overrides | {sweep.key: value}
        arm = Arm(f"{sweep.key}={value}", base[0].preset, overrides, f"{args.method}, {args.key}")
        # As the configuration reads it: 0.5 and .5 are one value, "none" may be None.
        values[arm.name] = getattr(getattr(arm.config(), section), name)
        arms.append(arm)
    if len(set(values.values())) < len(values):
        raise ConfigError("--values: a value is named twice")
    study = declared_study(args, arms)
    if sweep.key in study.settings:
        raise ConfigError(f"--set {sweep.key}: it is what is swept")
    code = ended_early(study, args, stop)
    if code is not None:
        return code
    chosen, every = study.results()
    rows = [_row(r, args.method, values[r["arm"]]) for r in chosen]
    # Also those of other rates: of a value that diverged at every rate they are all there is.
    rows += [_row(r, args.method, values[r["arm"]]) for r in every if not r["chosen"]]
    path = args.json or study.folder / "sweep.json"
    result = write_result(
        path,
        "sweep",
        rows,
        key=sweep.key,
        values=list(values.values()),
        method=args.method,
        study=declaration(study),
    )
    logger.info("result  %s", path)
    logger.info("report  %s", write_sweep_report(study.folder, result))
    return EXIT_DONE


def _row(result: dict, method: str, value) -> dict:
    """A run's last evaluation and cost beside its coordinates."""
    kept = ("seed", "learning_rate", "chosen", "status", "steps", "time_s", "cost")
    kept += ("peak_memory_gib",)
    kept += ("commit", "hardware", "starts")
    last = result["evaluations"][-1] if result["evaluations"] else {}
    scores = {key: score for key, score in last.items() if key.startswith("eval/")}
    row = {"method": method, "value": value}
    return row | {key: result.get(key) for key in kept} | scores
