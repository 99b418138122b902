"""Knowledge-state sampling: what the model does not know yet is what it is shown more often.

Every ``sampling.refresh_steps`` steps the knowledge state closes its window and becomes a table of
weights, w(e) = floor + (1 - K(e))^temperature, that the loaders draw by half an interval later.
The tables that a resumed run needs, in use or waiting, travel in the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from trelm_ds.config import SamplingConfig
from trelm_ds.data.collate import Batch
from trelm_ds.data.weights import WeightTables
from trelm_ds.distributed import World, write_together
from trelm_ds.errors import CheckpointError
from trelm_ds.files import try_again
from trelm_ds.memory.knowledge_state import KnowledgeState, frequency_bands

_TABLE = "weights_"  # in a checkpoint, then the version
WRITE_WAITS_S = (0.1, 2.0, 10.0)  # before a failed write of a table is tried again


def sampling_weights(value: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """(floor + (1 - K)^temperature) / (floor + 1), float32 [N] in (0, 1], of K float32 [N]."""
    unknown = (1.0 - value.astype(np.float64)).clip(0.0, 1.0) ** config.temperature
    return ((config.floor + unknown) / (config.floor + 1.0)).astype(np.float32)


class KnowledgeSampling:
    """Keeps the knowledge state, and writes the tables that the loaders read.

    Args:
        config: ``sampling`` of the run's configuration.
        state: the knowledge state.
        tables: the versions' folder, shared by the ranks.
        frequency: int64 [N] mentions of each entity in the training split, for the log.
        world, group: this process's place, and a host-side group.
    """

    def __init__(
        self,
        config: SamplingConfig,
        state: KnowledgeState,
        tables: WeightTables,
        frequency: np.ndarray,
        world: World,
        group,
    ):
        self.state = state
        self._config = config
        self._tables = tables
        self._world, self._group = world, group
        self._bands = frequency_bands(np.asarray(frequency))
        self._live: dict[int, np.ndarray] = {}  # versions in use or waiting

    @staticmethod
    def folder(output_dir: Path) -> Path:
        """Where a run keeps its tables."""
        return output_dir / "sampling"

    def start(self) -> None:
        """Leaves the live tables, and nothing else, in the folder. Collective, before loading.

        Raises:
            WriteError: on all ranks: a table cannot be written.
        """
        if self._world.is_main:
            # Of an earlier run here, or of steps that this one takes again.
            shutil.rmtree(self._tables.folder, ignore_errors=True)
        self._write(self._live)

    def _write(self, tables: dict[int, np.ndarray]) -> None:
        """Rank 0 writes tables, others wait. No step can do without the table it draws by."""
        with write_together(f"{self._tables.folder} was not written", self._group):
            if self._world.is_main:
                for item in tables.items():
                    try_again(
                        functools.partial(self._tables.write, *item),
                        WRITE_WAITS_S,
                        (OSError, SafetensorError),
                    )

    def stage(self, batch: Batch, probability: torch.Tensor) -> None:
        """Notes what a micro-batch's masked mentions show, ``StepOutput.mention_probability``."""
        self.state.stage(
            batch.mlm_mention, batch.mlm_mention_group, batch.mlm_mention_given, probability
        )

    def end_step(self, applied: bool, step: int) -> None:
        """Counts or forgets a step's observations; makes a table when one is due. Collective then.

        Args:
            applied: whether the step updated the weights.
            step: steps done, this one included.
        Raises:
            WriteError: on all ranks: the table cannot be written.
        """
        if applied:
            self.state.commit()
        else:
            self.state.drop()
        version, rest = divmod(step, self._config.refresh_steps)
        if rest:
            return
        self.state.close_window()  # collective: every rank has the batches of the steps before
        self._live[version] = sampling_weights(self.state.value, self._config)
        used = self._tables.version_at(step)
        self._live = {v: weights for v, weights in self._live.items() if v >= used}
        self._write({version: self._live[version]})
        if self._world.is_main:
            for path in self._tables.folder.glob("weights-*"):
                if path.name < self._tables.path(used).name:
                    with contextlib.suppress(OSError):  # a table too many does no harm
                        path.unlink()

    def metrics(self) -> dict[str, float]:
        """K by frequency band, and the share of the mentioned entities that have an estimate."""
        value, seen = self.state.value, self.state.count > 0
        values = {
            f"knowledge/{name}": float(value[entities].mean())
            for name, entities in self._bands.items()
            if len(entities)
        }
        mentioned = np.concatenate(list(self._bands.values()))
        if len(mentioned):
            values["knowledge/seen"] = float(seen[mentioned].mean())
        return values

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For the checkpoint, equal on all ranks. Collective."""
        tables = {f"{_TABLE}{v}": torch.from_numpy(w) for v, w in self._live.items()}
        return self.state.state_dict() | tables

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores ``state_dict``; ``start`` then writes the tables.

        Raises:
            CheckpointError: not a state of these entities.
        """
        self.state.load_state_dict(state, self._world.is_main)
        self._live = {}
        for name, weights in state.items():
            if name.startswith(_TABLE):
                if weights.shape != self.state.value.shape:
                    raise CheckpointError("the sampling weights are of other entities")
                self._live[int(name.removeprefix(_TABLE))] = weights.numpy()
