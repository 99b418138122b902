"""The DeepSpeed engine: its configuration resolved against the run's, started quietly."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import math
import os
import platform
import warnings
from pathlib import Path

import torch

from trelm_ds.config import Config
from trelm_ds.distributed import World, timeout
from trelm_ds.errors import ConfigError, one_line
from trelm_ds.gradient_checks import batch_gradient_checks

logger = logging.getLogger(__name__)

NVIDIA_DEVICE = Path("/dev/nvidia0")  # there is a driver for a GPU


def read_deepspeed_config(path: str | Path) -> dict:
    """The parsed DeepSpeed JSON.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--deepspeed {path}: no such file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path}: expected a JSON object")
    return config


def zero_stage(ds_config: dict) -> int:
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage: {stage!r} is not 0, 1, 2 or 3")
    return stage


def use_bf16(config: Config, device: torch.device) -> bool:
    if config.train.bf16 is not None:
        return config.train.bf16
    return has_bf16(device)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself. ``torch.cuda.is_bf16_supported`` counts GPUs that
    emulate it, and asks the current device."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_deepspeed_config(ds_config: dict, config: Config, world_size: int, bf16: bool) -> dict:
    """Fills every ``"auto"`` from the run's configuration and checks what is written out.

    DeepSpeed is imported for it: ``quiet_deepspeed`` comes first.

    Raises:
        ConfigError: one message with every value that contradicts the run's configuration, or a
            part of DeepSpeed that the trainer does itself (optimizer, scheduler, fp16); or with
            every key or value that DeepSpeed does not know.
    """
    resolved = copy.deepcopy(ds_config)
    for key in ("zero_optimization", "bf16", "fp16", "checkpoint"):
        if not isinstance(resolved.get(key, {}), dict):
            raise ConfigError(f"the DeepSpeed configuration's {key} is not a JSON object")
    train = config.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    wanted = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
    }
    problems = []
    for key, value in wanted.items():
        given = resolved.get(key, "auto")
        if given != "auto" and given != value:
            problems.append(f"{key} is {given} but the run needs {value}")
        resolved[key] = value
    section = resolved.setdefault("bf16", {})
    if section.get("enabled", "auto") not in ("auto", bf16):
        problems.append(f"bf16.enabled is {section['enabled']} but the run has bf16 {bf16}")
    section["enabled"] = bf16
    if resolved.get("fp16", {}).get("enabled"):
        problems.append("fp16 is not supported: use bf16")
    checkpoint = resolved.get("checkpoint", {})
    if checkpoint.get("writer") is not None:
        problems.append(
            "checkpoint.writer is not supported: a checkpoint is published when written"
        )
    if resolved.get("datastates_ckpt", False) is not False:
        problems.append("datastates_ckpt is not supported: checkpoints are written before they end")
    if resolved.get("zero_optimization", {}).get("compute_grad_norm", True) is not True:
        problems.append(
            "zero_optimization.compute_grad_norm has to be true: without it weights that are not "
            "finite can be saved as good ones"
        )
    for part in ("optimizer", "scheduler"):
        if part in resolved:
            problems.append(f"{part} belongs to the run's configuration (train.*): remove it")
    if problems:
        raise ConfigError(
            "the DeepSpeed configuration contradicts the run's: "
            + "; ".join(problems)
            + ' (write "auto" for values shared with the trainer)'
        )
    # The optimizer is this project's own: DeepSpeed has to accept it, offloaded or not.
    resolved["zero_allow_untested_optimizer"] = True
    if "offload_optimizer" in resolved.get("zero_optimization", {}):
        resolved["zero_force_ds_cpu_optimizer"] = False
    resolved.setdefault("steps_per_print", 10**9)
    left = [k for k, v in _leaves(resolved) if v == "auto"]
    if left:
        raise ConfigError(
            f'DeepSpeed keys left "auto" that the trainer does not know: {", ".join(left)}'
        )
    _check_sections(resolved)
    return resolved


