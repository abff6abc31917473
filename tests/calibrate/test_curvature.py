# Shapes: T tokens of a window, N out_features (of all linears of a part), D hidden width, V vocabulary.
"""The curvature found block by block, against one backward pass through the whole model, and against its expectation."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from duotone.calibrate import curvature as curvature_module
from duotone.calibrate.curvature import Backward, measure_curvature
from duotone.calibrate.data import token_batches
from duotone.calibrate.stream import BlockStream, start_stream
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.models.skeleton import build_skeleton, fill, release
from duotone.phases import Phases
from duotone.plan import Plan, make_plan
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from duotone.solver import couple as couple_module
from duotone.solver.couple import row_parts

ModelMaker = Callable[..., Path]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def filled(folder: Path) -> tuple[Backward, Plan]:
    """A model as the pipeline has it: what lies outside the blocks is loaded, the blocks are on meta."""
    source = open_source(folder)
    plan = make_plan(source, QuantizeConfig())
    model = build_skeleton(source.config, torch.float32)
    fill(model, source.load(plan.outside), torch.float32, torch.device("cpu"))
    model.tie_weights()
    blocks = [model.get_submodule(block.path) for block in plan.blocks]

    def load_block(index: int) -> None:
        fill(model, source.load(plan.blocks[index].tensors), torch.float32, torch.device("cpu"))

    groups = [block.shared_inputs for block in plan.blocks]
    return Backward(model, blocks, groups, load_block, lambda index: release(blocks[index])), plan


def measured(
    backward: Backward, stream: BlockStream, tokens: Tensor, seed: int = 0
) -> tuple[dict[str, list[Tensor]], list[int]]:
    """What is kept of each group, in the order of keeping, and what is told."""
    found: dict[str, list[Tensor]] = {}
    told: list[int] = []
    measure_curvature(backward, stream, tokens, seed, found.__setitem__, told.append)
    return found, told


def in_one_pass(
    model: PreTrainedModel, groups: Sequence[tuple[str, ...]], batches: Sequence[Tensor], seed: int
) -> dict[str, list[Tensor]]:
    """Second moments of the gradients in the groups' outputs, float64: the whole model with autograd, batch by batch.

    Of log p(y), y drawn on the CPU from the model's own predictions; without logits, of random projections of its outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {name: [] for group in groups for name in group}

    def watch(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in seen]
    model.requires_grad_(True)
    for batch in batches:
        output = model(input_ids=batch, use_cache=False)
        if hasattr(output, "logits"):
            share = torch.softmax(output.logits.detach().flatten(0, -2), -1)
            drawn = torch.multinomial(share, 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), drawn, reduction="sum").backward()
        else:
            states = output.last_hidden_state
            states.backward(torch.randn(states.shape, generator=generator))
        for name, output in outputs.items():
            assert output.grad is not None
            seen[name].append(output.grad.flatten(0, 1).double())
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(parts) for name, parts in seen.items()}
    moments: dict[str, list[Tensor]] = {}
    for group in groups:
        parts = row_parts([joined[name].shape[1] for name in group])
        cut = [torch.cat([joined[name][:, rows] for name, rows in zip(group, part, strict=True)], 1) for part in parts]
        moments[group[0]] = [g.T @ g / len(g) for g in cut]
    return moments


