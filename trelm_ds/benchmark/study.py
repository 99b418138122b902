"""A study: arms x budgets x learning rates x seeds, declared first, run in order, restartable.

The same grid, budgets and schedule rule hold for every arm. The grid is searched with the first
seed alone; the rate that is best by the declared metric, on facts that are never reported, is the
arm's at that budget for the other seeds. Everything that was run is reported.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trelm_ds.benchmark.arms import Arm
from trelm_ds.benchmark.results import write_json
from trelm_ds.benchmark.runner import REQUEST, Run, Runner
from trelm_ds.benchmark.targets import METRICS, Metric, crossing, goals_of
from trelm_ds.data.shards import load_manifest
from trelm_ds.errors import ConfigError, DataError
from trelm_ds.stopping import StopRequest

logger = logging.getLogger(__name__)

SELECT_BY = "eval/select_p1"
LOWER_IS_BETTER = ("eval/mlm_loss",)
EVALUATIONS = 24  # of a run of so many steps, unless --eval_steps says otherwise
MANY_STEPS = 10**8  # of a run whose budget is in hours: never the limit


@dataclass(frozen=True)
class Budget:
    """How long every run is: optimizer steps, or hours of training clock."""

    steps: int | None = None
    hours: float | None = None

    @property
    def size(self) -> float:
        """Steps, or hours."""
        return self.steps if self.hours is None else self.hours

    def __str__(self) -> str:
        return f"{self.size:g} {'steps' if self.hours is None else 'h'}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``2000`` is steps; ``0.5h``, ``30m`` and ``1800s`` are training clock.

        Raises:
            ConfigError: anything else, or nothing positive.
        """
        units = {"h": 1.0, "m": 1 / 60, "s": 1 / 3600}
        try:
            if text[-1:] in units:
                found = cls(hours=float(text[:-1]) * units[text[-1]])
            else:
                found = cls(steps=int(text))
        except ValueError:
            raise ConfigError(f"--budget {text}: expected steps, or hours as in 0.5h") from None
        if not (math.isfinite(found.size) and found.size > 0):
            raise ConfigError(f"--budget {text}: must be positive")
        return found

    def keys(self) -> dict[str, object]:
        """The configuration keys that make a run this long."""
        if self.hours is not None:
            # The schedules count the larger of the two shares, here always that of the clock.
            return {"train.max_hours": self.hours, "train.max_steps": MANY_STEPS}
        return {
            "train.max_steps": self.steps,
            "train.eval_steps": max(1, self.steps // EVALUATIONS),
        }


@dataclass(frozen=True)
class Start:
    """The run whose model all the others go on from: in ``STUDY/start``, on nobody's clock.

    Attributes:
        arm: what it trains, e.g. the preset ``mlm``.
        steps, learning_rate: of its own schedule.
    """

    arm: Arm
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Race:
    """A second rate of each arm, by the time to the baselines' targets (``--select_by time``).

    A rate that ends best is not the one that is first at a target: a high one learns the most facts
    in the end, and has its text loss back late. Baselines have both as everybody: with one of them
    alone, an arm would gain over its own copy.

    Attributes:
        baselines: arms whose largest runs, at the rate that ends best, set the targets.
        tolerance: see ``targets.target_of``.
    """

    baselines: Sequence[str]
    tolerance: float


@dataclass
class Study:
    """Declared runs and what became of them.

    Attributes:
        folder: ``runs/ARM/lr_X/seed_S`` lie in it, the runs of shorter budgets in
            ``runs/ARM/budget_N/lr_X/seed_S``.
        arms: what is compared.
        learning_rates: the grid, the same for each arm and budget.
        seeds: the first one searches the grid.
        budgets: each arm has runs of each, with a whole schedule in them; the first is the largest
            and the one that sets targets.
        settings: flat configuration keys for every run, over the arms'.
        select_by: metric that chooses the learning rate by its value at the end of the run.
        race: give each arm the rate that is first at the targets beside the one that ends best.
        start: trained first, from ``model.model_name_or_path`` of the settings or from scratch;
            None: the runs themselves begin there.
        export: runs of the largest budget leave a Hugging Face folder ``hf``.
    """

    folder: Path
    arms: Sequence[Arm]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    budgets: Sequence[Budget]
    settings: dict[str, object] = field(default_factory=dict)
    select_by: str = SELECT_BY
    start: Start | None = None
    export: bool = False
    race: Race | None = None

    def __post_init__(self):
        if len({budget.hours is None for budget in self.budgets}) > 1:
            raise ConfigError("--budget: steps and hours do not compare; name one kind")
        self.budgets = sorted(self.budgets, key=lambda budget: budget.size, reverse=True)
        if len(set(self.budgets)) < len(self.budgets):
            raise ConfigError("--budget: a budget is named twice")
        self.data_dir = Path(str(self.settings.get("data.data_dir")))
        self.dataset_id = load_manifest(self.data_dir)["dataset_id"]
        probes = any((self.data_dir / "probe").glob("*.jsonl"))
        if not probes and (self.select_by != "eval/mlm_loss" or self.race):
            raise DataError(
                f"{self.data_dir} has no probe files to choose settings by: "
                "use --select_by eval/mlm_loss"
            )
        for arm in self.arms:
            self.declare(arm, self.learning_rates[0], self.seeds[0])

    def declare(
        self, arm: Arm, learning_rate: float, seed: int, budget: Budget | None = None
    ) -> Run:
        """A run; ``budget`` None: the largest."""
        budget = budget or self.budgets[0]
        own = {"train.learning_rate": learning_rate, "train.seed": seed}
        if self.start is not None:
            own["model.model_name_or_path"] = str(self.folder / "start" / "hf")
        export = {"train.export": self.export and budget == self.budgets[0]}
        config = arm.config(export, budget.keys(), self.settings, own)
        folder = self.folder / "runs" / arm.name
        if budget != self.budgets[0]:
            folder /= f"budget_{budget.size:g}"
        folder = folder / f"lr_{learning_rate:g}" / f"seed_{seed}"
        length = str(budget) if len(self.budgets) > 1 else ""
        return Run(arm.name, learning_rate, seed, config, folder, length)

    def start_run(self) -> Run | None:
        """The run of ``start``, with the settings of all arms; the first seed's."""
        if self.start is None:
            return None
        arm, rate, seed = self.start.arm, self.start.learning_rate, self.seeds[0]
        own = {"train.max_steps": self.start.steps, "train.max_hours": None, "train.export": True}
        own |= {"train.learning_rate": rate, "train.seed": seed}
        config = arm.config(self.settings, own)
        return Run(f"start {arm.name}", rate, seed, config, self.folder / "start")

    def _grid(self) -> list[tuple[Budget, Run]]:
        return [
            (budget, self.declare(arm, rate, self.seeds[0], budget))
            for budget in self.budgets
            for rate in self.learning_rates
            for arm in self.arms
        ]

    def grid(self) -> list[Run]:
        """The runs of the first seed, arms inside: what is compared runs close in time."""
        return [run for _, run in self._grid()]

    def best_rates(self) -> dict[tuple[str, float], tuple[float, ...]]:
        """(arm, budget's size) -> the learning rates that the other seeds get, by the first's runs.

        The one that ends best comes first; in a race the one that is first at the targets follows,
        where it is another. An arm that diverged at all rates is not there.
        """
        best = self._best_at_the_end()
        first = {} if self.race is None else self._first_there(best)
        return {
            key: tuple(dict.fromkeys((rate, first.get(key, rate)))) for key, rate in best.items()
        }

    def _first_there(self, best: dict[tuple[str, float], float]) -> dict[tuple[str, float], float]:
        """The rates that are first at the targets, ``select_by`` with the text kept.

        Of several targets the more that are reached the better, then the less time to all of them
        together; where none is, the end decides.
        """
        full, goals = self.budgets[0].size, []
        metrics = (Metric(self.select_by, ""), METRICS[0])
        for arm in self.arms:
            if arm.name in self.race.baselines and (arm.name, full) in best:
                result = self.declare(arm, best[arm.name, full], self.seeds[0]).result()
                if found := goals_of(result, metrics, self.race.tolerance):
                    goals.append(found)

        def standing(arm: Arm, budget: Budget, rate: float) -> tuple:
            result = self.declare(arm, rate, self.seeds[0], budget).result()
            if result["status"] != "done":
                return (math.inf,)
            found = [crossing(result, goal) for goal in goals]
            times = [point.time_s for point in found if point is not None]
            return len(goals) - len(times), sum(times), *self._score(result), rate

        return {
            (arm.name, budget.size): min(
                standing(arm, budget, rate) for rate in self.learning_rates
            )[-1]
            for budget in self.budgets
            for arm in self.arms
            if (arm.name, budget.size) in best
        }

    def _best_at_the_end(self) -> dict[tuple[str, float], float]:
        """By ``select_by`` at the end of the runs.

        Ties go to the lower held-out MLM loss, then to the smaller rate; a rate at which the arm
        diverged is out, and so is an arm that diverged at all of them, or is not through its grid.
        """
        best = {}
        for budget in self.budgets:
            for arm in self.arms:
                runs = [self.declare(arm, r, self.seeds[0], budget) for r in self.learning_rates]
                if any(run.state != "finished" for run in runs):
                    continue
                scored = []
                for run in runs:
                    result = run.result()
                    if result["status"] == "done":
                        scored.append((*self._score(result), run.learning_rate))
                if scored:
                    best[arm.name, budget.size] = min(scored)[-1]
        return best

    def _score(self, result: dict) -> tuple[float, float]:
        """Sort key of a run, smaller is better."""
        last = result["evaluations"][-1] if result["evaluations"] else {}
        value, loss = last.get(self.select_by), last.get("eval/mlm_loss")
        if value is None:
            raise ConfigError(
                f"{result['arm']}: its last evaluation has no {self.select_by} to select by; "
                f"it has {', '.join(k for k in last if k.startswith('eval/')) or 'none'}"
            )
        sign = 1.0 if self.select_by in LOWER_IS_BETTER else -1.0
        return sign * value, math.inf if loss is None else loss

    def _rest(self) -> list[tuple[Budget, Run]]:
        return self._other_seeds(self.best_rates())

    def _other_seeds(self, rates: Mapping[tuple[str, float], Sequence[float]]):
        return [
            (budget, self.declare(arm, rate, seed, budget))
            for seed in self.seeds[1:]
            for budget in self.budgets
            for arm in self.arms
            for rate in rates.get((arm.name, budget.size), ())
        ]

    def rest(self) -> list[Run]:
        """The other seeds at each arm's best rates, seed after seed, arms inside."""
        return [run for _, run in self._rest()]

    def _following(self) -> tuple[list[Run], int]:
        """``rest`` as far as it is certain, and how many more it may have.

        An arm that is through its grid has the rate that ends best, whatever the others do; the one
        that is first at their targets has to wait for them.
        """
        if all(run.state == "finished" for run in self.grid()):
            return self.rest(), 0
        best = {key: (rate,) for key, rate in self._best_at_the_end().items()}
        certain = [run for _, run in self._other_seeds(best)]
        return certain, self._later - len(certain)

    def chosen(self) -> list[Run]:
        """The finished runs of the largest budget at the rate that ends best, every seed."""
        best, full = self.best_rates(), self.budgets[0]
        return [
            self.declare(arm, best[arm.name, full.size][0], seed)
            for arm in self.arms
            for seed in self.seeds
            if (arm.name, full.size) in best
        ]

    @property
    def _later(self) -> int:
        """Runs that follow the grid, at most."""
        rates = 1 if self.race is None else min(2, len(self.learning_rates))
        return (len(self.seeds) - 1) * len(self.arms) * len(self.budgets) * rates

    def plan(self) -> list[str]:
        """One line a run that is known already, then how many follow and their lengths."""
        first = [self.start_run()] if self.start else []
        lines = [f"{run.state:9} {run.name}" for run in [*first, *self.grid()]]
        if all(run.state == "finished" for run in self.grid()):
            return lines + [f"{run.state:9} {run.name}" for run in self.rest()]
        if self._later:
            lines.append(
                f"then up to {self._later} more: each arm's best rate with seeds {self.seeds[1:]}"
            )
        total, lengths = len(self.grid()) + self._later, " and ".join(map(str, self.budgets))
        return [*lines, f"{'up to ' if self._later else ''}{total} runs of {lengths}"]

    def run(
        self,
        stop: StopRequest,
        *,
        parallel: int = 1,
        deepspeed: Path | None = None,
        keep_checkpoints: bool = False,
    ) -> bool:
        """Runs what is not finished; False when it was stopped on request.

        Raises:
            ConfigError: another process is at work in the folder, the folder's study is of other
                data, or a run refuses its settings.
            RunFailed: a run ended with an error.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{self.folder} is in use: another study, or a run it left behind, works there"
                ) from None
            runner = Runner(
                parallel, stop, deepspeed=deepspeed, keep_checkpoints=keep_checkpoints, lock=lock
            )
            self._check_conditions(len(runner.slots[0]), deepspeed)
            start = self.start_run()
            expected = len(self.grid()) + self._later
            if start is not None and not runner.run([start], lambda: ((), expected)):
                return False
            if not self._score_mentions(runner):
                return False
            return runner.run(self.grid(), self._following)

    def _check_conditions(self, cores: int, deepspeed: Path | None) -> None:
        """What ``request.json`` does not say and every run has to share, kept in ``study.json``."""
        text = None if deepspeed is None else deepspeed.read_text(encoding="utf-8")
        wanted = {
            "dataset_id": ("other data", self.dataset_id),
            "cores": ("runs on another number of cores (--parallel)", cores),
            "deepspeed": ("another --deepspeed", text),
        }
        path = self.folder / "study.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        begun = any(self.folder.glob(f"runs/**/{REQUEST}"))  # of other arms, too
        done = all(run.state == "finished" for run in self.grid())
        done = done and all(run.state == "finished" for run in self.rest())
        if done or not begun:  # nothing will run, or nothing has yet
            found = {key: value for key, value in found.items() if key == "dataset_id"}
        for key, (what, value) in wanted.items():
            if found.get(key, value) != value:
                raise ConfigError(
                    f"{self.folder} holds a study of {what}: choose another --output_dir"
                )
        if not done or not path.is_file():
            write_json(path, {key: value for key, (_, value) in wanted.items()})

    def _score_mentions(self, runner: Runner) -> bool:
        """Scores the corpus's mentions (Eq. 1) before the first run, where nobody has yet.

        The first run that needs the scores would write them: then that run alone would pay, and
        two runs at a time would both write.
        """
        if (self.data_dir / "tables" / "importance.json").exists():
            return True
        arm = Arm("scoring", "dkplm")
        run = self.declare(arm, self.learning_rates[0], self.seeds[0])
        train = {"train.max_steps": 1, "train.eval_steps": 0, "train.max_hours": None}
        train["model.model_name_or_path"] = run.config.model.model_name_or_path
        config = arm.config(self.settings, train)
        return runner.run([Run(run.arm, run.learning_rate, run.seed, config, run.folder)])

    # -- what the runs say ----------------------------------------------------------------------

    def results(self) -> tuple[list[dict], list[dict]]:
        """Results of the finished runs: those at each arm's chosen rates, and the whole grid's.

        ``budget`` is the steps or hours a run was given, ``chosen`` whether its rate is one of
        ``best_rates``, ``ends_best`` whether it is the first of them.
        """
        best = self.best_rates()
        for budget in self.budgets:
            for arm in self.arms:
                if (arm.name, budget.size) not in best:
                    logger.warning("%s diverged at every learning rate of the grid", arm.name)

        def result(budget: Budget, run: Run) -> dict:
            rates = best.get((run.arm, budget.size), ())
            return run.result() | {
                "budget": budget.size,
                "chosen": run.learning_rate in rates,
                "ends_best": run.learning_rate in rates[:1],
            }

        every = [result(*pair) for pair in self._grid()]
        chosen = [r for r in every if r["chosen"]]
        chosen += [result(*pair) for pair in self._rest()]
        return chosen, every
