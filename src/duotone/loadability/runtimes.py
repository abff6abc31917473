"""The runtimes: which layouts each reads, what multiplies them, and what that asks for. Data, each with its source."""

from duotone.loadability.caches import VLLM_CACHE
from duotone.loadability.mixtures import VLLM_EXPERTS
from duotone.loadability.plugin import ON_GPU, TRITON, with_plugin
from duotone.loadability.routes import Route, Runtime
from duotone.loadability.rules import (
    capability,
    dtype,
    experts,
    group_size,
    groups_stay_whole,
    heads,
    multiples,
    symmetric,
    vendor,
    whole_fusions,
)

_VLLM, _VLLM_LAYERS = "vllm 0.33.0", "model_executor/layers/quantization"
_VLLM_CT = f"{_VLLM} {_VLLM_LAYERS}/compressed_tensors"
_VLLM_KERNELS = f"{_VLLM} model_executor/kernels/linear/mixed_precision"
_VLLM_PARALLEL = (
    heads(f"{_VLLM} model_executor/layers/linear.py QKVParallelLinear.__init__"),
    whole_fusions(f"{_VLLM_CT}/utils.py should_ignore_layer"),
)
_MARLIN = (
    capability(f"{_VLLM_KERNELS}/marlin.py MarlinLinearKernel.get_min_capability", least=75),
    group_size(f"{_VLLM} {_VLLM_LAYERS}/utils/marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES", 32, 64, 128),
    groups_stay_whole(f"{_VLLM_KERNELS}/marlin.py MarlinLinearKernel.can_implement"),
    *_VLLM_PARALLEL,
    VLLM_CACHE,
)
_TRITON = (
    vendor(f"{_VLLM_KERNELS}/triton_w4a16.py TritonW4A16LinearKernel.can_implement", "amd"),
    group_size(f"{_VLLM_KERNELS}/triton_w4a16.py TRITON_W4A16_SUPPORTED_GROUP_SIZES", 32, 64, 128, 256),
    multiples(f"{_VLLM_KERNELS}/triton_w4a16.py TritonW4A16LinearKernel.can_implement", 8, 1),
    groups_stay_whole(f"{_VLLM_KERNELS}/triton_w4a16.py TritonW4A16LinearKernel.can_implement"),
    *_VLLM_PARALLEL,
    VLLM_CACHE,
)
_CPU = (
    vendor(f"{_VLLM_KERNELS}/cpu.py CPUWNA16LinearKernel.can_implement", "cpu"),
    multiples(f"{_VLLM_KERNELS}/cpu.py CPUWNA16LinearKernel.can_implement", 32, 32),
    groups_stay_whole(f"{_VLLM_CT}/schemes/compressed_tensors_wNa16.py create_weights"),
    *_VLLM_PARALLEL,
    VLLM_CACHE,
)
# Asked of every device, whatever kernel is chosen then.
_GPTQ = (
    symmetric(f"{_VLLM} {_VLLM_LAYERS}/auto_gptq.py AutoGPTQConfig.TYPE_MAP"),
    group_size(f"{_VLLM} {_VLLM_LAYERS}/utils/marlin_utils.py verify_marlin_supported", 32, 64, 128),
)
_CUTLASS = f"{_VLLM_KERNELS}/cutlass.py CutlassW4A8LinearKernel.can_implement"

