"""All-or-nothing checkpoints: DeepSpeed's shards, the memory bank, RNG and the data position.

A checkpoint is a folder ``checkpoints/step_00000100`` that exists only when it is complete:
every rank writes into a temporary folder, the files' SHA-256 go into ``MANIFEST.json``, the folder
is renamed, and then ``LATEST`` is replaced. DeepSpeed's own ``latest`` is not used: it is written
before the other ranks have finished (docs/architecture.md). DeepSpeed's shards are pickles, so
nothing is loaded before the manifest of a run's own folder has been verified.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trelm_ds.distributed import (
    World,
    agree,
    barrier,
    first_problem,
    gather_objects,
    write_together,
)
from trelm_ds.errors import CheckpointError, WriteError
from trelm_ds.files import READ_WAITS_S, file_sha256, fsync, try_again, write_text
from trelm_ds.metrics import read_metrics
from trelm_ds.reshard import universal_checkpoint

logger = logging.getLogger(__name__)

FORMAT = "trelm-checkpoint-v1"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
LATEST = "LATEST"
TEMPORARY = "tmp-"
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")  # what ``checkpoint_name`` gives
LAST_STEP = "checkpoint/last_step"  # in the metrics: the step of the newest checkpoint


class StrayFile(CheckpointError):
    """A checkpoint's folder holds what nobody saved there. It is not damaged, and passing it over
    would lose its steps: the user has to look."""


@dataclass
class TrainState:
    """Where a run stands; everything else it needs is a function of this and the configuration.

    Attributes:
        step: optimizer steps taken, skipped ones included; the data position is ``step`` global
            batches.
        applied_steps: those of them that updated the weights and the memory bank.
        clock_s: training seconds, evaluation and queue time excluded.
        tokens_seen: real tokens consumed.
        quarantined: times that an empty sequence replaced a damaged sample, on all ranks.
    """

    step: int = 0
    applied_steps: int = 0
    clock_s: float = 0.0
    tokens_seen: int = 0
    quarantined: int = 0


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run's ``checkpoints`` by their steps, oldest first, complete or not.

    Other names are the user's: a copy ``step_00000800.keep`` is not the run's to find or to delete.
    """
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("step_*"))
    steps = sorted(int(match[1]) for match in matches if match)
    return {step: folder / checkpoint_name(step) for step in steps}


def _payload_files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


