"""README.md of a checkpoint: the model card that the hub shows. No times and no paths: the same run gives the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from duotone.checkpoint.sidecar import EVALUATION_RECORD, FORMAT_VERSION
from duotone.checkpoint.writer import write_json, write_text
from duotone.errors import DuotoneError

CARD = "README.md"
_BEGIN, _END = "<!-- duotone: evaluation -->", "<!-- end -->"
#: How a part of diffusers' pipelines is used.
_PIPELINE = [
    "```python",
    "import duotone",
    "from diffusers import DiffusionPipeline",
    "",
    'part = duotone.load("THIS_FOLDER")',
    'pipe = DiffusionPipeline.from_pretrained("THE_WHOLE_PIPELINE", transformer=part)  # or unet=part',
    "```",
    "",
]
_NOT_MEASURED = "Not measured yet: `duotone eval CHECKPOINT --reference BASE --text held_out.txt --card` fills this in."


def model_card(
    base_model: str,
    sidecar: Mapping[str, Any],
    can_generate: bool,
    license_of_base: Mapping[str, str] | None = None,
    library: str = "transformers",
) -> str:
    """The card of a checkpoint that `quantize` made, its front matter as the hub specifies it.

    base_model: as it was asked for. sidecar: what duotone.json will hold. license_of_base: what `license_in` found. library:
    whose model it is, transformers' or diffusers'.
    """
    settings, layers = sidecar["settings"], sidecar["layers"]
    name, is_hub_id = base_name(base_model)
    facts: dict[str, Any] = dict(license_of_base or {})
    facts |= {"base_model": name, "base_model_relation": "quantized"} if is_hub_id else {}
    facts |= {"pipeline_tag": "text-generation"} if can_generate else {}
    tags = ["duotone", "w4a8", "fp8", "int4", "compressed-tensors"]
    data = ModelCardData(library_name=library, tags=tags, **facts)
    front = ["---", data.to_yaml().strip(), "---", ""]
    errors = [entry["output_error"] for entry in layers.values() if entry.get("output_error") is not None]
    rows = [
        ("base model", name),
        (
            "weights",
            f"INT4 in groups of {settings['group_size']}, {sidecar['bits_per_weight']:.3f} bits each with scales",
        ),
        ("arithmetic", _arithmetic(settings["target"])),
        ("quantized", f"{len(layers)} linears, {100 * sidecar['quantized_macs_share']:.1f} % of the linears' work"),
        ("method", f"{settings['method']}, effort {settings['effort']}, order {settings['order']}, seed {settings['seed']}"),
    ]
    if settings.get("kv_cache"):
        shared = {"tensor": "layer", "attn_head": "head"}[settings["kv_cache_strategy"]]
        rows.append(("KV cache", f"FP8 E4M3, a scale for the keys and one for the values of each {shared}"))
    calibration = sidecar["calibration"]
    if calibration:
        rows.append(("calibration", f"{calibration['tokens']} tokens of {', '.join(calibration['text'])}"))
    if errors:
        rows.append(("output error of a linear", f"{fmean(errors):.5f} mean, {max(errors):.5f} worst (relative, squared)"))
    kept = [f"- {reason}: {', '.join(f'`{layer}`' for layer in names)}" for reason, names in _kept(sidecar["kept"]).items()]
    served = can_generate and not any("will not load in vLLM" in note for note in sidecar["notes"])
    parts = [
        *front,
        f"# {name.rpartition('/')[2]}, W4A8",
        "",
        f"Quantized by {sidecar['producer']}.",
        "",
        *_table(("", ""), rows),
        "",
        *(["Left in BF16:", "", *kept, ""] if kept else []),
        *(["Notes:", "", *(f"- {note}" for note in sidecar["notes"]), ""] if sidecar["notes"] else []),
        "## Distance from the original",
        "",
        _BEGIN,
        _NOT_MEASURED,
        _END,
        "",
        "## Use",
        "",
        *(_PIPELINE if library == "diffusers" else _use(settings["target"], served)),
    ]
    return "\n".join(parts) + "\n"


def license_in(folder: Path) -> dict[str, str]:
    """What a model's own card says of its license; nothing where there is no card, or none that can be read."""
    try:
        found = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a stranger's file
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def put_evaluation(folder: Path, text: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Put measured figures into a checkpoint's card and into a record beside it, in the place of those before.

    Raises as `card_around` does.
    """
    before, after = card_around(folder)
    write_text(folder / CARD, "\n".join((before + _BEGIN, *_evaluation(text, figures), _END)) + after)
    names = [Path(source.partition("#")[0]).name for source in text]
    write_json(folder / EVALUATION_RECORD, {"format_version": FORMAT_VERSION, "text": names, "figures": dict(figures)})


def card_around(folder: Path) -> tuple[str, str]:
    """A card before and behind the place of its evaluation. Raises DuotoneError where there is none."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise DuotoneError(f"{path}: found no place for an evaluation, expected the lines {_BEGIN} and {_END} in it")
    return before, after


def _evaluation(text: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    names = ", ".join(Path(source.partition("#")[0]).name for source in text)
    rows = [("perplexity", f"{figures['perplexity']:.4f}")]
    if figures["reference_perplexity"] is not None:
        rows.append(("perplexity of the original", f"{figures['reference_perplexity']:.4f}"))
    if figures["kl"] is not None:
        spread = "" if figures["kl_stderr"] is None else f" ± {figures['kl_stderr']:.5f}"
        rows.append(("KL to the original, nats a token", f"{figures['kl']:.5f}{spread}"))
        rows.append(("same likeliest token", f"{100 * figures['top1_agreement']:.2f} %"))
    return [f"On {figures['tokens']} tokens of {names}:", "", *_table(("", ""), rows)]


def base_name(model: str) -> tuple[str, bool]:
    """The base model's name, and whether the hub would find it by that: of a folder only its own name."""
    if Path(model).exists():
        return "".join(letter for letter in Path(model).resolve().name if letter.isprintable()), False
    return model, True


def _arithmetic(target: str) -> str:
    if target == "hopper":
        return "FP8 E4M3 weights (INT4 times E4M3 group scales) and activations per token, BF16 outputs"
    return "FP8 E4M3 weights up to 240 (INT4 times BF16 group scales) and static activations, BF16 outputs"


def _use(target: str, served: bool) -> list[str]:
    python = [
        "```python",
        "import duotone",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = duotone.load("THIS_FOLDER")',
        "with duotone.use_in_transformers():  # the same model, by transformers' own way",
        '    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "```",
        "",
    ]
    if target != "hopper":
        return python
    serve = ["On an H100 or H200, in its own arithmetic:", "", "    vllm serve THIS_FOLDER", ""] if served else []
    other = ["Without Duotone transformers and compressed-tensors load it as BF16, without the weights' rounding to FP8.", ""]
    other += ["Where that does not run: `duotone check THIS_FOLDER`, `duotone export THIS_FOLDER OUT --format w4a16`.", ""]
    return [*serve, "In Python, on a CPU too:", "", *python, *other]


def _kept(kept: Mapping[str, str]) -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for layer, reason in kept.items():
        by_reason.setdefault(reason, []).append(layer)
    return by_reason


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---", "---"), *((a, b.replace("|", "\\|")) for a, b in rows))]
