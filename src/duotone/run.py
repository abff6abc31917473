"""What the steps of one run share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from duotone.calibrate.offload import Keeper
from duotone.checkpoint.ahead import ReadAhead
from duotone.checkpoint.scratch import Scratch
from duotone.outcome import QuantizeReport
from duotone.phases import Phases
from duotone.plan import Plan
from duotone.ranks import Ranks

#: (steps done, steps in all, what is being done)
Progress = Callable[[int, int, str], None]


@dataclass
class Run:
    """A plan, where and by whom it is carried out, and what has come of it so far.

    offload: where hidden states lie, if not in the device's memory. ahead: reads the blocks of a checkpoint.
    curvatures: with `--effort high`, where each group's waits on disk until the group is solved.
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    phases: Phases
    report: QuantizeReport
    ranks: Ranks
    offload: Keeper | None = None
    ahead: ReadAhead | None = None
    sidecar_layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    curvatures: Scratch | None = None
