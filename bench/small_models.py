"""Four small models, trained here in a minute or two each, then quantized: what that costs in what each of them is for.

A ViT that reads digits, a LLaVA that describes them, a UNet of diffusers that draws them, convolutions that double pictures.
Usage: python bench/small_models.py [vit vlm unet doubling] [--methods rtn gptq dpq] [--images FILE.npz]
[--records FILE.jsonl]. Digits are scikit-learn's; pictures to double are an .npz of uint8 [n, 32, 32, 3], such as CIFAR-10's.
Needs: pip install 'duotone[diffusers]' scikit-learn pillow.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import duotone
from duotone.bench import append_records, provenance
from duotone.outcome import QuantizeReport

HELD_OUT, GROUP = 497, 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("<s>", "</s>", "<image>", "<unk>", "which", "digit", "?", *NAMES, "odd", "even", "small", "large")


@dataclass(frozen=True)
class Case:
    """A trained model, how to quantize it by a method, and what it is judged by: a number for each thing that was held out."""

    name: str
    original: nn.Module
    quantize: Callable[[str], tuple[nn.Module, QuantizeReport]]
    scores: dict[str, Callable[[nn.Module], Tensor]]


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, shuffled, [n, 1, 8, 8] from -1 to 1, and which they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.images).float()[order, None] / 8 - 1, torch.from_numpy(found.target)[order]


def train(model: nn.Module, loss_of: Callable[[Tensor], Tensor], count: int, steps: int, rate: float) -> None:
    """AdamW on random batches of 64 of the first `count` samples. loss_of: of the samples of some numbers."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(torch.randint(0, count, (64,), generator=draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def by_folder(model: Any, place: Path, calibration: Path, **options: Any) -> Callable[[str], tuple[nn.Module, QuantizeReport]]:
    """As on the command line: from a folder, by a file of samples, into a folder."""
    model.save_pretrained(place / "model")

    def quantize(method: str) -> tuple[nn.Module, QuantizeReport]:
        out = place / f"out-{method}"
        report = duotone.quantize(
            place / "model", out, method=method, group_size=GROUP, calibration=(str(calibration),), device="cpu", **options
        )
        return duotone.load(out, torch.float32, "cpu"), report

    return quantize


def vit(place: Path, _: argparse.Namespace) -> Case:
    """A ViT of transformers that reads digits."""
    from transformers import ViTConfig, ViTForImageClassification

    pictures, labels = digits()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    model = ViTForImageClassification(config)
    known = len(pictures) - HELD_OUT
    train(model, lambda at: functional.cross_entropy(model(pictures[at]).logits, labels[at]), known, 900, 2e-3)
    save_file({"pixel_values": pictures[:512].contiguous()}, place / "samples.safetensors")

    def right(model: Any) -> Tensor:
        return 100.0 * (model(pictures[known:]).logits.argmax(-1) == labels[known:])

    def nats(model: Any) -> Tensor:
        return functional.cross_entropy(model(pictures[known:]).logits, labels[known:], reduction="none")

    quantize = by_folder(model, place, place / "samples.safetensors", samples=512)
    return Case("ViT, digits", model, quantize, {"digits read, %": right, "cross entropy, nats": nats})


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    found.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return found


