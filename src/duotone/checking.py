# Shapes: N out_features, K in_features.
"""`duotone check`: a checkpoint that is there, or the one that would be made of a model, before the runtimes' rules.

Reads config and headers, no weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from duotone.checkpoint.compressed_tensors import layout_of
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import kv_strategy_of
from duotone.checkpoint.prequantized import widened
from duotone.checkpoint.reader import is_fp8_weight
from duotone.checkpoint.sidecar import read_sidecar, recorded_inputs
from duotone.checkpoint.source import SourceFolder, open_source
from duotone.errors import DuotoneError
from duotone.inspection import why_kept
from duotone.loadability import GPUS, RUNTIMES, Linear, Loadability, Subject, judge
from duotone.models.anatomy import Anatomy, linears_by_input
from duotone.models.diffusion import library_of
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears, text_config
from duotone.models.vision import full_anatomy, vision_path
from duotone.plan import Plan, make_plan
from duotone.runtime.load import config_dtype
from duotone.scheme import Fp8Scheme
from duotone.settings import QuantizeConfig

#: How the packed weight of a linear is called in the layouts that are known.
_PACKED = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_inv")


def check(
    model: str | Path,
    runtimes: Iterable[str] = (),
    gpus: Iterable[str] = (),
    tensor_parallel: int = 1,
    config: QuantizeConfig | None = None,
) -> list[Loadability]:
    """Each runtime on each device, all of them where none is named. config: how a model that is not quantized would be.

    Raises DuotoneError for a model that cannot be read or planned, and for names that are not known.
    """
    source = open_source(locate_model(model))
    original = widened(source)
    if original.config.get("quantization_config") is None:
        subject = subject_of_plan(make_plan(original, config or QuantizeConfig()))
    else:
        subject = subject_of_checkpoint(source)
    devices = list(gpus) or list(GPUS)
    return [judge(subject, runtime, gpu, tensor_parallel) for runtime in list(runtimes) or list(RUNTIMES) for gpu in devices]


def subject_of_plan(plan: Plan) -> Subject:
    """The checkpoint that a plan would write."""
    scheme = plan.config.scheme
    layout = "compressed-tensors" if scheme.target.channel_outer_scale else "duotone-gaudi"
    grid = (scheme.group_size, scheme.symmetric)
    in_fp8 = frozenset(name for name, kind in plan.schemes.items() if isinstance(kind, Fp8Scheme))
    subject = _subject(plan.text, plan.anatomy, layout, grid, plan.shapes, plan.kept, "bfloat16", in_fp8)
    ranks = plan.config.tensor_parallel if plan.config.method == "dpq" else 1
    biased, library = _biased(subject, plan.source.tensors), library_of(plan.source.config)
    return replace(subject, made_for=ranks, kv_cache=plan.config.kv_strategy, biased=biased, library=library)


def subject_of_checkpoint(source: SourceFolder) -> Subject:
    """A quantized checkpoint, ours or another tool's. Raises DuotoneError for a layout that is not known."""
    quantization: dict[str, Any] = source.config["quantization_config"]
    layout, group_size, symmetric = layout_of(quantization)
    dtype = config_dtype(source.config)
    sidecar = read_sidecar(source.path) or {}
    shapes, kept, in_fp8 = {}, {}, set[str]()
    model = build_skeleton(source.config, dtype)
    named = named_source(source, model)
    for name, linear in find_linears(model).items():
        weight = f"{name}.weight"
        is_fp8 = weight in named.tensors and is_fp8_weight(named, weight)
        if is_fp8 or any(f"{name}{suffix}" in named.tensors for suffix in _PACKED):
            shapes[name] = (linear.out_features, linear.in_features)
            in_fp8 |= {name} if is_fp8 else set()
        else:
            kept[name] = why_kept(named.written_as(name), sidecar, quantization) or "not quantized"
    if not shapes:
        raise DuotoneError(f"{source.path}: found no quantized linear, expected some of the layout {layout}")
    tower = vision_path(model)
    subject = _subject(
        text_config(model),
        full_anatomy(
            source.config,
            model,
            tower is not None and any(name.startswith(f"{tower}.") for name in shapes),
            recorded_inputs(source.path),
        ),
        layout,
        (group_size, symmetric),
        shapes,
        kept,
        str(dtype).removeprefix("torch."),
        frozenset(in_fp8),
    )
    settings = sidecar.get("settings", {})
    ranks = settings.get("tensor_parallel", 1) if settings.get("method") == "dpq" else 1
    cache, biased, library = kv_strategy_of(quantization), _biased(subject, named.tensors), library_of(source.config)
    return replace(subject, made_for=int(ranks), kv_cache=cache, biased=biased, library=library)


