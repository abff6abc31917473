"""Models that see: the same numbers as transformers, the language tower in the contract, the vision tower when asked for."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import duotone
from duotone import pipeline
from duotone.calibrate.pairs import draw_pairs, draw_samples
from duotone.calibrate.stream import start_stream
from duotone.checking import check
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.evaluation import evaluate_windows
from duotone.models.anatomy import Block
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.models.vision import full_anatomy, image_tokens
from duotone.phases import Phases
from duotone.plan import make_plan
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from tests.models.pictured import BY_TORCHVISION, FAMILIES, picture, pictures, save_pictured, save_processor
from tests.models.test_architectures import run_by_hand

Maker = Callable[[str], Path]
GATED = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]
PLAIN = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
#: By model_type: the tower's stack, and the groups of one of its blocks.
TOWERS = {
    "qwen2_vl": ("model.visual.blocks", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
    "qwen2_5_vl": ("model.visual.blocks", ["attn.qkv", "attn.proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]),
    "qwen3_vl": ("model.visual.blocks", ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"]),
    "qwen3_vl_moe": ("model.visual.blocks", ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"]),
    "llava": ("model.vision_tower.encoder.layers", PLAIN),
    "gemma3": ("model.vision_tower.encoder.layers", PLAIN),
    "idefics3": ("model.vision_model.encoder.layers", PLAIN),
    "smolvlm": ("model.vision_model.encoder.layers", PLAIN),
}
#: Names that vLLM 0.33 gives linears of the towers, before it fuses them.
IN_VLLM = {
    "qwen2_vl": "visual.blocks.0.attn.qkv",
    "qwen2_5_vl": "visual.blocks.1.mlp.gate_proj",
    "qwen3_vl": "visual.deepstack_merger_list.0.linear_fc1",
    "qwen3_vl_moe": "visual.merger.linear_fc2",
    "llava": "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "gemma3": "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    "idefics3": "model.vision_model.encoder.layers.0.self_attn.qkv_proj",
    "smolvlm": "model.vision_model.encoder.layers.0.self_attn.out_proj",
}


@pytest.fixture(scope="session")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """make(model_type) -> folder of a tiny random model that sees."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_pictured(tmp_path_factory.mktemp("pictured") / model_type, model_type)
        return made[model_type]

    return make


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def groups_of(block: Any) -> list[str]:
    return [" ".join(name.removeprefix(block.prefix) for name in group) for group in block.shared_inputs]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_loads_as_transformers_does(pictured: Maker, model_type: str) -> None:
    """Logits of an image with text equal transformers' own bit for bit, and depend on the image."""
    folder, inputs = pictured(model_type), picture(model_type)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, torch.float32)
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    other = inputs | {"pixel_values": picture(model_type, seed=1)["pixel_values"]}
    assert not torch.equal(logits(ours, inputs), logits(ours, other))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_anatomy(pictured: Maker, model_type: str) -> None:
    """The body is the language model's stack; the tower is left with its reason, or a stack of its own."""
    config = open_source(pictured(model_type)).config
    model = build_skeleton(config, torch.float32)
    body, both = full_anatomy(config, model), full_anatomy(config, model, quantize_vision=True)
    text = "text_model" if model_type in {"idefics3", "smolvlm"} else "language_model"
    assert [block.path for block in body.blocks] == [f"model.{text}.layers.{i}" for i in range(2)]
    assert groups_of(body.blocks[0])[:2] == GATED[:2]
    stack, groups = TOWERS[model_type]
    inside = [name for name in find_linears(model) if name.startswith(stack)]
    assert inside and all(body.keep[name].startswith("vision tower: ") for name in inside)
    assert body.tower is None and body.all_blocks == body.blocks == both.blocks
    assert both.tower is not None
    assert all(block.path.startswith(f"{stack}.") and groups_of(block) == groups for block in both.tower.blocks)
    assert {name for block in both.tower.blocks for group in block.shared_inputs for name in group} == set(inside)
    between = set(body.keep) - set(inside) - {"lm_head"}
    assert bool(between) == (model_type != "gemma3")  # whose projection is no linear
    assert set(both.keep) == {*between, "lm_head"}