def vlm(place: Path, _: argparse.Namespace) -> Case:
    """A LLaVA that is asked which digit it sees, and says its name, whether it is odd and whether it is large."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    pictures, labels = digits()
    (place / "model").mkdir()
    square = {"height": 16, "width": 16}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square, **half), tokenizer(), patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(place / "model")
    answers = [f"{NAMES[i]} {('even', 'odd')[i % 2]} {('small', 'large')[i > 4]} </s>" for i in labels.tolist()]
    rows = [{"image": f"{i}.png", "text": f"<image> which digit ? {text}"} for i, text in enumerate(answers)]
    for i, picture in enumerate(pictures):
        Image.fromarray((picture[0] * 127.5 + 127.5).byte().numpy()).convert("RGB").save(place / f"{i}.png")
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:256]))
    seen = processor(
        text=[row["text"] for row in rows], images=[[Image.open(place / row["image"])] for row in rows], return_tensors="pt"
    )
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=text | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
            text_config=text | {"model_type": "llama", "vocab_size": 64} | ends,
            image_token_index=2, image_seq_length=16, vision_feature_layer=-1,
        )
    )  # fmt: skip
    known = len(pictures) - HELD_OUT

    def loss_of(at: Tensor) -> Tensor:
        targets = seen["input_ids"][at].clone()
        targets[:, :-4] = -100  # the answer alone
        return model(input_ids=seen["input_ids"][at], pixel_values=seen["pixel_values"][at], labels=targets).loss

    def right(model: Any) -> Tensor:
        asked = {"input_ids": seen["input_ids"][known:, :-4], "pixel_values": seen["pixel_values"][known:]}
        asked["attention_mask"] = torch.ones_like(asked["input_ids"])
        said = model.generate(**asked, max_new_tokens=4, do_sample=False, pad_token_id=1)[:, -4:]
        return 100.0 * (said == seen["input_ids"][known:, -4:]).all(-1)

    def nats(model: Any) -> Tensor:
        logits = model(input_ids=seen["input_ids"][known:], pixel_values=seen["pixel_values"][known:]).logits[:, -5:-1]
        return functional.cross_entropy(logits.mT, seen["input_ids"][known:, -4:], reduction="none").sum(-1)

    train(model, loss_of, known, 700, 2e-3)
    options = {"samples": 256, "seq_len": 64, "quantize_vision": True}
    quantize = by_folder(model, place, place / "pairs.jsonl", **options)
    scores = {"descriptions right in every word, %": right, "nats a description": nats}
    return Case("LLaVA, digits described", model, quantize, scores)


def unet(place: Path, arguments: argparse.Namespace) -> Case:
    """A UNet of diffusers that draws the digit it is asked for; the ViT reads what it has drawn."""
    from diffusers import DDIMScheduler, UNet2DModel

    pictures, labels = digits()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    widths = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16}
    model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=10, **blocks, **widths)
    schedule = DDIMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    known, draw = len(pictures) - HELD_OUT, torch.Generator().manual_seed(2)

    def noisy(at: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        noise, steps = (
            torch.randn(len(at), 1, 8, 8, generator=generator),
            torch.randint(0, 200, (len(at),), generator=generator),
        )
        mixed: Any = schedule.add_noise(pictures[at], noise, steps)  # pyright: ignore[reportArgumentType]
        return {"sample": mixed, "timestep": steps, "class_labels": labels[at]}, noise

    def loss_of(at: Tensor) -> Tensor:
        inputs, noise = noisy(at, draw)
        return functional.mse_loss(model(**inputs).sample, noise)

    def error(model: Any) -> Tensor:
        inputs, noise = noisy(torch.arange(known, len(pictures)), torch.Generator().manual_seed(3))
        return (model(**inputs).sample - noise).square().mean((1, 2, 3))

    reader: Any = vit(Path(tempfile.mkdtemp(dir=place)), arguments).original
    asked = torch.arange(500) % 10

    def drawn(model: Any) -> Tensor:
        x = torch.randn(len(asked), 1, 8, 8, generator=torch.Generator().manual_seed(4))
        schedule.set_timesteps(20)
        for step in schedule.timesteps:
            x = schedule.step(model(x, step, asked).sample, int(step), x).prev_sample
        return 100.0 * (reader(x).logits.argmax(-1) == asked)

    train(model, loss_of, known, 1200, 2e-3)
    samples, _ = noisy(torch.arange(512), torch.Generator().manual_seed(5))
    save_file({name: tensor.contiguous() for name, tensor in samples.items()}, place / "samples.safetensors")
    quantize = by_folder(model, place, place / "samples.safetensors", samples=512)
    scores = {"squared error of the noise": error, "digits drawn as asked, %": drawn}
    return Case("UNet2DModel, digits drawn", model, quantize, scores)


class Doubling(nn.Module):
    """Residual blocks of convolutions without norms (EDSR, Lim et al. 2017), added to bicubic interpolation."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.wide, self.last = nn.Conv2d(width, 4 * width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, 3, 2 H, 2 W], from 0 to 1."""
        y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        y = self.last(functional.pixel_shuffle(functional.relu(self.wide(y)), 2))
        return y + functional.interpolate(x, scale_factor=2, mode="bicubic")


def doubling(_: Path, arguments: argparse.Namespace) -> Case:
    """A network of convolutions, as plain torch has it, that doubles pictures which were halved."""
    pictures = torch.from_numpy(np.load(arguments.images)["images"]).permute(0, 3, 1, 2).float() / 255
    pictures = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))]
    small, known = functional.avg_pool2d(pictures, 2), len(pictures) - HELD_OUT
    torch.manual_seed(0)
    model = Doubling()
    train(model, lambda at: functional.l1_loss(model(small[at]), pictures[at]), known, 700, 2e-3)

    def psnr(model: nn.Module) -> Tensor:
        apart = (model(small[known:]).clamp(0, 1) - pictures[known:]).square().mean((1, 2, 3))
        return -10 * apart.log10()

    def quantize(method: str) -> tuple[nn.Module, QuantizeReport]:
        found = duotone.quantize_module(model, small[:256].split(64), method=method, group_size=GROUP, device="cpu")
        return found.module, found.report

    return Case("EDSR, CIFAR-10 doubled", model, quantize, {"PSNR, dB": psnr})


CASES: dict[str, Callable[[Path, argparse.Namespace], Case]] = {"vit": vit, "vlm": vlm, "unet": unet, "doubling": doubling}


def rows_of(case: Case, method: str) -> Iterator[dict[str, Any]]:
    """What a method leaves of each thing that a model is judged by."""
    quantized, report = case.quantize(method)
    with torch.no_grad():
        for metric, score in case.scores.items():
            before, after = score(case.original).double(), score(quantized).double()
            yield {
                "model_class": case.name,
                "method": method,
                "metric": metric,
                "held_out": len(before),
                "original": float(before.mean()),
                "quantized": float(after.mean()),
                "difference_stderr": float((after - before).std() / len(before) ** 0.5),
                "group_size": GROUP,
                "linears_quantized": len(report.layers),
                "linears_left": len(report.kept),
                "quantized_macs_share": report.quantized_macs_share,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "dpq"])
    parser.add_argument("--images", help=".npz with images uint8 [n, 32, 32, 3]; without it nothing is doubled")
    parser.add_argument("--records", type=Path, help="append what was measured to this file")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        if name == "doubling" and not arguments.images:
            print("doubling: needs --images FILE.npz")
            continue
        with tempfile.TemporaryDirectory() as place:
            case = CASES[name](Path(place), arguments)
            for method in arguments.methods:
                for row in rows_of(case, method):
                    if arguments.records:
                        append_records(arguments.records, [provenance(0) | row])
                    change = f"{row['original']:.4f} -> {row['quantized']:.4f} (+- {row['difference_stderr']:.4f})"
                    print(f"{case.name}, {method}: {row['metric']} {change}", flush=True)


if __name__ == "__main__":
    main()