def deviation(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> float:
    """The largest distance of a matrix from what it should be, as a share of its size."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, parts in found.items():
        for part, meant in zip(parts, expected[name], strict=True):
            assert part.dtype == torch.float32 and part.device.type == "cpu"
            assert torch.equal(part, part.T)
            assert meant.norm() > 0
            largest = max(largest, float((part.double() - meant).norm() / meant.norm()))
    return largest


def untouched(backward: Backward) -> None:
    """Blocks are on meta and have their own forward; no hook is left and nothing wants a gradient."""
    for block in backward.blocks:
        assert "forward" not in vars(block)
        assert all(parameter.is_meta for parameter in block.parameters())
    for name, module in backward.model.named_modules():
        assert not module._forward_hooks and not module._backward_hooks and not module._forward_pre_hooks, name
    for name, parameter in backward.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("rows", [2048, 50], ids=["whole", "parts"])
def test_equals_one_pass_through_the_model(
    tiny_model: ModelMaker, model_type: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches, one short, the same labels: joint second moments of each group's outputs, its parts if it is cut."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 48)
    monkeypatch.setattr(couple_module, "MAX_ROWS", rows)
    folder = tiny_model(model_type, initializer_range=0.15, **SIZES)
    backward, plan = filled(folder)
    tokens = torch.randint(0, 256, (7, 16), generator=torch.Generator().manual_seed(0))
    stream = start_stream(backward.model, backward.blocks, token_batches(tokens), Phases())
    entrance, kept = stream.hidden, [states.clone() for states in stream.hidden]
    found, told = measured(backward, stream, tokens, seed=3)
    assert [len(states) for states in kept] == [3, 3, 1]
    assert stream.hidden is entrance
    assert all(torch.equal(states, before) for states, before in zip(entrance, kept, strict=True))
    untouched(backward)
    groups = [group for block in plan.blocks for group in block.shared_inputs]
    assert [name.split(".")[2] for name in found] == ["1"] * 4 + ["0"] * 4
    assert told == [1, 2, 3, 4]
    assert all(
        len(parts) == (1 if rows == 2048 else -(-sum_rows(backward, name, groups) // 50)) for name, parts in found.items()
    )
    assert deviation(found, in_one_pass(load(folder, torch.float32, "cpu"), groups, tokens.split(3), 3)) <= 1e-4
    other, _ = measured(backward, stream, tokens, seed=4)
    assert all((a[0] - b[0]).norm() > 0.05 * a[0].norm() for a, b in zip(found.values(), other.values(), strict=True))


def sum_rows(backward: Backward, first: str, groups: Sequence[tuple[str, ...]]) -> int:
    group = next(group for group in groups if group[0] == first)
    return sum(len(backward.model.get_submodule(name).get_parameter("weight")) for name in group)


def small_encoder(model_class: type[PreTrainedModel], folder: Path) -> Path:
    """A random float32 BERT of two blocks whose norms and biases are random too."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["num_labels"] = 5
    config = BertConfig(vocab_size=260, max_position_embeddings=128, initializer_range=0.15, **sizes)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_encoders(tmp_path: Path, model_class: type[PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without logits random projections of the last hidden states stand for labels; a classifier has one label a window."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 48)
    backward, plan = filled(small_encoder(model_class, tmp_path / "model"))
    tokens = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))
    stream = start_stream(backward.model, backward.blocks, token_batches(tokens), Phases())
    found, _ = measured(backward, stream, tokens, seed=1)
    untouched(backward)
    groups = [group for block in plan.blocks for group in block.shared_inputs]
    assert deviation(found, in_one_pass(load(tmp_path / "model", torch.float32, "cpu"), groups, tokens.split(3), 1)) <= 1e-4


def resident(model: PreTrainedModel, groups: Sequence[tuple[str, ...]]) -> Backward:
    """A model of one block that is there all the time."""
    return Backward(model, list(model.model.layers), [groups], lambda _: None, lambda _: None)


def one_block(vocabulary: int) -> LlamaForCausalLM:
    """A llama so small that every label of every token can be tried."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, num_key_value_heads=1, initializer_range=0.5, max_position_embeddings=8, **sizes
    )
    model = LlamaForCausalLM(config).eval()
    model.requires_grad_(False)
    return model


def test_many_draws_approach_the_fisher_information() -> None:
    """4000 draws of the labels of a window of 3 tokens over 6 words, against the sum over all of them: within 5 percent.

    The sum is over tokens and labels, each weighed by its probability; scores of different tokens are unrelated. Labels that
    are the likeliest, or those of the text, would be far off.
    """
    groups = [
        tuple(f"model.layers.0.{path}" for path in paths)
        for paths in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",))
    ]
    model, window = one_block(6), torch.tensor([[1, 4, 2]])
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in (name for group in groups for name in group):

        def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            outputs[name] = output.requires_grad_() if output.is_leaf else output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    logp_TV = torch.log_softmax(model(window, use_cache=False).logits[0], -1)
    for handle in handles:
        handle.remove()
    expected = {group[0]: torch.zeros(1) for group in groups}
    for logp in logp_TV.flatten():
        for group in groups:
            given = torch.autograd.grad(logp, [outputs[name] for name in group], retain_graph=True, allow_unused=True)
            filled_in = [
                torch.zeros_like(outputs[name]) if one is None else one for one, name in zip(given, group, strict=True)
            ]
            g_TN = torch.cat(filled_in, -1)[0]
            expected[group[0]] = expected[group[0]] + float(logp.detach().exp()) * (g_TN.T @ g_TN) / 3
    tokens = window.expand(4000, 3)
    stream = start_stream(model, list(model.model.layers), token_batches(tokens), Phases())
    found, _ = measured(resident(model, groups), stream, tokens)
    for name, meant in expected.items():
        assert (found[name][0] - meant).norm() < 0.05 * meant.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_callers_need_not_think_of_gradients(grad: bool) -> None:
    """Recorded or not around it: the same curvature, and no graph is kept on the way."""
    groups = [("model.layers.0.mlp.down_proj",)]
    model, tokens = one_block(6), torch.arange(6).view(2, 3)
    stream = start_stream(model, list(model.model.layers), token_batches(tokens), Phases())
    around: AbstractContextManager[object] = nullcontext() if grad else torch.no_grad()
    expected, _ = measured(resident(model, groups), stream, tokens)
    with around:
        found, _ = measured(resident(model, groups), stream, tokens)
    assert torch.equal(found[groups[0][0]][0], expected[groups[0][0]][0])
    assert not found[groups[0][0]][0].requires_grad
    assert not any(states.requires_grad for states in stream.hidden)


def test_a_linear_that_the_loss_does_not_feel_is_named(tiny_model: ModelMaker) -> None:
    """Its curvature cannot be measured; and the model is left as it was found."""
    backward, plan = filled(tiny_model(**SIZES))
    backward.blocks[1].spare = nn.Linear(4, 4, device="meta").requires_grad_(False)
    groups = [block.shared_inputs for block in plan.blocks]
    groups[1] = (*groups[1], ("model.layers.1.spare",))
    tokens = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    stream = start_stream(backward.model, backward.blocks, token_batches(tokens), Phases())
    broken = Backward(backward.model, backward.blocks, groups, backward.load, backward.release)
    with pytest.raises(DuotoneError, match=r"^model\.layers\.1\.spare: the loss has no gradient in its output"):
        measured(broken, stream, tokens)
    untouched(backward)


def test_a_failing_model_gets_its_blocks_back(tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails behind the blocks leaves their own forward in its place, and no weights in the last one."""
    backward, _ = filled(tiny_model(**SIZES))
    tokens = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    stream = start_stream(backward.model, backward.blocks, token_batches(tokens), Phases())

    def fail(*_: object, **__: object) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "multinomial", fail)
        measured(backward, stream, tokens)
    untouched(backward)


