# Shapes: B sequences, T new tokens of each, L tokens so far, H heads, D head size, M = B T.
"""A decoder of Llama's build with random weights, made where it runs: all that a form of its linears is to be compared in.

Embedding, head and cache are BF16 in all of them. What lies between two linears is compiled by torch on a GPU, as a serving
runtime would have fused it, so that no form looks good or bad for the launches of small ops.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from duotone.errors import gist
from duotone.speed_gpu.forms import Form, Linear, compiled, random_weight
from duotone.speed_gpu.sizes import Sizes

#: Keys and values [B, H, L, D] of each layer.
Cache = list[tuple[Tensor, Tensor]]
_EPSILON, _THETA = 1e-5, 5e5


def add_and_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x + y [M, hidden], and that normed."""
    both = x + y
    return both, rms_norm(both, weight.shape, weight, _EPSILON)


def gate(both: Tensor) -> Tensor:
    """silu(gate) * up of [M, 2 wide]."""
    wide = both.shape[1] // 2
    return silu(both[:, :wide]) * both[:, wide:]


def rotate_and_keep(qkv: Tensor, angles: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries [B, H, T, D] out of [B, T, heads of all three, D]; keys and values go where they are kept, [B, H, T, D] each."""
    count = keys.shape[1]
    turned = _rotated(qkv[:, :, :-count].transpose(1, 2), angles)
    queries, new_keys = turned[:, :-count], turned[:, -count:]
    keys.copy_(new_keys)
    values.copy_(qkv[:, :, -count:].transpose(1, 2))
    return queries


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D], angles float32 [T, D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@dataclass(frozen=True)
class Between:
    """What lies between linears: three functions, and how they run. Compiled where that works, with the reason where not."""

    add_and_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = add_and_norm
    gate: Callable[[Tensor], Tensor] = gate
    rotate_and_keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rotate_and_keep
    how: str = "torch's ops one by one"

    @classmethod
    def on(cls, device: torch.device, backend: str = "inductor") -> "Between":
        """For a device: compiled on a GPU, once it has computed there what the plain functions compute."""
        if device.type != "cuda" and backend == "inductor":
            return cls()
        try:
            functions = {each.__name__: compiled(each, backend) for each in (add_and_norm, gate, rotate_and_keep)}
            between = cls(**functions, how=f"torch.compile, {backend}")
            with torch.no_grad():
                differs = any(_differs(between, batch, tokens, device) for batch, tokens in ((1, 1), (2, 1), (1, 3)))
        except Exception as error:  # a compiler that is missing, or fails
            return cls(how=f"torch's ops one by one, since compiling failed: {gist(error)}")
        return cls(how="torch's ops one by one, since what was compiled differs from them") if differs else between


def _differs(between: Between, batch: int, tokens: int, device: torch.device) -> bool:
    """Whether compiled functions compute something else than the plain ones, but for roundings."""
    generator = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device).bfloat16()  # noqa: E731
    x, y, weight, qkv = random(batch * tokens, 64), random(batch * tokens, 64), random(64), random(batch, tokens, 6, 32)
    angles, found = torch.arange(tokens * 16, device=device).view(tokens, 16) / 9, []
    for each in (between, Between()):
        kept = torch.zeros(2, batch, 2, 7, 32, dtype=x.dtype, device=device)
        queries = each.rotate_and_keep(qkv, angles, kept[0, :, :, 2 : 2 + tokens], kept[1, :, :, 2 : 2 + tokens])
        found.append((*each.add_and_norm(x, y, weight), each.gate(x), queries, kept))
    return any(not torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02) for a, b in zip(*found, strict=True))


@dataclass(frozen=True)
class _Layer:
    """Linears in the order of `Sizes.linears`, and the norms before the first and the third of them."""

    linears: tuple[Linear, ...]
    norms: tuple[Tensor, ...]


@dataclass
class Decoder:
    """A model whose linears have one form. weight_bytes: of all that a step reads of it, the embedding's rows left out."""

    sizes: Sizes
    form: Form
    between: Between
    layers: list[_Layer]
    table: Tensor
    head: Tensor
    norm: Tensor
    group_size: int
    _angles: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, sizes: Sizes, form: Form, group_size: int, between: Between, device: torch.device) -> "Decoder":
        """Made where it runs. Layers are copies of the first: each has its memory, the values are all the same to time."""
        shapes, one = sizes.linears().values(), torch.ones(sizes.hidden, dtype=torch.bfloat16, device=device)
        linears = tuple(form.prepare(random_weight(shape, group_size, device, seed)) for seed, shape in enumerate(shapes))
        first = _Layer(linears, (one, one.clone()))
        generator = torch.Generator(device).manual_seed(0)
        table, head = (
            torch.randn(sizes.vocabulary, sizes.hidden, generator=generator, device=device, dtype=torch.bfloat16) * scale
            for scale in (1.0, sizes.hidden**-0.5)
        )
        layers = [first, *(copy.deepcopy(first) for _ in range(sizes.layers - 1))]
        return cls(sizes, form, between, layers, table, head, one.clone(), group_size)

    @property
    def weight_bytes(self) -> int:
        """Of linears and head."""
        linears = sum(self.form.nbytes(shape, self.group_size) for shape in self.sizes.linears().values())
        return self.sizes.layers * linears + self.head.nbytes

    def cache(self, batch: int, length: int) -> Cache:
        """Room for so many tokens of each sequence, all zeros."""
        shape = (batch, self.sizes.kv_heads, length, self.sizes.head_size)
        make = lambda: torch.zeros(shape, dtype=torch.bfloat16, device=self.table.device)  # noqa: E731
        return [(make(), make()) for _ in range(self.sizes.layers)]

    def embedded(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden]; what stands for an image is of that kind from the beginning."""
        return embedding(tokens, self.table)

    def next_tokens(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """The likeliest token [B] after new ones [B, T, hidden], of which the cache knows `start` before."""
        return self.logits(x, cache, start).argmax(-1)

    def logits(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """After the last of the new tokens, [B, vocabulary]. Several at once are a prompt: then start is 0."""
        batch, tokens, hidden = x.shape
        assert tokens == 1 or start == 0
        angles = self._angles_until(start + tokens)[start:]
        x, between = x.reshape(-1, hidden), self.between
        added = torch.zeros_like(x)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            from_x, out, wide, narrow = layer.linears
            x, normed = between.add_and_norm(x, added, layer.norms[0])
            qkv = from_x(normed).view(batch, tokens, -1, self.sizes.head_size)
            end = start + tokens
            queries = between.rotate_and_keep(qkv, angles, keys[:, :, start:end], values[:, :, start:end])
            mixed = scaled_dot_product_attention(
                queries, keys[:, :, :end], values[:, :, :end], is_causal=tokens > 1, enable_gqa=True
            )
            added = out(mixed.transpose(1, 2).reshape(batch * tokens, -1))
            x, normed = between.add_and_norm(x, added, layer.norms[1])
            added = narrow(between.gate(wide(normed)))
        last = (x + added).view(batch, tokens, hidden)[:, -1]
        return linear(rms_norm(last, self.norm.shape, self.norm, _EPSILON), self.head)

    def _angles_until(self, length: int) -> Tensor:
        """Float32 [length, D / 2], made once: a graph must find them where they were."""
        if length not in self._angles:
            half, device = self.sizes.head_size // 2, self.table.device
            frequency = _THETA ** -(torch.arange(half, device=device) / half)
            self._angles[length] = torch.arange(length, device=device)[:, None] * frequency
        return self._angles[length]
