"""What every peer's script has in common: its arguments, what is timed, what counts as a refusal, and peer.json.

    python TOOL_peer.py MODEL_DIR TOKENS.safetensors OUT_DIR --recipe NAME --group-size N --seed S

Runs in a tool's own environment, so it imports nothing of duotone and, at the top, nothing that is not the standard library's.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """The tool cannot do this model with this recipe: a row of its own, not a failure of the run."""


@dataclass
class Job:
    """One quantization: what to quantize, with which recipe, where to; `seconds` is what `timed` measured.

    weights: where to leave the weights as the tool itself dequantizes them, for verify.py; None, as a rule, to leave none.
    """

    model: Path
    tokens: Path
    out: Path
    recipe: str
    group_size: int
    seed: int
    weights: Path | None = None
    seconds: float = field(default=0.0, init=False)
    phases: dict[str, float] = field(default_factory=dict, init=False)

    def load_tokens(self) -> Any:
        """The calibration windows, int64 [windows, T]: tokens only, no padding."""
        from safetensors.torch import load_file

        return load_file(self.tokens)["input_ids"]

    def load_model(self, dtype: Any) -> Any:
        """The model as its config names it: a causal LM where it is one, else the bare encoder."""
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        names = AutoConfig.from_pretrained(self.model).architectures or []
        kind = AutoModelForCausalLM if any(name.endswith("ForCausalLM") for name in names) else AutoModel
        return kind.from_pretrained(self.model, dtype=dtype).eval()

    def keep_weights(self, weights: dict[str, Any]) -> None:
        """Write the tool's own dequantized weights, by module name, to `weights`."""
        from safetensors.torch import save_file

        save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, self.weights)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the tool's quantization and nothing else: adds to `seconds`; the tool's exceptions are its refusal."""
        start = time.perf_counter()
        with self.refusable():
            yield
        self.seconds += time.perf_counter() - start

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Count the time inside one of the tool's own methods under a phase; what is left of `seconds` is its forward."""
        inner = getattr(owner, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, method, watched)

    @contextmanager
    def refusable(self) -> Iterator[None]:
        """Around a call into the tool (its save, say): what it raises is its refusal."""
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            sentence = (str(error).strip() or "no message").splitlines()[0].split(". ")[0].rstrip(".")
            raise Refusal(f"{type(error).__name__}: {sentence}") from error


def run(tool: str, package: str, recipes: Sequence[str], quantize: Callable[[Job], None]) -> None:
    """Quantize as the command line says and write OUT_DIR/peer.json; `package` names the distribution for its version."""
    job = _arguments(recipes)
    import numpy
    import torch

    numpy.random.seed(job.seed)
    torch.manual_seed(job.seed)
    job.out.mkdir(parents=True, exist_ok=True)
    refused = None
    try:
        quantize(job)
    except Refusal as refusal:
        import traceback

        traceback.print_exception(refusal.__cause__ or refusal)
        refused = str(refusal)
    report = {
        "tool": tool,
        "version": importlib.metadata.version(package),
        "recipe": job.recipe,
        "seconds": round(job.seconds, 3),
        "phases": {phase: round(seconds, 3) for phase, seconds in job.phases.items()} or None,
        "peak_bytes": _peak_bytes(),
        "refused": refused,
    }
    (job.out / "peer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _arguments(recipes: Sequence[str]) -> Job:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=_absolute)
    parser.add_argument("--recipe", choices=recipes, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=_absolute, help="also write the tool's own dequantized weights, for verify.py")
    return Job(**vars(parser.parse_args()))


def _absolute(text: str) -> Path:
    """A script may change the working directory: some tools litter it."""
    return Path(text).absolute()


def _peak_bytes() -> int:
    """VmHWM: the most memory this process ever held at once."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
