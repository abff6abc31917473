"""What a runtime will do with a checkpoint is said before the work, from rules that name their source."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from duotone.checking import check, loading_notes, subject_of_checkpoint, subject_of_plan
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.loadability import GPUS, RUNTIMES, Linear, Subject, judge
from duotone.plan import make_plan
from duotone.settings import QuantizeConfig

ModelMaker = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "duotone-10m"


def llama(layout: str = "compressed-tensors", heads: tuple[int, int] = (32, 8), dim: int = 128, wide: int = 14336) -> Subject:
    """One block of a Llama 3 8B, unless said otherwise."""
    hidden = heads[0] * dim
    q, k, v = (
        Linear(f"model.layers.0.self_attn.{name}_proj", count * dim, hidden, "rows", count)
        for name, count in zip("qkv", (heads[0], heads[1], heads[1]), strict=True)
    )
    o = Linear("model.layers.0.self_attn.o_proj", hidden, hidden, "columns")
    gate, up = (Linear(f"model.layers.0.mlp.{name}_proj", wide, hidden, "rows") for name in ("gate", "up"))
    down = Linear("model.layers.0.mlp.down_proj", hidden, wide, "columns")
    return Subject(layout, 128, True, "bfloat16", ((q, k, v), (o,), (gate, up), (down,)), heads=heads)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_llama_8b_on_hopper(ranks: int) -> None:
    """14336 / 16 = 896 = 7 x 128 still divides; 14336 / 32 = 448 does not, and then down_proj and gate/up are named."""
    found = judge(llama(), "vllm", "h100", ranks)
    assert found.loads == (ranks <= 16)
    assert {layer.layer.rpartition(".")[2] for layer in found.layers if layer.reason} == (
        set() if found.loads else {"down_proj"}
    )
    if not found.loads:
        assert "down_proj of one rank of 32 is 4096 x 448" in found.reasons[0] and "multiple of 128" in found.reasons[0]
        assert any("--ignore 're:.*\\.down_proj$'" in advice for advice in found.advice)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 64}, ["group_size is 64", "--group-size 128"]),
        ({"symmetric": False}, ["zero points"]),
        ({"dtype": "float16"}, ["dtype float16", "--dtype bfloat16"]),
        ({"split": {"a.q_proj": ("a.k_proj", "a.v_proj")}}, ["a.q_proj stays BF16", "--ignore a.k_proj --ignore a.v_proj"]),
        ({"heads": (30, 10)}, ["30 heads and 10 of keys on 4 ranks"]),
        ({"layout": "int-quantized"}, ["INT8 byte", "weight_packed"]),
        ({"layout": "duotone-gaudi"}, ["Duotone's own"]),
        ({"layout": "modelopt"}, ["no W4A8_AWQ"]),
    ],
)
def test_each_refusal_is_a_sentence_with_its_source(change: dict, words: list[str]) -> None:
    """What was found, what was expected, where that was read, and what to do; every linear is told."""
    found = judge(replace(llama(), **change), "vllm", "h100", 4)
    assert not found.loads and len(found.reasons) == 1 and found.runs is None
    text = " ".join([*found.reasons, *found.advice])
    assert all(word in text for word in words)
    if "layout" not in change:
        assert "expected: " in found.reasons[0] and "[vllm 0.33.0 " in found.reasons[0]
    assert all(layer.outcome == "refused" for layer in found.layers)


def test_heads_of_keys_are_repeated_where_ranks_are_more() -> None:
    """Two heads of keys on eight ranks: each has one; queries, keys and values are one matrix of (4 + 1 + 1) x 64 rows."""
    assert judge(llama(heads=(32, 2), dim=64, wide=8192), "vllm", "h100", 8).loads
    odd = judge(llama(heads=(8, 2), dim=64, wide=8192), "vllm", "h100", 8)
    assert "q_proj+k_proj+v_proj of one rank of 8 is 192 x 512" in odd.reasons[0]


def test_fused_linears_are_measured_together() -> None:
    """Keys of 64 rows are no multiple of 128, but 512 + 64 + 64 is: vLLM has one matrix of the three."""
    subject = llama(heads=(8, 1), dim=64, wide=1024)
    assert judge(subject, "vllm", "h100").loads
    apart = replace(subject, fused=tuple((linear,) for fused in subject.fused for linear in fused))
    assert not judge(apart, "vllm", "h100").loads


#: outcome by runtime, layout and device. vLLM's for a CPU have been run: bench/records/vllm_generate.jsonl.
TABLE = {
    ("vllm", "compressed-tensors"): {"h100": "w4a8", "h200": "w4a8"},
    ("vllm", "w4a16"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100", "mi300x", "cpu"), "w4a16"),
    ("vllm", "gptq"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100", "mi300x", "cpu"), "w4a16"),
    ("vllm", "awq"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100"), "w4a16"),
    ("vllm-plugin", "compressed-tensors"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100", "mi300x", "cpu"), "w4a8"),
    ("vllm-plugin", "duotone-gaudi"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100", "mi300x", "cpu"), "w4a8"),
    ("vllm-plugin", "w4a16"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100", "mi300x", "cpu"), "w4a16"),
    ("sglang", "compressed-tensors"): {},
    ("sglang", "w4a16"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100"), "w4a16"),
    ("tensorrt-llm", "compressed-tensors"): {},
    ("tensorrt-llm", "w4a16"): {},
    ("tensorrt-llm", "gptq"): {},
    ("tensorrt-llm", "dense-bf16"): dict.fromkeys(("h100", "h200", "b200", "l40s", "a100"), "bf16"),
    ("tensorrt-llm", "modelopt"): dict.fromkeys(("h100", "h200", "b200", "l40s"), "w4a8"),
    ("sglang", "sglang-w4afp8"): dict.fromkeys(("h100", "h200", "b200"), "w8a8"),
    ("gaudi-inc", "gaudi-inc"): dict.fromkeys(("gaudi2", "gaudi3"), "w4a8"),
    ("gaudi-inc", "gptq"): dict.fromkeys(("gaudi2", "gaudi3"), "w4a16"),
    ("gaudi-inc", "duotone-gaudi"): {},
    ("llama.cpp", "gguf"): dict.fromkeys(GPUS, "w4a16"),
    ("transformers", "compressed-tensors"): dict.fromkeys(GPUS, "bf16"),
    ("duotone", "compressed-tensors"): dict.fromkeys(GPUS, "w4a8"),
    ("duotone", "duotone-gaudi"): dict.fromkeys(GPUS, "w4a8"),
}


@pytest.mark.parametrize(("runtime", "layout"), TABLE)
def test_what_loads_where(runtime: str, layout: str) -> None:
    """Every device of the list."""
    for gpu in GPUS:
        assert judge(llama(layout), runtime, gpu).outcome == TABLE[runtime, layout].get(gpu, "refused"), gpu


@pytest.mark.parametrize(("gpu", "layout"), [("a100", "w4a16"), ("mi300x", "w4a16"), ("cpu", "w4a16"), ("gaudi3", None)])
def test_where_it_does_not_load_something_else_is_advised(gpu: str, layout: str | None) -> None:
    """An export that the same runtime loads there, if there is one."""
    exports = [advice for advice in judge(llama(), "vllm", gpu).advice if "export" in advice]
    assert exports == [] if layout is None else f"--format {layout} loads there" in exports[0]


@pytest.mark.parametrize(
    ("runtime", "gpu", "layout", "export"),
    [
        ("gaudi-inc", "gaudi2", "duotone-gaudi", "gaudi-inc"),
        ("tensorrt-llm", "h100", "duotone-gaudi", "modelopt"),
        ("llama.cpp", "cpu", "compressed-tensors", "gguf"),
        ("vllm", "h100", "duotone-gaudi", "compressed-tensors"),
        ("sglang", "b200", "compressed-tensors", "w4a16"),
    ],
)
def test_of_ours_some_export_loads(runtime: str, gpu: str, layout: str, export: str) -> None:
    """The first of the list that the runtime takes there."""
    assert f"duotone export --format {export} loads there" in judge(llama(layout), runtime, gpu).advice[-1]


def test_gaudi_wants_whole_words_and_groups() -> None:
    """Neural Compressor packs 32 outputs for Gaudi, of each rank's share of what is fused."""
    odd = replace(llama("gaudi-inc"), fused=((Linear("a", 40, 128, "rows"),),))
    (reason,) = judge(odd, "gaudi-inc", "gaudi2").reasons
    assert "a is 40 x 128, expected: out_features of a rank is a multiple of 32" in reason and "HPUWeightOnlyLinear" in reason
    short = replace(llama("gaudi-inc"), fused=((Linear("a", 64, 192, "rows"),),))
    assert "group_size divides in_features" in judge(short, "gaudi-inc", "gaudi2").reasons[0]


