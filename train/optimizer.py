"""The optimizers and the learning-rate schedule of the training run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

WARMUP_STEPS = 30
# The stable phase takes this many tenths of all steps; the linear decay takes the rest.
STABLE_TENTHS = 7
# Coefficients of the quintic iteration that moves every singular value towards one.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(gradient: Tensor, iterations: int = 5) -> Tensor:
    """Return a matrix with the singular vectors of `gradient` and singular values near one."""
    a, b, c = QUINTIC
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices, in float32.

    torch.optim.Muon orthogonalises in bfloat16, which a processor without bfloat16 units has to emulate: a step of
    this model then takes half a minute instead of half a second.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Take the peak rate, the share of the old average kept at each step, and the decay per unit of rate."""
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix once from its gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                average = state.setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalised(matrix.grad.lerp(average, group["momentum"]))
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embedding, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    optimizers = [Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01), adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def decay_start(steps: int) -> int:
    """Return the first step of the decay in a run of `steps` steps."""
    return steps * STABLE_TENTHS // 10


def steps_for_decay_at(step: int) -> int:
    """Return the run length whose decay starts exactly at `step`; the inverse of `decay_start`."""
    return -(-step * 10 // STABLE_TENTHS)


def learning_rate_factor(step: int, steps: int | None) -> float:
    """Return the share of the peak rate at `step` (from 0); `steps` is None while the decay has not been planned."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if steps is None or step < decay_start(steps):
        return 1.0
    return (steps - step) / (steps - decay_start(steps))
