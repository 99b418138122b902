"""Where DeepSpeed keeps each parameter in the tensors that the optimizer steps.

The one place that reads DeepSpeed's internals for it. Whatever is found is compared with the
parameters' values on all ranks before training, so that a DeepSpeed with another layout is an
error at the start and never a wrong update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trelm_ds.distributed import world_size
from trelm_ds.errors import ConfigError
from trelm_ds.optim import RoutedFragment

# A parameter's piece on this rank: the optimizer's tensor, the first element in it, the first
# element in the parameter, and the parameter's own values there (flat, in the model's dtype).
Piece = tuple[Tensor, int, int, Tensor]


def routed_fragments(
    engine, named: Sequence[tuple[nn.Parameter, int, str]]
) -> list[RoutedFragment]:
    """Maps parameters that some steps leave alone to the tensors their optimizer steps; collective.

    ZeRO 0 to 3, fp32 and bf16, with the optimizer on the device or offloaded to the CPU.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        named: (parameter, layer, kind) of each such parameter, all of which train, in one order
            on all ranks; kinds as in :class:`RoutedFragment`.

    Returns:
        This rank's fragments; empty where it owns none of them.

    Raises:
        ConfigError: on every rank, if the combination of settings cannot be routed, or if a
            parameter is not found, bit for bit and exactly once, where this version of DeepSpeed
            should keep it.
    """
    locate = _locator(engine)
    fragments: list[RoutedFragment] = []
    # Per parameter: elements found on this rank, and whether any of them are others.
    found, wrong = torch.zeros(2, len(named), dtype=torch.int64)
    for i, (param, layer, kind) in enumerate(named):
        shape = getattr(param, "ds_shape", param.shape)
        row_length = shape[1] if len(shape) == 2 else 1
        for tensor, start, param_start, values in locate(param):
            numel = values.numel()
            kept = tensor.detach().reshape(-1)[start : start + numel]
            if kept.numel() != numel or not torch.equal(kept.to(values), values):
                wrong[i] = 1
            found[i] += numel
            fragments.append(
                RoutedFragment(tensor, start, numel, layer, kind, param_start, row_length)
            )
    overlap = _overlaps(fragments)
    table = torch.cat([found, wrong, torch.tensor([int(overlap)])]).to(engine.device)
    world = world_size()
    if world > 1:
        dist.all_reduce(table)
    copies = 1 if engine.zero_optimization_stage() else world
    *counts, overlaps = table.tolist()
    found, wrong = counts[: len(named)], counts[len(named) :]
    for (param, layer, kind), count, others in zip(named, found, wrong, strict=True):
        if others or count != copies * getattr(param, "ds_numel", param.numel()):
            raise ConfigError(
                f"routing cannot find {kind} of layer {layer} in the optimizer's tensors "
                f"({_describe(engine)}): this layout of parameters is not known"
            )
    if overlaps:
        raise ConfigError(
            f"parameters overlap in the optimizer's tensors ({_describe(engine)}): "
            "this layout of parameters is not known"
        )
    return fragments


def clear_gradients(engine, parameters: Sequence[nn.Parameter]) -> None:
    """Zeroes the gradients that ZeRO-3 keeps of parameters that will get none any more.

    It would count the last ones into the gradient norm for ever; the other stages take a missing
    gradient for zero, and offloaded ZeRO-3 leaves it out of the norm.
    """
    if engine.zero_optimization_stage() < 3 or engine.optimizer.offload_optimizer:
        return
    from deepspeed.utils import safe_set_local_grad

    for parameter in parameters:
        safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


def _overlaps(fragments: list[RoutedFragment]) -> bool:
    ends: dict[int, int] = {}
    for fragment in sorted(fragments, key=lambda f: (id(f.tensor), f.start)):
        if fragment.start < ends.get(id(fragment.tensor), 0):
            return True
        ends[id(fragment.tensor)] = fragment.start + fragment.numel
    return False


def _describe(engine) -> str:
    import deepspeed

    return (
        f"DeepSpeed {deepspeed.__version__}, ZeRO stage {engine.zero_optimization_stage()}, "
        f"{type(engine.optimizer).__name__}"
    )


def _locator(engine) -> Callable[[nn.Parameter], Iterator[Piece]]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        masters = {p: p for group in optimizer.param_groups for p in group["params"]}
        return lambda param: _whole(masters, param)
    # Exact types: a subclass (ZenFlow, SuperOffload, MiCS) steps its parameters in its own way.
    kind = type(optimizer)
    if kind is FP16_UnfusedOptimizer:
        masters = {
            low: high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        return lambda param: _whole(masters, param)
    if kind in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        return lambda param: _linked(optimizer, param)
    if kind is DeepSpeedZeroOptimizer_Stage3:
        if optimizer.swap_optimizer:
            raise ConfigError(
                "routing does not work with zero_optimization.offload_optimizer.device nvme: "
                'the optimizer\'s tensors are not in memory between steps; use "cpu"'
            )
        if optimizer.offload_optimizer and optimizer.partial_offload != 1.0:
            raise ConfigError(
                "routing does not work with zero_optimization.offload_optimizer.ratio "
                f"{optimizer.partial_offload}: DeepSpeed steps the rest with an optimizer of its "
                "own; use 1.0"
            )
        return lambda param: _sharded(optimizer, param)
    raise ConfigError(f"routing does not work with {_describe(engine)}")


def _whole(masters: dict[Tensor, Tensor], param: nn.Parameter) -> Iterator[Piece]:
    """Without ZeRO every rank steps the whole parameter, or its fp32 copy."""
    if param in masters:
        yield masters[param], 0, 0, param.detach().reshape(-1)


def _linked(optimizer, param: nn.Parameter) -> Iterator[Piece]:
    """ZeRO 1 and 2: a slice of this rank's flat fp32 partition of the parameter's group."""
    mapping = getattr(param, "_hp_mapping", None)
    if mapping is not None:  # None where the rank owns nothing of the parameter
        (partition,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
        low = mapping.lp_fragment_address
        values = param.detach().reshape(-1)[low.start : low.start + low.numel]
        yield partition, mapping.hp_fragment_address.start, low.start, values


def _sharded(optimizer, param: nn.Parameter) -> Iterator[Piece]:
    """ZeRO 3: an equal share of the parameter (the last one padded) in a sub-group's partition."""
    position = optimizer.grad_position.get(optimizer.get_param_id(param))
    if position is not None:
        sub_group, start, share = position
        param_start = dist.get_rank(group=param.ds_process_group) * share
        numel = min(share, param.ds_numel - param_start)
        if numel > 0:
            values = param.ds_tensor.detach().reshape(-1)[:numel]
            yield optimizer.fp32_partitioned_groups_flat[sub_group], start, param_start, values