@pytest.mark.parametrize(
    ("change", "gpu", "words"),
    [
        ({"group_size": 64}, "h100", ["group_size is 64", "fpA_intB_launcher_sm90.inl"]),
        ({"group_size": 32}, "l40s", ["group_size is 32", "--group-size 128"]),
        ({"symmetric": False}, "b200", ["zero points", "finegrained_mixed_dtype_gemm"]),
        ({"dtype": "float32"}, "h100", ["dtype float32", "W4A8_AWQ_LinearMethod"]),
        ({}, "a100", ["the device is a100", "MAX_SUPPORTED_SM_VERSION_W4A8"]),
    ],
)
def test_tensorrt_llm(change: dict, gpu: str, words: list[str]) -> None:
    """Ada's kernel takes groups of 64 too, Hopper's and Blackwell's whole tiles of 128; each sentence names its source."""
    assert judge(replace(llama("modelopt"), group_size=64), "tensorrt-llm", "l40s").loads
    found = judge(replace(llama("modelopt"), **change), "tensorrt-llm", gpu)
    assert not found.loads and all(word in " ".join([*found.reasons, *found.advice]) for word in words), found


PEERS = ROOT / "tests" / "fixtures" / "peers"


@pytest.mark.parametrize(
    ("made_by", "runtime", "gpu", "outcome"),
    [
        ("modelopt", "tensorrt-llm", "h100", "w4a8"),
        ("modelopt", "vllm", "h100", "refused"),
        ("gptqmodel", "tensorrt-llm", "h100", "refused"),
        ("llmcompressor-packed", "tensorrt-llm", "h100", "refused"),
        ("llmcompressor-packed", "vllm", "h100", "w4a8"),
        ("llmcompressor-bytes", "vllm", "h100", "refused"),
    ],
)
def test_what_other_tools_wrote(made_by: str, runtime: str, gpu: str, outcome: str) -> None:
    """Checkpoints that the real tools have made."""
    (found,) = check(PEERS / made_by, [runtime], [gpu])
    assert found.outcome == outcome, found.reasons
    if made_by == "modelopt":  # which TensorRT-LLM reads of each linear that it does not fuse
        assert {"model.layers.0.self_attn.o_proj.pre_quant_scale", "model.layers.0.mlp.down_proj.pre_quant_scale"} <= set(
            open_source(PEERS / made_by).tensors
        )