VLLM = Runtime(
    "vllm",
    "0.33.0",
    (
        Route(
            "compressed-tensors",
            "w4a8",
            "CUTLASS W4A8",
            (
                capability(f"{_VLLM_CT}/compressed_tensors.py _is_fp8_w4a8_sm90", exactly=90),
                group_size(f"{_VLLM_CT}/schemes/compressed_tensors_w4a8_fp8.py CompressedTensorsW4A8Fp8.__init__", 128),
                symmetric(_CUTLASS),
                dtype(_CUTLASS, "bfloat16"),
                multiples(_CUTLASS, 128, 128),
                *VLLM_EXPERTS,
                *_VLLM_PARALLEL,
                VLLM_CACHE,
            ),
            splits_scales=True,
        ),
        Route("w4a16", "w4a16", "Machete or Marlin W4A16", _MARLIN),
        Route("w4a16", "w4a16", "Triton W4A16", _TRITON),
        Route("w4a16", "w4a16", "CPU W4A16", _CPU),
        Route("gptq", "w4a16", "Machete or Marlin W4A16", (*_GPTQ, *_MARLIN)),
        Route("gptq", "w4a16", "Triton W4A16", (*_GPTQ, *_TRITON)),
        Route("gptq", "w4a16", "CPU W4A16", (*_GPTQ, *_CPU)),
        Route(
            "awq",
            "w4a16",
            "AWQ's own kernels, Marlin where the file has zero points",
            (
                capability(f"{_VLLM} {_VLLM_LAYERS}/auto_awq.py AutoAWQConfig.get_min_capability", least=75),
                multiples(f"{_VLLM} {_VLLM_LAYERS}/auto_awq.py BaseAWQLinearMethod.create_weights", 8, 1),
                groups_stay_whole(f"{_VLLM} {_VLLM_LAYERS}/auto_awq.py BaseAWQLinearMethod.create_weights"),
                *_VLLM_PARALLEL,
            ),
        ),
        Route(
            "dense-bf16",
            "bf16",
            "BF16",
            (
                vendor(f"{_VLLM} platforms/__init__.py", "nvidia", "amd", "cpu"),
                heads(f"{_VLLM} model_executor/layers/linear.py QKVParallelLinear.__init__"),
            ),
        ),
    ),
    {
        "duotone-gaudi": "the format of target gaudi is Duotone's own",
        "int-quantized": "weights are one INT8 byte each, its W4A8 scheme reads weight_packed",
        "modelopt": f"it has no W4A8_AWQ ({_VLLM_LAYERS}/modelopt.py)",
        "gaudi-inc": "its readers of GPTQ would lose the factor scale_bf16_to_fp8",
    },
    plugin="vllm-plugin",
)
VLLM_PLUGIN = with_plugin(VLLM, (*_VLLM_PARALLEL, VLLM_CACHE))

_SGLANG = "sglang 0.5.23 srt/layers/quantization"
_SGLANG_MARLIN = f"{_SGLANG}/marlin_utils.py check_marlin_supports_shape"
_SGLANG_ROUTE = (
    capability(f"{_SGLANG}/compressed_tensors/schemes/compressed_tensors_wNa16.py get_min_capability", least=80),
    group_size(f"{_SGLANG}/marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES", 32, 64, 128),
    multiples(_SGLANG_MARLIN, 64, 128),
    groups_stay_whole(_SGLANG_MARLIN),
    heads("sglang 0.5.23 srt/layers/linear.py QKVParallelLinear.__init__"),
    whole_fusions(f"{_SGLANG}/compressed_tensors/utils.py should_ignore_layer"),
)
SGLANG = Runtime(
    "sglang",
    "0.5.23",
    (
        Route(
            "compressed-tensors",
            "w4a8",
            "W4AFP8 experts",
            (
                experts(f"{_SGLANG}/compressed_tensors/compressed_tensors.py _get_scheme_from_parts (NotImplementedError)"),
                group_size(f"{_SGLANG}/compressed_tensors/schemes/compressed_tensors_w4a8_fp8_moe.py", 128),
                capability(f"{_SGLANG}/compressed_tensors/schemes/compressed_tensors_w4a8_fp8_moe.py", least=90),
            ),
        ),
        Route("w4a16", "w4a16", "Marlin W4A16", _SGLANG_ROUTE),
        Route(
            "sglang-w4afp8",
            "w8a8",
            "FP8 in blocks of 128 x 128 (of a mixture the experts stay INT4)",
            (
                capability(f"{_SGLANG}/w4afp8.py W4AFp8Config.get_min_capability", least=90),
                multiples(f"{_SGLANG}/fp8.py Fp8LinearMethod.validate_block_quant_shapes", 128, 128),
                symmetric(f"{_SGLANG}/w4afp8.py W4AFp8MoEMethod.create_weights"),
                heads("sglang 0.5.23 srt/layers/linear.py QKVParallelLinear.__init__"),
                whole_fusions(f"{_SGLANG}/w4afp8.py W4AFp8Config.from_config"),
            ),
        ),
        Route("dense-bf16", "bf16", "BF16", (vendor("sglang 0.5.23 srt/utils/common.py", "nvidia", "amd", "cpu"),)),
    ),
    {
        "duotone-gaudi": "the format of target gaudi is Duotone's own",
        "int-quantized": "it has no dense scheme for 4-bit weights with FP8 activations",
    },
)