def _hash_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Size and SHA-256 of files that are then on the disk."""
    found = {}
    for name in names:
        path = folder / name
        fsync(path)
        found[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return found


@contextlib.contextmanager
def _late_errors(engine):
    """Lets DeepSpeed finish its save when it cannot write a file, and raises the error then.

    ``engine.save_checkpoint`` ends in a barrier. A rank whose disk is full would leave the others
    there until the timeout, and the job would end without a word about the disk.
    """
    errors = []

    def late(function):
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return call

    # What writes: a file of states, and with ZeRO a script beside them.
    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    writers = [(owner, name) for owner, name in writers if hasattr(owner, name)]
    for owner, name in writers:
        setattr(owner, name, late(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)  # the class's again
    if errors:
        raise errors[0]


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


class Checkpointer:
    """Saves and restores a run under ``OUTPUT_DIR/checkpoints``.

    Args:
        output_dir: the run's folder, on a file system all ranks share.
        world: this process's place in the job.
        identity: what a resumed run must have in common with the saved one (data set, seed,
            global batch, ...); differences are refused, each named.
        limit: checkpoints to keep.
        group: host-side process group for the small decisions.
    """

    def __init__(
        self, output_dir: Path, world: World, identity: dict, limit: int, device, group=None
    ):
        self.folder = Path(output_dir) / "checkpoints"
        self._world = world
        self._identity = identity
        self._limit = limit
        self._device = device
        self._group = group

    # -- saving ---------------------------------------------------------------------------------

    def save(
        self,
        state: TrainState,
        engine,
        bank,
        routing_state: dict,
        extras: dict,
        sampling_state: dict | None = None,
    ) -> Path:
        """Writes one checkpoint; on every rank, at the same step.

        Args:
            state: the run's position.
            engine: the DeepSpeed engine.
            bank: memory bank or None.
            routing_state: ``RoutingController.state_dict()``, equal on all ranks.
            extras: files for rank 0 to write, ``{relative name: text}`` or a folder to copy.
            sampling_state: ``KnowledgeSampling.state_dict()``, equal on all ranks, or None.
        Returns:
            The published folder.
        Raises:
            WriteError: a rank failed; nothing was published and the last checkpoint stands.
        """
        name = checkpoint_name(state.step)
        final, temporary = self.folder / name, self.folder / f"{TEMPORARY}{name}"
        with self._all_or_none(final, temporary):
            if self._world.is_main:
                for left in self.folder.glob(f"{TEMPORARY}*"):  # of saves that were killed
                    shutil.rmtree(left, ignore_errors=True)
                (temporary / "bank").mkdir(parents=True)
        with self._all_or_none(final, temporary):
            with _late_errors(engine):
                engine.save_checkpoint(str(self.folder), tag=temporary.name, save_latest=False)
            if bank is not None:
                bank.save_shards(temporary / "bank")
            rng = temporary / f"rng_{self._world.rank:05d}.safetensors"
            save_file(_rng_state(self._device), str(rng))
            if self._world.is_main:
                self._write_main(temporary, state, engine, routing_state, extras)
                if sampling_state is not None:
                    save_file(sampling_state, str(temporary / "sampling.safetensors"))
        listing, hashes = [], {}
        with self._all_or_none(final, temporary):
            listing = _payload_files(temporary)
        # Of all ranks: a shared file system may show a rank another one's files a moment later.
        names = sorted(set().union(*gather_objects(listing, self._group)))
        with self._all_or_none(final, temporary):
            hashes = _hash_files(temporary, names[self._world.rank :: self._world.size])
        parts = gather_objects(hashes, self._group)
        with self._all_or_none(final, temporary):
            if self._world.is_main:
                self._publish(temporary, final, {k: v for part in parts for k, v in part.items()})
        return final

    @contextlib.contextmanager
    def _all_or_none(self, final: Path, temporary: Path):
        """A part of a save: one rank's failure is that of all, and nothing is left of it."""
        try:
            with write_together(f"checkpoint {final} was not written", self._group):
                yield
        except WriteError:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            barrier(self._group)
            raise

    def _write_main(self, folder, state, engine, routing_state, extras) -> None:
        save_file(routing_state, str(folder / "routing.safetensors"))
        document = {
            "format": FORMAT,
            "identity": self._identity,
            "world_size": self._world.size,
            "zero_stage": engine.zero_optimization_stage(),
            "bf16": bool(engine.bfloat16_enabled()),
            **asdict(state),
        }
        (folder / STATE).write_text(json.dumps(document, indent=2) + "\n")
        for name, content in extras.items():
            target = folder / name
            if isinstance(content, Path):
                shutil.copytree(content, target, dirs_exist_ok=True)
            else:
                target.write_text(content)

    def _publish(self, temporary: Path, final: Path, hashes: dict) -> None:
        manifest = {"format": FORMAT, "files": dict(sorted(hashes.items()))}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            fsync(folder)  # their files are on the disk since they were hashed
        if final.exists():  # never the one to resume from: that one's step is not saved again
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync(self.folder)
        write_text(self.folder / LATEST, final.name + "\n")
        for old in self._published(but=final)[self._limit - 1 :]:
            shutil.rmtree(old, ignore_errors=True)

    def _published(self, but: Path) -> list[Path]:
        """The other complete checkpoints, newest first."""
        folders = reversed(checkpoint_folders(self.folder).values())
        return [path for path in folders if path != but and (path / MANIFEST).exists()]

    def oldest_step(self) -> int:
        """Step of the oldest checkpoint that is kept; 0 if there is none."""
        return min(checkpoint_folders(self.folder), default=0)

    # -- restoring ------------------------------------------------------------------------------

    def find(self, which: str) -> Path | None:
        """The checkpoint to resume from, the same on every rank, verified.

        Args:
            which: ``latest``, or a checkpoint's folder.
        Returns:
            Its folder; None for ``latest`` in a run folder that has never saved one.
        Raises:
            CheckpointError: there are checkpoints but none is intact, or the named one is not; or
                there were some and all are gone.
        """
        if which == "latest":
            names = [str(path) for path in reversed(checkpoint_folders(self.folder).values())]
            traces = [] if names else self._traces()
            names, traces = gather_objects((names, traces), self._group)[0]  # as rank 0 sees it
            candidates = [Path(name) for name in names]
            if traces:
                raise CheckpointError(
                    f"no checkpoint to resume from: {' and '.join(traces)}, but no step_* "
                    f"folder is in {self.folder}: bring it back, or start afresh with another "
                    "--output_dir or after removing what tells of it",
                    everywhere=True,
                )
            if not candidates:
                return None
        else:
            candidates = [Path(which)]
        problems = []
        for candidate in candidates:
            problem = self._verify(candidate)
            if problem is None:
                if problems and self._world.is_main:
                    logger.warning("using %s: %s", candidate.name, "; ".join(problems))
                return candidate
            problems.append(problem)
        raise CheckpointError(
            "no intact checkpoint to resume from: " + "; ".join(problems), everywhere=True
        )

    def _traces(self) -> list[str]:
        """What proves that this run has had checkpoints. A run that died before its first one has
        left a log and metrics all the same: it may start from scratch."""
        traces = []
        latest, metrics = self.folder / LATEST, self.folder.parent / "metrics.jsonl"
        with contextlib.suppress(OSError):
            traces.append(f"{latest} names {latest.read_text(errors='replace').strip()!r}")
        with contextlib.suppress(OSError):
            saved = [r[LAST_STEP] for r in read_metrics(metrics) if LAST_STEP in r]
            if saved:
                traces.append(f"{metrics} tells of one of step {saved[-1]}")
        return traces

    def _verify(self, folder: Path) -> str | None:
        """What is wrong with it, the same on every rank. A disk's bad moment is not: it would cost
        all steps since the checkpoint before.

        Raises:
            StrayFile: on all ranks.
        """

        def look() -> str | None:
            manifest = read_manifest(folder)
            return check_files(folder, manifest, self._world.rank, self._world.size)

        problem = None
        with agree(self._group):
            try:
                problem = try_again(look, READ_WAITS_S)
            except StrayFile:
                raise
            except CheckpointError as error:
                problem = str(error)
            except OSError as error:  # a bad sector: an older one may be readable
                problem = f"{folder} cannot be read: {error}"
        return first_problem(problem, self._group)

    def restore(self, folder: Path, engine, bank, routing, sampling=None) -> TrainState:
        """Loads a verified checkpoint into the engine, memory bank, routing and sampling.

        Raises:
            CheckpointError: it belongs to another run (every difference is named), or DeepSpeed
                refuses it.
        """
        document = json.loads((folder / STATE).read_text())
        document.setdefault("quarantined", 0)  # a checkpoint that is older than the count
        self._check_identity(folder, document, engine)
        with self._loadable(folder, document, engine) as loadable, _silence():
            path, _ = engine.load_checkpoint(
                str(loadable.parent), tag=loadable.name, load_lr_scheduler_states=False
            )
        if path is None:  # DeepSpeed only warns and would train from scratch
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")
        if bank is not None:
            bank.load_shards(folder / "bank")
        routing.load_state_dict(load_file(folder / "routing.safetensors"))
        if sampling is not None:
            sampling.load_state_dict(load_file(folder / "sampling.safetensors"))
        if document["world_size"] == self._world.size:
            rng = load_file(folder / f"rng_{self._world.rank:05d}.safetensors")
            torch.set_rng_state(rng["cpu"])
            if self._device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self._device)
        else:  # each rank's own seed, but not the draws of the run's beginning again
            torch.manual_seed(torch.initial_seed() + document["step"])
        self._set_aside_after(folder, document["step"])
        return TrainState(**{k: document[k] for k in asdict(TrainState())})

    def _loadable(self, folder: Path, document: dict, engine):
        """The folder for DeepSpeed to load, as a context: converted where ranks have changed."""
        saved, stage = document["world_size"], engine.zero_optimization_stage()
        if saved == self._world.size:
            return contextlib.nullcontext(folder)
        if self._world.is_main:
            logger.warning(
                "%s is of %d ranks and goes on with %d: dropout's draws are other ones, and sums "
                "are rounded otherwise",
                *(folder, saved, self._world.size),
            )
        if stage == 0:  # nothing is cut by rank
            return contextlib.nullcontext(folder)
        temporary = self.folder / f"{TEMPORARY}universal-{folder.name}"
        truncated = bool(self._identity.get("routing.truncated_depth"))
        return universal_checkpoint(folder, temporary, engine, self._world, self._group, truncated)

    def is_beside(self, folder: Path) -> bool:
        """Whether a checkpoint is this run's or a copy beside its own, and not another run's."""
        return folder.resolve().parent == self.folder.resolve()

    def is_own(self, folder: Path, step: int) -> bool:
        """Whether a checkpoint of a step is this run's, and not another one's or a user's copy."""
        return folder.resolve() == (self.folder / checkpoint_name(step)).resolve()

    def _set_aside_after(self, folder: Path, step: int) -> None:
        """Later checkpoints here belong to a branch that is left: ``latest`` must not find them
        again once the run goes on from this one, nor may they take the place of newer ones.

        From another run's checkpoint it goes on beside this run's own of the same step, too.
        """
        with write_together(f"{self.folder} cannot be changed", self._group):
            if not self._world.is_main or not self.folder.is_dir():
                return
            own = self.is_own(folder, step)
            kept = []
            for saved, found in checkpoint_folders(self.folder).items():
                if saved < step or (own and saved == step):
                    kept.append(found.name)
                    continue
                logger.warning("setting %s aside: the run goes on from %s", found, folder)
                aside = found.with_name(f"abandoned-{found.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(found, aside)
            if kept:  # else the old name stays, and tells that there were checkpoints
                write_text(self.folder / LATEST, kept[-1] + "\n")

    def _check_identity(self, folder: Path, document: dict, engine) -> None:
        saved = dict(document.get("identity", {}))
        wanted = dict(self._identity)
        saved |= {k: document.get(k) for k in ("zero_stage", "bf16")}
        wanted |= {
            "zero_stage": engine.zero_optimization_stage(),
            "bf16": bool(engine.bfloat16_enabled()),
        }
        differences = [
            f"{key} was {saved.get(key)!r} and is {wanted.get(key)!r}"
            for key in sorted(set(saved) | set(wanted))
            if saved.get(key) != wanted.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{folder} belongs to a different run: " + "; ".join(differences), everywhere=True
            )


def read_manifest(folder: Path) -> dict:
    """The parsed manifest of a checkpoint.

    Raises:
        CheckpointError: no manifest, or not one of this format: nothing in it may be loaded.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it is not a complete checkpoint")
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT or not isinstance(files, dict) or STATE not in files:
            raise KeyError
        for entry in files.values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise TypeError
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT}") from None
    return manifest


def check_files(folder: Path, manifest: dict, rank: int = 0, size: int = 1) -> str | None:
    """The first file that is missing or changed, or None; ``rank`` of ``size`` checks its share.

    Raises:
        StrayFile: one that nobody checked lies among them, and loaders would find it.
    """
    files = manifest["files"]
    unknown = set(_payload_files(folder)) - set(files)
    if unknown:
        raise StrayFile(f"{folder / min(unknown)} is no file of this checkpoint: move it elsewhere")
    for name in sorted(files)[rank::size]:
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            return f"{path} is missing"
        if (
            path.stat().st_size != files[name]["bytes"]
            or file_sha256(path) != files[name]["sha256"]
        ):
            return f"{path} is corrupt (SHA-256 differs from the manifest)"
    return None


@contextlib.contextmanager
def _silence():
    """DeepSpeed's conversion and loading code prints its progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _replicated_state(folder: Path) -> dict[str, torch.Tensor]:
    """ZeRO 0: rank 0 holds everything; in bf16 the float32 masters are in the optimizer's part.

    That part has a tied parameter by one of its names, and the model is loaded by all of them.
    """
    shard = torch.load(
        folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    state, optimizer = shard["module"], shard.get("optimizer") or {}
    masters = optimizer.get("fp32_groups")
    if masters:
        tied: dict[tuple, list[str]] = {}
        for name, value in state.items():
            tied.setdefault((value.data_ptr(), value.shape), []).append(name)
        names_of = {name: names for names in tied.values() for name in names}
        groups = optimizer["optimizer_state_dict"]["param_groups"]
        for group, tensors in zip(groups, masters, strict=True):
            for name, tensor in zip(group["names"], tensors, strict=True):
                state.update(dict.fromkeys(names_of[name], tensor))
    return state


def load_model_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """The full model in float32 from any checkpoint of this project, whatever its ZeRO stage.

    Args:
        folder: ``.../checkpoints/step_00000100``.
    Returns:
        ``TrelmModel.state_dict()`` names to float32 tensors (integer buffers as they are).
    Raises:
        CheckpointError: missing, incomplete or corrupt; checked before anything is unpickled.
    """
    folder = Path(folder)
    problem = check_files(folder, read_manifest(folder))
    if problem:
        raise CheckpointError(problem)
    document = json.loads((folder / STATE).read_text())
    if document["zero_stage"] == 0:
        state = _replicated_state(folder)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with _silence():
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
