"""What becomes of each architecture: quantized by dpq, and how far the result is from the original and from the contract.

Usage: python bench/architectures.py [CLASS...]: small random models of transformers' classes, all by default.
       python bench/architectures.py --vit FOLDER --resnet FILE.th --images FILE.npz: real vision models and their accuracy.
Appends to bench/records/architectures.jsonl.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

import duotone
from duotone.bench import append_records, provenance
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.outcome import QuantizeReport
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime.linear import QuantizedLinear

RECORDS = Path(__file__).resolve().parent / "records" / "architectures.jsonl"
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "image_size": 32, "patch_size": 8, "num_channels": 3,
}  # fmt: skip
GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 256}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 128,
    "q_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
TWO = {
    "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
}  # fmt: skip
#: Of pyramids, which have a list in the place of each.
NO_SIZES: dict[str, Any] = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"))
#: Of DepthAnything: the DINOv2 in it.
BACKBONE = {
    "model_type": "dinov2", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2,
    "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True,
}  # fmt: skip
#: By class: model_type, and what differs from SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 32}),
    "GemmaForCausalLM": ("gemma", {"head_dim": 32}),
    "Gemma2ForCausalLM": ("gemma2", {"head_dim": 32}),
    "Gemma3ForCausalLM": ("gemma3_text", {"head_dim": 32}),
    "Phi3ForCausalLM": ("phi3", {}),
    "PhiForCausalLM": ("phi", {}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "GPTNeoXForCausalLM": ("gpt_neox", {}),
    "GPT2LMHeadModel": ("gpt2", GPT),
    "FalconForCausalLM": ("falcon", {}),
    "BloomForCausalLM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
    "CohereForCausalLM": ("cohere", {}),
    "OPTForCausalLM": ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 128}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", MOE | {"head_dim": 32}),
    "OlmoeForCausalLM": ("olmoe", MOE),
    "DeepseekV2ForCausalLM": ("deepseek_v2", LATENT),
    "DeepseekV3ForCausalLM": ("deepseek_v3", LATENT),
    "GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
                          | {"layer_types": ["full_attention", "sliding_attention"]}),
    "Llama4ForCausalLM": ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 32}),
    "BertModel": ("bert", {}),
    "RobertaModel": ("roberta", {}),
    "DistilBertModel": ("distilbert", {"dim": 128, "hidden_dim": 256, "n_layers": 2, "n_heads": 4}),
    "ModernBertModel": ("modernbert", {}),
    "T5ForConditionalGeneration": ("t5", {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32}),
    "BartForConditionalGeneration": ("bart", TWO),
    "WhisperForConditionalGeneration": ("whisper", TWO | {"num_mel_bins": 16, "max_source_positions": 32,
                                                          "decoder_start_token_id": 1}),
    "ViTForImageClassification": ("vit", {}),
    "DeiTForImageClassification": ("deit", {}),
    "Dinov2ForImageClassification": ("dinov2", {}),
    "SiglipVisionModel": ("siglip_vision_model", {}),
    "SwinForImageClassification": ("swin", NO_SIZES | {"embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
                                            "patch_size": 4}),
    "DPTForDepthEstimation": ("dpt", {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False,
                                      "neck_hidden_sizes": [32, 32, 32, 32], "fusion_hidden_size": 32}),
    "ConvNextForImageClassification": ("convnext", NO_SIZES | {"hidden_sizes": [64, 128], "depths": [2, 2], "num_stages": 2,
                                                    "patch_size": 4}),
    "ResNetForImageClassification": ("resnet", NO_SIZES | {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [2, 2],
                                                "layer_type": "basic"}),
    "Swinv2ForImageClassification": ("swinv2", NO_SIZES | {"embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4],
                                                "window_size": 4, "patch_size": 4}),
    "CLIPVisionModel": ("clip_vision_model", {}),
    "SegformerForSemanticSegmentation": ("segformer", NO_SIZES | {"num_encoder_blocks": 2, "depths": [2, 2],
                                                "sr_ratios": [2, 1], "hidden_sizes": [64, 128], "patch_sizes": [7, 3],
                                                "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                                                "decoder_hidden_size": 64}),
    "DepthAnythingForDepthEstimation": ("depth_anything", NO_SIZES | {"backbone_config": BACKBONE, "patch_size": 8,
                                                "reassemble_hidden_size": 128, "neck_hidden_sizes": [32, 32, 64, 64],
                                                "fusion_hidden_size": 32, "head_hidden_size": 16}),
    "MambaForCausalLM": ("mamba", {"state_size": 8, "expand": 2}),
    "Swin2SRForImageSuperResolution": ("swin2sr", NO_SIZES | {"embed_dim": 64, "depths": [2], "num_heads": [2],
                                                              "window_size": 4, "patch_size": 1}),
}  # fmt: skip


def random_model(name: str, folder: Path) -> Any:
    """A small random model of a class, saved in a folder; biases and norms random too."""
    model_type, sizes = FAMILIES[name]
    torch.manual_seed(0)
    given = {key: value for key, value in (SIZES | sizes).items() if value is not None}
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, **given)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def random_inputs(model: Any, count: int) -> dict[str, Tensor]:
    """Samples of what the model reads."""
    draw, main = torch.Generator().manual_seed(1), model.main_input_name
    tokens = {name: torch.randint(3, 256, (count, 32), generator=draw) for name in ("input_ids", "decoder_input_ids")}
    if not getattr(model.config, "is_encoder_decoder", False):
        del tokens["decoder_input_ids"]
    if main == "input_ids":
        return tokens
    tokens.pop("input_ids")
    shape = (count, 3, 32, 32) if main == "pixel_values" else (count, 16, 64)
    return {main: torch.randn(shape, generator=draw)} | tokens


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model says, whatever it is called."""
    with torch.no_grad():
        output = model(**inputs)
    names = ("logits", "predicted_depth", "reconstruction", "last_hidden_state")
    return next(output[name] for name in names if name in output)


