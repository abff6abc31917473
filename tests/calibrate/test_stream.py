# Shapes: M tokens, N out_features, K in_features, D hidden width.
"""Running block by block equals running the model; what is observed on the way, against its definition."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from duotone.calibrate import stream as stream_module
from duotone.calibrate.data import token_batches
from duotone.calibrate.stream import BlockStream, start_stream
from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter
from duotone.phases import Phases
from duotone.runtime.load import load
from duotone.solver.statistics import Statistics

ModelMaker = Callable[..., Path]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("windows", [1, 70], ids=["one batch", "a full batch and a short one"])
def test_hidden_states_and_second_moments(tiny_model: ModelMaker, model_type: str, windows: int) -> None:
    """Hidden states after each block, and X^T X of each watched input, equal those hooked out of one whole forward."""
    model = load(tiny_model(model_type), torch.float32, "cpu")
    tokens = torch.randint(0, 256, (windows, 64), generator=torch.Generator().manual_seed(0))
    blocks = list(model.model.layers)
    names = {"q": "self_attn.q_proj", "down": "mlp.down_proj"}
    seen: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, x, key=f"{i}.{name}": seen.update({key: x[0].flatten(0, 1)})
        )
        for i, block in enumerate(blocks)
        for name, path in names.items()
    ]
    with torch.no_grad():
        whole = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    phases = Phases()
    stream = start_stream(model, blocks, token_batches(tokens), phases)
    torch.testing.assert_close(torch.cat(stream.hidden), whole[0])
    for i, block in enumerate(blocks):
        with stream.enter(i, block, names, {}) as observer:
            for name in names:
                statistics = observer.observe(name)
                x = seen[f"{i}.{name}"].double()
                assert statistics is not None and statistics.tokens == windows * 64
                torch.testing.assert_close(statistics.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
                assert statistics.input_drift is None and statistics.stream_target is None
            before = stream.hidden
            stream.leave(observer)
        assert before is not stream.hidden
        for name in names:
            assert observer.absmax[name].amax() == pytest.approx(seen[f"{i}.{name}"].abs().max().item(), rel=1e-5)
        if i + 1 < len(blocks):
            torch.testing.assert_close(torch.cat(stream.hidden), whole[i + 1], rtol=1e-4, atol=1e-5)
    assert set(phases.seconds) == {"forward", "hessian"}


def test_largest_inputs_alone(tiny_model: ModelMaker) -> None:
    """For static activation scales of a method that needs no Hessian: no second moments are taken."""
    model = load(tiny_model(), torch.float32, "cpu")
    phases = Phases()
    stream = start_stream(model, list(model.model.layers), token_batches(torch.arange(32).view(2, 16)), phases)
    with stream.enter(0, model.model.layers[0], {"down": "mlp.down_proj"}, {}) as observer:
        assert observer.observe("down", statistics=False) is None
        assert observer.absmax["down"].amax() > 0
    assert set(phases.seconds) == {"forward"}


def test_a_linear_that_never_runs_is_named(tiny_model: ModelMaker) -> None:
    """No silent empty Hessian; and the walk that ended so leaves the hidden states before the block."""
    model = load(tiny_model(), torch.float32, "cpu")
    block = model.model.layers[0]
    block.spare = nn.Linear(4, 4)
    stream = start_stream(model, list(model.model.layers), token_batches(torch.zeros(1, 8, dtype=torch.int64)), Phases())
    before = stream.hidden
    with (
        pytest.raises(DuotoneError, match=r"^model\.layers\.0\.spare: the forward pass never reached it"),
        stream.enter(0, block, {"model.layers.0.spare": "spare"}, {}) as observer,
    ):
        observer.observe("model.layers.0.spare")
    assert stream.hidden is before


def test_blocks_keep_their_forward(tiny_model: ModelMaker) -> None:
    """Recording leaves no trace: the model computes what it did before."""
    model = load(tiny_model(), torch.float32, "cpu")
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        before = model(tokens).logits
        start_stream(model, list(model.model.layers), token_batches(tokens), Phases())
        assert torch.equal(model(tokens).logits, before)


# ---- two prefixes, one of them quantized on the way


def a_model(tiny_model: ModelMaker, model_type: str) -> nn.Module:
    """A random float32 model of two blocks whose linears matter: what they add is as large as the residual stream."""
    if model_type != "bert":
        return load(tiny_model(model_type, initializer_range=0.15), torch.float32, "cpu")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=260, max_position_embeddings=128, initializer_range=0.15, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def hooked(model: nn.Module, paths: list[str], tokens: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Inputs [M, K] in float64 of the modules at `paths` in one whole forward pass, and all hidden states."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        return lambda _, x: seen.update({path: x[0].flatten(0, 1).double()})

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    last: list[Tensor] = []  # transformers' own last hidden state has gone through the final norm

    def note_last(*call: Any) -> None:
        last.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])

    final = next(module for name, module in model.named_modules() if name in ("model.layers.1", "encoder.layer.1"))
    handles.append(final.register_forward_hook(note_last))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return seen, (*hidden[:2], last[0])


def walked(
    stream: BlockStream, model: nn.Module, model_type: str, replaced: nn.Module
) -> tuple[dict[str, Statistics], dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Walk all of the model, each group taking its weights from `replaced` as soon as it has been observed.

    Returns statistics and largest inputs by the groups' first linears, and both prefixes' hidden states behind each block.
    """
    adapter = find_adapter({"model_type": model_type})
    found: dict[str, Statistics] = {}
    absmax: dict[str, Tensor] = {}
    hidden = []
    for i in range(2):
        path = f"{adapter.blocks}.{i}"
        block = model.get_submodule(path)
        stops = {f"{path}.{group[0]}": group[0] for group in adapter.shared_inputs}
        marks = {f"{path}.{writer}": reader for writer, reader in adapter.streams}
        with stream.enter(i, block, stops, marks, copy.deepcopy(block)) as observer:
            for group in adapter.shared_inputs:
                statistics = observer.observe(f"{path}.{group[0]}")
                assert statistics is not None
                found[f"{path}.{group[0]}"] = statistics
                for name in group:
                    block.get_submodule(name).weight.data = replaced.get_submodule(f"{path}.{name}").weight.data
            stream.leave(observer)
        absmax |= observer.absmax
        assert stream.original is not None
        hidden.append((torch.cat(stream.hidden), torch.cat(stream.original)))
    return found, absmax, hidden


