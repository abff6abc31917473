"""As near to the original as so many bytes allow, or as small as a distance allows: what each unit of linears is to be.

From measured sensitivities (sensitivity.py) by integer programming. What units cost alone is taken to add up, and is brought
to the distance of the whole: the method makes up for some of it, or errors make one another worse.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duotone.checkpoint.staging import check_output
from duotone.errors import DuotoneError
from duotone.evaluation import Evaluation, evaluate
from duotone.outcome import QuantizeReport
from duotone.pipeline import quantize
from duotone.sensitivity import Sensitivity
from duotone.settings import QuantizeConfig

Progress = Callable[[int, int, str], None]
#: What a unit may become, from the smallest.
PRECISIONS = ("w4a8", "w8a8", "bf16")
#: Where a run measured to be too far from the original is made again, for so much less.
_TRIES = 3


@dataclass(frozen=True)
class Goal:
    """One of the two. max_bytes: of all tensors. target_kl: mean KL to the original, in nats a token."""

    max_bytes: int | None = None
    target_kl: float | None = None

    def __post_init__(self) -> None:
        if (self.max_bytes is None) == (self.target_kl is None):
            raise DuotoneError("expected either --max-bytes or --target-kl")
        if self.target_kl is not None and not self.target_kl > 0:
            raise DuotoneError(f"--target-kl: found {self.target_kl}, expected more than 0 (nats a token)")


@dataclass(frozen=True)
class Choice:
    """A precision for each unit, in order; what that takes on disk, its bits a weight, and the KL to expect."""

    precisions: tuple[str, ...]
    nbytes: int
    bits: float
    kl: float

    def rules(self, found: Sensitivity) -> tuple[str, ...]:
        """As `--rule` takes them."""
        return tuple(
            f"{layer}={precision}"
            for unit, precision in zip(found.units, self.precisions, strict=True)
            if precision != "w4a8"
            for layer in unit.layers
        )


@dataclass(frozen=True)
class Reached:
    """What came of a goal: the choice that was made, the run's report, and the checkpoint measured on the same text."""

    choice: Choice
    report: QuantizeReport
    measured: Evaluation


def gains(found: Sensitivity) -> np.ndarray:
    """By unit and precision, how much nearer the model comes; no less for more bits, and all of the distance with BF16."""
    raw = np.array([[0.0, unit.alone["w4a8"] - unit.alone["w8a8"], unit.alone["w4a8"]] for unit in found.units])
    rising = np.maximum.accumulate(raw, axis=1)
    return rising * found.kl / max(float(rising[:, -1].sum()), 1e-30)


def choose(found: Sensitivity, goal: Goal) -> Choice:
    """The best choice. Raises DuotoneError where even 4 bits everywhere take too much."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    gain, whole = gains(found), max(found.kl, 1e-30)
    size = np.array([[unit.nbytes[name] for name in PRECISIONS] for unit in found.units], dtype=float)
    one_each = np.kron(np.eye(len(size)), np.ones(len(PRECISIONS)))
    limits = [LinearConstraint(one_each, 1, 1)]
    if goal.max_bytes is not None:
        least = found.fixed_bytes + int(size.min(1).sum())
        if goal.max_bytes < least:
            raise DuotoneError(f"--max-bytes: found {goal.max_bytes}, expected at least {least}, with 4 bits everywhere")
        limits.append(LinearConstraint(size.reshape(1, -1), -np.inf, goal.max_bytes - found.fixed_bytes))
        cost = -gain / whole + 1e-9 * size / size.max()  # of equal gains the smaller
    else:
        assert goal.target_kl is not None
        wanted = min(found.kl - goal.target_kl, float(gain[:, -1].sum()) * (1 - 1e-9))
        limits.append(LinearConstraint(gain.reshape(1, -1) / whole, wanted / whole, np.inf))
        cost = size / size.max()
    answer = milp(
        cost.ravel(), constraints=limits, integrality=np.ones(cost.size), bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    if answer.x is None:
        raise DuotoneError(f"the choice of precisions: HiGHS found no solution ({answer.message})")
    taken = answer.x.reshape(size.shape).argmax(1)
    rows = np.arange(len(size))
    nbytes = int(size[rows, taken].sum())
    kl = found.kl - float(gain[rows, taken].sum())
    precisions = tuple(PRECISIONS[index] for index in taken)
    return Choice(precisions, found.fixed_bytes + nbytes, 8 * nbytes / found.weights, max(0.0, kl))


def curve(found: Sensitivity, points: int = 12) -> list[Choice]:
    """The best choices from 4 bits everywhere to FP8 everywhere, at even steps of bytes, without those that gain nothing."""
    low, high = (sum(unit.nbytes[name] for unit in found.units) for name in PRECISIONS[:2])
    steps = (low + math.ceil((high - low) * step / (points - 1)) for step in range(points))
    choices = [choose(found, Goal(max_bytes=found.fixed_bytes + step)) for step in steps]
    return [one for one, before in zip(choices, [None, *choices], strict=False) if before is None or one.kl < before.kl]


def quantize_to(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig,
    goal: Goal,
    found: Sensitivity,
    text: Sequence[str],
    samples: int = 32,
    progress: Progress | None = None,
) -> Reached:
    """Quantize into `out` with the precisions that a goal asks for, and measure what was made.

    Where a target is missed the choice is made again, for as much less as it was missed by. Raises DuotoneError when it still
    is missed, and as `quantize` does; then there is no `out`.
    """
    out = Path(out)
    check_output(out)
    asked, nearest = goal, math.inf
    for attempt in range(1, _TRIES + 1):
        choice = choose(found, asked)
        with tempfile.TemporaryDirectory(prefix=".duotone-", dir=out.absolute().parent) as scratch:
            made = Path(scratch) / out.name
            report = quantize(model, made, replace(config, rules=(*config.rules, *choice.rules(found))), progress)
            measured = evaluate(made, text, reference=model, seq_len=found.seq_len, samples=samples, device=config.device)
            assert measured.kl is not None
            if goal.target_kl is None or measured.kl <= goal.target_kl:
                if out.exists():
                    out.rmdir()  # check_output has seen that it is empty
                shutil.move(made, out)
                report.out = str(out)
                return Reached(choice, report, measured)
        assert asked.target_kl is not None
        nearest = min(nearest, measured.kl)
        asked = Goal(target_kl=asked.target_kl * goal.target_kl / measured.kl)
        if progress is not None:
            progress(attempt, _TRIES, f"again: found KL {measured.kl:.3g}, expected {goal.target_kl:.3g}")
    raise DuotoneError(f"--target-kl: found {nearest:.3g} at best in {_TRIES} runs, expected {goal.target_kl:.3g}")