def test_vllm_on_a_cpu_does_what_the_rules_say() -> None:
    """The records of bench/peers/vllm_generate.py: every layout that was run, and how near vLLM came to its weights.

    Nearer than three times what BF16 arithmetic alone makes of dense weights.
    """
    lines = (ROOT / "bench" / "records" / "vllm_generate.jsonl").read_text().splitlines()
    rows = {row["layout"]: row for row in map(json.loads, lines)}
    assert set(rows) == {"compressed-tensors", "w4a16", "gptq", "dense-bf16"}
    for layout, row in rows.items():
        assert row["check"] == judge(llama(layout), "vllm", "cpu").outcome and (row["check"] == "refused") == bool(
            row["refused"]
        )
    for layout in ("w4a16", "gptq"):
        assert rows[layout]["mean_difference"] < 3 * rows["dense-bf16"]["mean_difference"]
        assert rows[layout]["likeliest"] >= 0.95 * rows[layout]["tokens"] > 0


def test_the_plugin_takes_what_vllm_refuses() -> None:
    """vLLM's own kernel where it has one; elsewhere ours, advised where vLLM refuses, with what is known of it."""
    assert judge(llama(), "vllm-plugin", "h100").runs == "CUTLASS W4A8"
    refused = judge(llama(), "vllm", "cpu")
    assert "with Duotone installed beside it (vllm-plugin) it loads there: Duotone's CPU kernel" in refused.advice
    for gpu, words in (("l40s", "Triton kernels: tested without a GPU, never run on one"), ("a100", "not run on a GPU")):
        assert any(words in advice for advice in judge(llama("duotone-gaudi"), "vllm", gpu).advice)
    odd = judge(llama(wide=14336 + 64), "vllm-plugin", "h100")  # 14400 is no multiple of 128: vLLM would refuse, and is left to
    assert odd.runs is not None and odd.runs.startswith("with --quantization duotone")
    assert not any("vllm-plugin" in advice for advice in judge(llama(), "vllm", "gaudi2").advice)


