"""What becomes of an FP8 cache of keys and values in the runtimes that read its scales."""

from duotone.loadability.rules import fp8_cache

#: FlashInfer's kernels from 8.0 on; scales of heads by FlashAttention 3 on 9.0 and 4 on 10.0 alone.
VLLM_CACHE = fp8_cache(
    "vllm 0.33.0 v1/attention/backends/flash_attn.py supports_per_head_quant_scales, fa_utils.py "
    "flash_attn_supports_kv_cache_dtype, flashinfer.py supported_kv_cache_dtypes",
    tensor_least=80,
    per_head=(90, 100),
)

_FP8 = "FP8 KV cache"
_ROUNDED = "keys and values rounded to FP8, the KV cache as large as before"
#: By runtime, and by what shares a scale. SGLang: compressed_tensors.py CompressedTensorsKVCacheMethod.is_supported_scheme;
#: transformers: compressed-tensors' modeling/kvcache.py QuantizedKVCache.
CACHES = {
    "vllm": {"tensor": _FP8, "attn_head": f"{_FP8} with a scale for each head"},
    "vllm-plugin": {"tensor": _FP8, "attn_head": f"{_FP8} with a scale for each head"},
    "sglang": {"tensor": _FP8, "attn_head": "KV cache in BF16: it ignores a scale for each head"},
    "transformers": {"tensor": _ROUNDED, "attn_head": _ROUNDED},
    "duotone": {"tensor": _FP8, "attn_head": _FP8},
}