def test_no_infinite_curvature(tmp_path: Path) -> None:
    """Gradients too large for float32's squares are refused by the name of the linear whose output they are of."""
    backward, _ = filled(small_encoder(BertModel, tmp_path / "model"))
    tokens = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    stream = start_stream(backward.model, backward.blocks, token_batches(tokens), Phases())

    def load_huge(index: int) -> None:
        backward.load(index)
        backward.blocks[index].get_parameter("output.LayerNorm.weight").mul_(1e30)

    huge = Backward(backward.model, backward.blocks, backward.groups, load_huge, backward.release)
    with pytest.raises(DuotoneError, match=r"^encoder\.layer\.1\.\S+: .*finite"):
        measured(huge, stream, tokens)
    untouched(backward)


def test_a_large_vocabulary_is_taken_in_steps(tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three windows, the head two windows at a time: the labels are those of such steps, all else is the same."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 48)
    monkeypatch.setattr(curvature_module, "_HEAD_VALUES", 2 * 16 * 260 + 5)
    folder = tiny_model(initializer_range=0.15, **SIZES)
    backward, plan = filled(folder)
    tokens = torch.randint(0, 256, (7, 16), generator=torch.Generator().manual_seed(0))
    found, _ = measured(
        backward, start_stream(backward.model, backward.blocks, token_batches(tokens), Phases()), tokens, seed=3
    )
    groups = [group for block in plan.blocks for group in block.shared_inputs]
    assert deviation(found, in_one_pass(load(folder, torch.float32, "cpu"), groups, tokens.split([2, 1, 2, 1, 1]), 3)) <= 1e-4
