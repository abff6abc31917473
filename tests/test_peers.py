"""The comparison reads other tools' files and runs them in the right arithmetic."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.pipeline import quantize
from duotone.qweight import dequantize
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from tests.oracles import vllm_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "peers"))

import arithmetic  # pyright: ignore[reportMissingImports]
import layouts  # pyright: ignore[reportMissingImports]
from layers import PeerLinear  # pyright: ignore[reportMissingImports]


def random_linear(rows: int = 8, columns: int = 256, seed: int = 0) -> PeerLinear:
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(-8, 8, (rows, columns), generator=generator).float()
    scale = torch.rand(rows, columns // 128, generator=generator).add(0.1).div(100).to(torch.bfloat16).float()
    return PeerLinear(level=level, scale=scale, group_size=128)


def test_our_own_file_comes_back_bit_for_bit(tiny_model, tmp_path: Path) -> None:
    """A checkpoint in compressed-tensors' layout, read as a peer's and split as vLLM does, is the contract's weight."""
    quantize(tiny_model(), tmp_path / "out", QuantizeConfig(method="rtn", device="cpu"))
    source = open_source(tmp_path / "out")
    reader, peers = WeightReader(source), layouts.read_peer(tmp_path / "out")
    assert set(peers) == set(packed_layers(source))
    for name, peer in peers.items():
        assert torch.equal(arithmetic.split_weights(peer), dequantize(reader.read(name)))


def test_split_is_vllms_and_the_sign_of_a_scale_goes_to_the_level() -> None:
    linear = random_linear()
    group, channel = vllm_split.load_split(linear.scale.numpy(), reciprocal=False)
    expected = vllm_split.fp8_weights(linear.level.numpy(), group, 128) * channel[:, None]
    np.testing.assert_array_equal(arithmetic.split_weights(linear).numpy(), expected)
    flipped = PeerLinear(level=-linear.level, scale=-linear.scale, group_size=128)
    assert torch.equal(arithmetic.split_weights(flipped), arithmetic.split_weights(linear))


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_layout(tmp_path: Path, checkpoint_format: str) -> None:
    """Codes packed along K with the lowest nibble first; v1 stores zero - 1, v2 the zero itself."""
    linear = random_linear()
    code = (linear.level + 8).to(torch.int64)
    packed = sum(code.T.reshape(-1, 8, 8)[:, i] << 4 * i for i in range(8))  # [K / 8, N]
    zero = 8 if checkpoint_format == "gptq_v2" else 7
    zeros = torch.full((2, 1), sum(zero << 4 * i for i in range(8)), dtype=torch.int64)
    tensors = {
        "x.qweight": packed.to(torch.int32).contiguous(),
        "x.qzeros": zeros.to(torch.int32),
        "x.scales": linear.scale.T.half().contiguous(),
        "x.g_idx": torch.arange(256, dtype=torch.int32) // 128,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": checkpoint_format}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = layouts.read_peer(tmp_path)["x"]
    assert torch.equal(found.level, linear.level)
    assert torch.equal(found.scale, linear.scale.half().float())


def test_a_placed_peer_computes_what_its_checkpoint_says(tiny_model, tmp_path: Path) -> None:
    """Our checkpoint placed as llm-compressor's gives the logits of our own runtime."""
    model = tiny_model()
    quantize(model, tmp_path / "out", QuantizeConfig(method="rtn", device="cpu"))
    ours, placed = load(tmp_path / "out", torch.float32, "cpu"), load(model, torch.float32, "cpu")
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    arithmetic.place(placed, tmp_path / "out", "llm-compressor", "contract", tokens)
    with torch.no_grad():
        torch.testing.assert_close(placed(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-5)
