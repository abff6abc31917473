"""Running block by block equals running the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duotone.calibrate.stream import start_stream
from duotone.errors import DuotoneError
from duotone.phases import Phases
from duotone.runtime.load import load

ModelMaker = Callable[..., Path]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("windows", [1, 70], ids=["one batch", "a full batch and a short one"])
def test_hidden_states_and_second_moments(tiny_model: ModelMaker, model_type: str, windows: int) -> None:
    """Hidden states after each block, and X^T X of each watched input, equal those hooked out of one whole forward."""
    model = load(tiny_model(model_type), torch.float32, "cpu")
    tokens = torch.randint(0, 256, (windows, 64), generator=torch.Generator().manual_seed(0))
    blocks = list(model.model.layers)
    names = {"q": "self_attn.q_proj", "down": "mlp.down_proj"}
    seen: dict[str, torch.Tensor] = {}
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
    stream = start_stream(model, blocks, tokens, phases)
    torch.testing.assert_close(torch.cat(stream.hidden), whole[0])
    for i, block in enumerate(blocks):
        watched = {name: block.get_submodule(path) for name, path in names.items()}
        for name, statistics in stream.observe(i, block, watched).items():
            x = seen[f"{i}.{name}"].double()
            assert statistics.tokens == windows * 64
            torch.testing.assert_close(statistics.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        absmax = stream.advance(i, block, watched)
        assert absmax["q"] == pytest.approx(seen[f"{i}.q"].abs().max().item(), rel=1e-5)
        if i + 1 < len(blocks):
            torch.testing.assert_close(torch.cat(stream.hidden), whole[i + 1], rtol=1e-4, atol=1e-5)
    assert set(phases.seconds) == {"forward", "hessian"}


def test_a_linear_that_never_runs_is_named(tiny_model: ModelMaker) -> None:
    """No silent empty Hessian."""
    model = load(tiny_model(), torch.float32, "cpu")
    stream = start_stream(model, list(model.model.layers), torch.zeros(1, 8, dtype=torch.int64), Phases())
    with pytest.raises(DuotoneError, match="spare: the forward pass never reached it"):
        stream.observe(0, model.model.layers[0], {"spare": torch.nn.Linear(4, 4)})


def test_blocks_keep_their_forward(tiny_model: ModelMaker) -> None:
    """Recording leaves no trace: the model computes what it did before."""
    model = load(tiny_model(), torch.float32, "cpu")
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        before = model(tokens).logits
        start_stream(model, list(model.model.layers), tokens, Phases())
        assert torch.equal(model(tokens).logits, before)
