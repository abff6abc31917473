"""A GPU that is not there: tensors that say they are on `cuda:0` and are computed on the CPU.

What a real one refuses is refused here, operands on two devices first of all; it divides by a number as a real one does; what
makes a host wait for it, and how many operations it is asked for, is counted. So a pipeline's devices are tested on a machine
without one. Speed is not, and neither are streams, pinned memory, nor anything else that a GPU computes otherwise.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
#: What reads a value back: the host waits for all that is queued.
_WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
#: What asks a GPU for memory, not for work.
_NO_WORK = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_local_scalar_dense"}
#: Operations that take tensors of both devices: copies, and indices on the CPU.
_MIXES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_copy_from"}


class Pretended(Tensor):
    """A tensor on the pretended GPU; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        facts = {"dtype": held.dtype, "layout": held.layout, "device": CUDA, "requires_grad": held.requires_grad}
        made = Tensor._make_wrapper_subclass(cls, held.size(), held.stride(), held.storage_offset(), **facts)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Counter())

    def tolist(self) -> Any:
        """Its values, waited for."""
        return self.cpu().tolist()

    @property
    def data(self) -> "Pretended":
        """As a tensor's, but that its values can be replaced by another's."""
        return self.detach()

    @data.setter
    def data(self, other: "Pretended") -> None:
        assert isinstance(other, Pretended), "a parameter on the GPU is given values on the CPU"
        assert other.shape == self.shape and other.dtype == self.dtype
        self.held = other.held

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretended":
        copied = memo[id(self)] = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = memo[id(self)] = torch.nn.Parameter(copied, requires_grad=False)
        return copied


def run(func: Any, args: Any, kwargs: dict[str, Any], seen: Counter[str]) -> Any:
    """One operation as the GPU would do it."""
    kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Pretended)]
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else torch.device(asked).type == "cuda"
    if not there and not goes_there:
        return func(*args, **kwargs)
    name = func._schema.name
    strays = [x for x in tensors if not isinstance(x, Pretended) and x.dim() and not x.is_meta]
    if there and strays and name not in _MIXES:
        raise RuntimeError(f"{name}: found operands on cuda:0 and on cpu, {[tuple(x.shape) for x in strays]}")
    if name == "aten::index" and not isinstance(args[0], Pretended):
        raise RuntimeError("aten::index: found indices on cuda:0 of a tensor on the cpu")
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    seen["launches"] += not is_view and name not in _NO_WORK
    if func in _WAITS or (asked is not None and there and torch.device(asked).type == "cpu"):
        seen["waits"] += 1
    if name == "aten::copy_" and not isinstance(args[0], Pretended):
        seen["waits"] += 1
        goes_there = False
    if asked is not None and goes_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    if func is aten._fused_sdp_choice.default:
        return 0  # plain attention: what is fused differs by device
    does = func
    if func in (aten.div.Tensor, aten.div_.Tensor) and not isinstance(args[1], Pretended) and plain_args[0].is_floating_point():
        # By a number, or a tensor of the CPU's that is one: CUDA multiplies by its inverse, itself rounded.
        wide = torch.promote_types(plain_args[0].dtype, torch.float32)
        does = aten.mul.Tensor if func is aten.div.Tensor else aten.mul_.Tensor
        plain_args = plain_args[0], float(1 / torch.tensor(float(args[1]), dtype=wide))
    if func is aten.mm.dtype:  # which a CPU lacks
        does, plain_args = aten.mm.default, tuple(matrix.float() for matrix in plain_args[:2])
    result = does(*plain_args, **plain_kwargs)
    if func is aten.ldexp.Tensor:
        result = result * (1 + 2.0**-23)  # CUDA's is a product with its pow, which misses some powers of two by a bit
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return tree_map_only(Tensor, Pretended, result) if goes_there else result


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument that an operation in place, or into `out`, gives back."""
    schema = func._schema
    if len(schema.returns) != 1 or schema.returns[0].alias_info is None or not schema.returns[0].alias_info.is_write:
        return None
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[place]
    return None


class PretendedGpu(TorchDispatchMode):
    """While active, `cuda:0` is there. seen: how many launches it was asked for, and how often the host waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.seen)


@contextmanager
def _guarded() -> Iterator[None]:
    """Switching to the device does nothing, as on a CPU: torch's table of who does it is given the CPU's entry for CUDA.

    Builds without CUDA have none, those with it ask a driver.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cpu_and_cuda = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = cpu_and_cuda[1]
    cpu_and_cuda[1] = cpu_and_cuda[0]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its numbers on the CPU and moves them
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
        cpu_and_cuda[1] = before


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """The GPU, and what torch says of it."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda _: "a pretended GPU")
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))  # whose linears are plain torch
    with _guarded(), torch.no_grad(), PretendedGpu() as gpu:
        yield gpu