@pytest.mark.parametrize(("ranks", "loads"), [(1, True), (2, True), (4, False)])
def test_the_plugin_cuts_columns_by_eights(ranks: int, loads: bool) -> None:
    """48 columns on four ranks are 12 each, half a word of the file; on one rank nothing is cut."""
    found = judge(llama(heads=(4, 4), dim=32, wide=48), "vllm-plugin", "cpu", ranks)
    assert found.loads == loads
    assert (
        loads
        or "down_proj of one rank of 4 is 128 x 12, expected: in_features of a rank is a multiple of 8" in found.reasons[0]
    )


def test_vllm_with_the_plugin_does_what_the_rules_say() -> None:
    """The records of bench/peers/vllm_plugin.py: every weight of every rank is the contract's.

    In float32 the tokens are our own runtime's, on two ranks where activations have a scale of all columns. In BF16 vLLM is
    about as far from that as our own runtime in BF16.
    """
    rows = [json.loads(line) for line in (ROOT / "bench" / "records" / "vllm_plugin.jsonl").read_text().splitlines()]
    assert {(row["target"], row["ranks"]) for row in rows} == {("hopper", 1), ("hopper", 2), ("gaudi", 1), ("gaudi", 2)}
    for row in rows:
        layout = "compressed-tensors" if row["target"] == "hopper" else "duotone-gaudi"
        assert judge(llama(layout), "vllm-plugin", "cpu", row["ranks"]).loads
        assert row["equal"] == row["layers"] > 0 and row["bits_in_memory"] < 5
        if row.get("dtype") == "float32":
            assert row["same"] == row["tokens"] > 0
        else:
            assert row["mean_difference"] < 2 * row["ours"]["mean_difference"]


def test_every_rule_has_a_source() -> None:
    """Package and version, or this project."""
    for runtime in RUNTIMES.values():
        rules = [rule for route in runtime.routes for rule in route.rules]
        assert runtime.version and all(rule.source and rule.says for rule in rules)
        if runtime.name in {"vllm", "sglang"}:
            assert rules and all(rule.source.startswith(f"{runtime.name} {runtime.version} ") for rule in rules)


def mixture(hidden: int = 4096, wide: int = 14336, **changed: object) -> Subject:
    """A layer of a Mixtral 8x7B, unless said otherwise: its attention, and two of its experts."""
    bank, dense = "model.layers.0.mlp.experts", llama()
    experts: list[tuple[Linear, ...]] = []
    for expert in range(2):
        gate, up = (Linear(f"{bank}.{expert}.{name}_proj", wide, hidden, "rows", bank=bank) for name in ("gate", "up"))
        experts += [(gate, up), (Linear(f"{bank}.{expert}.down_proj", hidden, wide, "columns", bank=bank),)]
    return replace(dense, fused=(*dense.fused[:2], *experts), **changed)


