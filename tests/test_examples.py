"""Everything in examples/, run on the bundled model with less text, and the cells of the notebook from top to bottom."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))


def run(name: str, **arguments: Any) -> None:
    """The `main` of an example."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)


def test_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what became smaller, and a folder that is not empty ends it with a sentence."""
    run("quantize", out=tmp_path / "out", method="rtn", samples=2)
    assert "MB became" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not empty"):
        run("quantize", out=tmp_path / "out", method="rtn", samples=2)


def test_module(capsys: pytest.CaptureFixture[str]) -> None:
    """Saved and loaded, it gives the same."""
    run("module", method="gptq")
    printed = capsys.readouterr().out
    assert "the same: True" in printed and "left as it is: head" in printed


def test_in_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """from_pretrained gives Duotone's linear, and the model writes on."""
    run("in_transformers")
    printed = capsys.readouterr().out
    assert "QuantizedLinear(in_features=1024" in printed and "To install the package, " in printed


def test_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each method."""
    run("evaluate", methods=["rtn"], samples=2)
    assert "KL 0.0" in capsys.readouterr().out


def cells(method: str) -> list[str]:
    """The code of the notebook, with another method."""
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert sum('METHOD = "dpq"' in cell for cell in code) == 1
    return [cell.replace('METHOD = "dpq"', f'METHOD = "{method}"') for cell in code]


@pytest.mark.parametrize("method", ["rtn", pytest.param("dpq", marks=pytest.mark.slow)])
def test_the_notebook_runs_from_top_to_bottom(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each cell in the names of those before it, in the folder it is started in."""
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(method)):
        exec(compile(cell, f"tour.ipynb, code cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "nats a token" in printed and "duotone loads it" in printed and "outputs off by" in printed


def test_the_notebook_is_clean() -> None:
    """As nbformat 4.5 wants it, and without outputs: what it prints is for whoever runs it."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
