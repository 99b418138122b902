"""``launch/benchmark.py``: one subcommand a kind of benchmark, each in a module of its own.

A kind's module has ``add_arguments(parser)`` and ``run(args, stop) -> exit code``; adding a kind is
adding a line to ``KINDS``. ``stop`` is the ``StopRequest`` that signals set: a long benchmark looks
at it and returns ``EXIT_STOPPED``.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from trelm_ds.arguments import LineParser
from trelm_ds.errors import TrelmError, report
from trelm_ds.stopping import StopRequest

# kind -> (module, what --help says)
KINDS = {
    "convergence": (
        "trelm_ds.benchmark.convergence",
        "time to the better DKPLM baseline's quality, method by method",
    ),
    "routing": (
        "trelm_ds.benchmark.convergence",
        "the same study over forms of knowledge routing",
    ),
    "sweep": ("trelm_ds.benchmark.sweep", "one configuration key over several values"),
    "memory": ("trelm_ds.benchmark.memory", "lookups and commits of the memory bank, by its size"),
    "data": ("trelm_ds.benchmark.data", "the data path, stage by stage"),
    "scale": ("trelm_ds.benchmark.scale", "whole training steps on 1, 2, ... ranks"),
    "masked-adamw": (
        "trelm_ds.benchmark.masked_adamw",
        "the masked AdamW against torch's fused AdamW",
    ),
    "step": ("trelm_ds.benchmark.step", "time of a training step, dense against routed"),
    "summary": ("trelm_ds.benchmark.summary", "write the README's table from committed results"),
    "unpad": ("trelm_ds.benchmark.unpad", "the encoder with and without pads, on real batches"),
}


def build_parser(kinds=tuple(KINDS)) -> argparse.ArgumentParser:
    """The parser with the subcommands ``kinds``; their modules are imported only here."""
    parser = LineParser(prog="launch/benchmark.py", description="Benchmarks; each writes one JSON.")
    # The deepspeed launcher puts it before the kind; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in kinds:
        module, says = KINDS[kind]
        command = commands.add_parser(kind, help=says, description=says, allow_abbrev=False)
        importlib.import_module(module).add_arguments(command)
    return parser


def setup_logging() -> None:
    """Progress goes to stderr, so that a caller may read a result from stdout."""
    root = logging.getLogger("trelm_ds")
    if not root.handlers:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)
    root.setLevel(logging.INFO)
    root.propagate = False


def main(argv: list[str] | None = None) -> int:
    """Entry point: one line per user error, then the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    stop = StopRequest()
    stop.install()
    setup_logging()
    first = next((word for word in argv if not word.startswith("-")), None)
    kind = first if first in KINDS else None
    try:
        # Only the kind that is asked for is imported; the list of all for --help.
        args = build_parser((kind,) if kind else tuple(KINDS)).parse_args(argv)
        return importlib.import_module(KINDS[args.kind][0]).run(args, stop)
    except (TrelmError, OSError) as error:
        return report(error)
