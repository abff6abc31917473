"""Memory of a run depends on one block and on the calibration activations, never on the number of blocks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

#: A block of 3.2 million weights: 36 more of them are 230 MB in BF16 and twice that as the numbers they are solved in.
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 260}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: object) -> Path:
    """A folder with one."""
    return tiny_model()  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[int, Path]:
    """The same model with 4 blocks and with 40."""
    deep = tmp_path_factory.mktemp("deep")
    return {layers: deep_model(deep / str(layers), layers, SIZES, tokenizer) for layers in (4, 40)}


def deep_model(folder: Path, layers: int, sizes: dict[str, int], tokenizer: Path) -> Path:
    """Random weights, each block in a shard of its own."""
    folder.mkdir()
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    generator, where = torch.Generator().manual_seed(0), {}
    for block in ("", *(f"model.layers.{i}." for i in range(layers))):
        names = [name for name in shapes if (name.startswith(block) if block else ".layers." not in name)]
        tensors = {name: (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16() for name in names}
        file = f"model-{block or 'rest.'}safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def quantized(model: Path, out: Path, text: Path, *options: str) -> dict[str, Any]:
    """The report of the whole command."""
    command = [
        sys.executable,
        "-m",
        "duotone",
        "quantize",
        str(model),
        str(out),
        "--calibration",
        str(text),
        "--json",
        *options,
    ]
    size = ["--samples", "16", "--seq-len", "64", "--device", "cpu"]
    done = subprocess.run([*command, *size], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_peak_does_not_grow_with_the_number_of_blocks(models: dict[int, Path], text_file: Path, tmp_path: Path) -> None:
    """4 blocks and 40: within 10 %, which is a quarter of the other 36 blocks' weights in BF16."""
    few, many = (int(quantized(models[layers], tmp_path / str(layers), text_file)["peak_bytes"]) for layers in (4, 40))
    print(f"peak of 4 blocks {few / 1e6:.0f} MB, of 40 {many / 1e6:.0f} MB")
    assert abs(many - few) <= 0.1 * few


@pytest.mark.slow
def test_a_checkpoint_three_times_as_large_as_the_memory_it_takes(tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    """Peak resident memory, which is what a container's limit counts: interpreter, torch and all.

    A limit on the address space would say nothing: the source is mapped, and mapped files may be dropped at any time.
    """
    model = deep_model(tmp_path / "deep", 370, SIZES, tokenizer)
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    peak = int(quantized(model, tmp_path / "out", text_file, "--method", "gptq")["peak_bytes"])
    print(f"a checkpoint of {nbytes / 1e6:.0f} MB within {peak / 1e6:.0f} MB")
    assert nbytes >= 3 * peak