def _biased(subject: Subject, tensors: Iterable[str]) -> frozenset[str]:
    """Banks whose experts have biases."""
    names = set(tensors)
    return frozenset(linear.bank for fused in subject.fused for linear in fused if f"{linear.name}.bias" in names)


def _subject(
    text: PreTrainedConfig | None,
    anatomy: Anatomy,
    layout: str,
    grid: tuple[int, bool],
    shapes: Mapping[str, tuple[int, int]],
    kept: dict[str, str],
    dtype: str,
    in_fp8: frozenset[str] = frozenset(),
) -> Subject:
    """The linears as runtimes see them: fused where they read the same input, cut along K where they write to the stream."""
    queries = _count(text, "num_attention_heads")
    heads = queries, _count(text, "num_key_value_heads") or queries
    fused: list[tuple[Linear, ...]] = []
    fused_fp8: list[tuple[Linear, ...]] = []
    split: dict[str, tuple[str, ...]] = {}
    for names in linears_by_input(anatomy, [*shapes, *kept]):
        coded = tuple(name for name in names if name in shapes and name not in in_fp8)
        narrow = tuple(name for name in names if name in in_fp8)
        split |= {name: coded or narrow for name in names if name in kept and (coded or narrow)}
        split |= {name: coded for name in narrow if coded}
        for found, partners in ((fused, coded), (fused_fp8, narrow)):
            linears = (_linear(anatomy, name, shapes[name], names.index(name), len(names), heads) for name in partners)
            found += [tuple(linears)] if partners else []
    return Subject(layout, *grid, dtype, tuple(fused), split, kept, heads, fp8=tuple(fused_fp8))


def _count(text: PreTrainedConfig | None, name: str) -> int:
    """A number of the config; 0 where it has none, or one for each stage as pyramids have."""
    value = getattr(text, name, 0)
    return value if isinstance(value, int) else 0


def _linear(anatomy: Anatomy, name: str, shape: tuple[int, int], place: int, of: int, heads: tuple[int, int]) -> Linear:
    """Queries, keys and values are three that read one input, and are made of heads; a vision tower's are others. Ranks
    have parts of every expert.
    """
    bank = next((bank for block in anatomy.all_blocks for bank in block.experts if name.startswith(f"{bank}.")), "")
    writes = any(name in block.streams for block in anatomy.all_blocks) or (bank and name.endswith(".down_proj"))
    units = (heads[0] if place == 0 else heads[1]) if of == 3 and name not in anatomy.seeing else 0
    return Linear(name, *shape, "columns" if writes else "rows", units, bank)


def loading_notes(plan: Plan) -> list[str]:
    """What is known of loading the checkpoint that a plan would write, a line each: where `--runtime` says, else in vLLM.

    Raises DuotoneError where it would not load as `--runtime` asks; the sentence says what would.
    """
    config, subject = plan.config, subject_of_plan(plan)
    if config.runtime is None:
        found = judge(subject, "vllm", "h100")
        return [f"will not load in vLLM: {reason}" for reason in found.reasons]
    found = judge(subject, config.runtime, config.gpu, config.tensor_parallel)
    ranks = f", {config.tensor_parallel} ranks" if config.tensor_parallel > 1 else ""
    where = f"{config.runtime} ({found.version}) on {config.gpu}{ranks}"
    if found.loads:
        return [f"loads in {where}: {found.runs}", *found.advice]
    rest = f" (and {len(found.reasons) - 1} more)" if len(found.reasons) > 1 else ""
    advice = f"; {'; '.join(found.advice)}" if found.advice else ""
    raise DuotoneError(f"--runtime: would not load in {where}: {found.reasons[0]}{rest}{advice}")
