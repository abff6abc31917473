"""How many story endings a model would still lose if `--effort high` left the least error that any rounding can.

    python bench/task_bound.py MODEL --calibration TEXT... --stories tinystories_val.txt [--group-size 128] [--draws 10]

Between the original weights and the quantized ones lie weights with a share of the rounding errors; the loss of a layer goes
with its square. So the share at which the losses are the least there can be (bench/bound.py) is the root of their ratio. All
multiply FP8 activations. Each story is asked `draws` times, each time beside another story's ending; answers are averaged over
draws and calibration seeds, errors are over stories. Appends one row to bench/records/task_bound.jsonl.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablation import FloatLinear, per_token
from duotone.bench import append_records, provenance
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.evaluation import standard_error
from duotone.models.tokenizer import load_tokenizer
from duotone.pipeline import quantize
from duotone.questions import Item, load_story_cloze
from duotone.qweight import dequantize
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from duotone.tasks import fits_context, multiple_choice

RECORDS = Path(__file__).resolve().parent / "records"
CPU = torch.device("cpu")


def share_of_the_least(model: str) -> float:
    """The share of the errors of `--effort high` that the newest bound allows."""
    rows = [json.loads(line) for line in (RECORDS / "bound.jsonl").read_text().splitlines()]
    row = [row for row in rows if row["model"] == model][-1]
    return (row["bound"] / row["loss"]) ** 0.5


def weights_of(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint multiplies, float32, by linear."""
    source = open_source(folder)
    reader = WeightReader(source)
    return {layer: dequantize(reader.read(layer)) for layer in packed_layers(source)}


def between(folder: Path, quantized: dict[str, Tensor], share: float) -> Any:
    """The original model with a share of the rounding errors, and FP8 activations."""
    model = load(folder, torch.float32, "cpu")
    for name, value in quantized.items():
        linear = model.get_submodule(name)
        weight = torch.lerp(linear.weight.detach(), value, share)
        model.set_submodule(name, FloatLinear(weight, linear.bias, per_token))
    return model


def right(model: Any, tokenizer: Any, draws: Sequence[Sequence[Item]]) -> dict[str, float]:
    """How often a story's ending was found, by story."""
    answers: dict[str, list[bool]] = defaultdict(list)
    for items in draws:
        for item, correct in zip(items, multiple_choice(model, tokenizer, items, CPU).correct_norm, strict=True):
            answers[item.context].append(correct)
    return {story: sum(found) / len(found) for story, found in answers.items()}


def main() -> None:
    """Measure and append."""
    given = _arguments()
    folder = locate_model(given.model)
    original, tokenizer = load(folder, torch.float32, "cpu"), load_tokenizer(folder)
    fits = fits_context(original, tokenizer)
    draws = [load_story_cloze(given.stories, given.stories_count, draw, fits) for draw in range(given.draws)]
    before = right(original, tokenizer, draws)
    least = share_of_the_least(folder.name)
    losses: dict[float, dict[str, list[float]]] = {share: defaultdict(list) for share in (0.0, least, 1.0)}
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            config = QuantizeConfig(
                effort="high", calibration=tuple(given.calibration), group_size=given.group_size, seed=seed, device="cpu",
                samples=given.samples, seq_len=given.seq_len,
            )  # fmt: skip
            quantize(folder, Path(scratch) / "out", config)
            values = weights_of(Path(scratch) / "out")
        for share, stories in losses.items():
            for story, found in right(between(folder, values, share), tokenizer, draws).items():
                stories[story].append(found - before[story])
    rows = [_points(share, stories) for share, stories in losses.items()]
    row = provenance(0) | {
        "model": folder.name, "group_size": given.group_size, "seeds": len(given.seeds), "draws": given.draws,
        "stories": len(before), "accuracy": sum(before.values()) / len(before), "shares": rows,
    }  # fmt: skip
    append_records(given.records, [row])
    print(json.dumps(row))


def _points(share: float, stories: dict[str, list[float]]) -> dict[str, float | None]:
    means = torch.tensor([sum(found) / len(found) for found in stories.values()])
    return {"share": share, "difference": float(means.double().mean()), "stderr": standard_error(means)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--stories-count", type=int, default=600)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--records", type=Path, default=RECORDS / "task_bound.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
