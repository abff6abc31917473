"""One of several processes that quantize a model together: python -m tests.several MODEL TEXT OUT [DIE] CASE...

CASE: a folder's name in OUT and its options, as in `gaudi:target=gaudi,method=gptq`. DIE: `die=RANK@BLOCK`, a process that is
killed before it begins that block.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from duotone.calibrate import data
from duotone.errors import DuotoneError, ToldError
from duotone.pipeline import quantize
from duotone.ranks import Ranks, joined
from duotone.settings import QuantizeConfig

QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu"}


def one_window_a_batch() -> Any:
    """A context: as many batches as there are windows, so that processes can share them as they are."""
    return mock.patch.object(data, "BATCH_POSITIONS", 1)


def options_of(text: str) -> dict[str, Any]:
    """`name=value,...` as arguments; numbers and `yes` as what they mean, one rule as a tuple of it."""
    found = dict(option.split("=", 1) for option in text.split(",") if option)
    return QUICK | {
        name: (value,) if name == "rules" else True if value == "yes" else float(value) if value[0].isdigit() else value
        for name, value in found.items()
    }


def killer(ranks: Ranks, die: str) -> Callable[[int, int, str], None]:
    """A listener that kills its own process."""
    rank, block = map(int, die.removeprefix("die=").split("@"))

    def tell(done: int, total: int, what: str) -> None:
        del total, what
        if ranks.rank == rank and done == block:
            os.kill(os.getpid(), signal.SIGKILL)

    return tell


def main() -> None:
    """All cases, one after the other."""
    model, text, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    die = cases.pop(0) if cases[0].startswith("die=") else ""
    try:
        with joined() as ranks, one_window_a_batch():
            for case in cases:
                name, _, options = case.partition(":")
                config = QuantizeConfig(calibration=(text,), **options_of(options))
                tell = killer(ranks, die) if die else None
                quantize(model, Path(out) / name, config, tell, resume=True, save_every=0.0, ranks=ranks)
    except ToldError:
        sys.exit(2)
    except DuotoneError as error:
        print(f"duotone: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
