"""Where to compute, in which arithmetic, and with which random numbers."""

import platform
from pathlib import Path

import torch

from duotone.errors import DuotoneError


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a torch device. Raises DuotoneError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in {"cpu", "cuda"}:
        raise DuotoneError(f"--device: found {device!r}, expected auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DuotoneError("--device: cuda was asked for, found no CUDA device; use --device cpu")
    return place


class StreamClock:
    """Time as the work queued on a GPU passes by, for `Phases`: nothing waits until seconds are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """The end of what is queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, since: torch.cuda.Event, until: torch.cuda.Event) -> float:
        """Between two marks, once the GPU has come to the later one."""
        until.synchronize()
        return since.elapsed_time(until) / 1e3


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody holds."""
    return torch.cuda.mem_get_info(device)[0]


def peak_bytes(device: torch.device) -> int:
    """Most memory of a GPU that this process's tensors have held; 0 for a CPU, whose memory `phases` looks at."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def resolve_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as a torch dtype. Raises DuotoneError for another."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise DuotoneError(f"--dtype: found {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def check_seed(seed: int) -> None:
    """Raise DuotoneError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise DuotoneError(f"--seed: found {seed}, expected an integer from 0 to 2^63 - 1")


#: Multiplications of a forward, all tokens together, that a CPU does in float32 in a second: BF16 would save little of it.
_SMALL = 2**36
#: Columns from which the solver's products in BF16 save more than rounding to it takes.
WIDE = 1024


def calibration_dtype(dtype: str, device: torch.device, multiplications: int, gradients: bool) -> torch.dtype:
    """What a model is calibrated in: BF16 on an accelerator, and on a CPU with units for it when there is much to multiply.

    dtype: auto, float32 or bfloat16. multiplications: of one forward. Gradients on a CPU are taken in float32 unless asked
    otherwise. In BF16 the outputs of linears are rounded as a runtime rounds them; docs/LOG.md has what that costs.
    """
    if dtype != "auto":
        return resolve_dtype(dtype)
    if device.type != "cpu":
        return torch.bfloat16
    fast = is_x86() and has_bf16_units() and multiplications > _SMALL and not gradients
    return torch.bfloat16 if fast else torch.float32


def product_dtype(matrix: torch.Tensor) -> torch.dtype:
    """What the solver multiplies a whole matrix in: BF16 where there are units for it, if it is wide; else what it comes in.

    Sums of rounding errors and measured losses: BF16 takes a thousandth off them, at random. docs/LOG.md has what that costs.
    """
    narrow = matrix.dtype == torch.float32 and multiplies_narrow(matrix.device, matrix.shape[1])
    return torch.bfloat16 if narrow else matrix.dtype


def multiplies_narrow(device: torch.device, columns: int) -> bool:
    """Whether float32 matrices of so many columns are multiplied in BF16: on CPUs with units for it, on GPUs from Ampere on."""
    if columns < WIDE:
        return False
    if device.type == "cpu":
        return has_bf16_units()
    return sums_stay_wide(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two matrices as `product_dtype` has them, rounded to their dtype; on an NVIDIA GPU float32 of BF16."""
    is_wide = left.dtype == torch.bfloat16 and sums_stay_wide(left.device)
    return wide_product(left, right) if is_wide else left @ right


def sums_stay_wide(device: torch.device) -> bool:
    """Whether torch gives BF16 products in the float32 that they are added up in (`wide_product`): on NVIDIA's GPUs."""
    return device.type == "cuda" and torch.version.hip is None


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two BF16 matrices, in float32, never rounded to BF16."""
    return torch.mm(left, right, out_dtype=torch.float32)


def is_x86() -> bool:
    """Whether this is an x86-64 machine."""
    return platform.machine().lower() in {"x86_64", "amd64"}


def has_bf16_units() -> bool:
    """Whether an x86 processor multiplies BF16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def processor_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
