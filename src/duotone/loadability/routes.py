"""What a runtime is to the rules: the ways in which it runs layouts."""

from dataclasses import dataclass

from duotone.loadability.rules import Rule


@dataclass(frozen=True)
class Route:
    """One way to run a layout.

    outcome: `w4a8` as stored, `w4a16` (4-bit weights without FP8), `w8a8` (stored as FP8), `bf16` (unpacked at load).

    splits_scales: each rank makes two scales of the file's one, from its own columns.
    """

    layout: str
    outcome: str
    runs: str
    rules: tuple[Rule, ...]
    splits_scales: bool = False


@dataclass(frozen=True)
class Runtime:
    """version: that the rules were read from. routes: in the runtime's own order. unread: layouts it refuses, and how.

    plugin: the name of this runtime with Duotone's plugin, if there is one.
    """

    name: str
    version: str
    routes: tuple[Route, ...]
    unread: dict[str, str]
    plugin: str | None = None
