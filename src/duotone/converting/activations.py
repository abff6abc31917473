# Shapes: K in_features.
"""Static activation scales of a quantized model, for layouts that have one a tensor: the largest value that text brings."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duotone.calibrate.data import draw_windows
from duotone.errors import DuotoneError
from duotone.formats import E4M3FN
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load

_BATCH = 8
#: The number of an expert in a linear's name.
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def static_scales(folder: Path, text: Sequence[str], samples: int, seq_len: int) -> dict[str, float]:
    """max |x| / 448 of every quantized linear's input, by its module's name; the model runs on a CPU.

    An expert that no token is sent to has the largest of the others, which is what SGLang takes for all of them. Raises
    DuotoneError for a text that is not there or too short, and for another linear that no token reaches.
    """
    windows = draw_windows(load_tokenizer(folder), text, seq_len, samples, seed=0).tokens
    model = load(folder, torch.float32, "cpu", shortcuts=False)
    largest: dict[str, Tensor] = {}

    def watcher(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            largest[name] = torch.maximum(largest.get(name, torch.zeros(())), inputs[0].abs().max().float())

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, module in linears.items():
        module.register_forward_pre_hook(watcher(name))
    with torch.no_grad():
        for batch in windows.split(_BATCH):
            model(batch)
    for name in [name for name in linears if name not in largest]:
        others = [value for other, value in largest.items() if _EXPERT.sub("", other) == _EXPERT.sub("", name)]
        if others:
            largest[name] = torch.stack(others).max()
    unseen = [name for name in linears if not float(largest.get(name, 0.0)) > 0]
    if unseen:
        raise DuotoneError(f"{unseen[0]}: the calibration text brings it no value but zero, expected some for a static scale")
    return {name: float(value) / E4M3FN.max for name, value in largest.items()}