def replaced_copy(model: nn.Module, model_type: str, groups: int | None = None) -> nn.Module:
    """The model with other weights in the first `groups` groups of linears (all when None), always the same ones."""
    adapter, changed = find_adapter({"model_type": model_type}), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    paths = [[f"{adapter.blocks}.{i}.{name}" for name in group] for i in range(2) for group in adapter.shared_inputs]
    for group in paths[:groups]:
        for path in group:
            weight = changed.get_submodule(path).weight
            weight.data = weight.data * (1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return changed


@pytest.mark.parametrize(
    ("model_type", "waiting"),
    [("llama", 3), ("qwen2", 3), ("qwen3", 3), ("mistral", 3), ("bert", 3), ("llama", 0), ("bert", 2)],
)
def test_every_group_sees_the_groups_before_it(
    tiny_model: ModelMaker, model_type: str, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H of group i equals X^T X hooked from a model with the groups before i replaced, and none behind; so do the drifts.

    By their definitions in float64, against the original model: (X0 - X)^T X, or, where the adapter says that a linear's
    output is added to the residual stream as it is, R^T X with R what the stream behind it is off by. Three batches, one short;
    the memory for those that wait inside a block is enough for all, or for some, or for none.
    """
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 48)
    model, adapter = a_model(tiny_model, model_type), find_adapter({"model_type": model_type})
    tokens = torch.randint(0, 256, (7, 16), generator=torch.Generator().manual_seed(0))
    firsts = [f"{adapter.blocks}.{i}.{group[0]}" for i in range(2) for group in adapter.shared_inputs]
    readers = {f"{adapter.blocks}.{i}.{w}": f"{adapter.blocks}.{i}.{r}" for i in range(2) for w, r in adapter.streams}
    watched = [*firsts, *readers.values()]
    inputs0, hidden0 = hooked(model, watched, tokens)
    references = [hooked(replaced_copy(model, model_type, groups), watched, tokens) for groups in range(len(firsts) + 1)]

    walking = copy.deepcopy(model)
    stream = start_stream(walking, list(walking.get_submodule(adapter.blocks)), token_batches(tokens), Phases())
    assert [len(hidden) for hidden in stream.hidden] == [3, 3, 1]
    stream.carry_original()
    widths = [walking.get_submodule(name).weight.shape[1] for name in firsts]
    monkeypatch.setattr(stream_module, "WAITING_BYTES", waiting * 4 * 48 * (6 * widths[0] + max(widths)))
    begun: list[nn.Module] = []
    for block in walking.get_submodule(adapter.blocks):
        block.register_forward_pre_hook(lambda block, _: begun.append(block))
    found, absmax, hidden = walked(stream, walking, model_type, replaced_copy(model, model_type))

    assert len(begun) == 2 * 2 * (waiting + (3 - waiting) * (len(adapter.shared_inputs) + 1))
    for i, (quantized, original) in enumerate(hidden, 1):
        torch.testing.assert_close(original, hidden0[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quantized, references[-1][1][i], rtol=1e-4, atol=1e-5)
        assert (original - quantized).norm() > 0.05 * original.norm(), "the weights hardly matter: nothing was tested"
    for groups, name in enumerate(firsts):
        x, x0, statistics = references[groups][0][name], inputs0[name], found[name]
        close(statistics.hessian, x.T @ x / len(x))
        assert statistics.tokens == len(x) == 7 * 16
        assert absmax[name].amax() == pytest.approx(references[-1][0][name].abs().max().item(), rel=1e-4)
        if name not in readers:
            assert statistics.stream_target is None and statistics.input_drift is not None
            close(statistics.input_drift, (x0 - x).T @ x / len(x), loose=groups > 0)
            continue
        s0, s = inputs0[readers[name]], references[groups][0][readers[name]]
        target = s0 - s + x0 @ model.get_submodule(name).weight.data.double().T
        assert statistics.input_drift is None and statistics.stream_target is not None
        close(statistics.stream_target, target.T @ x / len(x), loose=True)
    assert len(readers) == 4 and readers.keys() < set(firsts)


def close(found: Tensor, expected: Tensor, loose: bool = False) -> None:
    """To float32 rounding, relative to the whole matrix; `loose` for small differences of large numbers."""
    assert (found.double() - expected).norm() <= (1e-4 if loose else 1e-5) * expected.norm()


def test_without_the_original_there_is_no_drift(tiny_model: ModelMaker) -> None:
    """A stream that carries no original hands out no drift, even if the block's original weights are there."""
    model = a_model(tiny_model, "llama")
    stream = start_stream(model, list(model.model.layers), token_batches(torch.arange(32).view(2, 16)), Phases())
    block = model.model.layers[0]
    with stream.enter(0, block, {"o": "self_attn.o_proj"}, {"o": "input_layernorm"}, copy.deepcopy(block)) as observer:
        statistics = observer.observe("o")
        stream.leave(observer)
    assert statistics is not None and statistics.input_drift is None and statistics.stream_target is None
    assert stream.original is None