# Those of the many that such a file usually has.
DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "bf16",
    "checkpoint",
    "communication_data_type",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def _check_sections(resolved: dict) -> None:
    """DeepSpeed's own checks, which it makes only once data, model and memory bank are built."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    problems = []
    for key in resolved:
        # DeepSpeed passes over what it does not know: a run would be ZeRO 0 by a slip of the pen.
        near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
        if near and key not in DEEPSPEED_KEYS:
            problems.append(f"{key}: did you mean {near[0]!r}?")
    for section, schema in (
        ("bf16", DeepSpeedBF16Config),
        ("zero_optimization", DeepSpeedZeroConfig),
    ):
        try:
            schema(**resolved.get(section, {}))
        except ValidationError as error:
            for found in error.errors():
                key = ".".join(map(str, (section, *found["loc"])))
                problems.append(f"{key}: {found['msg']}")
        except AssertionError as error:  # an old key beside the one that has replaced it
            problems.append(f"{section}: {error}")
    if problems:
        raise ConfigError(f"DeepSpeed refuses its configuration: {'; '.join(problems)}")


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def add_tracker(ds_config: dict, report_to: str, output_dir: Path) -> None:
    """Switches on one of DeepSpeed's monitors (TensorBoard, Weights & Biases, CSV)."""
    if report_to == "none":
        return
    if report_to == "wandb":
        ds_config["wandb"] = {"enabled": True, "project": "trelm_ds", "group": output_dir.name}
        return
    key = {"tensorboard": "tensorboard", "csv": "csv_monitor"}[report_to]
    ds_config[key] = {
        "enabled": True,
        "output_path": str(output_dir / "logs"),
        "job_name": report_to,
    }


def check_tracker(report_to: str) -> None:
    module = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(report_to)
    if module:
        import importlib.util

        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"--report_to {report_to} needs the package {module}: pip install -e '.[tracking]'"
            )


def local_device(world: World) -> torch.device:
    """This rank's accelerator, or the CPU, also where ``DS_ACCELERATOR`` says so to DeepSpeed.

    Raises:
        ConfigError: a rank without a GPU beside others that have one, or a GPU that torch cannot
            use: training on the CPU by mistake is found out hours later.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if world.local_rank >= count:
            raise ConfigError(
                f"local rank {world.local_rank} has no GPU: this machine shows {count}",
                everywhere=False,
            )
        return torch.device("cuda", world.local_rank)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if NVIDIA_DEVICE.exists() and not hidden:
        raise ConfigError(
            f"{platform.node()} has an NVIDIA GPU but torch sees none: its build does not fit "
            "the driver, or the GPU is not this process's; to train on the CPU set "
            "CUDA_VISIBLE_DEVICES=",
            everywhere=False,
        )
    return torch.device("cpu")


def quiet_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed without its banner lines and without the build a trainer never uses.

    On a CPU DeepSpeed compiles ``deepspeed_shm_comm`` at every cold start, about a minute, for an
    all-reduce that only its inference code calls. Declaring the operator incompatible skips it.

    Raises:
        ConfigError: ``DEEPSPEED_TIMEOUT`` is not a number.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed still calls collectives by names that newer torch versions have renamed.
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    given = os.environ.get("DEEPSPEED_TIMEOUT")
    if given is not None:  # the import reads it, and fails where the minutes are not whole
        os.environ["DEEPSPEED_TIMEOUT"] = str(math.ceil(timeout().total_seconds() / 60))
    import deepspeed
    import deepspeed.ops

    if given is not None:
        os.environ["DEEPSPEED_TIMEOUT"] = given
    log.setLevel(logging.WARNING)  # the import sets it back
    # "Untested": PathAdamW is this project's own, and its tests run under every ZeRO stage.
    log.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def init_distributed(world: World, device: torch.device) -> None:
    """Joins the job's process group (NCCL on GPUs, gloo on CPUs), also for a single process."""
    quiet_deepspeed(device)
    import deepspeed

    limit = timeout()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=limit,
            rank=world.rank,
            world_size=world.size,
        )
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"cannot join the job at {place} ({one_line(error)}): is another run using the port? "
            "Choose one with the launcher's --master_port"
        ) from None


@contextlib.contextmanager
def gathered(engine, parameter: torch.nn.Parameter):
    """Makes a parameter whole for reading; ZeRO-3 has it in parts. Collective there."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def build_engine(model: torch.nn.Module, optimizer, ds_config: dict):
    """``deepspeed.initialize`` with the project's optimizer; returns the engine."""
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    batch_gradient_checks(engine)
    return engine
