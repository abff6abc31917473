"""The shape of an architecture's table."""

from dataclasses import dataclass

from transformers import AutoModelForCausalLM
from transformers.models.auto.auto_factory import _BaseAutoModelClass


@dataclass(frozen=True)
class NormedStream:
    """A residual stream that is read through norms which divide by the root mean square and multiply by their weight, no more.

    Only with it can the stream be rotated, and a channel's size moved between a norm and the linears behind it. norms: for each
    norm of a block, by its path in the block, the linears that read it; nothing else does. values: the linear whose outputs
    attention averages, and the one that reads the averages, head by head. embedding, final_norm, head: paths outside the
    blocks; the head reads the final norm. What writes to the stream is in `Adapter.streams`.
    """

    norms: tuple[tuple[str, tuple[str, ...]], ...]
    values: tuple[str, str]
    embedding: str
    final_norm: str
    head: str


@dataclass(frozen=True)
class Adapter:
    """Where a transformer's blocks are and which linears of a block read the same input.

    model_types: `model_type` values of config.json. blocks: path of the list of blocks. shared_inputs: for each tensor a
    block's linears read, the linears' paths inside the block, in running order. streams: for each linear whose output is added
    to the residual stream as it is, the module that reads the stream before that. keep: paths of linears left in BF16 unless
    asked for, each with its reason. auto: the transformers class that builds the model. architectures: which of config.json's
    `architectures` this is the table of, the first one standing for a config that names none; empty: all of them. residual:
    None where the stream is read otherwise, such as through layer norms.
    """

    model_types: tuple[str, ...]
    blocks: str
    shared_inputs: tuple[tuple[str, ...], ...]
    streams: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    auto: type[_BaseAutoModelClass] = AutoModelForCausalLM
    architectures: tuple[str, ...] = ()
    residual: NormedStream | None = None
