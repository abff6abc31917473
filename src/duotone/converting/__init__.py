"""A checkpoint in another layout, and another tool's in ours: a linear at a time, each told how exact it is."""

from duotone.converting.exporting import Calibration, export_checkpoint
from duotone.converting.importing import import_checkpoint
from duotone.converting.report import EXACTNESS, Conversion, LayerConversion

__all__ = ["EXACTNESS", "Calibration", "Conversion", "LayerConversion", "export_checkpoint", "import_checkpoint"]
