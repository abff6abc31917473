"""`duotone eval --tasks`: questions from local files, answered by likelihood by a model and by its original.

The same questions are put to both, so what quantizing changes has the small error of a paired difference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from duotone.checkpoint.hub import locate_model
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer
from duotone.questions import Item, load_gsm8k, load_piqa, load_story_cloze
from duotone.runtime.load import load
from duotone.tasks import TaskResult, fits_context, multiple_choice

#: (steps done, steps in all, what is being done)
Progress = Callable[[int, int, str], None]
#: What a task's file or folder is.
TASKS = {
    "piqa": "a folder of valid.jsonl and valid-labels.lst",
    "gsm8k": "a .jsonl file of question and answer: which final number, its own or another question's",
    "stories": "a TinyStories text: which ending, its own or another story's",
}
#: Stories drawn when nobody says how many questions.
_STORIES = 500


@dataclass(frozen=True)
class TaskFigures:
    """Accuracy on a task with its standard error; against a reference, the difference on the same items.

    difference_stderr: paired. mcnemar_p: of McNemar's exact test, two-sided: how likely as many changed answers would go one
    way if quantizing changed none for good or bad.
    """

    task: str
    items: int
    accuracy: float
    stderr: float
    reference_accuracy: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    mcnemar_p: float | None = None


def examine(
    model: str | Path,
    tasks: Sequence[str],
    reference: str | Path | None = None,
    items: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> list[TaskFigures]:
    """Put the tasks' questions to a model folder, and to the reference if one is given.

    tasks: NAME=PATH, the names those of `TASKS`. items: the most questions of a task, its first ones. Raises DuotoneError for a
    name that is not known, files that hold no such questions, and a model that does not predict tokens.
    """
    named = [_task(task) for task in tasks]
    folder, place = locate_model(model), resolve_device(device)
    sources = [folder] if reference is None else [folder, locate_model(reference)]
    answers: list[list[TaskResult]] = []
    questions: list[list[Item]] = []
    for number, source in enumerate(sources):
        network, tokenizer = load(source, dtype, device), load_tokenizer(source)
        questions = questions or [_questions(name, path, items, network, folder) for name, path in named]
        found: list[TaskResult] = []
        for done, ((name, _), asked) in enumerate(zip(named, questions, strict=True), number * len(named)):
            progress(done, len(named) * len(sources), f"{name}, {source.name}")
            found.append(multiple_choice(network, tokenizer, asked, place))
        answers.append(found)
    names = [name for name, _ in named]
    return [_figures(name, *results) for name, *results in zip(names, *answers, strict=True)]


def _task(task: str) -> tuple[str, str]:
    name, _, path = task.partition("=")
    if name not in TASKS or not path:
        known = ", ".join(f"{name}=PATH ({what})" for name, what in TASKS.items())
        raise DuotoneError(f"--tasks: found {task!r}, expected one of {known}")
    return name, path


def _questions(name: str, path: str, count: int | None, model: PreTrainedModel, folder: Path) -> list[Item]:
    """A task's questions that the model can read."""
    fits = fits_context(model, load_tokenizer(folder))
    if name == "stories":
        return load_story_cloze(path, count or _STORIES, 0, fits)
    found = [item for item in (load_piqa if name == "piqa" else load_gsm8k)(path) if fits(item)]
    if len(found) < 2:
        raise DuotoneError(f"{path}: found {len(found)} questions that fit the model's context, expected at least 2")
    return found if count is None else found[:count]


def _figures(name: str, own: TaskResult, original: TaskResult | None = None) -> TaskFigures:
    figures = TaskFigures(name, len(own.correct), own.accuracy, own.stderr)
    if original is None:
        return figures
    change = torch.tensor(own.correct, dtype=torch.float64) - torch.tensor(original.correct, dtype=torch.float64)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    error = float(change.std() / len(change) ** 0.5)
    beside = original.accuracy, float(change.mean()), error, mcnemar(better, worse)
    return TaskFigures(name, figures.items, own.accuracy, own.stderr, *beside)


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test, two-sided: coins that are fair would fall so unevenly, or more so, this often."""
    flips, least = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(flips, heads) for heads in range(least + 1)) / 2**flips)