@pytest.mark.parametrize(
    ("subject", "ranks", "words"),
    [
        (mixture(), 1, ()),
        (mixture(), 8, ()),  # 14336 / 8 = 7 x 256
        (mixture(wide=1408), 1, ("the experts' gate_proj is 1408 x 4096", "are multiples of 256")),  # DeepSeek-V2-Lite
        (mixture(wide=768), 2, ("the experts' down_proj of one rank of 2 is 4096 x 384",)),  # Qwen3-30B-A3B
        (mixture(biased=frozenset({"model.layers.0.mlp.experts"})), 1, ("the experts have biases",)),
        (mixture(kept={"model.layers.0.mlp.experts.1.down_proj": "ignored"}), 1, ("experts.1.down_proj is not in 4 bits",)),
        (mixture(kept={"model.layers.1.mlp.experts.1.down_proj": "ignored"}), 1, ()),  # another layer's
        (mixture(kept={"model.layers.0.mlp.gate": "a router"}), 1, ()),
    ],
)
def test_experts_in_vllm(subject: Subject, ranks: int, words: tuple[str, ...]) -> None:
    """Its kernel for all experts at once wants multiples of 256, one scheme, no biases."""
    found = judge(subject, "vllm", "h100", ranks)
    assert found.loads == (not words)
    told = f"{found.reasons} {found.advice}"
    assert all(word in told.replace('"', "'") for word in words)


def test_experts_of_a_model(tiny_model: ModelMaker) -> None:
    """Which linears are experts is known from the model: GPT-OSS's have biases, and a Mixtral of this size is too narrow."""
    for model_type, words in (("gpt_oss", "the experts have biases"), ("mixtral", "the experts' gate_proj is 256 x 128")):
        sizes: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2}
        sizes |= {"layer_types": ["full_attention", "sliding_attention"]} if model_type == "gpt_oss" else {}
        source = open_source(tiny_model(model_type, **sizes))
        plan = make_plan(source, QuantizeConfig(tensor_parallel=2))
        subject = subject_of_plan(plan)
        assert any(words in reason for reason in judge(subject, "vllm", "h100").reasons)
        assert not subject.experts
        down = next(linear for fused in subject.fused for linear in fused if linear.bank and "down" in linear.name)
        assert down.cut == "columns" and plan.shards(down.name) == 2
        assert subject_of_plan(make_plan(source, QuantizeConfig(ignore=("re:.*self_attn.*",)))).experts


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"runtime": "ollama"}, "--runtime: found 'ollama'"),
        ({"gpu": "h900"}, "--gpu: found"),
        ({"tensor_parallel": 0}, "at least 1"),
    ],
)
def test_unknown_names(changed: dict, words: str) -> None:
    """Refused with what there is."""
    with pytest.raises(DuotoneError, match=words):
        judge(llama(), **({"runtime": "vllm", "gpu": "h100"} | changed))


# ---- of folders


