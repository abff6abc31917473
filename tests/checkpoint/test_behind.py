"""Tensors written while others are worked out: in order, not too many at once, and no error is lost."""

import threading

import pytest
import torch
from torch import Tensor

from duotone.checkpoint import behind
from duotone.checkpoint.behind import WriteBehind
from duotone.errors import DuotoneError

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Disk:
    """Writes one thing each time it is let to; breaks at what is called `bad`."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.threads: set[int] = set()
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, tensors: dict[str, Tensor]) -> None:
        self.begun.release()
        assert self.may.acquire(timeout=10)
        self.threads.add(threading.get_ident())
        if "bad" in tensors:
            raise DuotoneError("the disk is full")
        self.written += tensors

    def allow(self, times: int) -> None:
        self.may.release(times)


def one(name: str, numbers: int = 5) -> dict[str, Tensor]:
    return {name: torch.zeros(numbers, dtype=torch.uint8)}


def test_it_is_written_in_order_by_another_thread() -> None:
    """The work goes on while nothing is written yet; when it has settled all is."""
    disk = Disk()
    with WriteBehind(CUDA) as writes:
        for name in "abc":
            writes.write(one(name), disk.write)
        assert disk.begun.acquire(timeout=10) and disk.written == []
        disk.allow(3)
        writes.settle()
        assert disk.written == ["a", "b", "c"]
        disk.allow(1)
        writes.write(one("d") | one("e"), disk.write)
    assert disk.written == list("abcde"), "all of it at the end"
    assert len(disk.threads) == 1 and threading.get_ident() not in disk.threads


def test_so_much_waits_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that the work waits for the disk; what is larger than all that may wait goes alone."""
    monkeypatch.setattr(behind, "BEHIND_BYTES", 10)
    disk, passed = Disk(), list[str]()

    def work(writes: WriteBehind) -> None:
        for name, numbers in (("a", 5), ("b", 5), ("c", 1), ("large", 50), ("d", 1)):
            writes.write(one(name, numbers), disk.write)
            passed.append(name)

    with WriteBehind(CUDA) as writes:
        worker = threading.Thread(target=work, args=(writes,))
        worker.start()
        for count in (2, 3, 3, 4, 5):  # with none, one, two, three, four written
            for _ in range(200):
                if len(passed) == count:
                    break
                worker.join(0.01)
            assert len(passed) == count, "too little went on"
            worker.join(0.02)
            assert len(passed) == count, "too much waits"
            disk.allow(1)
        worker.join(10)
        writes.settle()
    assert disk.written == ["a", "b", "c", "large", "d"]


@pytest.mark.parametrize("settles", [True, False])
def test_an_error_comes_out_of_the_next_call(settles: bool) -> None:
    """As it was, in the thread that works; nothing behind it is written."""
    disk = Disk()
    disk.allow(10)
    with pytest.raises(DuotoneError, match=r"^the disk is full$"), WriteBehind(CUDA) as writes:
        writes.write(one("a"), disk.write)
        writes.write(one("bad"), disk.write)
        writes.write(one("b"), disk.write)
        for _ in range(1000):
            if settles:
                writes.settle()
            else:
                writes.write(one("b"), disk.write)
                threading.Event().wait(0.001)
    assert disk.written == ["a"]


def test_what_failed_is_not_forgotten() -> None:
    """Who goes on in spite of it is told again."""
    disk = Disk()
    with WriteBehind(CUDA) as writes:
        writes.write(one("bad"), disk.write)
        writes.write(one("b"), disk.write)
        disk.allow(2)
        with pytest.raises(DuotoneError):
            writes.settle()
        with pytest.raises(RuntimeError, match="what came before this was not written"):
            writes.settle()
    assert disk.written == []


def test_a_run_that_ends_early_leaves_the_rest() -> None:
    """What is being written is ended, what waits is not begun, and the error of the work is the one that is told."""
    disk = Disk()
    with pytest.raises(KeyError), WriteBehind(CUDA) as writes:
        for name in ("a", "b", "c"):
            writes.write(one(name), disk.write)
        assert disk.begun.acquire(timeout=10)
        threading.Timer(0.05, disk.allow, [10]).start()
        raise KeyError
    assert disk.written == ["a"]


def test_a_cpu_writes_at_once() -> None:
    """In the thread that works, and its errors are told there."""
    disk = Disk()
    disk.allow(2)
    with WriteBehind(CPU) as writes:
        writes.write(one("a"), disk.write)
        assert disk.written == ["a"] and disk.threads == {threading.get_ident()}
        with pytest.raises(DuotoneError):
            writes.write(one("bad"), disk.write)
