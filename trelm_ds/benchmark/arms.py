"""What is compared: arms, the studies made of them and the named sweeps, read from ``arms.yaml``.

An arm is a preset and configuration keys over it. The table goes through the configuration's own
machinery, so that a wrong key or value in it is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trelm_ds.config import Config, build_config, flatten, preset_names, read_preset
from trelm_ds.errors import ConfigError

TABLE = Path(__file__).with_name("arms.yaml")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: also the folder of its runs.
        preset: what ``--method`` names.
        overrides: flat configuration keys over the preset.
        about: one line for reports.
    """

    name: str
    preset: str
    overrides: dict[str, object] = field(default_factory=dict)
    about: str = ""

    def config(self, *layers: dict[str, object]) -> Config:
        """The configuration of a run: preset < arm < ``layers``.

        Raises:
            ConfigError: a value that does not fit.
        """
        method = {"method": self.preset}
        return build_config(read_preset(self.preset), self.overrides, *layers, method)


@dataclass(frozen=True)
class StudyPlan:
    """A study's default arms and their roles, by arm name."""

    arms: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A configuration key and the values it takes."""

    key: str
    values: tuple[object, ...]


@dataclass(frozen=True)
class Table:
    """``arms.yaml``, checked."""

    arms: dict[str, Arm]
    studies: dict[str, StudyPlan]
    sweeps: dict[str, Sweep]

    def find(self, patterns: Iterable[str], among: Sequence[str] = ()) -> list[Arm]:
        """The arms that ``patterns`` name, each once, in that order.

        Args:
            patterns: names, or globs over ``among`` (all arms where it is empty).
            among: names of the study's own arms.
        Raises:
            ConfigError: a pattern that names nothing; says the nearest name.
        """
        found: dict[str, Arm] = {}
        for pattern in patterns:
            if pattern in self.arms:
                names = [pattern]
            else:
                names = fnmatch.filter(among or self.arms, pattern)
            if not names:
                near = difflib.get_close_matches(pattern, self.arms, n=1, cutoff=0.0)
                raise ConfigError(
                    f"no arm {pattern!r}; did you mean {near[0]!r}? Known: {', '.join(self.arms)}"
                )
            found.update((name, self.arms[name]) for name in names)
        return list(found.values())


@functools.cache
def load_table(path: str | Path = TABLE) -> Table:
    """Reads and checks the table; every arm of it resolves to a configuration.

    Raises:
        ConfigError: an unknown section, arm, base or key, a base that leads back to its arm, or a
            value that does not fit.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    unknown = set(tree) - {"arms", "studies", "sweeps"}
    if unknown:
        raise ConfigError(f"{path}: unknown section {sorted(unknown)[0]!r}")
    written = tree.get("arms", {})
    arms = {name: Arm(name, name, about=f"preset {name}") for name in preset_names()}
    twice = set(arms) & set(written)
    if twice:
        raise ConfigError(f"{path}: arm {sorted(twice)[0]!r} has the name of a preset")
    for name in written:
        arms[name] = _resolve(name, written, arms, path)
    for name in written:
        try:
            arms[name].config()
        except ConfigError as error:
            raise ConfigError(f"{path}: arm {name!r}: {error}") from None
    table = Table(
        arms,
        {
            name: StudyPlan(**{role: tuple(names) for role, names in body.items()})
            for name, body in tree.get("studies", {}).items()
        },
        {
            name: Sweep(body["key"], tuple(body["values"]))
            for name, body in tree.get("sweeps", {}).items()
        },
    )
    for plan in table.studies.values():
        table.find((*plan.arms, *plan.baselines, *plan.ablations, *plan.modules))
    return table


def _resolve(name: str, written: dict, arms: dict[str, Arm], path: Path) -> Arm:
    """The arm with the keys of all its bases, nearest last."""
    layers: list[dict[str, object]] = []
    seen: list[str] = []
    at = name
    while at in written:
        if at in seen:
            raise ConfigError(f"{path}: the base of arm {name!r} leads back to {at!r}")
        seen.append(at)
        body = dict(written[at])
        base = body.pop("base", None)
        body.pop("about", None)
        layers.append(flatten(body, f"{path}: arm {at!r}"))
        if base not in written and base not in preset_names():
            near = difflib.get_close_matches(str(base), arms, n=1, cutoff=0.0)
            raise ConfigError(f"{path}: arm {at!r}: no base {base!r}; did you mean {near[0]!r}?")
        at = base
    overrides: dict[str, object] = {}
    for layer in reversed(layers):
        overrides.update(layer)
    return Arm(name, at, overrides, str(written[name].get("about", "")))
