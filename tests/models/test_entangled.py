"""What ties a model's parts together beside the hidden states: tensors and modules of two names, notes, biases, processes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from duotone.calibrate.observer import Observer
from duotone.calibrate.stream import start_stream
from duotone.calibrate.walk import BlockWalk, Call
from duotone.models.anatomy import _from_trace
from duotone.models.experts import find_experts
from duotone.models.norms import fold_norms
from duotone.models.rewrite import all_linears
from duotone.models.trace import Trace
from duotone.modules import quantize_module
from duotone.phases import Phases
from duotone.ranks import Ranks
from tests.models.test_architectures import EXPERTS, skeleton


class Noted(Ranks):
    """Two processes, of which the other has seen nothing; notes what they exchange."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.shapes: list[list[int]] = []

    def _reduce(self, tensors: Any, operation: Any) -> None:
        del operation
        self.shapes += [list(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("beside", [False, True])
def test_a_process_without_tokens_for_an_expert_exchanges_all_the_same(beside: bool) -> None:
    """The same calls with the same shapes as a process that has some, or all would wait for one another for ever."""
    told = []
    for some in (True, False):
        experts = nn.Linear(4, 4), nn.Linear(4, 4)
        blocks = [nn.Sequential(expert) if some else nn.Identity() for expert in experts]
        call = Call(torch.ones(3, 4), (), {})
        left, right = (BlockWalk(block, [call], {"e": expert}, {}) for block, expert in zip(blocks, experts, strict=True))
        with left, right:
            observer = Observer(left, right if beside else None, Phases(), ranks := Noted())
            if some:
                assert cast("Any", observer.observe("e", expert=True)).tokens == 3
            else:
                try:
                    observer.observe("e", expert=True)
                except Exception as error:
                    assert "e" in str(error)
            assert observer.absmax["e"].shape == (4,)
        told.append(ranks.shapes)
    assert told[0] == told[1] != []


def test_an_expert_that_no_token_goes_to_is_shown_something(tiny_model: Callable[..., Path]) -> None:
    """Llama 4 deals every expert zeros in the place of other experts' tokens: these say nothing of what it will read."""
    model = skeleton(tiny_model, "llama4_text", **EXPERTS["llama4_text"])
    bank = next(experts for _, experts in find_experts(model))
    for linear in [module for module in bank.modules() if isinstance(module, nn.Linear)]:
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape), requires_grad=False)
    dealt = torch.zeros(bank.count, 6, 128)
    dealt[0] = torch.randn(6, 128)
    own, read = bank(dealt.flatten(0, 1)), []
    bank.get_submodule("1.up_proj").register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    bank.shown_all = frozenset(range(bank.count))
    assert torch.allclose(bank(dealt.flatten(0, 1)), own, atol=1e-3)
    assert torch.equal(read[0], dealt[0])


def test_blocks_that_hand_on_more_than_hidden_states_run_as_one() -> None:
    """T5's first block makes the position bias of all: alone, those behind it would have none."""
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4)
    assert _from_trace(transformers.T5EncoderModel(config).eval()).whole
    separate = transformers.UMT5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4)
    assert len(_from_trace(transformers.UMT5EncoderModel(separate).eval()).blocks) == 3


def test_stages_that_tell_the_next_one_a_size_are_no_chain() -> None:
    """Swin v2's stages give the picture's size beside the hidden states, which a walk from one to the next would not have."""
    sizes = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4, "image_size": 32}
    assert _from_trace(transformers.Swinv2Model(transformers.Swinv2Config(**sizes)).eval()).whole


def test_prefixes_do_not_read_each_others_notes() -> None:
    """Gemma 4's last blocks read keys and values that blocks before them noted: each prefix its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    config = transformers.Gemma4TextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, num_key_value_heads=2, global_head_dim=16,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM._from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.15)
    anatomy, ids = _from_trace(model), torch.randint(0, 64, (2, 16))
    blocks = [model.get_submodule(block.path) for block in anatomy.blocks]

    def last() -> Tensor:
        found: list[Tensor] = []
        with blocks[-1].register_forward_hook(lambda _, __, output: found.append(output)), torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return found[0]

    before = last()
    stream = start_stream(model, blocks, [{"input_ids": ids}], Phases(), gives=anatomy.gives)
    stream.carry_original()
    for index, block in enumerate(anatomy.blocks):
        module = blocks[index]
        original, untouched = copy.deepcopy(module), copy.deepcopy(module)
        for parameter in module.parameters():
            parameter.data *= 0.7
        stops = {group[0]: group[0].removeprefix(block.prefix) for group in block.shared_inputs}
        with (
            stream.enter(index, module, stops, {}, original) as observer,
            stream.enter(index, untouched, stops, {}, aside=True) as ahead,
        ):
            for group in block.shared_inputs:
                observer.observe(group[0], statistics=False)
                ahead.observe(group[0], statistics=False)
            with torch.no_grad():
                stream.leave(observer)
    assert stream.original is not None
    assert torch.equal(stream.original[0], before)
    assert torch.equal(stream.hidden[0], last())


class Tied(nn.Module):
    """Two linears of one weight, and a module of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(64, 64) for _ in range(4))
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.b(self.a(x).relu()).relu()).relu())


def test_tied_linears_are_left_alone_and_modules_of_two_names_replaced_under_both() -> None:
    for method in ("rtn", "dpq"):
        found = quantize_module(Tied(), [torch.randn(256, 64)], method=method, device="cpu")
        assert list(found.weights) == ["c"]
        assert found.report.kept["a"] == "its weight is also b.weight"
        module: Any = found.module
        assert module.again is module.c


def test_a_norm_is_folded_into_a_convolution_of_two_names() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
    norm.running_mean, norm.running_var = torch.randn(16), torch.rand(16) + 0.5
    model = nn.ModuleDict({"conv": conv, "run": nn.Sequential(conv, norm)}).eval()
    model.forward = lambda x: cast("nn.Module", model["run"])(x)
    x = torch.randn(1, 16, 8, 8)
    before = model(x)
    fold_norms(model, (x,), {})
    all_linears(model)
    assert torch.allclose(model(x), before, atol=1e-4)


def test_only_the_same_rows_have_one_key() -> None:
    found, x = Trace(), torch.zeros(8, 8)
    assert found.key(x) == found.key(x.view(2, 4, 8))
    assert len({found.key(x), found.key(x.mT), found.key(x[::2]), found.key(x[:4])}) == 4
