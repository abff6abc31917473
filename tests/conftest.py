"""Fixtures shared by all tests: tiny models with the real layout, the bundled model, real weights beside the repo."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs are interpreted where there is none

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "duotone-10m"
SHARED = ROOT.parent / "shared"

#: Sentences of plain ASCII, long enough for a few windows of any tiny model.
TEXT = "\n".join(f"The {word} fox counted {i} stones, then {i * i} foxes." for i in range(400) for word in ("red", "old"))


def pytest_configure() -> None:
    """One thread: the tests' matrices are too small to share, and results do not depend on the machine's core count."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why; `slow` runs only when asked for with -m slow."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, found none"))
        markers = item.config.getoption("-m")
        if "slow" in item.keywords and "slow" not in str(markers):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session", autouse=True)
def row_wise_product() -> Iterator[None]:
    """torch's FP8 product with row-wise scales where a CPU's has none (torch 2.11): tests of a GPU's ways call it on one."""
    patch, ones = pytest.MonkeyPatch(), torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.T, scale, scale.T.contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        patch.setattr(torch, "_scaled_mm", _scaled_mm)
    yield
    patch.undo()


def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype, use_fast_accum: bool = False
) -> Tensor:
    del use_fast_accum
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of about 40 kB."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(model_type="llama", **config overrides) -> folder of a random BF16 model of two blocks, with a byte tokenizer."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **overrides: object) -> Path:
        key = json.dumps([model_type, overrides], sort_keys=True)
        if key not in made:
            made[key] = _save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", model_type, overrides)
        return made[key]

    return make


def _save_tiny_model(folder: Path, model_type: str, overrides: dict[str, object]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 260,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    sizes = {name: value for name, value in (sizes | overrides).items() if (name, value) != ("head_dim", None)}
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # random norms and biases too: a test must see them lost
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer():
    """256 bytes, BOS and EOS; no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model."""
    assert BUNDLED.is_dir(), f"{BUNDLED} is part of the repository"
    return BUNDLED


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and text beside the project, where they are."""
    if not SHARED.is_dir():
        pytest.skip("no folder ../shared with real weights beside the project")
    return SHARED
