"""Quantizes a model again and again, killed at random: python -m tests.killed MODEL OUT TEXT KILLS SEED [OPTION=VALUE ...].

Each try is a child that goes on where the one before was killed: by the clock, anywhere, or at a random one of the moments at
which something reaches the disk, inside a shard among them. The last one is left alone. Prints how often it was killed and how
often it went on from a save.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import duotone.checkpoint.journal
import duotone.checkpoint.writer
import duotone.pipeline
from duotone.errors import DuotoneError
from duotone.settings import QuantizeConfig


def die_at(moment: int) -> None:
    """Have this process killed at the n-th moment at which something is written, settled or renamed."""
    left = [moment]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return wrapper

    duotone.checkpoint.writer.content_hash = counted(duotone.checkpoint.writer.content_hash)  # behind each tensor's bytes
    for owner, name in (
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "unlink"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def attempt(
    model: str, out: Path, config: QuantizeConfig, moment: int | None, seconds: float | None, save_every: float = 0.0
) -> bool:
    """One try, in a child; whether it came to its end."""
    child = os.fork()
    if child == 0:
        if moment is not None:
            die_at(moment)
        try:
            report = duotone.pipeline.quantize(model, out, config, resume=True, save_every=save_every)
        except DuotoneError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(0 if "is not empty" in str(error) and (out / "config.json").exists() else 1)  # killed when all was done
        os.write(1, b"" if report.resumed_at is None else b"resumed\n")
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a try ended with {os.WEXITSTATUS(status)}")
    return not os.WIFSIGNALED(status)


def main() -> None:
    """The loop."""
    model, out, text, kills, seed, *options = sys.argv[1:]
    torch.set_num_threads(1)
    chosen: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu", "calibration": (text,)}
    config = QuantizeConfig(**chosen | dict(option.split("=") for option in options))
    draw, folder, killed, began = random.Random(int(seed)), Path(out), 0, time.monotonic()
    attempt(model, folder, config, None, None)
    whole = time.monotonic() - began
    shutil.rmtree(folder)
    while killed < int(kills):
        moment, seconds = (None, draw.uniform(0, whole)) if draw.random() < 0.5 else (draw.randint(1, 150), None)
        if attempt(model, folder, config, moment, seconds, draw.choice((0.0, 0.0, 60.0))):
            shutil.rmtree(folder)
        else:
            killed += 1
    attempt(model, folder, config, None, None)
    print("killed", killed)


if __name__ == "__main__":
    main()
