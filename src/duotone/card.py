"""README.md of a checkpoint: the model card that the hub shows. No times and no paths: the same run gives the same bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import yaml
from huggingface_hub import ModelCardData, metadata_load

from duotone.calibrate.sources import titles
from duotone.checkpoint.sidecar import EVALUATION_RECORD, FORMAT_VERSION, read_record
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
    _put(folder, {"text": titles(text), "figures": dict(figures)})


def put_tasks(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Put the fields of `examining.TaskFigures` there likewise, in the place of the same metrics of the same tasks.

    Raises as `card_around` and `recorded_tasks` do.
    """
    found = {_key(one): dict(one) for one in recorded_tasks(folder)} | {_key(one): dict(one) for one in tasks}
    _put(folder, {"tasks": list(found.values())})


def recorded_tasks(folder: Path) -> list[dict[str, Any]]:
    """Tasks that a checkpoint's record tells of, none where there is none. Raises DuotoneError for what tells of no task."""
    tasks = (read_record(folder, EVALUATION_RECORD) or {}).get("tasks", [])
    if not isinstance(tasks, list) or not all(map(_is_task, cast("list[Any]", tasks))):
        raise DuotoneError(f"{folder / EVALUATION_RECORD}: found tasks of {tasks!r}, expected a list of figures with names")
    return tasks


#: Fields of a task that are names, and those that are figures, which may be unknown.
_NAMES, _NUMBERS = ("task", "by", "metric"), ("stderr", "reference_value", "difference", "difference_stderr", "mcnemar_p")


def _is_task(one: Any) -> bool:
    if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in _NAMES):
        return False
    numbers = [one.get("value"), one.get("items"), *(one[name] for name in _NUMBERS if one.get(name) is not None)]
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def _key(one: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(one[name] for name in _NAMES)


def _put(folder: Path, measured: Mapping[str, Any]) -> None:
    before, after = card_around(folder)
    record = {**(read_record(folder, EVALUATION_RECORD) or {}), "format_version": FORMAT_VERSION, **measured}
    write_text(folder / CARD, "\n".join((before + _BEGIN, *_evaluation(record), _END)) + after)
    write_json(folder / EVALUATION_RECORD, record)


TASK_HEADER = ("task", "items", "score", "original", "difference", "McNemar's p")


def task_cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    """A task's figures for people, under `TASK_HEADER`: shares in percent and their differences in points."""
    scale, unit, digits = (100, " %", 2) if one.get("is_share") else (1, "", 4)

    def shown(name: str, sign: str = "") -> str:
        return "-" if one.get(name) is None else f"{scale * one[name]:{sign}.{digits}f}"

    def spread(name: str) -> str:
        return "" if one.get(name) is None else f" ± {scale * one[name]:.{digits}f}"

    title = f"{one['task']}, {one['metric']}" + ("" if one["by"] == "duotone" else f" ({one['by']})")
    original = shown("reference_value") + (unit if one.get("reference_value") is not None else "")
    p = "-" if one.get("mcnemar_p") is None else f"{one['mcnemar_p']:.2f}"
    score, difference = f"{shown('value')}{spread('stderr')}{unit}", shown("difference", "+") + spread("difference_stderr")
    return title, str(one["items"]), score, original, difference, p


def card_around(folder: Path) -> tuple[str, str]:
    """A card before and behind the place of its evaluation. Raises DuotoneError where there is none."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise DuotoneError(f"{path}: found no place for an evaluation, expected the lines {_BEGIN} and {_END} in it")
    return before, after


def _evaluation(record: Mapping[str, Any]) -> list[str]:
    figures, lines = record.get("figures"), list[str]()
    if figures is not None:
        rows = [("perplexity", f"{figures['perplexity']:.4f}")]
        if figures["reference_perplexity"] is not None:
            rows.append(("perplexity of the original", f"{figures['reference_perplexity']:.4f}"))
        if figures["kl"] is not None:
            spread = "" if figures["kl_stderr"] is None else f" ± {figures['kl_stderr']:.5f}"
            rows.append(("KL to the original, nats a token", f"{figures['kl']:.5f}{spread}"))
            rows.append(("same likeliest token", f"{100 * figures['top1_agreement']:.2f} %"))
        lines += [f"On {figures['tokens']} tokens of {', '.join(record['text'])}:", "", *_table(("", ""), rows)]
    if record.get("tasks"):
        lines += [*([""] if lines else []), "On tasks:", "", *_table(TASK_HEADER, [task_cells(one) for one in record["tasks"]])]
    return lines


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = (header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    return [f"| {' | '.join(row)} |" for row in cells]
