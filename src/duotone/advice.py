# Shapes: W windows, T tokens of a window, K in_features.
"""Whether a text suits a model, as far as its tokens alone tell: how many, how varied, how alike to another text's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.calibrate.data import TokenWindows
from duotone.calibrate.samples import Samples
from duotone.calibrate.sources import PLAIN, TURNS
from duotone.plan import Plan

#: Tokens for each input of the widest linear below which more of them still help (docs/calibration.md has the curve).
TOKENS_AN_INPUT = 16
#: Tokens in a row that two texts do not share by chance; and the shares of such runs that are worth a word.
RUN = 16
REPEATED, OVERLAPPING = 0.2, 0.01
#: Divergence of two texts' tokens, in bits from 0 to 1 and above chance, from which on they are of another kind.
DIVERGENT = 0.2
#: Share of a linear's inputs that may be idle without a word.
IDLE = 0.01


@dataclass(frozen=True)
class Advice:
    """One thing to know about a text. about: a word for it; number: what was measured; sentence: that, and what to do."""

    about: str
    number: float
    sentence: str


def advice_before(plan: Plan, samples: Samples | None) -> list[Advice]:
    """What can be told of a calibration text before any forward pass."""
    if not isinstance(samples, TokenWindows):
        return []
    return [*_few(plan, samples), *_repeating(samples), *_rendered(samples)]


def idle_advice(plan: Plan, idle: Mapping[str, int]) -> list[Advice]:
    """What the text did not reach. idle: of linears, by name, how many of their inputs were zero on all of it."""
    found = {layer: count / plan.shapes[layer][1] for layer, count in idle.items() if count > IDLE * plan.shapes[layer][1]}
    if not found:
        return []
    worst = max(found, key=lambda layer: found[layer])
    return [
        Advice(
            "idle inputs",
            found[worst],
            f"linears with inputs that were zero on all of the calibration text: {len(found)}, most so {worst} with "
            f"{100 * found[worst]:.0f} % of its inputs; what the weights behind them do is not calibrated: more, or other text",
        )
    ]


def widest(plan: Plan) -> tuple[str, int]:
    """The linear with the most inputs, and how many: that many tokens a Hessian needs to have full rank."""
    layer = max(plan.shapes, key=lambda layer: plan.shapes[layer][1])
    return layer, plan.shapes[layer][1]


def repeated_share(tokens_WT: Tensor) -> float:
    """Of all runs of `RUN` tokens in the windows, the share that stands there more than once, each counted but once."""
    runs = _runs(tokens_WT)
    return 1 - len(runs.unique()) / len(runs) if len(runs) else 0.0


def overlap(tokens_WT: Tensor, text_WT: Tensor) -> float:
    """Of a text's runs of `RUN` tokens, the share that the calibration windows hold too."""
    runs = _runs(text_WT)
    return float(torch.isin(runs, _runs(tokens_WT)).double().mean()) if len(runs) else 0.0


def divergence(tokens_WT: Tensor, text_WT: Tensor, vocabulary: int) -> float:
    """Jensen and Shannon's divergence of how often each token occurs, in bits: 0 for the same text, 1 for no common token."""
    p_V, q_V = (torch.bincount(one.flatten(), minlength=vocabulary).double() for one in (tokens_WT, text_WT))
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    middle_V = (p_V + q_V) / 2
    return sum(float(torch.special.xlogy(one, one / middle_V.clamp(min=1e-300)).sum()) for one in (p_V, q_V)) / math.log(4)


def chance_divergence(tokens_WT: Tensor, text_WT: Tensor, vocabulary: int, seed: int) -> float:
    """The divergence of two texts of these sizes that are of one kind: all windows shuffled and dealt out again."""
    whole_WT = torch.cat((tokens_WT, text_WT))
    shuffled_WT = whole_WT[torch.randperm(len(whole_WT), generator=torch.Generator().manual_seed(seed))]
    return divergence(shuffled_WT[: len(tokens_WT)], shuffled_WT[len(tokens_WT) :], vocabulary)


def _few(plan: Plan, windows: TokenWindows) -> list[Advice]:
    layer, inputs = widest(plan)
    each = windows.positions / inputs
    if not plan.config.needs_statistics or each >= TOKENS_AN_INPUT:
        return []
    enough = math.ceil(TOKENS_AN_INPUT * inputs / windows.tokens.shape[1])
    return [
        Advice(
            "few tokens",
            each,
            f"{windows.positions} calibration tokens are {each:.1f} for each of the {inputs} inputs of {layer}; up to "
            f"{TOKENS_AN_INPUT} for each, more help much: --samples {enough}",
        )
    ]


def _repeating(windows: TokenWindows) -> list[Advice]:
    share = repeated_share(windows.tokens)
    if share < REPEATED:
        return []
    return [
        Advice(
            "repeats itself",
            share,
            f"{100 * share:.0f} % of the calibration text's runs of {RUN} tokens are repetitions, which teach nothing new; "
            "take more varied text",
        )
    ]


def _rendered(windows: TokenWindows) -> list[Advice]:
    plain = [count for count, kinds in zip(windows.counts, windows.rendering, strict=True) if kinds == (PLAIN,)]
    turns = sum(TURNS in kinds for kinds in windows.rendering)
    if turns:
        sentence = "the calibration text has conversations, the model no chat template: their turns were joined by line"
        return [Advice("no chat template", turns, sentence)]
    if windows.chats and windows.counts and sum(plain) == len(windows):
        sentence = "the model has a chat template, the calibration text no conversation; mix some in as the model will see them"
        return [Advice("no conversations", sum(plain) / len(windows), sentence)]
    return []


def _runs(tokens_WT: Tensor) -> Tensor:
    """A hash of each run of `RUN` tokens inside a window, int64; equal runs have equal ones."""
    if tokens_WT.shape[1] < RUN:
        return torch.empty(0, dtype=torch.int64)
    hashes = torch.zeros(len(tokens_WT), tokens_WT.shape[1] - RUN + 1, dtype=torch.int64)
    for i in range(RUN):  # wraps around, as a hash may
        hashes = hashes * 6364136223846793005 + tokens_WT[:, i : tokens_WT.shape[1] - RUN + 1 + i] + 1442695040888963407
    return hashes.flatten()