def test_of_a_model_and_of_the_checkpoint_made_of_it(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Before and after quantizing the verdict is the same, linear by linear."""
    import duotone

    model = tiny_model(hidden_size=256, intermediate_size=384, head_dim=64)
    duotone.quantize(model, tmp_path / "out", method="rtn")
    for gpu, ranks in (("h100", 1), ("h100", 2), ("a100", 1)):
        before, after = (check(path, ["vllm"], [gpu], ranks)[0] for path in (model, tmp_path / "out"))
        assert (before.outcome, before.reasons) == (after.outcome, after.reasons)
        assert {(one.layer, one.outcome) for one in before.layers} == {(one.layer, one.outcome) for one in after.layers}
    subject = subject_of_checkpoint(open_source(tmp_path / "out"))
    assert subject.heads == (4, 2) and len(subject.fused) == 8 and subject.split == {}
    assert len(check(model)) == len(RUNTIMES) * len(GPUS)


def test_partly_ignored_groups_are_found(tiny_model: ModelMaker) -> None:
    """Ignoring q alone splits a fused group; ignoring all three, or a linear that reads its input alone, does not."""
    source = open_source(tiny_model())
    attention = "model.layers.{}.self_attn.{}_proj"
    for ignore, blocks in {("re:.*q_proj",): 2, ("re:.*[qkv]_proj", "re:.*o_proj", "re:.*down_proj"): 0, (): 0}.items():
        plan = make_plan(source, QuantizeConfig(ignore=ignore))
        assert subject_of_plan(plan).split == {
            attention.format(i, "q"): (attention.format(i, "k"), attention.format(i, "v")) for i in range(blocks)
        }


#: As the tools write them (bench/peers): llm-compressor 0.14, packed and not, GPTQModel 7.6, AutoRound 0.16, ModelOpt 0.47.
CONFIGS = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {
            "format": "pack-quantized", "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
        }},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "ignore": ["lm_head"]},
    "gaudi-inc": {"quant_method": "neural-compressor-dpq", "bits": 4, "group_size": 128, "sym": True},
}  # fmt: skip
CONFIGS["int-quantized"] = json.loads(json.dumps(CONFIGS["compressed-tensors"]).replace("pack-quantized", "int-quantized"))
CONFIGS["w4a16"] = json.loads(json.dumps(CONFIGS["compressed-tensors"]))
CONFIGS["w4a16"]["config_groups"]["group_0"]["input_activations"] = None


@pytest.mark.parametrize("layout", CONFIGS)
def test_layouts_of_other_tools_are_known(layout: str) -> None:
    """By the config that each tool writes; a damaged one, or another tool's, is one sentence."""
    from duotone.checkpoint.compressed_tensors import layout_of

    assert layout_of(CONFIGS[layout]) == (layout, 128, True)
    with pytest.raises(DuotoneError, match=r"config\.json"):
        layout_of(
            {key: value for key, value in CONFIGS[layout].items() if key not in {"config_groups", "group_size", "quant_algo"}}
        )


def test_loading_notes(tiny_model: ModelMaker) -> None:
    """Without --runtime vLLM's refusal is a note; with it, an error before the work, or a promise."""
    fitting, odd = tiny_model(hidden_size=256, intermediate_size=384, head_dim=64), tiny_model()
    plan = make_plan(open_source(fitting), QuantizeConfig())
    assert loading_notes(plan) == []
    (promise,) = loading_notes(replace(plan, config=QuantizeConfig(runtime="vllm", gpu="h200")))
    assert promise == "loads in vllm (0.33.0) on h200: CUTLASS W4A8"
    plan = make_plan(open_source(odd), QuantizeConfig(group_size=32))
    assert loading_notes(plan)[0].startswith("will not load in vLLM: group_size is 32")
    with pytest.raises(
        DuotoneError, match=r"--runtime: would not load in vllm \(0.33.0\) on h100: group_size is 32.*--group-size 128"
    ):
        loading_notes(replace(plan, config=QuantizeConfig(group_size=32, runtime="vllm")))
    with pytest.raises(DuotoneError, match="--runtime: found 'vlm', expected one of vllm, vllm-plugin, sglang"):
        QuantizeConfig(runtime="vlm")


@pytest.mark.parametrize(
    ("made_for", "ranks", "exact"), [(1, 1, True), (1, 2, False), (2, 2, True), (4, 2, True), (2, 4, False)]
)
def test_ranks_that_round_again_are_told_of(made_for: int, ranks: int, exact: bool) -> None:
    """Where a checkpoint is not made for so many; it loads all the same."""
    found = judge(replace(llama(), made_for=made_for), "vllm", "h100", ranks)
    assert found.loads and (found.advice == []) == exact
    assert (
        exact
        or f"quantize by dpq with --tensor-parallel {ranks}: each rank rounds its part of o_proj, down_proj" in found.advice[0]
    )
