"""The command that would make a checkpoint again, from what its records say was asked for."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from duotone.settings import QuantizeConfig

#: Options whose names on the command line are not those of their fields.
_NAMES = {"damping_frac": "damping"}
_DEFAULTS = {field.name: field.default for field in fields(QuantizeConfig)}


def command_of(base: str, out: str, sidecar: Mapping[str, Any], run: Mapping[str, Any] | None) -> str:
    """One line for a shell: every setting that is not the default, and files by their names, without folders.

    base: the original model; out: the folder to write. run: the run's record, where there is one.
    """
    settings, calibration = sidecar.get("settings", {}), sidecar.get("calibration") or {}
    asked = {name: value for name, value in settings.items() if name in _DEFAULTS} | dict((run or {}).get("asked", {}))
    asked |= {"calibration": calibration.get("text", [])}
    asked["dtype"] = calibration.get("dtype", "auto")
    if asked.get("order") == QuantizeConfig(method=asked.get("method", "dpq")).solver.order:
        del asked["order"]
    if not calibration:
        asked = {name: value for name, value in asked.items() if name not in {"samples", "seq_len", "damping_frac", "order"}}
    words = [base, out]
    for name, default in _DEFAULTS.items():
        if name in asked and asked[name] not in (default, [], ()):
            words += _option(name, asked[name])
    processes = int((run or {}).get("machine", {}).get("number of processes", 1))
    start = ["duotone"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}", "-m", "duotone"]
    return shlex.join([*start, "quantize", *words])


def _option(name: str, value: Any) -> list[str]:
    option = f"--{_NAMES.get(name, name).replace('_', '-')}"
    if name == "symmetric":
        return ["--asymmetric"]
    if isinstance(value, bool):
        return [option]
    if isinstance(value, list | tuple):
        return [word for one in value for word in (option, str(one))]  # pyright: ignore[reportUnknownVariableType]
    return [option, f"{value:g}" if isinstance(value, float) else str(value)]
