# Shapes: T threads of a program.
"""Runs compiled PTX on a CPU, instruction by instruction for all threads of a program at once, as its manual describes it.

For what Triton makes of our programs: enough instructions for those, not for any. Whatever happens later than where it stands
(copies to shared memory, Hopper's products) happens as late as it may, or at once, never both of them so: a text that waits for
too little, or copies over what a product still reads, gives something else in one of the two. Every access is checked against
the buffer that it is of. Threads of different warps do not overtake each other here: a barrier that is missing does not show.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*)$", re.S)
_BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
#: Barriers and fences: threads go in step, and what is late has its own waits.
_NOTHING = ("bar.", "fence.", "wgmma.fence", "membar")
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
#: What gives an instruction a meaning that none has here.
_OTHERWISE = {"hi", "sat", "ftz", "approx", "full", "NaN"}
#: Buffers begin so far from each other that no wrong address of one is in another.
_APART = 1 << 40


@dataclass(frozen=True)
class _Step:
    """A statement: the predicate that it waits on and whether it is turned, its name in parts, its operands."""

    predicate: str | None
    turned: bool
    name: tuple[str, ...]
    operands: tuple[str, ...]


def _parsed(text: str) -> tuple[list[_Step], dict[str, int], int]:
    """Steps, where labels stand, and threads."""
    threads = int(re.findall(r"\.reqntid (\d+)", text)[0])
    body = re.sub(r"//[^\n]*", "", text[text.index("\n{") :])
    body = re.sub(r"\n\s*\.(?:loc|pragma|reg|section|file)\b[^\n]*", "\n", body.partition("\n}")[0])
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    # A block of inline text has registers of its own, which nothing else is called.
    for line in re.split(r"[;\n]", re.sub(r"\{\s*\.reg[^;]*;|(?<=;)\s*\}|\t", " ", body)):
        line = line.strip().strip("{}").strip() if line.strip() in {"{", "}"} else line.strip()
        if label := re.match(r"^(\$\w+):$", line):
            labels[label[1]] = len(steps)
        elif line and not line.startswith(("$", ".")):
            found = _STATEMENT.match(line)
            assert found, f"not a statement: {line}"
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
            steps.append(_Step(found[2], found[1] == "!", tuple(found[3].split(".")), tuple(each.strip() for each in operands)))
    return steps, labels, threads


def run(text: str, shared: int, grid: tuple[int, int, int], arguments: Sequence[np.ndarray | int | float], late: bool) -> None:
    """All programs of a grid, one after the other, the last first if late. arguments: buffers of bytes, which are written."""
    steps, labels, threads = _parsed(text)
    buffers = [each for each in arguments if isinstance(each, np.ndarray)]
    head = text[text.index(".entry") : text.index(".reqntid")]
    names = re.findall(r"\.param \.\w+ (?:[^,\n]*\s)?(\w+_param_\d+)", head)
    places: dict[str, Any] = {}
    for name, value in zip(names, arguments, strict=False):
        at = next((i for i, buffer in enumerate(buffers) if buffer is value), None)
        places[name] = (at + 1) * _APART + value.ctypes.data % 16 if at is not None else value
    programs = [{"x": x, "y": y, "z": z} for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    size = dict(zip(("of x", "of y", "of z"), grid, strict=True))
    for program in reversed(programs) if late else programs:
        _Program(steps, labels, threads, shared, buffers, places, late).run(program | size)


class _Program:
    def __init__(
        self, steps: list[_Step], labels: dict[str, int], threads: int, shared: int, buffers: list[np.ndarray],
        parameters: dict[str, Any], late: bool,
    ) -> None:  # fmt: skip
        self.steps, self.labels, self.threads, self.late = steps, labels, threads, late
        self.shared, self.buffers, self.parameters = np.zeros(shared + 16, np.uint8), buffers, parameters
        self.held: dict[str, np.ndarray] = {}
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.products: list[list[Callable[[], None]]] = [[]]
        self.active = np.ones(threads, bool)

    def run(self, program: dict[str, int]) -> None:
        self.program, place = program, 0
        while place < len(self.steps):
            step, place = self.steps[place], place + 1
            self.active = np.ones(self.threads, bool)
            if step.predicate:
                self.active = self.held[step.predicate] ^ step.turned
            if step.name[0] == "bra":
                target = self.labels[step.operands[0]]
                if any(goes.any() and self.fails(at) for at, goes in ((target, self.active), (place, ~self.active))):
                    raise RuntimeError("device-side assert triggered")
                assert self.active.all() or not self.active.any(), "threads part ways"
                place = target if self.active.all() else place
            elif step.name[0] == "ret":
                assert not step.predicate, "some threads end"
                break
            elif not ".".join(step.name).startswith(_NOTHING):
                try:
                    getattr(self, "do_" + step.name[0])(step.name[1:], step.operands)
                except (KeyError, ValueError) as error:
                    raise NotImplementedError(f"{step}: {error!r}") from error
        self.wait(self.copies, 0)
        assert not any(self.products), "products that nobody waits for"

    def fails(self, place: int) -> bool:
        """Whether what stands there leads to the end of an assertion, by no other branch."""
        while self.steps[place].name[0] != "ret":
            step = self.steps[place]
            if step.name[0] == "call" or (step.name[0] == "bra" and step.predicate):
                return step.name[0] == "call"
            place = self.labels[step.operands[0]] if step.name[0] == "bra" else place + 1
        return False

    # ---- registers

    def get(self, operand: str, kind: str = "b32") -> np.ndarray:
        """An operand [T] in an unsigned type of its size, floats as their bits."""
        dtype = np.dtype(_BITS[re.sub(r"\D", "", kind)])
        if operand in self.held:
            found = self.held[operand]
            return found.astype(dtype) if found.dtype != bool else found
        if operand.startswith("%"):
            base, _, axis = operand.partition(".")
            numbers = {"%tid": np.arange(self.threads) if axis == "x" else 0, "%ctaid": self.program[axis]}
            numbers["%nctaid"] = self.program["of " + axis]
            return np.broadcast_to(np.asarray(numbers[base]), self.threads).astype(dtype)
        if operand == "global_smem":
            return np.zeros(self.threads, dtype)
        if operand in self.parameters:  # its address, that a text may choose by
            return np.full(self.threads, list(self.parameters).index(operand), dtype)
        number = int(operand[2:], 16) if operand[:2] in {"0f", "0d"} else int(operand.rstrip("U"), 0)
        return np.full(self.threads, number % (1 << 8 * dtype.itemsize), dtype)

    def put(self, operand: str, value: np.ndarray) -> None:
        value = np.broadcast_to(value, self.threads)
        before = self.held.get(operand)
        if not self.active.all():
            value = np.where(self.active, value, np.zeros_like(value) if before is None else before)
        self.held[operand] = value.copy()

    def many(self, operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{}").split(",")]

    def typed(self, operand: str, kind: str) -> np.ndarray:
        """An operand as a number of its type."""
        if kind == "f16x2":
            return np.ascontiguousarray(self.get(operand)).view(np.float16)
        bits = self.get(operand, kind)
        size = bits.dtype.itemsize
        return bits.view(f"f{size}") if kind[0] == "f" else bits.view(f"i{size}") if kind[0] == "s" else bits

    def keep(self, operand: str, value: np.ndarray, kind: str) -> None:
        dtype = np.dtype(_BITS["32" if kind == "f16x2" else re.sub(r"\D", "", kind)])
        value = np.asarray(value)
        self.put(operand, value.view(dtype) if value.dtype.kind == "f" else value.astype(dtype))

    # ---- memory

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.get(base.strip(), "b64").astype(np.int64) + int(offset or 0)

    def memory(self, space: str, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of active threads: the buffer, and where in it, [active threads, size]."""
        address = address[self.active]
        if space == "shared":
            buffer, start = self.shared, address
        else:
            assert len(set(address // _APART)) == 1, "addresses of several buffers"
            buffer = self.buffers[int(address[0] // _APART) - 1]
            start = address % _APART - buffer.ctypes.data % 16
        assert size and not (address % size).any(), f"{space}: misaligned access of {size} bytes"
        assert start.min() >= 0 and start.max() + size <= len(buffer), f"{space}: access beyond {len(buffer)} bytes"
        return buffer, start[:, None] + np.arange(size)

    def parts(self, name: Sequence[str]) -> tuple[str, int, np.dtype]:
        count = next((int(each[1]) for each in name if re.fullmatch(r"v\d", each)), 1)
        return ("shared" if "shared" in name[0] else "global"), count, np.dtype(_BITS[re.sub(r"\D", "", name[-1])])

    def do_ld(self, name: Sequence[str], operands: Sequence[str]) -> None:
        if name[0] == "param":
            operand = operands[1].strip("[]")
            if operand not in self.parameters:
                (place,) = set(self.get(operand).tolist())
                operand = list(self.parameters)[place]
            value = self.parameters[operand]
            bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value
            self.put(operands[0], np.full(self.threads, int(bits) % 2**64, np.uint64).astype(_BITS[name[1][1:]]))
            return
        space, count, dtype = self.parts(name)
        outs = self.many(operands[0])
        found = np.zeros((self.threads, count), dtype)
        if self.active.any():
            buffer, place = self.memory(space, self.address(operands[1]), count * dtype.itemsize)
            found[self.active] = buffer[place].view(dtype)
        for out, value in zip(outs, found.T, strict=True):
            self.put(out, value)

    def do_st(self, name: Sequence[str], operands: Sequence[str]) -> None:
        space, count, dtype = self.parts(name)
        if self.active.any():
            buffer, place = self.memory(space, self.address(operands[0]), count * dtype.itemsize)
            values = np.stack([self.get(each, name[-1]) for each in self.many(operands[1])], 1)[self.active]
            buffer[place] = np.ascontiguousarray(values).view(np.uint8).reshape(place.shape)

    def do_cp(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """cp.async: each thread's bytes, the first of them from global memory, zeros for the rest."""
        if self.grouped(name[1], operands, self.copies):
            return
        size, given = int(operands[2], 0), self.get(operands[3]) if len(operands) > 3 else None
        target, to = self.memory("shared", self.address(operands[0]), size)
        address, active = self.address(operands[1]), self.active
        taken = np.full(self.threads, size) if given is None else given.astype(np.int64)
        assert set(taken.tolist()) <= {0, size}

        def copy() -> None:
            values = np.zeros((self.threads, size), np.uint8)
            self.active = active & (taken > 0)
            if self.active.any():
                source, place = self.memory("global", address, size)
                values[self.active] = source[place]
            target[to] = values[active]

        self.copies[-1].append(copy)
        if not self.late:
            self.copies[-1].pop()()

    def do_atom(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """Additions, thread after thread."""
        assert {"global", "gpu", "acq_rel", "add"} <= set(name)
        found = np.zeros(self.threads, np.uint32)
        if self.active.any():
            buffer, places = self.memory("global", self.address(operands[1]), 4)
            for thread, place, more in zip(
                np.flatnonzero(self.active), places, self.get(operands[2])[self.active], strict=True
            ):
                word = buffer[place].view(np.uint32)
                found[thread] = word[0]
                buffer[place] = (word + more).view(np.uint8)
        self.put(operands[0], found)

    def grouped(self, what: str, operands: Sequence[str], groups: list[list[Callable[[], None]]]) -> bool:
        """Close a group of what is late, or wait for groups, if that is what is asked for."""
        if what == "commit_group":
            groups.append([])
        elif what == "wait_group":
            self.wait(groups, int(operands[0], 0))
        return what in {"commit_group", "wait_group"}

    def wait(self, groups: list[list[Callable[[], None]]], left: int) -> None:
        """For all groups that were closed but the last `left` of them."""
        while len(groups) - 1 > left:
            for act in groups.pop(0):
                act()

    def matrices(self, name: Sequence[str], operand: str, count: int) -> list[np.ndarray]:
        """Of matrices of 8 x 8 halves, whose rows' addresses 8 threads of a warp each have: where each thread's 4 bytes are."""
        address, lane, two = self.address(operand).reshape(-1, 32), np.arange(32)[:, None], np.arange(2)[None, :]
        row, column = lane // 4, lane % 4 * 2 + two
        if "trans" in name:
            row, column = column, row
        places = []
        for i in range(count):
            starts = address[:, 8 * i : 8 * i + 8]
            assert not (starts % 16).any() and starts.min() >= 0 and starts.max() + 16 <= len(self.shared)
            places.append((starts[:, np.broadcast_to(row, (32, 2))] + column * 2)[..., None] + np.arange(2))
        return places

    def do_ldmatrix(self, name: Sequence[str], operands: Sequence[str]) -> None:
        outs = self.many(operands[0])
        for out, place in zip(outs, self.matrices(name, operands[1], len(outs)), strict=True):
            self.put(out, np.ascontiguousarray(self.shared[place]).reshape(-1).view(np.uint32))

    def do_stmatrix(self, name: Sequence[str], operands: Sequence[str]) -> None:
        given = self.many(operands[1])
        for word, place in zip(given, self.matrices(name, operands[0], len(given)), strict=True):
            self.shared[place] = np.ascontiguousarray(self.get(word)).view(np.uint8).reshape(place.shape)

    # ---- products

    def do_wgmma(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """[64, 32] of four warps' registers times [32, n] of shared memory, FP8, K innermost there."""
        if self.grouped(name[0], operands, self.products):
            return
        outs, from_registers = self.many(operands[0]), operands[1].startswith("{")
        kind = "b32" if from_registers else "b64"
        columns, descriptor = int(re.findall(r"n(\d+)k32", name[3])[0]), self.get(operands[2], "b64")
        adds = (
            self.get(operands[3]).astype(bool) if operands[3] not in {"0", "1"} else np.full(self.threads, operands[3] == "1")
        )
        assert name[-2:] == ("e4m3", "e4m3") and operands[4:] == ("1", "1"), operands

        def multiply() -> None:
            given = [self.get(each, kind) for each in self.many(operands[1])]  # what registers hold by now
            for group in range(self.threads // 128):
                own = slice(128 * group, 128 * group + 128)
                assert len(set(descriptor[own].tolist())) == 1
                right = self._described(int(descriptor[own][0]), columns)
                lane, warp = np.arange(128) % 32, np.arange(128) // 32
                left = np.zeros((64, 32))
                if not from_registers:
                    left = self._described(int(given[0][own][0]), 64).T
                for i, word in enumerate(given if from_registers else []):
                    row, k = warp * 16 + lane // 4 + 8 * (i % 2), lane % 4 * 4 + 16 * (i // 2)
                    left[row[:, None], k[:, None] + np.arange(4)] = _E4M3[
                        np.ascontiguousarray(word[own]).view(np.uint8)
                    ].reshape(128, 4)
                whole = left @ right
                for i, out in enumerate(outs):
                    row, column = warp * 16 + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + lane % 4 * 2 + i % 2
                    before = self.held.setdefault(out, np.zeros(self.threads, np.uint32))
                    total = np.where(adds[own], before[own].view(np.float32), 0) + whole[row, column]
                    before[own] = total.astype(np.float32).view(np.uint32)

        self.products[-1].append(multiply)
        if self.late:
            self.products[-1].pop()()

    def _described(self, descriptor: int, columns: int) -> np.ndarray:
        """[32, n] of shared memory as a matrix descriptor has it: rows of 128 bytes for a column, swizzled."""
        assert descriptor >> 62 == 1 and not descriptor >> 49 & 7, "not rows of 128 bytes, swizzled, from a multiple of 1024 on"
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        k, n = np.arange(32)[:, None], np.arange(columns)[None, :]
        address = start + n // 8 * stride + n % 8 * 128 + k
        address ^= (address >> 7 & 7) << 4
        assert address.max() < len(self.shared)
        return _E4M3[self.shared[address]]

    def do_mma(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """m16n8k32 of each warp, FP8."""
        assert name[-4:] == ("f32", "e4m3", "e4m3", "f32") and "m16n8k32" in name
        outs, *given = (self.many(each) for each in operands)
        a, b = ([self.get(each).reshape(-1, 32) for each in words] for words in given[:2])
        before = [self.get(each).view(np.float32).reshape(-1, 32) for each in given[2]]
        lane, totals = np.arange(32), [np.zeros_like(each) for each in before]
        for warp in range(self.threads // 32):
            left, right = np.zeros((16, 32)), np.zeros((32, 8))
            bytes_ = lambda words, i, warp=warp: _E4M3[np.ascontiguousarray(words[i][warp]).view(np.uint8)].reshape(32, 4)  # noqa: E731
            for i in range(4):
                row, k = lane // 4 + 8 * (i % 2), lane % 4 * 4 + 16 * (i // 2)
                left[row[:, None], k[:, None] + np.arange(4)] = bytes_(a, i)
            for i in range(2):
                right[(lane % 4 * 4 + 16 * i)[:, None] + np.arange(4), (lane // 4)[:, None]] = bytes_(b, i)
            whole = left @ right
            for i, total in enumerate(totals):
                total[warp] = before[i][warp] + whole[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
        for out, total in zip(outs, totals, strict=True):
            self.keep(out, total.reshape(-1), "f32")

    # ---- arithmetic

    def do_mov(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """A value, or one made of two halves, or two halves of one."""
        out, given = operands
        size = int(name[0][1:]) if name[0] != "pred" else 0
        if given.startswith("{"):
            low, high = (self.get(each, f"b{size // 2}").astype(np.uint64) for each in self.many(given))
            self.keep(out, low | high << np.uint64(size // 2), name[0])
        elif out.startswith("{"):
            value, (low, high) = self.get(given, name[0]), self.many(out)
            self.keep(low, value & value.dtype.type(2 ** (size // 2) - 1), f"b{size // 2}")
            self.keep(high, value >> value.dtype.type(size // 2), f"b{size // 2}")
        else:
            self.put(out, self.get(given, name[0]) if size else self.truth(given))

    def truth(self, operand: str) -> np.ndarray:
        return self.held[operand] if operand in self.held else np.full(self.threads, int(operand) != 0)

    def do_setp(self, name: Sequence[str], operands: Sequence[str]) -> None:
        a, b = (self.typed(each, name[-1]) for each in operands[1:3])
        unordered = name[0] in {"neu", "equ", "ltu", "leu", "gtu", "geu"}
        compared = getattr(np, _COMPARED[name[0][:2]])(a, b)
        if name[-1][0] == "f":
            nan = np.isnan(a) | np.isnan(b)
            compared = compared | nan if unordered else compared & ~nan
        if len(operands) > 3:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name[1]]
            other = operands[3]
            compared = combine(compared, ~self.truth(other[1:]) if other[0] == "!" else self.truth(other))
        self.put(operands[0], compared)

    def do_selp(self, name: Sequence[str], operands: Sequence[str]) -> None:
        yes, no = (self.get(each, name[0]) for each in operands[1:3])
        self.keep(operands[0], np.where(self.truth(operands[3]), yes, no), name[0])

    def do_cvt(self, name: Sequence[str], operands: Sequence[str]) -> None:
        to, of = name[-2:]
        if to == "f16x2":  # the second operand is the lower half
            high, low = (self.typed(each, of).astype(np.float16).view(np.uint16).astype(np.uint32) for each in operands[1:])
            self.put(operands[0], low | high << np.uint32(16))
            return
        value, kind = self.typed(operands[1], of), {"f": "f", "s": "i"}.get(to[0], "u")
        if of[0] == "f" and to[0] != "f":
            assert {"rzi", "rni"} & set(name), name
            value = np.trunc(value) if "rzi" in name else np.rint(value)
            most = np.iinfo(f"{kind}{int(to[1:]) // 8}")
            value = np.clip(np.nan_to_num(value.astype(np.float64)), most.min, most.max)
        self.keep(operands[0], value.astype(f"{kind}{int(to[1:]) // 8}"), to)

    def do_prmt(self, _: Sequence[str], operands: Sequence[str]) -> None:
        a, b, select = (self.get(each).astype(np.uint64) for each in operands[1:])
        pair, total = a | b << np.uint64(32), np.zeros(self.threads, np.uint64)
        for i in range(4):
            nibble = select >> np.uint64(4 * i) & np.uint64(15)
            byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            total |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        self.keep(operands[0], total, "b32")

    def do_lop3(self, _: Sequence[str], operands: Sequence[str]) -> None:
        a, b, c = (self.get(each) for each in operands[1:4])
        table, total = int(operands[4], 0), np.zeros(self.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        self.put(operands[0], total)

    def do_bfe(self, name: Sequence[str], operands: Sequence[str]) -> None:
        value, (start, count) = self.typed(operands[1], name[0]), (int(each, 0) for each in operands[2:])
        bits = 8 * value.dtype.itemsize
        self.keep(operands[0], value << bits - start - count >> bits - count, name[0])

    def do_shfl(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """Of a warp's threads: each takes another's."""
        assert self.active.all() and int(operands[3], 0) == 31
        own, other = np.arange(self.threads), self.get(operands[2]).astype(np.int64) & 31
        lane = {"bfly": own ^ other, "idx": own // 32 * 32 + other}[name[1]]
        self.put(operands[0], self.get(operands[1])[lane])

    def do_redux(self, name: Sequence[str], operands: Sequence[str]) -> None:
        """Of a warp's threads."""
        assert self.active.all() and (self.get(operands[2]) == 2**32 - 1).all()
        fold = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce}[name[1]]
        whole = fold(self.typed(operands[1], name[-1]).reshape(-1, 32), axis=1)
        self.keep(operands[0], np.repeat(whole, 32), name[-1])

    def __getattr__(self, name: str) -> Callable[[Sequence[str], Sequence[str]], None]:
        operation = _OPERATIONS[name.removeprefix("do_")]

        def compute(parts: Sequence[str], operands: Sequence[str]) -> None:
            kind = parts[-1]
            assert not _OTHERWISE & set(parts), f"{name} {parts}"
            if kind == "pred":
                self.put(operands[0], operation(*(self.truth(each) for each in operands[1:])))
                return
            wide = "wide" in parts
            given = [self.typed(each, kind) for each in operands[1:3]]
            rest = [self.typed(each, f"{kind[0]}64" if wide else kind) for each in operands[3:]]
            if wide:
                given = [each.astype(np.int64 if kind[0] == "s" else np.uint64) for each in given]
            with np.errstate(all="ignore"):
                self.keep(operands[0], operation(*given, *rest), "b64" if wide else kind)

        return compute


def _shift(function: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """By no more than there are bits; by as many, nothing or the sign is left."""

    def shift(value: np.ndarray, by: np.ndarray) -> np.ndarray:
        bits = 8 * value.dtype.itemsize
        most = function(function(value, bits - 1), 1)
        return np.where(by >= bits, most, function(value, np.minimum(by, bits - 1).astype(value.dtype)))

    return shift


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero between integers."""
    return a / b if a.dtype.kind == "f" else a // b + ((a % b != 0) & ((a < 0) != (b < 0)))


_COMPARED = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}
_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": _fused, "fma": _fused, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
    "min": np.fmin, "max": np.fmax, "div": _quotient, "rem": np.fmod, "sqrt": np.sqrt,
    "shl": _shift(np.left_shift), "shr": _shift(np.right_shift),
}  # fmt: skip
