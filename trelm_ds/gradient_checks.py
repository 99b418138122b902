"""DeepSpeed's checks of the gradients, all parameters in a few launches.

Before each update DeepSpeed asks of every gradient whether it is finite, and for its norm: about
fourteen launches a parameter under ZeRO 1 and 2, and a wait for the device a parameter without
ZeRO. For BERT-base on one H100 that was 2,900 of the 3,900 launches of a step. Here the gradients
go through torch's multi-tensor norm instead, in the float64 in which DeepSpeed has them, where the
norm of a gradient is finite exactly if all of its entries are. What is done with the answers, and
what is exchanged between ranks, stays DeepSpeed's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def batch_gradient_checks(engine) -> None:
    """Replaces the checks of ``engine``'s optimizer, where it has those known here.

    ZeRO 3 checks its flat buffer as a whole, and offloaded optimizers check on the host as
    gradients arrive: both stay as they are. In float32 without ZeRO nothing is checked: there the
    engine is made to tell the norm of its gradients.
    """
    optimizer = engine.optimizer
    checker = getattr(optimizer, "overflow_checker", None)
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        engine.clip_fp32_gradients = lambda: None  # the hook does, or there is nothing to clip
        optimizer.register_step_pre_hook(functools.partial(_clip_and_tell, engine))
    elif checker is not None:  # bf16 without ZeRO
        checker.has_overflow_serial = _any_of_parameters
    # ZeRO 1 with gradients in float32 and weights in bf16 has an optimizer of another kind, too.
    elif engine.zero_optimization_stage() in (1, 2) and not getattr(optimizer, "cpu_offload", True):
        optimizer.has_overflow_partitioned_grads_serial = functools.partial(
            _any_of_partition, optimizer
        )
        optimizer.get_grad_norm_direct = functools.partial(_norm_of_partition, optimizer)


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, in the dtype in which DeepSpeed takes norms: [len(gradients)]."""
    from deepspeed.runtime.zero.utils import get_norm_dtype

    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=get_norm_dtype()))


def any_not_finite(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Bool scalar on ``device``: whether any entry of any gradient is infinite or NaN."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return torch.zeros((), dtype=torch.bool, device=device)
    return gradient_norms(given).isfinite().all().logical_not()


def _clip_and_tell(engine, *_) -> None:
    """DeepSpeed's clipping of float32 gradients without ZeRO, with the norm that it does not keep.

    The norm stays on the device. It is not finite where a gradient is not: the update is made all
    the same, and whoever asks for the norm learns that the weights are spoilt.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    limit = engine.gradient_clipping() or math.inf
    engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), limit, mpu=engine.mpu)


def _any_of_parameters(parameters: Iterable[torch.nn.Parameter]) -> bool:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(gradients) and bool(any_not_finite(gradients, gradients[0].device))


def _any_of_partition(optimizer) -> Tensor:
    groups = range(len(optimizer.bit16_groups))
    gradients = [g for i in groups for g in optimizer.averaged_gradients[i]]
    return any_not_finite(gradients, optimizer.device)[None]


def _norm_of_partition(optimizer, gradients, params, norm_type=2) -> Tensor:
    """Norm over all ranks of a group's gradients; -1, as DeepSpeed has it, if it is not finite."""
    import deepspeed.comm as dist
    from deepspeed.runtime.zero.stage_1_and_2 import mask_nan_or_inf_with_val_inplace

    if norm_type != 2:
        raise ValueError(f"norm_type {norm_type}: only the L2 norm is known here")
    own = [g for g in gradients if not getattr(g, "_zero_padding", False)][: len(params)]
    total = torch.zeros((), device=optimizer.device)
    if own:
        total = gradient_norms(own).square().sum().float()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    total = total.sqrt()
    mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
    return total