def in_float64(model: nn.Module, layers: dict[str, QuantizedWeight]) -> None:
    """Put the contract, written out in float64, in the place of the quantized linears."""
    for layer, weight in layers.items():
        linear: Any = model.get_submodule(layer)

        def forward(x: Tensor, weight: QuantizedWeight = weight, linear: Any = linear) -> Tensor:
            x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            return (y if linear.bias is None else y + linear.bias.double()).to(x.dtype)

        linear.forward = forward


def random_row(name: str) -> dict[str, Any]:
    """One architecture at random: quantize, load, compare. The row says why where it cannot be."""
    from duotone.checkpoint.reader import WeightReader
    from duotone.checkpoint.source import open_source
    from duotone.models.names import named_source
    from duotone.models.skeleton import build_skeleton

    with tempfile.TemporaryDirectory() as place:
        folder, out, samples = Path(place, "model"), Path(place, "out"), Path(place, "samples.safetensors")
        inputs = random_inputs(random_model(name, folder), 64)
        save_file({key: tensor[:48].contiguous() for key, tensor in inputs.items()}, samples)
        try:
            report = duotone.quantize(folder, out, calibration=(str(samples),), samples=48, device="cpu")
        except DuotoneError as error:
            return {"refused": str(error)}
        held_out = {key: tensor[48:] for key, tensor in inputs.items()}
        original, found = (duotone.load(path, torch.float32, "cpu") for path in (folder, out))
        expected, given = answer(original, held_out), answer(found, held_out)
        source = open_source(out)
        reader = WeightReader(named_source(source, build_skeleton(source.config, torch.float32)))
        layers = [layer for layer, module in found.named_modules() if isinstance(module, QuantizedLinear)]
        in_float64(found, {layer: reader.read(layer) for layer in layers})
        return facts(report) | {
            "max_error_vs_reference": _relative(given, answer(found, held_out)),
            "metric": "relative error of the output",
            "original": 0.0,
            "quantized": _relative(given, expected),
        }


