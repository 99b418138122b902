"""The feed-forward block with routed backward, and its place in Hugging Face's models.

Both matrices are stored neuron-major ([f, d]: row j belongs to intermediate neuron j), so that a
path is a set of rows of every parameter, and a contiguous block is a view of all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trelm_ds import ops
from trelm_ds.errors import ConfigError
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.paths import PathScores

_aten = torch.ops.aten


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_(x):
    return _aten.gelu_(x, approximate="tanh")


def _gelu_tanh_backward(grad, x):
    return _aten.gelu_backward(grad, x, approximate="tanh")


# Hugging Face's name -> (function, in place, (grad of the output, input) -> grad of the input).
ACTIVATIONS = {
    "gelu": (F.gelu, _aten.gelu_, _aten.gelu_backward),
    "gelu_new": (_gelu_tanh, _gelu_tanh_, _gelu_tanh_backward),
    "gelu_pytorch_tanh": (_gelu_tanh, _gelu_tanh_, _gelu_tanh_backward),
    "relu": (F.relu, F.relu_, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
}


class _RoutedFFNFunction(torch.autograd.Function):
    """Exact forward; backward that gives gradients to the layer's paths alone.

    Gradients of parameters are dense, exact zeros off the path: DeepSpeed then sees the same set
    of gradients on every rank and step (ZeRO-3 would silently reuse a stale one).

    What is kept for the backward is what it will read: hidden [N, f] and activation [N, f] where
    the paths are not known yet or scattered, hidden alone for a block, and where the input's
    gradient goes through the paths too, their columns of hidden, [N, k].
    """

    @staticmethod
    def forward(ctx, x, up_weight, up_bias, down_weight, down_bias, ffn, deferred):
        ctx.ffn, ctx.deferred = ffn, deferred
        routing = ffn.context
        paths = routing.paths[ffn.layer_index]
        hidden = F.linear(x, up_weight, up_bias)  # [N, f]
        ctx.only_paths = paths is not None and not (
            routing.exact_input_gradient or routing.full or routing.may_recompute
        )
        if ctx.only_paths:
            kept = paths.take(hidden, 1)
            # A copy also of a block that is everything: the whole is overwritten next.
            kept = kept.clone(memory_format=torch.contiguous_format)
            activation = ffn.activation_(hidden)
            saved = (kept, None)
        else:
            activation = ffn.activation(hidden)
            is_block = paths is not None and paths.start is not None
            saved = (hidden, None if is_block else activation)
        # Parameters are saved as they are, not as views: ZeRO-3 swaps their data in and out.
        ctx.save_for_backward(x, *saved, up_weight, up_bias, down_weight, down_bias)
        return torch.addmm(down_bias, activation, down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, activation, up_weight, up_bias, down_weight, down_bias = ctx.saved_tensors
        ffn, routing = ctx.ffn, ctx.ffn.context
        layer = ffn.layer_index
        exact = routing.exact_input_gradient and ctx.needs_input_grad[0]

        # dL/dA of every neuron and token: needed for the exact dX, or by its own choice of score.
        wants_scores = routing.wants_scores(layer)
        # Where only the weights' gradients depend on the paths, the ranks agree on them meanwhile.
        overlaps = ctx.deferred is not None and wants_scores and exact and not routing.full
        grad_activation = None
        if exact or (wants_scores and routing.score_all_tokens):
            grad_activation = grad @ down_weight.t()
        if wants_scores:
            scores = _path_scores(
                ffn,
                x=x,
                hidden=None if ctx.only_paths else hidden,
                activation=activation,
                grad=grad,
                grad_activation=grad_activation,
                weights=(up_weight, up_bias, down_weight, down_bias),
            )
            if overlaps:
                pending = routing.send_scores(layer, scores)
            else:
                routing.receive_scores(layer, scores)
        if overlaps:
            grad_hidden = ffn.activation_backward(grad_activation, hidden)

            def weight_grads():
                routing.select_from(layer, pending)
                return _weight_grads(
                    ffn,
                    routing.paths[layer],
                    x=x,
                    hidden=hidden,
                    activation=activation,
                    grad=grad,
                    grad_hidden=grad_hidden,
                )

            ctx.deferred.compute = weight_grads
            grad_down_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
            weights = (ctx.deferred.stand_in(i, grad) for i in range(3))
            return grad_hidden @ up_weight, *weights, grad_down_bias, None, None
        paths = routing.paths[layer]

        grad_hidden = path_grad = None
        if exact:
            grad_hidden = ffn.activation_backward(grad_activation, hidden)
            grad_x = grad_hidden @ up_weight
        else:  # only the path's columns from here on: [N, k]
            if grad_activation is None:
                path_grad = grad @ paths.take(down_weight, 0).t()
            else:
                path_grad = paths.take(grad_activation, 1)
            path_hidden = hidden if ctx.only_paths else paths.take(hidden, 1)
            path_grad = ffn.activation_backward(path_grad, path_hidden)
            path_grad = paths.only_used(path_grad)
            grad_x = path_grad @ paths.take(up_weight, 0) if ctx.needs_input_grad[0] else None

        grad_up, grad_up_bias, grad_down = _weight_grads(
            ffn,
            paths,
            x=x,
            hidden=hidden,
            activation=activation,
            grad=grad,
            grad_hidden=grad_hidden,
            path_grad=path_grad,
            needed=ctx.needs_input_grad[1:4],
        )
        grad_down_bias = None
        if ctx.needs_input_grad[4]:
            grad_down_bias = grad.sum(0)
            if paths.outputs is not None:
                kept = paths.kept("outputs", len(grad_down_bias))
                grad_down_bias = grad_down_bias.masked_fill(~kept, 0)
        return grad_x, grad_up, grad_up_bias, grad_down, grad_down_bias, None, None


def _weight_grads(
    ffn,
    paths,
    *,
    x,
    hidden,
    activation,
    grad,
    grad_hidden=None,
    path_grad=None,
    needed=(True, True, True),
):
    """dW1, db1, dW2 on the paths, zeros elsewhere; None where it is not ``needed``.

    Args:
        x: the FFN's input [N, d].
        hidden: before the activation, of every neuron [N, f] or of the path's alone [N, k].
        activation: [N, f]; None: to be computed of the path's neurons again.
        grad: dL/dY at the FFN's output [N, d].
        grad_hidden: dL/dH of every neuron [N, f], or None.
        path_grad: without it, dL/dH of the path's neurons [N, k].
    """
    grad_up = grad_up_bias = grad_down = None
    size = ffn.intermediate_size
    exact = grad_hidden is not None
    # else views, columns too, or rows that are listed without being on the path
    gathered = paths.start is None and paths.inputs is None and paths.rows_used is None
    if needed[0]:
        if exact and gathered:
            grad_up = ops.path_weight_grad(grad_hidden, x, paths.rows)
        else:
            left = paths.take(grad_hidden, 1) if exact else path_grad
            grad_up = paths.weight_grad(left, x, paths.inputs, size, paths.inputs_used)
    if needed[1]:
        rows_grad = paths.only_used((paths.take(grad_hidden, 1) if exact else path_grad).sum(0))
        grad_up_bias = grad.new_zeros(size).index_copy_(0, paths.rows, rows_grad)
    if needed[2]:
        if gathered and activation is not None:
            grad_down = ops.path_weight_grad(activation, grad, paths.rows)
        else:
            if activation is not None:
                left = paths.take(activation, 1)
            else:
                whole = hidden.shape[1] == size
                left = ffn.activation(paths.take(hidden, 1) if whole else hidden)
            grad_down = paths.weight_grad(left, grad, paths.outputs, size, paths.outputs_used)
    return grad_up, grad_up_bias, grad_down


class _Deferred:
    """Weight gradients of one FFN call that are computed later than its backward.

    ``compute`` is set by a backward that deferred them; without it the gradients that arrive are
    the real ones.
    """

    def __init__(self, shapes):
        self.shapes = shapes
        self.compute = None

    def stand_in(self, i: int, like: torch.Tensor) -> torch.Tensor:
        """A gradient of the right shape that holds no memory; replaced by ``compute``'s."""
        return like.new_zeros(()).expand(self.shapes[i])