# Its wheels are not on the public index, so its repository was read, each file at the newest commit that was to be had.
_TRT = "TensorRT-LLM main tensorrt_llm"
_TRT_AWQ = f"{_TRT}/_torch/modules/linear.py @00bbf71e W4A8_AWQ_LinearMethod"
_TRT_GEMM = f"{_TRT}/_torch/custom_ops/torch_custom_ops.py @000af3a1 finegrained_mixed_dtype_gemm"
_TRT_MATRIX = "docs/source/features/quantization.md @09d4c79b Hardware Support Matrix"
_TRT_KERNEL = "TensorRT-LLM main cpp/tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm"
_TRT_WEIGHTS = (
    symmetric(f"{_TRT_GEMM} (asserts zeros, which the method does not give)"),
    dtype(f"{_TRT_AWQ}.apply (output_dtype)", "bfloat16", "float16"),
    groups_stay_whole(f"{_TRT_AWQ}.create_weights"),
    multiples(f"{_TRT}/quantization/functional.py @2a9abd95 preprocess_weights_for_mixed_gemm", 8, 32),
)
TENSORRT_LLM = Runtime(
    "tensorrt-llm",
    "main of 2026",
    (
        Route(
            "modelopt",
            "w4a8",
            "W4A8_AWQ, static activations",
            (
                # At most 10.3, which no device of the list exceeds; older versions stopped at 9.0.
                capability(f"TensorRT-LLM {_TRT_MATRIX}; {_TRT_GEMM} MAX_SUPPORTED_SM_VERSION_W4A8", least=89),
                group_size(f"{_TRT_KERNEL}/launchers/fpA_intB_launcher_sm90.inl @2a9abd95 (a multiple of the tile's K)", 128),
                *_TRT_WEIGHTS,
            ),
        ),
        Route(
            "modelopt",
            "w4a8",
            "W4A8_AWQ, static activations",
            (
                capability(f"TensorRT-LLM {_TRT_MATRIX}", exactly=89),
                group_size(f"{_TRT_KERNEL}/fpA_intB_gemm_template.h @03cff08f generic_mixed_gemm_kernelLauncher", 64, 128),
                *_TRT_WEIGHTS,
            ),
        ),
        Route("dense-bf16", "bf16", "BF16", (vendor(f"{_TRT}/_torch/modules/linear.py @00bbf71e get_quant_method", "nvidia"),)),
    ),
    dict.fromkeys(
        ("compressed-tensors", "w4a16", "int-quantized"),
        "of compressed-tensors it reads FP8, NVFP4 and MXFP4 weights (models/quant_config_utils.py @21156a7a)",
    )
    | {
        "duotone-gaudi": "the format of target gaudi is Duotone's own",
        "gaudi-inc": "it knows no quant_method of Neural Compressor",
        "gptq": "its reader of config.json knows no quant_method gptq (_torch/model_config.py @008e0af8 load_hf_quant_config)",
    },
)

