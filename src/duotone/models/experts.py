# Shapes: E experts, T tokens, A experts a token goes to, H hidden width, I width inside an expert.
"""Banks of experts, which transformers keeps in 3-D tensors, as the linears they are.

A linear can be observed, solved, written and multiplied by itself, and files name each expert's by itself too: that is what
vLLM reads. Which tokens go where is the router's business, which stays as it is.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Fewest tokens that say something of an expert: with fewer it is shown all of them.
FEW_TOKENS = 128


class Experts(nn.Module):
    """A bank of experts: children "0", "1", ... each with `gate_proj` (if gated), `up_proj` and `down_proj`.

    gated, interleaved, transposed: how the checkpoint may hold them in one tensor: with a gate, its rows between those of `up`
    instead of before them, as [E, in, out] instead of [E, out, in]. dealt: Llama 4's way, see `forward`. top_k: A, where known.

    shown_all: experts that are run on every token, so that a calibration that sends them few sees them at work; what the bank
    gives is the same. sent: of the batch under way, what `routing` was given in another model: each expert is run on the
    tokens that it gets there first, then on those of its own that are not among them.
    """

    def __init__(self, bank: nn.Module, top_k: int | None = None) -> None:
        super().__init__()
        self.top_k = top_k
        self._bank: tuple[Any] = (bank,)  # not a child: its activation function and its settings are used, its tensors are gone
        self.gated = bool(getattr(bank, "has_gate", True))
        self.interleaved = not getattr(bank, "is_concatenated", True)
        self.transposed = _is_transposed(bank)
        self.dealt = len(inspect.signature(bank.forward).parameters) == 1
        self.width = int(dict(bank.named_parameters(recurse=False))["down_proj"].shape[1 if self.transposed else 2])
        found = dict(bank.named_parameters(recurse=False))
        up = "gate_up_proj" if "gate_up_proj" in found else "up_proj"
        self.count = len(found[up])
        for index in range(self.count):
            expert: Any = nn.Module()
            for linear, name, rows in self._pieces(up):
                weight = found[name][index].data
                weight = (weight.mT if self.transposed else weight)[rows].contiguous()
                bias = found[f"{name}_bias"][index].data[rows].contiguous() if f"{name}_bias" in found else None
                expert.add_module(linear, linear_of(weight, bias))
            self.add_module(str(index), expert)
        self.shown_all: frozenset[int] = frozenset()
        self.sent: Callable[[], Tensor] | None = None
        self.grouped: Any = None
        self.routing = nn.Identity()
        for name, _ in list(bank.named_parameters(recurse=False)):
            delattr(bank, name)

    def _pieces(self, up: str) -> list[tuple[str, str, slice]]:
        """Linears of an expert: which of the bank's tensors each is of, and which of its rows."""
        if not self.gated:
            return [("up_proj", up, slice(None)), ("down_proj", "down_proj", slice(None))]
        halves = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(0, self.width), slice(self.width, None))
        return [("gate_proj", up, halves[0]), ("up_proj", up, halves[1]), ("down_proj", "down_proj", slice(None))]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, A] -> [T, H]; or [E * T, H], dealt out, -> as many."""
        if top_k_index is None or top_k_weights is None:
            return self._dealt(hidden_states)
        chosen_TA = self.routing(top_k_index)
        if self.grouped is not None and self.grouped.is_ready:
            return self.grouped(hidden_states, chosen_TA, top_k_weights, self.between)
        sent = None if self.sent is None else self.sent()
        out_TH = torch.zeros_like(hidden_states)
        for index in range(self.count):
            token, place = torch.where(chosen_TA == index)
            seen = self._seen(index, token, len(hidden_states), sent)
            if len(seen):
                answer = self._run(index, hidden_states[seen])
                answer = answer if seen is token else answer[_places(token, seen, len(hidden_states))]
                out_TH.index_add_(0, token, (answer * top_k_weights[token, place, None]).to(out_TH.dtype))
        return out_TH

    def _dealt(self, hidden_states: Tensor) -> Tensor:
        """Llama 4's way: every expert gets all tokens, those that are not its own scaled to zero, which it maps to zero."""
        states_ETH = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        used_ET = states_ETH.any(-1)
        self.routing(used_ET)
        if self.grouped is not None and self.grouped.is_ready:
            return self.grouped.dealt(states_ETH, used_ET, self.top_k, self.between).view_as(hidden_states)
        sent, everyone = None if self.sent is None else self.sent(), torch.arange(used_ET.shape[1], device=used_ET.device)
        # The tokens of others as these get them: an expert's own copies are zeros.
        others_TH = states_ETH[used_ET.int().argmax(0), everyone]
        out_ETH = torch.zeros_like(states_ETH)
        for index in range(self.count):
            own_T1 = used_ET[index, :, None]
            seen = self._seen(index, used_ET[index].nonzero()[:, 0], len(everyone), sent)
            if len(seen):
                answer = self._run(index, torch.where(own_T1, states_ETH[index], others_TH)[seen])
                out_ETH[index, seen] = torch.where(own_T1[seen], answer, 0)
        return out_ETH.view_as(hidden_states)

    def _seen(self, index: int, own: Tensor, count: int, sent: Tensor | None) -> Tensor:
        """The tokens to run an expert on, by their numbers: its own, unless more are to be seen."""
        if index in self.shown_all:
            return torch.arange(count, device=own.device)
        if sent is None:
            return own
        first = (sent[index] if sent.dtype == torch.bool else (sent == index).any(-1)).nonzero()[:, 0]
        return torch.cat((first, own[~torch.isin(own, first)]))

    def _run(self, index: int, x_TH: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(index))
        first = (expert.gate_proj(x_TH), expert.up_proj(x_TH)) if self.gated else (expert.up_proj(x_TH),)
        return expert.down_proj(self.between(*first))

    def between(self, *first: Tensor) -> Tensor:
        """What `down_proj` is given of what `gate_proj` (if gated) and `up_proj` give, [T, I] each."""
        (bank,) = self._bank
        if not self.gated:
            return bank.act_fn(*first)
        gate_TI, up_TI = first
        if not hasattr(bank, "_apply_gate"):
            return bank.act_fn(gate_TI) * up_TI
        both = torch.stack((gate_TI, up_TI), -1).flatten(-2) if self.interleaved else torch.cat((gate_TI, up_TI), -1)
        return bank._apply_gate(both)

    def tokens_of(self, routed: Tensor) -> Tensor:
        """How many tokens each expert gets [E], of what `routing` was given."""
        if routed.dtype == torch.bool:
            return routed.sum(1)
        chosen = routed.flatten()
        return torch.bincount(chosen[(chosen >= 0) & (chosen < self.count)], minlength=self.count)