def facts(report: QuantizeReport) -> dict[str, Any]:
    """What was quantized."""
    return {
        "linears_quantized": len(report.layers),
        "linears_left": len(report.kept),
        "quantized_macs_share": report.quantized_macs_share,
        "bits_per_weight": report.bits_per_weight,
        "seconds": sum(report.seconds.values()),
    }


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut that pads (ResNet for CIFAR-10, option A of He et al. 2015)."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR-10 network whose state dicts are named conv1, bn1, layer1.0..., linear."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        before = 16
        for number, channels in enumerate((16, 32, 64), 1):
            strides = [1 if number == 1 else 2, *[1] * (depth - 1)]
            blocks = [BasicBlock(before if i == 0 else channels, channels, stride) for i, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = channels
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] -> logits [B, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(x.mean((-2, -1)))


def accuracy_row(original: Tensor, quantized: Tensor, labels: Tensor, report: QuantizeReport) -> dict[str, Any]:
    """Accuracy before and after on the same pictures, and the KL between the two."""
    right = [(logits.argmax(-1) == labels).double() for logits in (original, quantized)]
    log_p, log_q = original.log_softmax(-1), quantized.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return facts(report) | {
        "metric": f"accuracy, % of {len(labels)} pictures",
        "original": 100 * float(right[0].mean()),
        "quantized": 100 * float(right[1].mean()),
        "difference_stderr": 100 * float((right[1] - right[0]).std() / len(labels) ** 0.5),
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std() / len(labels) ** 0.5),
    }


def vision_rows(arguments: argparse.Namespace) -> dict[str, Callable[[str], dict[str, Any]]]:
    """By model: its row for a method, calibrated on the first pictures, judged on the others."""
    data = np.load(arguments.images)
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    pictures = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)[order].float() / 255
    labels = torch.from_numpy(data["labels"])[order][512:]

    def logits(model: Any, values: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [model(batch) for batch in values[512:].split(128)]
        return torch.cat([part if isinstance(part, Tensor) else part.logits for part in parts])

    def vit(method: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            save_file({"pixel_values": pictures[:512].contiguous()}, f"{place}/pictures.safetensors")
            report = duotone.quantize(
                arguments.vit, f"{place}/out", method=method, group_size=64, calibration=(f"{place}/pictures.safetensors",),
                samples=512, device="cpu",
            )  # fmt: skip
            quantized = logits(duotone.load(f"{place}/out", torch.float32, "cpu"), pictures)
        return accuracy_row(
            logits(AutoModelForImageClassification.from_pretrained(arguments.vit), pictures), quantized, labels, report
        )

    def resnet(path: str) -> Callable[[str], dict[str, Any]]:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        model = ResNet(9 if "56" in Path(path).name else 3)
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
        middle, width = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        values = (pictures - middle[:, None, None]) / width[:, None, None]

        def row(method: str) -> dict[str, Any]:
            found = duotone.quantize_module(model, values[:512].split(64), method=method, group_size=64, device="cpu")
            return accuracy_row(logits(model.eval(), values), logits(found.module, values), labels, found.report)

        return row

    rows = {Path(arguments.vit).name: vit} if arguments.vit else {}
    return rows | {Path(path).stem.partition("-")[0]: resnet(path) for path in arguments.resnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", default=[])
    parser.add_argument("--vit", help="folder of a ViTForImageClassification of CIFAR-10")
    parser.add_argument("--resnet", nargs="*", default=[], help="state dicts of CIFAR-10 ResNets")
    parser.add_argument("--images", help=".npz of images uint8 [n, 32, 32, 3] and labels [n]")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "dpq"])
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in arguments.classes or ([] if arguments.images else FAMILIES):
        row = {"model_class": name, "source": "random weights", "method": "dpq"} | random_row(name)
        append_records(arguments.records, [provenance(0) | row])
        print(name, row.get("refused") or f"{row['quantized']:.3f} from the original", flush=True)
    for name, measure in vision_rows(arguments).items() if arguments.images else ():
        for method in arguments.methods:
            row = {"model_class": name, "source": "real weights", "method": method} | measure(method)
            append_records(arguments.records, [provenance(0) | row])
            print(name, method, f"{row['original']:.2f} -> {row['quantized']:.2f} %, KL {row['kl']:.4f}", flush=True)


if __name__ == "__main__":
    main()