_CT = "compressed-tensors 0.19.0 compressors/quantized_compressors"
TRANSFORMERS = Runtime(
    "transformers",
    "5.17.0 with compressed-tensors 0.19.0",
    (
        Route(
            "compressed-tensors",
            "bf16",
            "unpacked to BF16 at load, activations rounded to FP8, without the weights' second rounding",
            (groups_stay_whole(_CT),),
        ),
        Route("w4a16", "bf16", "unpacked to BF16 at load", (groups_stay_whole(_CT),)),
        Route("int-quantized", "bf16", "BF16 from INT8 at load", (groups_stay_whole(_CT),)),
        Route("dense-bf16", "bf16", "BF16", ()),
    ),
    {"duotone-gaudi": "the format of target gaudi is Duotone's own", "gptq": "it needs GPTQModel for this layout"},
)

_INC = "neural_compressor_pt 3.10 torch/algorithms"
_HPU = f"{_INC}/weight_only/modules.py HPUWeightOnlyLinear"
GAUDI_INC = Runtime(
    "gaudi-inc",
    "Neural Compressor 3.10",
    (
        Route(
            "gaudi-inc",
            "w4a8",
            "convert_from_uint4 to FP8 and an FP8 product, static activations that the tool measures there",
            (
                vendor(f"{_INC}/mixed_low_precision/modules.py HPUMixedPrecisionLinear.forward", "intel"),
                multiples(f"{_HPU}.__init__ (qweight [K, N / 32 * 4])", 32, 1),
                groups_stay_whole(f"{_HPU}.is_g_idx_ordered"),
            ),
        ),
        Route(
            "gptq",
            "w4a16",
            "convert_from_uint4 to BF16",
            (
                vendor(f"{_HPU}.forward", "intel"),
                multiples(f"{_HPU}.__init__ (qweight [K, N / 32 * 4])", 32, 1),
                groups_stay_whole(f"{_HPU}.is_g_idx_ordered"),
            ),
        ),
    ),
    {
        "compressed-tensors": "its loader takes GPTQ's tensors (torch/algorithms/weight_only/save_load.py)",
        "duotone-gaudi": "the format of target gaudi is Duotone's own",
    },
)

_LLAMA_CPP = "llama-cpp-python 0.3.36 ggml/src/ggml-common.h block_q4_0"
LLAMA_CPP = Runtime(
    "llama.cpp",
    "of llama-cpp-python 0.3.36",
    (
        Route(
            "gguf",
            "w4a16",
            "Q4_0, activations in Q8_0 blocks of 32",
            (
                symmetric(_LLAMA_CPP),
                group_size(_LLAMA_CPP, *(32 * blocks for blocks in range(1, 9))),
                multiples(_LLAMA_CPP, 1, 32),
            ),
        ),
    ),
    dict.fromkeys(("compressed-tensors", "duotone-gaudi", "w4a16", "gptq", "modelopt"), "it reads GGUF files"),
)

DUOTONE = Runtime(
    "duotone",
    "this one",
    (
        Route("compressed-tensors", "w4a8", "its own CPU kernel", (vendor("duotone kernels/cpu.py", "cpu"),)),
        Route("duotone-gaudi", "w4a8", "its own CPU kernel", (vendor("duotone kernels/cpu.py", "cpu"),)),
        Route("compressed-tensors", "w4a8", TRITON, ON_GPU),
        Route("duotone-gaudi", "w4a8", TRITON, ON_GPU),
        Route("compressed-tensors", "w4a8", "torch's operations: right, not fast", ()),
        Route("duotone-gaudi", "w4a8", "torch's operations: right, not fast", ()),
        Route("dense-bf16", "bf16", "transformers", ()),
    ),
    {},
)

RUNTIMES = {
    runtime.name: runtime for runtime in (VLLM, VLLM_PLUGIN, SGLANG, TENSORRT_LLM, TRANSFORMERS, GAUDI_INC, LLAMA_CPP, DUOTONE)
}
