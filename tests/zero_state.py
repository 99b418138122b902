"""Parameters, moments and gradients in full on the host, whatever the ZeRO stage; collective."""

import torch


def full_state(engine, param, name) -> torch.Tensor:
    """The whole fp32 ``param``, or the moment ``exp_avg`` or ``exp_avg_sq`` of it; a copy."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.global_steps == 0 and name != "param":  # DeepSpeed links them at the first step
        return torch.zeros(getattr(param, "ds_shape", param.shape))
    if engine.zero_optimization_stage() == 0:
        optimizer = engine.basic_optimizer
        master = param
        if optimizer is not engine.optimizer:  # bf16: fp32 copies
            lows = [p for group in engine.optimizer.fp16_groups for p in group]
            highs = [p for group in engine.optimizer.fp32_groups for p in group]
            master = highs[next(i for i, p in enumerate(lows) if p is param)]
        value = master if name == "param" else optimizer.state[master][name]
    elif name == "param":
        value = safe_get_full_fp32_param(param)
    else:
        value = safe_get_full_optimizer_state(param, name)
    return value.detach().clone().float().cpu().reshape(getattr(param, "ds_shape", param.shape))


def full_gradient(param) -> torch.Tensor:
    """The reduced gradient in float32, before clipping; between backward and the engine's step.
    Zeros where there is none."""
    from deepspeed.utils import safe_get_full_grad

    shape = getattr(param, "ds_shape", param.shape)
    gradient = safe_get_full_grad(param)
    if gradient is None:
        return torch.zeros(shape)
    return gradient.detach().float().cpu().clone().reshape(shape)
