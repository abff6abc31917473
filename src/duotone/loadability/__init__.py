"""Which runtime loads a checkpoint on which accelerator, and how: rules with their source, judged before any work."""

from duotone.loadability.judge import LayerOutcome, Loadability, judge
from duotone.loadability.rules import GPUS, Gpu
from duotone.loadability.runtimes import RUNTIMES
from duotone.loadability.subject import Linear, Subject

__all__ = ["GPUS", "RUNTIMES", "Gpu", "LayerOutcome", "Linear", "Loadability", "Subject", "judge"]
