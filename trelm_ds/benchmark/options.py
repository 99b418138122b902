"""Flags that every study has, and the study they declare."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from trelm_ds.arguments import add_config_flags, add_set_flag, given_settings
from trelm_ds.benchmark.arms import Arm, load_table
from trelm_ds.benchmark.results import require_positive
from trelm_ds.benchmark.study import SELECT_BY, Budget, Race, Start, Study
from trelm_ds.config import Config
from trelm_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trelm_ds.pretrain import data_folder
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

# Keys that are the study's own, under flags of its own.
OWN = {
    *("output_dir", "max_steps", "max_hours", "learning_rate", "seed", "data_dir"),
    *("resume_from_checkpoint", "report_to"),
}


def add_study_arguments(parser: argparse.ArgumentParser, learning_rates: Sequence[float]) -> None:
    """The flags of a study; ``learning_rates`` is the default grid."""
    parser.add_argument("--output_dir", type=Path, help="default outputs/benchmark/KIND")
    parser.add_argument("--json", type=Path, help="result; default OUTPUT_DIR/KIND.json")
    parser.add_argument(
        "--data", "--data_dir", type=Path, help="prepared folder; default the embedded sample"
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        default=["2400"],
        metavar="N",
        help="of each run: steps, or hours as in 0.5h; of several, each arm has runs of each, and "
        "the largest sets the targets",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N; default 3")
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=list(learning_rates),
        metavar="X",
        help="grid of every arm, searched with the first seed",
    )
    parser.add_argument(
        "--select_by",
        default=SELECT_BY,
        metavar="METRIC",
        help="chooses the learning rate: a score at the end of the run, or time (to the targets)",
    )
    parser.add_argument(
        "--start_steps",
        type=int,
        metavar="N",
        help="train one checkpoint for so many steps first, which every run goes on from",
    )
    parser.add_argument(
        "--start_method", default="mlm", metavar="NAME", help="arm that trains it; default mlm"
    )
    parser.add_argument(
        "--start_learning_rate", type=float, metavar="X", help="default the arm's own"
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, each on own cores")
    parser.add_argument("--deepspeed", type=Path, metavar="JSON", help="of every run")
    add_set_flag(parser, "for every arm")
    parser.add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    parser.add_argument(
        "--plan",
        "--dry_run",
        action="store_true",
        help="print the runs and their state, then exit; without --data the sample corpus must be "
        "there",
    )
    add_config_flags(parser, OWN)


def folder_of(args: argparse.Namespace) -> Path:
    return args.output_dir or Path("outputs/benchmark") / args.kind


def declared_study(
    args: argparse.Namespace, arms: Sequence[Arm], export: bool = False, race: Race | None = None
) -> Study:
    """The study that the flags declare.

    Where no data is named it writes the sample corpus, though not for a plan.

    Raises:
        ConfigError: a number out of range, the same rate or arm twice, or an unknown key.
        DataError: the data folder is not one.
    """
    require_positive(args, "seeds")
    if args.select_by.startswith(("eval/report_", "eval/probe_")):
        raise ConfigError(
            f"--select_by {args.select_by}: settings are chosen by facts that are not reported: "
            "eval/select_p1, or eval/mlm_loss"
        )
    is_race = args.select_by == "time"
    if is_race and race is None:
        raise ConfigError("--select_by time: there is no baseline here whose targets are raced to")
    rates = args.learning_rates
    if len(set(rates)) < len(rates):
        raise ConfigError("--learning_rates: a rate is named twice")
    if args.deepspeed is not None and not args.deepspeed.is_file():
        raise ConfigError(f"--deepspeed {args.deepspeed}: no such file")
    settings = given_settings(args, OWN, "study")
    start = _declared_start(args)
    settings["data.data_dir"] = str(data_folder(args.data, only_look=args.plan))
    return Study(
        folder_of(args),
        arms,
        rates,
        list(range(1, args.seeds + 1)),
        [Budget.parse(text) for text in args.budget],
        settings,
        SELECT_BY if is_race else args.select_by,
        start,
        export,
        race if is_race else None,
    )


def _declared_start(args: argparse.Namespace) -> Start | None:
    if args.start_steps is None:
        if args.start_learning_rate is not None:
            raise ConfigError("--start_learning_rate: name --start_steps with it")
        return None
    require_positive(args, "start_steps")
    arm = load_table().find([args.start_method])
    if len(arm) != 1:
        raise ConfigError(f"--start_method {args.start_method}: names {len(arm)} arms, one starts")
    rate = args.start_learning_rate
    rate = arm[0].config().train.learning_rate if rate is None else rate
    return Start(arm[0], args.start_steps, rate)


def ended_early(study: Study, args: argparse.Namespace, stop: StopRequest) -> int | None:
    """Prints the plan or runs the study; the exit code if there is nothing to report, else None."""
    if args.plan:
        print("\n".join(study.plan()))
        return EXIT_DONE
    if study.run(
        stop,
        parallel=args.parallel,
        deepspeed=args.deepspeed,
        keep_checkpoints=args.keep_checkpoints,
    ):
        return None
    logger.info("stopped; the same command goes on")
    return EXIT_STOPPED


def made_equal(study: Study) -> list[str]:
    """Keys the study sets for every arm although the arms would differ in them."""
    configs: list[Config] = [arm.config() for arm in study.arms]
    found = []
    for key in study.settings:
        section, _, name = key.partition(".")
        if len({repr(getattr(getattr(config, section), name)) for config in configs}) > 1:
            found.append(key)
    return found
