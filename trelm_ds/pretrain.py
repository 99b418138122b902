"""``launch/pretrain.py``: flags to configuration to a trainer, and the exit code of the run."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import platform
import sys
import time
import uuid
from pathlib import Path

from trelm_ds import stack_dump
from trelm_ds.arguments import parse_arguments
from trelm_ds.checkpoint import checkpoint_folders
from trelm_ds.config import FROM_SCRATCH, Config
from trelm_ds.distributed import (
    World,
    barrier,
    gather_objects,
    get_world,
    leave,
    report_once,
    write_together,
)
from trelm_ds.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    TrelmError,
    WriteError,
)
from trelm_ds.files import try_again, write_text

logger = logging.getLogger(__name__)

SAMPLE_DIR = "outputs/sample_data"
LOCK_WAIT_S = 30.0
SHARED_WAITS_S = (0.1, 1.0, 5.0, 10.0)  # before a rank looks again for what rank 0 has written
_held_locks: list = []  # open files: a lock lasts as long as its file
DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 2}}


def setup_logging(world: World, output_dir: Path | None = None) -> None:
    """Rank 0 speaks on the console, every rank writes ``logs/rank_N.log``, its stacks too."""
    root = logging.getLogger("trelm_ds")
    if not root.handlers:
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO if world.is_main else logging.ERROR)
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)
        root.setLevel(logging.INFO)
        root.propagate = False
    if output_dir is not None:
        folder = output_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{world.rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        root.addHandler(file)
        stack_dump.enable(file.stream)


def choose_output_dir(config: Config) -> Path:
    """The run's folder; without ``--output_dir`` the first free ``outputs/METHOD[-N]``, made here.

    Raises:
        ConfigError: the folder holds another run's checkpoints and nothing was said about resuming.
    """
    train = config.train
    if train.output_dir is None:
        if train.resume_from_checkpoint == "latest":
            raise ConfigError("--resume_from_checkpoint latest needs --output_dir")
        folder = Path("outputs")
        folder.mkdir(exist_ok=True)
        path, number = folder / config.method, 1
        while True:
            try:
                path.mkdir()  # made at once: a run that starts now takes the next one
                return path
            except FileExistsError:
                number += 1
                path = folder / f"{config.method}-{number}"
    path = Path(train.output_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output_dir {path} is a file")
    _refuse_other_run(path, config)
    return path


def _refuse_other_run(path: Path, config: Config) -> None:
    if checkpoint_folders(path / "checkpoints") and not config.train.resume_from_checkpoint:
        raise ConfigError(
            f"{path} holds checkpoints of an earlier run: go on with "
            "--resume_from_checkpoint latest, or choose another --output_dir"
        )


def _lock(output: Path) -> None:
    """Keeps the run's folder for this job until rank 0 ends, however it ends.

    Two jobs in one folder would delete each other's half-written checkpoints. A job that was
    requeued may find the lock of the one it replaces for a moment: the file system hears later.

    Raises:
        ConfigError: another job has it.
    """
    file = (output / ".lock").open("a")
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise ConfigError(
                    f"{output} is in use by another run: choose another --output_dir, or wait"
                ) from None
            time.sleep(0.2)
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): start one run at a time there", output, error)
            return
        else:
            _held_locks.append(file)
            return


def data_folder(named: str | Path | None, only_look: bool = False) -> Path:
    """The prepared folder that is named, or the embedded corpus's, written where it is not yet.

    Raises:
        ConfigError: it would have to be written, and ``only_look`` says to write nothing.
    """
    if named is not None:
        return Path(named)
    folder = Path(SAMPLE_DIR)
    if not (folder / "manifest.json").exists():
        if only_look:
            raise ConfigError(
                "name --data_dir, or write the sample corpus first: "
                f"python launch/prepare.py sample --output {folder}"
            )
        logger.info("writing the sample corpus to %s", folder)
        from trelm_ds.prepare.cli import prepare

        prepare(["sample", "--output", str(folder)])
    return folder


def _prepare_folders(config: Config, world: World) -> None:
    """Rank 0 picks the folders and writes what is missing; every rank takes its choice.

    Raises:
        TrelmError: on all ranks: rank 0 could not.
    """
    choice, problem = None, None
    if world.is_main:
        try:
            data = data_folder(config.data.data_dir)
            if not (data / "manifest.json").is_file():
                raise DataError(
                    f"--data_dir {data}: no manifest.json there; write it with launch/prepare.py"
                )
            output = choose_output_dir(config)
            output.mkdir(parents=True, exist_ok=True)
            _lock(output)
            _refuse_other_run(output, config)  # again: one may have ended while this one waited
            choice = (str(output), str(data))
        except TrelmError as error:
            problem = error
            problem.everywhere = True
        except OSError as error:
            problem = WriteError(str(error), everywhere=True)
    choice, problem = gather_objects((choice, problem))[0]
    if problem is not None:
        raise problem
    config.train.output_dir, config.data.data_dir = choice


def _refuse_unshared(output: Path, world: World) -> None:
    """A checkpoint is one folder that all ranks write into; the first would fail, hours later.

    Raises:
        ConfigError: on all ranks: what rank 0 writes is not seen from some hosts.
        WriteError: on all ranks: it cannot write.
    """
    name = gather_objects(f".shared-{uuid.uuid4().hex}")[0]  # one that no earlier run has left
    host, blind = platform.node(), False
    with write_together(f"{output} cannot be written"):
        if world.is_main:
            (output / name).touch()
    try:
        try_again((output / name).stat, SHARED_WAITS_S)  # a network file system may be late
    except OSError:
        blind = True
    hosts = gather_objects((host, blind))
    if world.is_main:
        with contextlib.suppress(OSError):  # the other ranks go on
            (output / name).unlink()
    if without := sorted({where for where, unseen in hosts if unseen}):
        raise ConfigError(
            f"--output_dir {output} is not shared: what {hosts[0][0]} writes there is not seen on "
            f"{', '.join(without)}; name a folder that all nodes share",
            everywhere=True,
        )


def _write_records(config: Config, ds_config: dict, backbone, step: int) -> None:
    """What the run was asked for, and what it runs on: a model that was loaded has a shape of its
    own (``backbone``, its Hugging Face configuration), whatever the keys for one from scratch say.
    A run that goes on from ``step`` keeps where and by which commit it was trained before.
    """
    from trelm_ds import environment

    output = Path(config.train.output_dir)
    config.save(output / "config.json")
    shape = {key: getattr(backbone, key) for key in ("vocab_size", *FROM_SCRATCH)}
    record = environment.describe()
    path, starts = output / "environment.json", []
    if step:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            starts = [s for s in json.loads(path.read_text())["starts"] if s["step"] < step]
    starts.append({"step": step} | {key: record[key] for key in ("commit", "hardware", "versions")})
    record |= {"deepspeed_config": ds_config, "backbone": shape, "starts": starts}
    write_text(path, json.dumps(record, indent=2) + "\n")


def _dry_run(config: Config, ds_config: dict, world: World) -> None:
    """Builds the model on this host only to count it, and prints what would run."""
    if not world.is_main:
        return
    from trelm_ds.data.graph import KnowledgeGraph
    from trelm_ds.data.shards import load_manifest
    from trelm_ds.data.tables import KnowledgeTables
    from trelm_ds.dry_run import describe_run
    from trelm_ds.model import TrelmModel

    data = data_folder(config.data.data_dir, only_look=True)
    manifest = load_manifest(data)
    model = TrelmModel.build(config, data, KnowledgeGraph.load(data), KnowledgeTables.load(data))
    _warn_of_the_rate(config, model.hidden_size)
    keys = manifest["graph"]["entities"] + manifest["long_tail_words"]
    print(describe_run(config, ds_config, world.size, model, keys))


def run(argv: list[str], stop) -> int:
    """One training run; returns its exit code.

    Raises:
        TrelmError: bad input, before or while the parts are built; or what ended the training.
    """
    try:
        return _run(argv, stop)
    finally:
        stack_dump.disable()  # before its log is closed


def _run(argv: list[str], stop) -> int:
    config, args = parse_arguments(argv)
    world = get_world()
    setup_logging(world)
    from trelm_ds import engine as engines
    from trelm_ds.routing.controller import refuse_unsupported

    device = engines.local_device(world)
    engines.quiet_deepspeed(device)
    engines.check_tracker(config.train.report_to)
    given = engines.read_deepspeed_config(args.deepspeed) if args.deepspeed else DEFAULT_DEEPSPEED
    bf16 = engines.use_bf16(config, device)
    ds_config = engines.resolve_deepspeed_config(given, config, world.size, bf16)
    refuse_unsupported(config, engines.zero_stage(ds_config))  # before the ranks meet: said once
    if args.dry_run:
        _dry_run(config, ds_config, world)
        return EXIT_DONE
    if world.is_main:
        logger.info(
            "%s on %d rank(s), %s, ZeRO %d; starting DeepSpeed",
            config.method,
            world.size,
            device.type,
            engines.zero_stage(ds_config),
        )
        logger.info("to stop with a checkpoint: kill -USR1 %d", os.getpid())
    engines.init_distributed(world, device)
    _prepare_folders(config, world)
    output = Path(config.train.output_dir)
    _refuse_unshared(output, world)  # before other nodes make a folder of that name
    with write_together(f"{output / 'logs'} cannot be written"):
        setup_logging(world, output)
    engines.add_tracker(ds_config, config.train.report_to, output)
    from trelm_ds.ops import load_kernels
    from trelm_ds.trainer import Trainer

    kernels = load_kernels()
    if device.type == "cpu":
        _refuse_mixed_kernels(kernels)
    trainer = Trainer(config, ds_config, world, device, stop)
    _warn_of_the_rate(config, trainer.model.hidden_size)
    trainer.resume()
    with write_together(f"{output} cannot be written"):
        if world.is_main and not trainer.done:
            backbone = trainer.model.backbone.config
            _write_records(config, ds_config, backbone, trainer.state.step)
    if trainer.done:
        logger.info("%s is already complete at step %d", output, trainer.state.step)
        complete = True
    else:
        complete = trainer.train()
    if complete:
        trainer.finish()
        if world.is_main:
            _print_summary(output, trainer)
    elif world.is_main:
        logger.info("stopped on request at step %d; start again with", trainer.state.step)
        logger.info("  --output_dir %s --resume_from_checkpoint latest", output)
    stop.ignore()
    barrier()
    return EXIT_DONE if complete else EXIT_STOPPED


def _refuse_mixed_kernels(mine: bool) -> None:
    """Kernels and reference round differently: replicas that step by both drift apart unseen.

    Raises:
        ConfigError: on all ranks: the C++ kernels serve on some of them only.
    """
    loaded = gather_objects(mine)
    without = [str(rank) for rank, served in enumerate(loaded) if not served]
    if 0 < len(without) < len(loaded):
        raise ConfigError(
            f"the C++ kernels cannot be built on rank(s) {', '.join(without)}: give their "
            "machines a compiler, or set TRELM_KERNELS=0 for all",
            everywhere=True,
        )


def _warn_of_the_rate(config: Config, hidden_size: int) -> None:
    """The default learning rate is for the sample's small model, and ruins a large one."""
    rate = config.train.learning_rate
    if hidden_size >= 512 and rate > 5e-4:
        logger.warning(
            "train.learning_rate %g is far above what a model %d wide takes: 1e-4 or less",
            rate,
            hidden_size,
        )


def _print_summary(output: Path, trainer) -> None:
    logger.info("done: %d steps", trainer.state.step)
    logger.info("  checkpoint      %s", trainer.checkpoints.folder)
    if trainer.config.train.export:
        logger.info("  exported model  %s", output / "hf")
    logger.info("  metrics         %s", output / "metrics.jsonl")
    logger.info("  plot            %s", output / "curves.png")


def main(argv: list[str] | None = None) -> int:
    """Entry point: signals first, one line per user error, then the exit code."""
    from trelm_ds.stopping import StopRequest

    stop = StopRequest()
    stop.install()
    faulthandler.enable()  # a crash of native code says on stderr where it was
    try:
        code = run(sys.argv[1:] if argv is None else argv, stop)
    except (TrelmError, OSError) as error:
        code = report_once(error)
        logger.debug("traceback", exc_info=error)
    except Exception:
        logger.exception("rank %s failed", os.environ.get("RANK", "0"))
        code = EXIT_FAILED
    while _held_locks:
        _held_locks.pop().close()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if code not in (EXIT_DONE, EXIT_STOPPED):
        os._exit(code)  # do not wait in the process group's destructor for ranks that still run
    leave()
    return code
