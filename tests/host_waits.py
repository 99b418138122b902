"""What would make the host wait for a GPU, found without one.

The device is torch's ``meta``: tensors without data. Whatever asks a value of it (``item``, a
result whose size is data, a copy to the host) cannot be answered, just as a GPU could not answer it
without being waited for. CPU tensors are the host's and may do anything.
"""

import contextlib
import traceback
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trelm_ds.ops import reference

DEVICE = torch.device("meta")

# Results whose size is data, or that are read by the operator itself.
DATA_DEPENDENT = {
    *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("unique_dim_consecutive", "bincount", "equal", "is_nonzero", "histc", "multinomial"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Calls that bring host data to the device and cannot be told to go on meanwhile.
CONSTRUCTORS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


class HostWait(AssertionError):
    """An operator that the host cannot get past without the device."""


def _on_device(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE.type


def _on_host(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _place() -> str:
    """The line that called torch."""
    frames = traceback.extract_stack()
    frame = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__][-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.line}"


class _Operators(TorchDispatchMode):
    """Sees every ATen operator, those of the backward too."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(map(_on_device, leaves)) and not self._moves(func, args, kwargs):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "trelm":
            with self:  # what a GPU runs
                return getattr(reference, name)(*args, **kwargs)
        asks_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        masks = name in INDEXING and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in tree_leaves(args[1])
        )
        if name in DATA_DEPENDENT or asks_size or masks:
            raise HostWait(f"{name} at {_place()}")
        if name == "_local_scalar_dense":
            self._found.append(f"item at {_place()}")
            return torch.zeros((), dtype=args[0].dtype).item()
        if name == "_to_copy" and _on_device(args[0]) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == "cpu":
                self._found.append(f"copy to the host at {_place()}")
                every_other = torch.arange(args[0].numel()).view(args[0].shape) % 2
                return every_other.to(kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and _on_host(args[0]):
            self._found.append(f"copy to the host at {_place()}")
            return args[0]
        if self._moves(func, args, kwargs) and not self._non_blocking(args, kwargs):
            self._found.append(f"blocking copy to the device at {_place()}")
        if name in INDEXING or name == "where":  # these copy what they find on the host
            if any(map(_on_host, leaves)):
                self._found.append(f"{name} with a host tensor at {_place()}")
        return func(*args, **kwargs)

    @staticmethod
    def _moves(func, args, kwargs) -> bool:
        """Whether host data goes to the device."""
        name = func.overloadpacket.__name__
        if name == "copy_":
            return _on_device(args[0]) and _on_host(args[1])
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == DEVICE.type
        return name == "_to_copy" and to_device and _on_host(args[0])

    @staticmethod
    def _non_blocking(args, kwargs) -> bool:
        return bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


class _Calls(TorchFunctionMode):
    """Sees Python calls whose copies no operator shows."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONSTRUCTORS and not _on_device(args[-1]):
            device = kwargs.get("device") or (_on_device(args[0]) and DEVICE)
            if device and torch.device(device).type == DEVICE.type:
                self._found.append(f"{func.__name__} on the device at {_place()}")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _on_device(args[0]):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, (list, np.ndarray)) for key in keys):
                self._found.append(f"index by a list at {_place()}")
        if func is torch.Tensor.__setitem__ and _on_device(args[0]):
            scalar = not isinstance(args[2], torch.Tensor)
            if scalar and any(_on_device(t) and t.dim() for t in tree_leaves(args[1])):
                # On CUDA the scalar becomes a host tensor, which index_put_ copies.
                self._found.append(f"scalar set by index at {_place()}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def host_waits():
    """Collects the waits of what is run inside, as text: ``with host_waits() as found``.

    A number asked of the device is answered with 0, a copy to the host with zeros and ones by
    turns.

    Raises:
        HostWait: at an operator that has no result without the device.
    """
    found: list[str] = []
    # torch.autocast knows no device ``meta``; the code switches it off where it does not compute.
    off = mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    with off, _Operators(found), _Calls(found):
        yield found