def test_a_tower_before_no_stack(pictured: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that is one block cannot be entered behind what sees: said at once, not as if all were BF16."""
    config = open_source(pictured("qwen2_vl")).config
    model = build_skeleton(config, torch.float32)
    whole = replace(full_anatomy(config, model), blocks=(Block("", (), {}),))
    monkeypatch.setattr("duotone.models.vision.anatomy_of", lambda *_: whole)
    with pytest.raises(DuotoneError, match=r"sees with model\.visual.* no stack of blocks"):
        full_anatomy(config, model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streams_are_what_the_model_computes(pictured: Maker, model_type: str) -> None:
    """Block by block from the stream's entrance, with what the model adds in between: its own hidden states, bit for bit."""
    model: Any = load(pictured(model_type), torch.float32)
    anatomy = full_anatomy(open_source(pictured(model_type)).config, model, quantize_vision=True)
    assert anatomy.tower is not None
    inputs = [picture(model_type, seed, 12 + seed) for seed in range(2)]
    for part in (anatomy.tower, anatomy):
        blocks = [model.get_submodule(block.path) for block in part.blocks]
        own: list[torch.Tensor] = []
        hook = blocks[-1].register_forward_hook(lambda _, __, out, own=own: own.append(first(out)))
        for sample in inputs:
            logits(model, sample)
        hook.remove()
        stream = start_stream(model, blocks, inputs, Phases(), gives=part.gives)
        states = stream.hidden
        for index, block in enumerate(blocks):
            with torch.no_grad():
                given = [block(hidden, *args, **named) for hidden, args, named in stream.calls(index, states)]
            states = list(stream.entering(index + 1, map(first, given)))
        assert all(torch.equal(state, expected) for state, expected in zip(states, own, strict=True))
    adds = any(more is not None for batches in stream.added for more in batches)
    assert adds == model_type.startswith("qwen3")  # what it sees, at several depths


@pytest.mark.parametrize("quantize_vision", [False, True], ids=["text", "both"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_runs_what_was_written(tmp_path: Path, pictured: Maker, model_type: str, quantize_vision: bool) -> None:
    """A quantized checkpoint, loaded, is the original with the contract in every linear but those listed."""
    folder, inputs = pictured(model_type), picture(model_type)
    report = duotone.quantize(folder, tmp_path / "out", method="rtn", device="cpu", quantize_vision=quantize_vision)
    by_hand, found = load(folder, torch.float32), load(tmp_path / "out", torch.float32)
    layers = [layer.layer for layer in report.layers]
    assert {*layers, *report.kept} >= set(find_linears(by_hand))
    assert any(layer.startswith(TOWERS[model_type][0]) for layer in layers) == quantize_vision
    source = open_source(tmp_path / "out")
    run_by_hand(by_hand, WeightReader(named_source(source, build_skeleton(source.config, torch.float32))), layers)
    expected = logits(by_hand, inputs)
    assert ((logits(found, inputs) - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_calibrates_on_images(tmp_path: Path, pictured: Maker, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dpq` walks through the tower, then through the text with what the quantized tower sees; a killed run ends the same."""
    monkeypatch.setattr(pipeline, "draw_samples", lambda *_: pictures(model_type, 12))
    settings: dict[str, Any] = {"quantize_vision": True, "samples": 12, "seq_len": 64, "device": "cpu"}
    report = duotone.quantize(pictured(model_type), tmp_path / "out", calibration=("pictures.jsonl",), **settings)
    assert report.calibration is not None and report.calibration["windows"] == 12
    rounded = duotone.quantize(pictured(model_type), tmp_path / "rtn", method="rtn", device="cpu", quantize_vision=True)
    better = [ours.output_error < 1.2 * theirs.weight_error for ours, theirs in zip(report.layers, rounded.layers, strict=True)]
    assert sum(better) > 0.9 * len(better)
    solve = pipeline.quantize_block

    def killed(run: Any, index: int, *rest: Any) -> Any:
        if index == len(run.plan.blocks) - 1:
            raise KeyboardInterrupt
        return solve(run, index, *rest)

    monkeypatch.setattr(pipeline, "quantize_block", killed)
    again = {"calibration": ("pictures.jsonl",), "resume": True, "save_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        duotone.quantize(pictured(model_type), tmp_path / "killed", **settings, **again)
    monkeypatch.setattr(pipeline, "quantize_block", solve)
    resumed = duotone.quantize(pictured(model_type), tmp_path / "killed", **settings, **again)
    plan = make_plan(open_source(pictured(model_type)), QuantizeConfig(quantize_vision=True))
    assert resumed.resumed_at == len(plan.blocks) - 1
    files = [path / "model.safetensors" for path in (tmp_path / "out", tmp_path / "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(DuotoneError, match=r"--effort high: found calibration on images"):
        duotone.quantize(pictured(model_type), tmp_path / "high", effort="high", calibration=("pictures.jsonl",), **settings)


def test_text_alone_calibrates_the_language_model(
    tmp_path: Path, pictured: Maker, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text file will do for a model that sees, but not for its tower; a model that only reads has no tower."""
    folder = pictured("gemma3")
    monkeypatch.setattr("duotone.calibrate.pairs.load_tokenizer", lambda _: _tokenizer())
    settings: dict[str, Any] = {"calibration": (str(text_file),), "samples": 4, "seq_len": 64, "device": "cpu"}
    report = duotone.quantize(folder, tmp_path / "out", **settings)
    assert len(report.layers) == 14 and all(layer.tokens > 0 for layer in report.layers)
    with pytest.raises(DuotoneError, match=r"--quantize-vision: .*without images"):
        duotone.quantize(folder, tmp_path / "both", quantize_vision=True, **settings)


def test_no_tower_to_quantize(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Words for a model that only reads."""
    with pytest.raises(DuotoneError, match=r"--quantize-vision: found no vision tower in LlamaForCausalLM"):
        make_plan(open_source(tiny_model()), QuantizeConfig(method="rtn", quantize_vision=True))
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "text": "a fox"}\n')
    with pytest.raises(DuotoneError, match=r"pairs.jsonl: holds images, found a model .* only reads text"):
        draw_samples(tiny_model(), [str(tmp_path / "pairs.jsonl")], 32, 4, 0)


def _tokenizer() -> Any:
    from tests.conftest import _byte_tokenizer

    return _byte_tokenizer()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ignore_names_what_vllm_names(pictured: Maker, model_type: str) -> None:
    """The tower stays BF16 under vLLM's names too, and what is quantized is not ignored by any of them."""
    plan = make_plan(open_source(pictured(model_type)), QuantizeConfig(method="rtn"))
    rules = [rule[3:] if rule.startswith("re:") else f"{re.escape(rule)}$" for rule in plan.ignored]
    assert any(re.match(rule, IN_VLLM[model_type]) for rule in rules)
    for layer in plan.layers:
        assert not any(re.match(rule, name) for rule in rules for name in (layer, plan.written_layer(layer)))


def test_check_says_what_loads(tmp_path: Path, pictured: Maker) -> None:
    """With its tower in BF16 it loads in vLLM; a tower whose width 128 does not divide does not, planned or written."""
    folder = pictured("llava")
    assert check(folder, ["vllm"], ["h100"])[0].loads
    both = QuantizeConfig(method="rtn", quantize_vision=True)
    planned = check(folder, ["vllm"], ["h100"], config=both)[0]
    duotone.quantize(folder, tmp_path / "out", method="rtn", device="cpu", quantize_vision=True)
    written = check(tmp_path / "out", ["vllm"], ["h100"])[0]
    assert not planned.loads and planned.reasons == written.reasons
    assert "192" in planned.reasons[0]


def test_likelihood_behind_an_image(pictured: Maker) -> None:
    """Only text behind the image counts, token by token in float64; KL is to what the reference makes of the same image."""
    samples = pictures("qwen2_vl", 4)
    model, reference = load(pictured("qwen2_vl"), torch.float32), load(pictured("qwen2_vl"), torch.float32)
    with torch.no_grad():
        reference.get_submodule("model.visual.merger.mlp.2").weight.mul_(1.5)
    nll, kl = [], []
    for sample in samples.samples:
        ids = sample["input_ids"][0]
        behind = int((ids == 258).nonzero()[-1]) + 1
        p, q = (torch.log_softmax(logits(m, sample)[0].double(), -1) for m in (model, reference))
        for t in range(behind, len(ids)):
            nll.append(-p[t - 1, ids[t]].item())
            kl.append((q[t - 1].exp() * (q[t - 1] - p[t - 1])).sum().item())
    result = evaluate_windows(model, samples, reference, torch.device("cpu"))
    assert result.tokens == len(nll)
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert result.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3) and result.kl > 0
    assert result.kl_stderr is not None and 0 < result.kl_stderr < result.kl


def write_pairs(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of rows, and images 0.png, 1.png, ... of different sizes beside it."""
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (40 + 8 * i, 32 + 4 * i), (60 * i, 99, 200)).save(folder / f"{i}.png")
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_model_s_own_processor(tmp_path: Path, pictured: Maker, model_type: str) -> None:
    """Rows of a file through the family's processor and its chat template into the model; the text's end is what is cut."""
    pytest.importorskip("PIL", reason="images need Pillow (the extra vision)")
    if model_type in BY_TORCHVISION:
        pytest.importorskip("torchvision", reason="its processor needs torchvision (the extra vision)", exc_type=ImportError)
    if model_type == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words (the extra vision)")
    folder = pictured(model_type)
    rows = [{"image": f"{i}.png", "text": f"A fox counted {i} stones."} for i in range(3)]
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": [{"type": "text", "text": "Stones."}]}]
    path = write_pairs(tmp_path, [*rows, {"images": ["3.png"], "messages": asked}])
    model = load(folder, torch.float32)
    for template in (True, False):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        save_processor(folder, model_type, template)
        found: Any = draw_samples(folder, [str(path)], 64, None, 0, image_tokens(model))
        assert len(found) == 4 and found.positions == sum(sample["input_ids"].numel() for sample in found.samples)
        decoded = [bytes_of(sample["input_ids"]) for sample in found.samples]
        assert decoded[1].rstrip().endswith("A fox counted 1 stones.")
        assert ("user: " in decoded[3]) == template and "What?" in decoded[3] and "Stones." in decoded[3]
        result = evaluate_windows(model, found, None, torch.device("cpu"))
        assert result.perplexity > 1 and result.tokens < found.positions
    short: Any = draw_samples(folder, [str(path)], 24, 2, 0, image_tokens(model))
    assert [sample["input_ids"].shape for sample in short.samples] == [(1, 24)] * 2
    assert torch.isfinite(logits(model, short.samples[0])).all()
    with pytest.raises(DuotoneError, match=r"row 1: its last image ends at token \d+, expected it before 5 \(--seq-len\)"):
        draw_samples(folder, [str(path)], 5, None, 0, image_tokens(model))


def bytes_of(ids: torch.Tensor) -> str:
    """The text of the byte tokenizer's tokens."""
    return _tokenizer().decode(ids[ids < 256].tolist())


def test_a_folder_of_images(tmp_path: Path) -> None:
    """Each image with the caption beside it; one without is an error."""
    pytest.importorskip("PIL", reason="images need Pillow (the extra [vision])")
    write_pairs(tmp_path, [])
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"stone {i}\n")
    with pytest.raises(DuotoneError, match=r"3\.png: found no caption beside it, expected 3\.txt"):
        draw_pairs(None, [str(tmp_path)], 64, None, 0, (258,))
    (tmp_path / "3.txt").write_text("stone 3")
    found = draw_pairs(Bare(), [str(tmp_path)], 64, 3, 0, (258,))
    assert len(found) == 3 and found.sha256 == draw_pairs(Bare(), [str(tmp_path)], 64, 3, 0, (258,)).sha256
    assert found.text_bytes == 3 * len("stone 0")


class Bare:
    """As much of a processor as rows need: one token of an image, then bytes."""

    image_token, chat_template = "<image>", None

    class tokenizer:  # noqa: N801 - the processor's attribute
        bos_token = None

        @staticmethod
        def decode(ids: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return bytes(ids).decode()

    def __call__(self, text: list[str], images: list[list[Any]], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt" and all(image.mode == "RGB" for image in images[0])
        ids = [258 if part == "<image>" else byte for part in re.split("(<image>)", text[0]) if part
               for byte in ([258] if part == "<image>" else part.encode())]  # fmt: skip
        return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": "../secret.png", "text": "x"}, r"row 1: found the image '\.\./secret\.png', expected one inside"),
        ({"image": "/etc/hostname", "text": "x"}, r"row 1: found the image '/etc/hostname', expected one inside"),
        ({"image": "link.png", "text": "x"}, r"row 1: found the image 'link\.png', expected one inside"),
        ({"image": "gone.png", "text": "x"}, r"row 1: found no image 'gone\.png'"),
        ({"image": "a\0b", "text": "x"}, r"row 1: the image 'a\\x00b' cannot be opened"),
        ({"image": 3, "text": "x"}, r"row 1: found image 3, expected the path"),
        ({"image": [], "text": "x"}, r"row 1: found image \[\], expected the path"),
        ({"image": "http://127.0.0.1/a.png", "text": "x"}, r"row 1: found no image 'http://127\.0\.0\.1/a\.png'"),
        ({"image": "0.png"}, r"row 1: found the fields \['image'\], expected 'text' or 'messages'"),
        ({"image": "0.png", "messages": ["hi"]}, r"row 1: found a message that is 'hi'"),
        ({"image": "0.png", "messages": [{"role": "user", "content": [{"type": "video", "path": "/x"}]}]}, r"type 'video'"),
        (
            {"image": "0.png", "messages": [{"role": "user", "content": [{"type": "image", "url": "file:///x"}] * 2}]},
            r"row 1: found 2 places of images in its messages, expected 1",
        ),
        ({"image": "0.png", "text": ""}, r"row 1: found no text behind its image"),
        ({"image": "text.png", "text": "x"}, r"row 1: text\.png cannot be read as an image"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    """One sentence that names the row; nothing outside the folder is opened, nothing is fetched."""
    pytest.importorskip("PIL", reason="images need Pillow (the extra [vision])")
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("no image")
    path = write_pairs(folder, [row])
    with pytest.raises(DuotoneError, match=says):
        draw_pairs(Bare(), [str(path)], 64, None, 0, (258,))
