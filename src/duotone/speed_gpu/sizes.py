# Shapes: N out_features, K in_features.
"""What is measured: models by their sizes alone, and how many tokens, sequences and calibration windows."""

from dataclasses import dataclass

_MANY = 50_000_000


@dataclass(frozen=True)
class Sizes:
    """A decoder of Llama's build, without biases. heads, kv_heads: of queries, and of keys and values."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a layer's linears, those of one input as a runtime merges them."""
        queries = self.heads * self.head_size
        return {
            "qkv": (queries + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": (self.hidden, queries),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def cache_bytes(self, value_bytes: int) -> int:
        """Of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * value_bytes


LLAMA_8B = Sizes("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_70B = Sizes("Llama-3-70B", 8192, 28672, 80, 64, 8, 128, 128256)
QWEN2_VL_7B = Sizes("Qwen2-VL-7B, text tower", 3584, 18944, 28, 28, 4, 128, 152064)


@dataclass(frozen=True)
class Plan:
    """All sizes of a run. Numbers of tokens stand in the order of what they are worth, should time not be enough for all.

    small, large: models whose linears are measured; whole, seeing: models that run, the latter with image tokens first.
    tile_tokens: for which other ways than `launch`'s are tried, up to 64 of them with all tiles.
    batches, contexts: sequences that decode, and tokens that each has so far; goal_context: of the steps in `end-to-end`.
    prompts, outputs: tokens read and written by each sequence of the throughput grid. blocks: of the model that is quantized in
    calibration windows x window_tokens. out_of_cache: bytes written over between two calls, more than any L2 cache; read: bytes
    read to see what memory gives; peak_size: of the products that show the units' peak.
    """

    small: Sizes = LLAMA_8B
    large: Sizes = LLAMA_70B
    whole: Sizes = LLAMA_8B
    seeing: Sizes = QWEN2_VL_7B
    tokens: tuple[int, ...] = (1, 16, 64, 1024, 4096, 4, 256, 8192, 2, 8, 32, 128, 512, 2048)
    tile_tokens: tuple[int, ...] = (16, 64, 32, 128, 256, 512)
    batches: tuple[int, ...] = (1, 64, 16, 256, 4)
    contexts: tuple[int, ...] = (128, 2048, 8192)
    goal_context: int = 1024
    prompts: tuple[int, ...] = (128, 1024, 8192)
    outputs: tuple[int, ...] = (128, 1024)
    image_tokens: int = 1024
    blocks: int = 2
    windows: int = 128
    window_tokens: int = 2048
    group_size: int = 128
    rounds: int = 20
    out_of_cache: int = 256 * 2**20
    read: int = 2 * 2**30
    peak_size: int = 8192


def is_large(shape: tuple[int, int]) -> bool:
    """Whether a linear is large enough for the launch to cost nothing: more is wanted of it."""
    return shape[0] * shape[1] >= _MANY