class _DeferredWeights(torch.autograd.Function):
    """An FFN's weights on their way into its function; their gradients are finished here.

    Autograd runs what was recorded last first. Recorded just before the FFN of the layer BELOW,
    this backward runs just after that FFN's: the all-reduce of this layer's scores has the layer
    between to finish in.
    """

    @staticmethod
    def forward(ctx, up_weight, up_bias, down_weight, deferred):
        ctx.deferred = deferred
        return tuple(w.view_as(w) for w in (up_weight, up_bias, down_weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        compute, ctx.deferred.compute = ctx.deferred.compute, None
        if compute is not None:
            grads = compute()
        return (*grads, None)


def _path_scores(ffn, *, x, hidden, activation, grad, grad_activation, weights) -> PathScores:
    """This rank's scores of one layer, read off its backward (trelm.md section 4, cheap form).

    signed:        score_j = sum_t p(y*_t) * A_tj * (-dL/dA_tj) over knowledge positions t;
    abs_gradient:  score_j = sum_t |dL/dA_tj|;
    activation:    score_j = sum_t |A_tj| (its mean, up to a factor shared by all neurons).
    S_in and S_out are scored in the same way at the FFN's input and output.
    """
    up_weight, up_bias, down_weight, down_bias = weights
    routing = ffn.context
    device = x.device
    if routing.score_all_tokens:
        positions = torch.arange(len(x), device=device)
        share = torch.ones(len(x), device=device)
    else:
        positions, share = routing.targets(device)
    compact = grad_activation is None or activation is None
    if compact or routing.full or routing.score == "activation":
        # Only the knowledge positions: a few rows, so that nothing of size [N, f] is computed.
        x, grad = x.index_select(0, positions), grad.index_select(0, positions)
        if grad_activation is not None:
            grad_activation = grad_activation.index_select(0, positions)
        # Of a block no more was kept than its own neurons, or no activation.
        if hidden is None:
            hidden = F.linear(x, up_weight, up_bias)
        else:
            hidden = hidden.index_select(0, positions)
        if activation is None:
            activation = ffn.activation(hidden)
        else:
            activation = activation.index_select(0, positions)
        positions = torch.arange(len(positions), device=device)

    if routing.score == "activation":
        scores = PathScores(activation.abs().sum(0, dtype=torch.float32))
        if routing.full:
            output = torch.addmm(down_bias, activation, down_weight)
            scores.inputs = x.abs().sum(0, dtype=torch.float32)
            scores.outputs = output.abs().sum(0, dtype=torch.float32)
        return scores

    def score(value, grad_value):
        absolute = routing.score == "abs_gradient"
        return ops.neuron_scores(value, grad_value, positions, share, absolute)

    if grad_activation is None:
        grad_activation = grad @ down_weight.t()
    scores = PathScores(score(activation, grad_activation))
    if routing.full:
        grad_x = ffn.activation_backward(grad_activation, hidden) @ up_weight
        scores.inputs = score(x, grad_x)
        scores.outputs = score(torch.addmm(down_bias, activation, down_weight), grad)
    return scores


class RoutedFFN(nn.Module):
    """x -> act(x W1 + b1) W2 + b2, trained along the paths of its context.

    Attributes:
        up_weight, down_weight: [f, d]. up_bias: [f]. down_bias: [d].
        layer_index: its row in the context's paths and scores.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        context: RoutingContext,
        layer_index: int,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {activation!r} of the backbone is not supported by the routed "
                f"feed-forward; known: {', '.join(ACTIVATIONS)}"
            )
        factory = {"device": device, "dtype": dtype}
        self.activation, self.activation_, self.activation_backward = ACTIVATIONS[activation]
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.context = context
        self.layer_index = layer_index
        self.above: list[RoutedFFN] = []  # the next layer's; in a list, so that it is no submodule
        self._through: tuple | None = None  # its weights by way of ``_DeferredWeights``
        self.up_weight = nn.Parameter(torch.empty(intermediate_size, hidden_size, **factory))
        self.up_bias = nn.Parameter(torch.zeros(intermediate_size, **factory))
        self.down_weight = nn.Parameter(torch.empty(intermediate_size, hidden_size, **factory))
        self.down_bias = nn.Parameter(torch.zeros(hidden_size, **factory))
        nn.init.normal_(self.up_weight, std=0.02)
        nn.init.normal_(self.down_weight, std=0.02)

    def intermediate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The activation vectors A [..., f]."""
        return self.activation(F.linear(hidden_states, self.up_weight, self.up_bias))

    def project(self, activation: torch.Tensor) -> torch.Tensor:
        """A [..., f] to the FFN's output [..., d]."""
        return F.linear(activation, self.down_weight.t(), self.down_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.context.active:
            return self.project(self.intermediate(hidden_states))
        return self._routed(hidden_states)

    # torch.compile traces a backward together with its forward, when the step's targets and paths
    # are not known yet: the routed block stays outside, the graphs end before it and go on after.
    @torch.compiler.disable
    def _routed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        for ffn in self.above:
            ffn._defer_weights()
        through, self._through = self._through, None
        weights = (self.up_weight, self.up_bias, self.down_weight)
        *weights, deferred = through or (*weights, None)
        output = _RoutedFFNFunction.apply(flat, *weights, self.down_bias, self, deferred)
        return output.view(hidden_states.shape)

    def _defer_weights(self) -> None:
        """Called by the layer below, just before its own function is recorded."""
        weights = (self.up_weight, self.up_bias, self.down_weight)
        if (
            self.context.defers
            and torch.is_grad_enabled()
            and all(w.requires_grad and not hasattr(w, "ds_id") for w in weights)  # not ZeRO-3's
        ):
            deferred = _Deferred([w.shape for w in weights])
            self._through = (*_DeferredWeights.apply(*weights, deferred), deferred)


def encoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The encoder layers of a Hugging Face BERT or RoBERTa, lowest first."""
    try:
        return backbone.base_model.encoder.layer
    except AttributeError:
        raise ConfigError(
            f"{type(backbone).__name__} is not a BERT or RoBERTa: it has no encoder.layer"
        ) from None


def install_routed_ffn(backbone: nn.Module, context: RoutingContext) -> list[RoutedFFN]:
    """Puts a ``RoutedFFN`` into every encoder layer of a Hugging Face BERT or RoBERTa, in place.

    ``layer.intermediate`` becomes the identity and ``layer.output.dense`` the RoutedFFN, so
    dropout, residual and LayerNorm stay Hugging Face's. Outputs change by rounding only.

    Returns:
        The FFNs, lowest layer first; they share ``context``.

    Raises:
        ConfigError: another architecture or activation, or chunked feed-forward.
    """
    if getattr(backbone.config, "chunk_size_feed_forward", 0):
        raise ConfigError("chunk_size_feed_forward of the backbone must be 0 with routed FFNs")
    ffns = []
    for index, layer in enumerate(encoder_layers(backbone)):
        up, down = layer.intermediate.dense, layer.output.dense
        ffn = RoutedFFN(
            up.in_features,
            up.out_features,
            backbone.config.hidden_act,
            context,
            index,
            device=up.weight.device,
            dtype=up.weight.dtype,
        )
        with torch.no_grad():
            ffn.up_weight.copy_(up.weight)
            ffn.up_bias.copy_(up.bias)
            ffn.down_weight.copy_(down.weight.t())
            ffn.down_bias.copy_(down.bias)
        layer.intermediate = nn.Identity()
        layer.output.dense = ffn
        if ffns:
            ffns[-1].above.append(ffn)
        ffns.append(ffn)
    context.num_layers = len(ffns)
    return ffns


def to_hf_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with routed FFNs in Hugging Face's names and layout; the rest is passed on."""
    result = {}
    for name, tensor in state_dict.items():
        stem, _, last = name.rpartition(".output.dense.")
        if stem and last == "up_weight":
            result[f"{stem}.intermediate.dense.weight"] = tensor
        elif stem and last == "up_bias":
            result[f"{stem}.intermediate.dense.bias"] = tensor
        elif stem and last == "down_weight":
            result[f"{stem}.output.dense.weight"] = tensor.t().contiguous()
        elif stem and last == "down_bias":
            result[f"{stem}.output.dense.bias"] = tensor
        else:
            result[name] = tensor
    return result
