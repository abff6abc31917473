"""What each linear becomes: 4 bits, FP8 or BF16, and why; from names, rules and the anatomy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from duotone.errors import DuotoneError
from duotone.models.anatomy import Anatomy
from duotone.models.skeleton import find_linears
from duotone.scheme import AnyScheme, choice_of, matches
from duotone.settings import QuantizeConfig


@dataclass(frozen=True)
class Choices:
    """schemes: of every linear to quantize. kept: those left in BF16, each with its reason.

    unseen: linears to put into FP8 that calibration does not pass, and that are rounded as they are.
    """

    schemes: dict[str, AnyScheme]
    kept: dict[str, str]
    unseen: frozenset[str]


def choose_schemes(model: nn.Module, anatomy: Anatomy, config: QuantizeConfig) -> Choices:
    """What the linears of a model become.

    Raises DuotoneError for a rule that matches nothing or cannot be followed, and under strict for a linear that must stay.
    """
    linears, tied = list(find_linears(model)), _tied(model)
    rules = _rules(config, linears)
    passed = {name for block in anatomy.all_blocks for group in block.shared_inputs for name in group}
    schemes: dict[str, AnyScheme] = {}
    kept: dict[str, str] = {}
    unseen: set[str] = set()
    for name in linears:
        rule, choice = next(((rule, choice) for rule, pattern, choice in rules if matches(name, pattern)), (None, "w4a8"))
        reason = anatomy.keep.get(name) or _outside(name, anatomy, passed)
        if rule is not None and choice == "bf16":
            kept[name] = f"ignored by the rule {rule}"
        elif name in tied:
            kept[name] = reason if rule is None and reason is not None else tied[name]
        elif reason is None:
            schemes[name] = config.scheme if choice == "w4a8" else config.fp8_scheme
        elif rule is None:
            kept[name] = reason
            if config.strict and name not in anatomy.keep:
                raise DuotoneError(f"{name}: must stay BF16 ({reason}), which --strict forbids; name it with --ignore")
        else:
            _check_unseen(rule, name, choice, reason, config)
            schemes[name] = config.fp8_scheme
            unseen.add(name)
    return Choices(schemes, kept, frozenset(unseen))


def _rules(config: QuantizeConfig, linears: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each rule in order: how it was written, which names it means and what they become."""
    rules = [("--ignore", rule, rule, "bf16") for rule in config.ignore]
    rules += [("--rule", rule, *choice_of(rule)) for rule in config.rules]
    for option, rule, pattern, _ in rules:
        if not any(matches(name, pattern) for name in linears):
            raise DuotoneError(f"{option} {rule}: matches no linear of this model; names look like {linears[0]!r}")
    return [rule[1:] for rule in rules]


def _outside(name: str, anatomy: Anatomy, passed: set[str]) -> str | None:
    """Why calibration does not come by a linear; None if it does."""
    if name in passed:
        return None
    inside = any(name.startswith(block.prefix) for block in anatomy.all_blocks)
    return "not in the architecture's table" if inside else "outside the blocks"


def _check_unseen(rule: str, name: str, choice: str, reason: str, config: QuantizeConfig) -> None:
    """Raise DuotoneError for what cannot be done without calibration."""
    if choice == "w4a8":
        raise DuotoneError(f"--rule {rule}: names {name}, which cannot have 4 bits ({reason}); expected w8a8 or bf16 for it")
    if not config.scheme.target.dynamic_activations:
        raise DuotoneError(
            f"--rule {rule}: names {name}, which calibration does not pass ({reason}); target {config.target} needs the size "
            "of its input, expected bf16 for it"
        )


def _tied(model: nn.Module) -> dict[str, str]:
    """Linears whose weight is another module's too, each with its reason: the other needs it as it is."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{leaf}")
    linears: Mapping[str, str] = {f"{name}.weight": name for name in find_linears(model)}
    return {
        linears[name]: f"its weight is also {next(other for other in names if other != name)}"
        for names in owners.values()
        for name in names
        if name in linears and len(names) > 1
    }
