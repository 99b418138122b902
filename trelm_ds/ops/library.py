"""The operators' registration in namespace ``trelm``: schemas, fake kernels, autograd, loading.

The reference serves every backend; loading the C++ library puts its kernels in front of it on the
CPU. So the operators exist, trace and run the same with and without a compiler.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from trelm_ds.ops import reference

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("trelm", "DEF")

SCHEMAS = (
    "neuron_scores(Tensor activation, Tensor gradient, Tensor positions, Tensor weights, "
    "bool absolute) -> Tensor",
    "select_paths(Tensor scores, int k, bool positive_only, float threshold) -> Tensor",
    "path_weight_grad(Tensor grad_out, Tensor inputs, Tensor rows) -> Tensor",
    "masked_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "int fragment_start, int row_length, Tensor row_counts, Tensor? columns, "
    "Tensor(d!)? update_count, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
)
for _schema in SCHEMAS:
    _name = _schema.partition("(")[0]
    LIBRARY.define(_schema)
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("trelm::neuron_scores", lib=LIBRARY)
def _(activation, gradient, positions, weights, absolute):
    return activation.new_empty(activation.shape[1], dtype=torch.float32)


@torch.library.register_fake("trelm::select_paths", lib=LIBRARY)
def _(scores, k, positive_only, threshold):
    return scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("trelm::path_weight_grad", lib=LIBRARY)
def _(grad_out, inputs, rows):
    return inputs.new_empty(grad_out.shape[1], inputs.shape[1])


@torch.library.register_fake("trelm::masked_adamw_", lib=LIBRARY)
def _(param, grad, exp_avg, exp_avg_sq, *_):
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _path_weight_grad_backward(ctx, grad: Tensor):
    grad_out, inputs, rows = ctx.saved_tensors
    rows = rows.to(grad.device)
    path = grad.index_select(0, rows)  # [k, d]; the other rows are constants
    d_grad_out = torch.zeros_like(grad_out).index_copy(1, rows, inputs @ path.t())
    d_inputs = grad_out.index_select(1, rows) @ path
    return d_grad_out, d_inputs, None


torch.library.register_autograd(
    "trelm::path_weight_grad",
    _path_weight_grad_backward,
    setup_context=_save_for_backward,
    lib=LIBRARY,
)


@functools.cache
def load_kernels() -> bool:
    """Builds (once per machine) and loads the C++ kernels; True if they now serve the CPU.

    Where they cannot be built, the reference goes on serving, and one warning says what that
    costs. ``TRELM_KERNELS=0`` asks for the reference.
    """
    if os.environ.get("TRELM_KERNELS") == "0":
        logger.info("TRELM_KERNELS=0: torch's operators serve in place of the C++ kernels")
        return False
    from trelm_ds.ops.build import KernelBuildError, build

    try:
        torch.ops.load_library(build())
    except (KernelBuildError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others would say the same
            logger.warning(
                "C++ kernels are not available (%s): torch's operators serve in their place; "
                "on a CPU, an optimizer step over scattered paths takes about 30 times as long",
                error,
            )
        return False
    return True
