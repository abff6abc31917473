"""`duotone eval --tasks`: questions from local files or of lm-evaluation-harness, put to a model and to its original.

The same questions are put to both, so what quantizing changes has the small error of a paired difference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.checkpoint.hub import locate_model
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.harness import HarnessTasks, load_tasks
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import load_tokenizer
from duotone.questions import Item, load_gsm8k, load_piqa, load_story_cloze
from duotone.runtime.load import load
from duotone.tasks import Answers, fits_context, multiple_choice

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
    """A figure of a task with its standard error; against a reference, the difference on the same items.

    The first fields as in `tasks.Answers`. difference_stderr: paired. mcnemar_p: of McNemar's exact test, two-sided, where
    items are right or wrong: how likely as many changed answers would go one way if quantizing changed none for good or bad.
    """

    task: str
    by: str
    metric: str
    is_share: bool
    items: int
    value: float
    stderr: float | None
    reference_value: float | None = None
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

    tasks: as `Examination` takes them. items: the most questions of a task, its first ones. Raises DuotoneError for a name that
    is not known, files that hold no such questions, and a model that does not predict tokens.
    """
    asked = Examination(tasks, items)
    place, answers = resolve_device(device), list[list[Answers]]()
    folders = [locate_model(model)] if reference is None else [locate_model(model), locate_model(reference)]
    for number, folder in enumerate(folders):
        network, tokenizer = load(folder, dtype, device), load_tokenizer(folder)

        def tell(done: int, what: str, before: int = number * asked.steps, name: str = folder.name) -> None:
            progress(before + done, len(folders) * asked.steps, f"{what}, {name}")

        answers.append(asked.put(network, tokenizer, place, tell))
    return [compared(*results) for results in zip(*answers, strict=True)]


class Examination:
    """Tasks to put to several models, of which the first says what fits its context.

    tasks: NAME=PATH, the names those of `TASKS`; else names of lm-eval, several between commas, or a task file of it (.yaml).
    """

    def __init__(self, tasks: Sequence[str], items: int | None = None) -> None:
        self._named = [_task(task) for task in tasks if "=" in task]
        self._items, self._questions = items, list[list[Item]]()
        names = [name.strip() for task in tasks if "=" not in task for name in task.split(",")]
        self._harness: HarnessTasks | None = load_tasks(names) if names else None

    @property
    def steps(self) -> int:
        """Tasks that are put one after the other; those of lm-eval are one."""
        return len(self._named) + (self._harness is not None)

    def put(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        tell: Callable[[int, str], None] = lambda *_: None,
    ) -> list[Answers]:
        """A model's answers, in the order of the tasks, those of lm-eval last. tell: steps done, and what is being done."""
        check_causal(model, "tasks")
        fits = fits_context(model, tokenizer)
        self._questions = self._questions or [_questions(name, path, self._items, fits) for name, path in self._named]
        found: list[Answers] = []
        for done, ((name, _), questions) in enumerate(zip(self._named, self._questions, strict=True)):
            tell(done, name)
            result = multiple_choice(model, tokenizer, questions, device)
            outcomes = tuple(float(right) for right in result.correct)
            found.append(Answers(name, "duotone", "accuracy", True, len(outcomes), result.accuracy, result.stderr, outcomes))
        if self._harness is not None:
            done = len(self._named)
            found += self._harness.put(model, tokenizer, self._items, lambda n: tell(done, f"lm-eval: {n} passes"))
        return found


def compared(own: Answers, original: Answers | None = None) -> TaskFigures:
    """A model's figure, and what it differs by from the original's on the same items."""
    of_task = (own.task, own.by, own.metric, own.is_share, own.items, own.value, own.stderr)
    if original is None:
        return TaskFigures(*of_task)
    if not own.outcomes or len(own.outcomes) != len(original.outcomes):
        return TaskFigures(*of_task, original.value, own.value - original.value)
    change = torch.tensor(own.outcomes, dtype=torch.float64) - torch.tensor(original.outcomes, dtype=torch.float64)
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else None
    p = mcnemar(int((change > 0).sum()), int((change < 0).sum())) if own.is_share else None
    return TaskFigures(*of_task, original.value, float(change.mean()), error, p)


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test, two-sided: coins that are fair would fall so unevenly, or more so, this often."""
    flips, least = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(flips, heads) for heads in range(least + 1)) / 2**flips)


def _task(task: str) -> tuple[str, str]:
    name, _, path = task.partition("=")
    if name not in TASKS or not path:
        known = ", ".join(f"{name}=PATH ({what})" for name, what in TASKS.items())
        raise DuotoneError(f"--tasks: found {task!r}, expected one of {known}; or names of lm-eval's tasks")
    return name, path


def _questions(name: str, path: str, count: int | None, fits: Callable[[Item], bool]) -> list[Item]:
    """A task's questions that the model can read."""
    if name == "stories":
        return load_story_cloze(path, count or _STORIES, 0, fits)
    found = [item for item in (load_piqa if name == "piqa" else load_gsm8k)(path) if fits(item)]
    if len(found) < 2:
        raise DuotoneError(f"{path}: found {len(found)} questions that fit the model's context, expected at least 2")
    return found if count is None else found[:count]
