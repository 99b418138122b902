"""``benchmark.py convergence`` and ``routing``: time of each arm to a baseline's quality."""

from __future__ import annotations

import argparse
import logging

from trelm_ds.benchmark.arms import load_table
from trelm_ds.benchmark.downstream import DownstreamTask, score_runs
from trelm_ds.benchmark.options import (
    add_study_arguments,
    declared_study,
    ended_early,
    folder_of,
    made_equal,
)
from trelm_ds.benchmark.report import write_report
from trelm_ds.benchmark.results import require_folder, write_result
from trelm_ds.benchmark.runner import Run
from trelm_ds.benchmark.study import Race, Study
from trelm_ds.benchmark.targets import (
    METRICS,
    convergence_rows,
    equal_time_rows,
    other_targets,
    paired_ratios,
)
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

LEARNING_RATES = (1e-3, 2e-3, 4e-3)  # small models from scratch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        "--arms",
        nargs="+",
        metavar="NAME",
        help="arms or globs of them; default the study's (trelm_ds/benchmark/arms.yaml)",
    )
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help="arms that set the targets")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="share of its gain by which a baseline's final value is missed at the target",
    )
    parser.add_argument(
        "--downstream",
        nargs="+",
        default=[],
        metavar="TASK=DIR",
        help="fine-tune the final models too: typing, relation or glue on a folder of data",
    )
    parser.add_argument(
        "--downstream_seeds", type=int, metavar="N", help="of each fine-tuning; default 3"
    )
    parser.add_argument(
        "--downstream_train_samples", type=int, metavar="N", help="at most so many; default all"
    )
    parser.add_argument(
        "--downstream_learning_rate",
        type=float,
        metavar="X",
        help="default 2e-5, which suits a BERT-base; small models need more",
    )
    add_study_arguments(parser, LEARNING_RATES)


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Runs what is missing of the study, then writes its JSON and its report."""
    table = load_table()
    roles = table.studies[args.kind]
    if not 0 <= args.tolerance < 1:
        raise ConfigError(f"--tolerance {args.tolerance}: must be in [0, 1)")
    arms = table.find(args.methods or roles.arms, roles.arms)
    names = [arm.name for arm in arms]
    baselines = args.baselines or [name for name in roles.baselines if name in names]
    missing = [name for name in baselines if name not in names]
    if missing or not baselines:
        raise ConfigError(
            f"the baseline {(missing or roles.baselines)[0]!r} is not among --methods: "
            "add it, or name another with --baselines"
        )
    require_folder(args.json)
    tasks = [
        DownstreamTask.parse(
            text,
            seeds=args.downstream_seeds,
            max_train_samples=args.downstream_train_samples,
            learning_rate=args.downstream_learning_rate,
        )
        for text in args.downstream
    ]
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        raise ConfigError("--downstream: two tasks have folders of one name; rename one")
    race = Race(baselines, args.tolerance)
    study = declared_study(args, arms, export=bool(tasks), race=race)
    for key in made_equal(study):
        logger.warning("--set %s makes equal what the arms differ in", key)
    code = ended_early(study, args, stop)
    if code is not None:
        return code
    downstream = score_runs([run for run in study.chosen() if _done(run)], tasks, stop)
    if downstream is None:
        logger.info("stopped; the same command goes on")
        return EXIT_STOPPED
    chosen, every = study.results()
    rows = convergence_rows(chosen, baselines, METRICS, args.tolerance)
    path = args.json or folder_of(args) / f"{args.kind}.json"
    result = write_result(
        path,
        args.kind,
        rows,
        ratios=paired_ratios(rows, study.seeds[0] if len(study.learning_rates) > 1 else None),
        other_targets=other_targets(every, baselines, args.tolerance),
        equal_time=equal_time_rows(chosen, baselines, select_by=study.select_by),
        runs=[summary(run) for run in every + [r for r in chosen if r not in every]],
        downstream=downstream,
        study=declaration(study) | {"baselines": baselines, "tolerance": args.tolerance},
    )
    logger.info("result  %s", path)
    logger.info("report  %s", write_report(study.folder, result, chosen, roles))
    return EXIT_DONE


def _done(run: Run) -> bool:
    return run.result()["status"] == "done"


def summary(result: dict) -> dict:
    """A run as a row of the grid: everything but its curve, and its last evaluation."""
    last = result["evaluations"][-1] if result["evaluations"] else {}
    row = {key: value for key, value in result.items() if key != "evaluations"}
    return row | {key: value for key, value in last.items() if key.startswith("eval/")}


def declaration(study: Study) -> dict:
    """What was fixed before the first run."""
    settings = {k: v for k, v in study.settings.items() if k != "data.data_dir"}
    return {
        "arms": {
            arm.name: {"preset": arm.preset, "overrides": arm.overrides, "about": arm.about}
            for arm in study.arms
        },
        "learning_rates": list(study.learning_rates),
        "seeds": list(study.seeds),
        "budgets": [{"steps": b.steps, "hours": b.hours} for b in study.budgets],
        "select_by": study.select_by,
        "raced": study.race is not None,
        "baselines_raced": study.race is not None,
        "settings": settings,
        "data": study.data_dir.name,
        "dataset_id": study.dataset_id,
        "start": _start_of(study),
    }


def _start_of(study: Study) -> dict | None:
    """What all arms went on from: the method, its steps and its clock, which no arm is charged."""
    if study.start is None:
        return None
    run = study.start_run()
    start = {"method": study.start.arm.name, "steps": study.start.steps}
    start["learning_rate"] = study.start.learning_rate
    return start | {"time_s": run.result()["time_s"], "from": run.config.model.model_name_or_path}
