"""Command-line flags of ``launch/pretrain.py``, in Hugging Face's names, as configuration."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Collection

from trelm_ds.config import (
    FROM_SCRATCH,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    load_config,
    nearest_key,
    parse_assignment,
    preset_names,
    read_preset,
)
from trelm_ds.errors import ConfigError

# Sections whose keys are flags by their own name; the method's knobs go through --set.
FLAG_SECTIONS = {"train": TrainConfig, "model": ModelConfig, "data": DataConfig}
KEY_LISTS = "trelm_ds/config.py, docs/recipe.md and docs/routing.md list the keys"
# What other trainers, or other commands here, call a flag.
ALIASES = {"lr": "learning_rate", "num_train_epochs": "max_steps", "max_steps": "budget"}


class LineParser(argparse.ArgumentParser):
    """An error is a ConfigError, one line, and not two lines and an exit."""

    def error(self, message: str):
        raise ConfigError(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's.

        Raises:
            ConfigError: anything wrong; of an unknown flag it names the nearest known one.
        """
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            flag = flag.partition("=")[0]
            near = self._nearest(flag, found) if flag.startswith("-") else None
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"unknown argument {flag!r}{hint}")
        return found

    def _nearest(self, flag: str, found: argparse.Namespace) -> str | None:
        """The flag most like ``flag``; where there is ``--set``, maybe a configuration key."""
        name = flag.lstrip("-").replace("-", "_")
        flags = self._flags(found)
        key = nearest_key(name) if "--set" in flags else ""
        section, _, bare = key.partition(".")
        if bare and bare == name and section not in FLAG_SECTIONS:
            return f"--set {key}=..."
        meant = ALIASES.get(name, name)
        near = [known for known in flags if known.startswith(f"--{meant}")]
        near += [known for known in flags if known.endswith(f"_{name}")]
        near += difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.6)
        return near[0] if near else f"--set {key}=..." if key else None

    def _flags(self, found: argparse.Namespace) -> list[str]:
        """The flags that --help shows but itself, those of the chosen command too."""
        flags = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += action.choices[getattr(found, action.dest)]._flags(found)
            elif action.help != argparse.SUPPRESS and action.dest != "help":
                flags += action.option_strings
        return flags


def add_set_flag(parser: argparse.ArgumentParser, scope: str) -> None:
    """``--set SECTION.KEY=VALUE``, any number of times; ``scope`` is what --help adds."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help=f"any configuration key, {scope}; {KEY_LISTS}",
    )


def add_config_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """A flag for every key of ``FLAG_SECTIONS`` by its bare name, but those in ``leave_out``."""
    preset = read_preset(Config.method)
    for section, cls in FLAG_SECTIONS.items():
        group = parser.add_argument_group(section)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name in leave_out:
                continue
            options = typing.get_args(hints[f.name]) or (hints[f.name],)
            # A bare --bf16 means true; --bf16 false switches it off.
            bare = {"nargs": "?", "const": "true"} if bool in options else {}
            text = f"{f.metadata['help']}; default {_plain(f.default)}"
            ours = preset.get(f"{section}.{f.name}", f.default)
            if ours != f.default:
                text += f" ({Config.method}: {_plain(ours)})"
            group.add_argument(f"--{f.name}", metavar="VALUE", help=text, **bare)


def _plain(value) -> str:
    """A default as one would write it on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def given_config_flags(
    args: argparse.Namespace, leave_out: Collection[str] = ()
) -> dict[str, object]:
    """The flags of ``add_config_flags`` that were given, as ``{"section.key": value}``."""
    return {
        f"{section}.{f.name}": getattr(args, f.name)
        for section, cls in FLAG_SECTIONS.items()
        for f in dataclasses.fields(cls)
        if f.name not in leave_out and getattr(args, f.name) is not None
    }


def given_settings(args: argparse.Namespace, own: Collection[str], owner: str) -> dict[str, object]:
    """The flat keys of the flags and of ``--set``, which wins.

    Args:
        own: keys, by their bare names, that are not the user's here.
        owner: what decides them, for the message.
    Raises:
        ConfigError: a key of ``own``, or an assignment that is none.
    """
    assigned = dict(parse_assignment(text) for text in args.set)
    for key in assigned:
        if key.partition(".")[2] in own:
            raise ConfigError(f"--set {key}: the {owner} decides it, see --help")
    return given_config_flags(args, own) | assigned


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="launch/pretrain.py",
        description="Pre-train a knowledge-enhanced BERT or RoBERTa (TRELM and its baselines).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deepspeed", metavar="JSON", help="DeepSpeed configuration (ds_configs/*.json)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON run configuration")
    parser.add_argument(
        "--method",
        metavar="NAME",
        help=f"preset: {', '.join(preset_names())}; default {Config.method}",
    )
    add_set_flag(parser, "repeatable, strongest")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would run, then exit; without --data_dir the sample corpus must be there",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    add_config_flags(parser)
    return parser


def parse_arguments(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The resolved configuration and the flags that are not part of it.

    Raises:
        ConfigError: an unknown flag, preset or key (the nearest known one is named), a value that
            does not fit, or a shape for a model that has its own.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    overrides = given_config_flags(args)
    overrides.update(parse_assignment(text) for text in args.set)
    config = load_config(args.method, args.config, overrides)
    folder = config.model.model_name_or_path
    shape = next((name for name in FROM_SCRATCH if f"model.{name}" in overrides), None)
    if folder is not None and shape is not None:
        raise ConfigError(
            f"model.{shape} is for a model from scratch, and that of --model_name_or_path {folder} "
            "has its own: leave one of the two out"
        )
    return config, args
