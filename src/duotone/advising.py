# Shapes: W windows, K in_features.
"""`duotone advise`: does a text suit a model, measured on the original before it is quantized.

The text that a model is calibrated on can matter more than the method. What its tokens tell alone is in `advice`; here the
model reads some of it.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.advice import (
    DIVERGENT,
    OVERLAPPING,
    RUN,
    Advice,
    advice_before,
    chance_divergence,
    divergence,
    idle_advice,
    overlap,
    repeated_share,
    widest,
)
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.calibrate.sources import calibration_sources, titles
from duotone.card import base_name
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.source import open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.evaluation import check_windows, score_windows, standard_error
from duotone.models.experts import FEW_TOKENS, find_experts
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import load_tokenizer
from duotone.plan import Plan, make_plan
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig

Progress = Callable[[int, int, str], None]
#: A window is known by heart where the model needs less than this share of the bits, next to zlib's, that the middle window of
#: its text needs; worth a word where so many of the windows are.
_BY_HEART, _BY_HEART_SHARE = 0.5, 0.02
#: Perplexities whose ratio is beyond this are of texts of another kind, or one of them is known by heart.
_FAR = 3.0


@dataclass(frozen=True)
class TextFacts:
    """What a model makes of one text. perplexity, with the standard error of its logarithm, over the windows that it read.

    zlib_ratio: bits that the model needs over bits that zlib needs, of the middle window. by_heart: share of windows far below
    that. repeated: as `advice.repeated_share`. distinct: how many of the vocabulary's tokens occur.
    """

    text: str
    windows: int
    tokens: int
    read: int
    distinct: int
    repeated: float
    perplexity: float
    log_stderr: float | None
    zlib_ratio: float
    by_heart: float
    rendering: str


@dataclass(frozen=True)
class Suitability:
    """A calibration text, source by source, beside a text of what the model is to do, where there is one.

    tokens_an_input: calibration tokens for each input of the widest linear. perplexity_ratio, divergence, overlap: calibration
    against the other text, see `advice`; chance: the divergence that texts of one kind would have, as short as these. starved:
    experts with too few tokens, of all experts. idle: inputs that were always zero, by linear. advice: what is worth a word.
    """

    model: str
    calibration: list[TextFacts]
    text: list[TextFacts]
    widest: str
    inputs: int
    tokens_an_input: float
    experts: int
    starved: int
    idle: dict[str, int]
    perplexity_ratio: float | None = None
    divergence: float | None = None
    chance: float | None = None
    overlap: float | None = None
    advice: list[Advice] = field(default_factory=list)


def advise(
    model: str | Path,
    config: QuantizeConfig,
    text: Sequence[str] = (),
    read: int = 32,
    progress: Progress = lambda *_: None,
) -> Suitability:
    """Measure whether the calibration text of `config` suits a model; text: what it will meet, to compare with.

    read: windows of each source that the model reads at most; the others are only counted. Raises DuotoneError as `evaluate`
    does, and for a model that does not predict tokens.
    """
    if read < 2:
        raise DuotoneError(f"--read: found {read}, expected at least 2 windows")
    folder = locate_model(model)
    plan, tokenizer = make_plan(open_source(folder), config), load_tokenizer(folder)
    sources = calibration_sources(config.calibration, folder)
    windows = draw_windows(tokenizer, sources, plan.seq_len, config.samples, config.seed)
    other = draw_windows(tokenizer, text, plan.seq_len, None, config.seed) if text else None
    network, device = load(folder, torch.float32, config.device), resolve_device(config.device)
    check_causal(network, "advising")
    check_windows(windows, plan.seq_len, network, folder)
    reads = _Reading(network, tokenizer, device, read, progress)
    with _watched(network, plan) as watch:
        found = reads.facts(windows)
    beside = reads.facts(other) if other is not None else []
    layer, inputs = widest(plan)
    few = FEW_TOKENS * sum(one.read for one in found) / len(windows)  # of the tokens that were read
    facts = Suitability(
        model=base_name(str(model))[0],
        calibration=found,
        text=beside,
        widest=layer,
        inputs=inputs,
        tokens_an_input=windows.positions / inputs,
        experts=sum(len(counts) for counts in watch.routed.values()),
        starved=sum(int((counts < few).sum()) for counts in watch.routed.values()),
        idle={layer: int((~used_K).sum()) for layer, used_K in watch.used.items() if not bool(used_K.all())},
    )
    if other is not None:
        texts = windows.tokens, other.tokens, int(network.config.get_text_config().vocab_size)
        facts = replace(
            facts,
            perplexity_ratio=_perplexity(found) / _perplexity(beside),
            divergence=divergence(*texts),
            chance=chance_divergence(*texts, config.seed),
            overlap=overlap(windows.tokens, other.tokens),
        )
    return replace(facts, advice=[*advice_before(plan, windows), *idle_advice(plan, facts.idle), *_advice(facts)])


@dataclass(frozen=True, eq=False)
class _Reading:
    """How texts are read. most: windows of each source, evenly out of all."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    most: int
    progress: Progress

    def facts(self, windows: TokenWindows) -> list[TextFacts]:
        """Each source's."""
        found: list[TextFacts] = []
        parts = windows.tokens.split(list(windows.counts))
        for title, tokens, kinds in zip(titles(windows.sources), parts, windows.rendering, strict=True):
            chosen = torch.linspace(0, len(tokens) - 1, min(self.most, len(tokens))).long()
            read = replace(windows, tokens=tokens[chosen])
            nll_W = score_windows(self.model, read, None, self.device, partial(self._told, title)).nll
            ratio_W = nll_W * (tokens.shape[1] - 1) / math.log(2) / self._zlib_bits(read.tokens)
            found.append(
                TextFacts(
                    text=title,
                    windows=len(tokens),
                    tokens=tokens.numel(),
                    read=len(chosen),
                    distinct=len(tokens.unique()),
                    repeated=repeated_share(tokens),
                    perplexity=math.exp(float(nll_W.mean())),
                    log_stderr=standard_error(nll_W),
                    zlib_ratio=float(ratio_W.median()),
                    by_heart=float((ratio_W < _BY_HEART * ratio_W.median()).double().mean()),
                    rendering=" and ".join(kinds),
                )
            )
        return found

    def _told(self, title: str, done: int, total: int) -> None:
        self.progress(done, total, title)

    def _zlib_bits(self, tokens_WT: Tensor) -> Tensor:
        """Of each window's text, float64 [W]; of what is predicted, all but the first token."""
        texts = (str(self.tokenizer.decode(window_T)) for window_T in tokens_WT[:, 1:])
        return torch.tensor([8.0 * len(zlib.compress(text.encode(), 9)) for text in texts], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Watch:
    """What went by: tokens of each expert by bank, and by linear which of its inputs [K] were ever another than zero."""

    routed: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _watched(model: PreTrainedModel, plan: Plan) -> Iterator[_Watch]:
    """Watch the linears that will be quantized, and the banks of experts, while texts are read."""
    watch, banks = _Watch(), dict(find_experts(model))
    watch.routed.update({path: torch.zeros(bank.count, dtype=torch.int64) for path, bank in banks.items()})

    def see(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            used_K = (inputs[0] != 0).flatten(0, -2).any(0).cpu()
            watch.used[layer] = watch.used[layer] | used_K if layer in watch.used else used_K

        return hook

    def count(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            watch.routed[path] += banks[path].tokens_of(inputs[0]).cpu()

        return hook

    with ExitStack() as stack:
        for layer in (group[0] for block in plan.blocks for group in block.shared_inputs if group[0] not in block.experts):
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(see(layer)).remove)
        for path, bank in banks.items():
            stack.callback(bank.routing.register_forward_pre_hook(count(path)).remove)
        yield watch


def _perplexity(found: Sequence[TextFacts]) -> float:
    """Of several texts, each by its windows."""
    windows = sum(one.windows for one in found)
    return math.exp(sum(math.log(one.perplexity) * one.windows for one in found) / windows)


def _advice(facts: Suitability) -> list[Advice]:
    """What is worth a word, of what the model read."""
    advice = [_by_heart(one) for one in facts.calibration if one.by_heart >= _BY_HEART_SHARE]
    if facts.starved:
        sentence = (
            f"{facts.starved} of {facts.experts} experts would get fewer than {FEW_TOKENS} calibration tokens, and are shown "
            "all then; more --samples, or text of more kinds, lets the router choose"
        )
        advice.append(Advice("starved experts", facts.starved, sentence))
    if facts.overlap is not None and facts.overlap >= OVERLAPPING:
        sentence = (
            f"{100 * facts.overlap:.0f} % of the other text's runs of {RUN} tokens stand in the calibration text: figures "
            "on it flatter; evaluate on text that was left out"
        )
        advice.append(Advice("overlaps", facts.overlap, sentence))
    if facts.divergence is not None and facts.divergence - (facts.chance or 0) >= DIVERGENT:
        sentence = (
            f"the calibration text's tokens are far from the other text's (divergence {facts.divergence:.2f}, by chance "
            f"{facts.chance:.2f}); text of the kind that the model will meet, if only a share of it, may do more than a method"
        )
        advice.append(Advice("another kind of text", facts.divergence, sentence))
    ratio = facts.perplexity_ratio
    if ratio is not None and not 1 / _FAR < ratio < _FAR:
        more = f"{ratio:.1f} times as perplexing as" if ratio > 1 else f"{1 / ratio:.1f} times less perplexing than"
        why = "the model knows such text badly" if ratio > 1 else "it may have been trained on, and known by heart"
        advice.append(Advice("far perplexity", ratio, f"the calibration text is {more} the other text: {why}"))
    return advice


def _by_heart(one: TextFacts) -> Advice:
    sentence = (
        f"{one.text}: the model knows about {100 * one.by_heart:.0f} % of its windows by heart (it needs less than half the "
        "bits that such text needs); inputs look cleaner there than on new text, so take text that it was not trained on"
    )
    return Advice("known by heart", one.by_heart, sentence)
