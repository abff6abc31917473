"""Triton's interpreter reads and writes wherever a program points; here that has to be inside of what the program was given."""

import bisect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

#: Bytes around each tensor's memory, wherever that lies, that belong to nobody.
_GAP = 1 << 16


class Fences:
    """Copies of what programs are given, far from one another: an access that leaves one is an error, on either side.

    A GPU gives memory out in pages of megabytes, so that it lets most of these pass, until one is the last page's.
    """

    def __init__(self) -> None:
        self._first: list[int] = []
        self._last: list[int] = []

    def put_up(self, tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Move tensors into copies of the memory they lie in; of each such memory its bytes, and those of its copy."""
        self._first, self._last = [], []
        moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for tensor in tensors:
            held = tensor.untyped_storage()
            if held.data_ptr() not in moved:
                room = torch.full((held.nbytes() + 2 * _GAP,), 0xAB, dtype=torch.uint8)
                there = torch.empty(0, dtype=torch.uint8).set_(held, 0, (held.nbytes(),), (1,))
                moved[held.data_ptr()] = there, room[_GAP : _GAP + held.nbytes()].copy_(there)
            copy = moved[held.data_ptr()][1]
            start = tensor.storage_offset() + copy.storage_offset() // tensor.element_size()
            tensor.set_(copy.untyped_storage(), start, tensor.shape, tensor.stride())
        for _, copy in sorted(moved.values(), key=lambda pair: pair[1].data_ptr()):
            self._first.append(copy.data_ptr())
            self._last.append(copy.data_ptr() + copy.nbytes)
        return list(moved.values())

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Raise IndexError where a program goes out of the memory that its first access is to."""
        at = pointers.data[mask.data]
        if not at.size:
            return
        low, high = int(at.min()), int(at.max()) + pointers.get_element_ty().primitive_bitwidth // 8
        place = bisect.bisect_right(self._first, low) - 1
        if place < 0 or high > self._last[place]:
            near = "before all tensors" if place < 0 else f"{high - self._last[place]} bytes behind a tensor"
            raise IndexError(f"a program {what} {near} ({at.size} numbers, {high - low} bytes from first to last)")


@pytest.fixture(autouse=True)
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fences | None]:
    """Fences around all that an interpreted program is given; None where programs are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not _has_triton():
        yield None
        return
    from triton.runtime import interpreter

    around, executor, builder = Fences(), interpreter.GridExecutor, interpreter.InterpreterBuilder
    take = executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store

    def fenced(self: Any, args: Any, kwargs: Any) -> Any:
        given = take(self, args, kwargs)
        own = [x for x in (*given[0], *given[1].values()) if isinstance(x, torch.Tensor)]
        self.fenced = around.put_up(own)
        return given

    def restored(self: Any, *_: Any) -> None:
        for there, copy in self.fenced:
            there.copy_(copy)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        around.check("reads", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        around.check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(executor, "_init_args_hst", fenced)
    monkeypatch.setattr(executor, "_restore_args_dev", restored)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    yield around


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """What nobody has written yet is NaN or the largest number, so that nothing goes well by what memory happens to hold."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