def _places(some: Tensor, among: Tensor, count: int) -> Tensor:
    """Where some of `count` tokens stand among those that an expert was run on."""
    place_T = torch.empty(count, dtype=torch.long, device=among.device)
    place_T[among] = torch.arange(len(among), device=among.device)
    return place_T[some]


def _is_bank(module: nn.Module) -> bool:
    """Is this one of transformers' banks of experts, in the form that `Experts` takes?"""
    found = dict(module.named_parameters(recurse=False))
    up = found.get("gate_up_proj", found.get("up_proj"))
    return up is not None and up.ndim == 3 and "down_proj" in found and found["down_proj"].ndim == 3


def _is_transposed(bank: nn.Module) -> bool:
    """Does the bank hold [E, in, out] instead of [E, out, in]? Its own word where it has one, else its two shapes' word."""
    if hasattr(bank, "is_transposed"):
        return bool(bank.is_transposed)
    first, down = _parameters(bank)
    gated = bool(getattr(bank, "has_gate", True))
    return first.shape[1] == down.shape[2] and first.shape[2] == (2 if gated else 1) * down.shape[1]


def unfuse(model: nn.Module) -> None:
    """Put `Experts` in the place of every bank."""
    for path, bank in [(name, module) for name, module in model.named_modules() if _is_bank(module)]:
        parent, _, leaf = path.rpartition(".")
        mixture = model.get_submodule(parent)
        setattr(mixture, leaf, Experts(bank, getattr(mixture, "top_k", None)))


def find_experts(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Every bank of experts below a module, with its path there."""
    return ((name, found) for name, found in module.named_modules() if isinstance(found, Experts))


def _parameters(bank: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    found = dict(bank.named_parameters(recurse=False))
    return found["gate_up_proj"] if "gate_up_proj" in found else found["up_proj"], found["down_proj"]


def linear_of(weight_NK: Tensor, bias_N: Tensor | None) -> nn.Linear:
    """A linear with this weight, on whatever device it is."""
    linear = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias_N is not None, device="meta")
    linear.weight = nn.Parameter(weight_NK, requires_grad=False)
    if bias_N is not None:
        linear.bias = nn.Parameter(bias_N, requires_grad=False)
    return linear


def put(model: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module in another's place, under every name that the other goes by."""
    before = model.get_submodule(path)
    for parent in list(model.modules()):
        for leaf in [leaf for leaf, found in parent._modules.items() if found is before]:
            setattr(parent, leaf, child)
