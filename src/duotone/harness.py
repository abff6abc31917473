"""Tasks of lm-evaluation-harness, by its own Python interface, put to a model that is loaded already."""

import difflib
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.errors import DuotoneError
from duotone.tasks import Answers

#: As `lm_eval` seeds everything: tasks that shuffle or choose examples give the numbers that it gives.
_SEED, _OTHER_SEED = 0, 1234
#: Sequences of one pass, and draws of the bootstrap where a metric's error has no formula.
_BATCH, _DRAWS = 8, 1000
#: Of a task's results, what is no metric.
_NO_METRIC = {"name", "alias", "sample_len", "sample_count"}


@dataclass(frozen=True, eq=False)
class HarnessTasks:
    """Tasks that lm-eval has loaded, their data with them. loaded: what its `TaskManager.load` gives."""

    loaded: Mapping[str, Any]

    def put(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        items: int | None,
        passed: Callable[[int], None] = lambda _: None,
    ) -> list[Answers]:
        """Put the tasks to a model: an answer for each metric of each task, those of groups without single outcomes.

        items: the most questions of a task, its first ones. passed: is told how many forward passes there have been. Raises
        DuotoneError for a task that cannot be put to such a model.
        """
        from lm_eval import evaluate  # pyright: ignore[reportMissingImports] - an extra
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        for task in self.loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_OTHER_SEED)
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1
            passed(passes)

        watched = model.register_forward_hook(count)
        try:
            with _silence():
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
                found: Any = evaluate(lm=lm, task_dict=self.loaded, limit=items, bootstrap_iters=_DRAWS, log_samples=True)
        except (ValueError, TypeError, KeyError, NotImplementedError, AssertionError) as error:
            raise DuotoneError(f"lm-eval {', '.join(self.loaded['tasks'])}: cannot be run ({_reason(error)})") from None
        finally:
            watched.remove()
        return list(_answers(found))


def load_tasks(names: Sequence[str]) -> HarnessTasks:
    """Tasks, groups and tags as lm-eval names them, or the paths of task files (.yaml) in its language.

    Raises DuotoneError where lm-eval is not installed, for a name that it does not know, and for data that cannot be had.
    """
    try:
        with _silence():
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra: hundreds of packages
    except ImportError:
        raise DuotoneError(
            f"--tasks {names[0]}: needs lm-evaluation-harness (pip install duotone[eval]); without it --tasks NAME=PATH"
        ) from None
    files = [name for name in names if Path(name).suffix in {".yaml", ".yml"}]
    missing = next((name for name in files if not Path(name).is_file()), None)
    if missing is not None:
        raise DuotoneError(f"--tasks: found no task file {missing}")
    with _silence():
        manager = TaskManager(include_defaults=len(files) < len(names))  # to read all that it knows takes a while
    for name in names:
        if name not in files and name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; the closest are {', '.join(close)}" if close else ""
            raise DuotoneError(f"--tasks: found {name!r}, expected a task of lm-eval, a task file, or NAME=PATH{hint}")
    try:
        with _silence():
            return HarnessTasks(manager.load(list(names)))
    except Exception as error:  # the hub client's, a reader's of a data set, or whatever a task's own functions raise
        raise DuotoneError(f"--tasks {','.join(names)}: lm-eval cannot load it ({_reason(error)})") from None


def _answers(found: Mapping[str, Any]) -> Iterator[Answers]:
    """lm-eval's results as ours, in its order."""
    outcomes_of: dict[tuple[str, str], tuple[float, ...]] = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if key not in _NO_METRIC and not name.endswith("_stderr") and isinstance(value, int | float):
                outcomes_of[task, key] = _outcomes(found["samples"].get(task, ()), name, filtered, value)
    # Metrics that are right or wrong; of groups, whose single outcomes are those of their tasks, known by these.
    shares = {key for (_, key), outcomes in outcomes_of.items() if outcomes and set(outcomes) <= {0.0, 1.0}}
    for task, metrics in found["results"].items():
        for key in (key for other, key in outcomes_of if other == task):
            name, _, filtered = key.partition(",")
            value, error, outcomes = metrics[key], metrics.get(f"{name}_stderr,{filtered}"), outcomes_of[task, key]
            yield Answers(
                task=task,
                by="lm-eval",
                metric=name if filtered in {"", "none"} else f"{name} ({filtered})",
                is_share=key in shares,
                items=int(metrics.get("sample_len", len(outcomes))),
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                outcomes=outcomes,
            )


def _outcomes(samples: Sequence[Mapping[str, Any]], name: str, filtered: str, value: float) -> tuple[float, ...]:
    """A metric of each item, where the task's figure is their mean; nothing otherwise."""
    single = [sample.get(name) for sample in samples if sample["filter"] == filtered]
    if not single or not all(isinstance(one, int | float) for one in single):
        return ()
    outcomes = tuple(float(one) for one in single if one is not None)
    return outcomes if abs(sum(outcomes) / len(outcomes) - value) < 1e-9 * max(1.0, abs(value)) else ()


@contextmanager
def _silence() -> Iterator[None]:
    """Without lm-eval's bars, warnings and greetings: they would run through our own bar, and through --json."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        yield


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
