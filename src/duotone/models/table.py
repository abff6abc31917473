"""The shape of an architecture's table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Adapter:
    """Where a transformer's blocks are and which linears of a block read the same input.

    model_types: `model_type` values of config.json. blocks: path of the list of blocks. shared_inputs: for each tensor a
    block's linears read, the linears' paths inside the block. keep: paths of linears left in BF16 unless asked for, each
    with its reason.
    """

    model_types: tuple[str, ...]
    blocks: str
    shared_inputs: tuple[tuple[str, ...], ...]
    keep: tuple[tuple[str, str], ...] = ()
