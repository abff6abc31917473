"""The pages of docs/ are true: what they tell to type is there, their links lead somewhere, their recipes can be followed."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import duotone
from duotone.contract import quantize_activations
from duotone.kernels import cpu, dispatch, reference
from duotone.qweight import fp8_values
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target
from duotone.solver import methods
from tests.kernels.test_reference import make_weight
from tests.test_cli import commands, invoke

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: A line of a code block that begins with the command, behind what launches it.
COMMAND = re.compile(r"^\s*(?:[A-Z_]+=\S+ )?(?:torchrun .* -m )?duotone (?P<rest>[a-z].*)$", re.MULTILINE)


def tool(name: str) -> ModuleType:
    """A script of tools/."""
    found = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def typed(page: Path) -> Iterator[list[str]]:
    """The words of every call of `duotone` on a page."""
    for match in COMMAND.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        try:
            yield shlex.split(match["rest"], comments=True)
        except ValueError:  # prose with an apostrophe
            continue


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_tells_to_type_is_there(page: Path) -> None:
    """Each command is one, and each option it is given is its own."""
    known = {tuple(path.split()): command for path, command in tool("commands").all_commands()}
    for words in typed(page):
        path = next((path for path in known if tuple(words[: len(path)]) == path), None)
        if path is None:
            assert words[0] not in {path[0] for path in known} or words[0] == "bench", words
            continue
        options = {name for parameter in known[path].params for name in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words


def test_calls_are_found() -> None:
    """The walk above sees the README's and the quick start's calls."""
    assert len(list(typed(ROOT / "README.md"))) > 15 and len(list(typed(ROOT / "docs" / "quick-start.md"))) >= 7


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is to a file of the repository."""
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_page_is_on_the_site() -> None:
    """The index lists all pages, each once."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    listed = [name for tree in trees for name in tree.split("\n\n")[1].split()]
    there = [page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES if ROOT / "docs" in page.parents]
    assert sorted([*listed, "index"]) == sorted(there)


def test_the_commands_page_has_everything() -> None:
    """A section for every command; no option without words."""
    page = tool("commands").commands_page()
    for path in commands():
        section = page.partition(f"## duotone {' '.join(path)}\n")[2].partition("\n## ")[0]
        assert f"duotone {' '.join(path)} " in section and "```bash\nduotone " in section
    for row in re.findall(r"^\| `.*$", page, re.MULTILINE):
        assert row.rstrip(" |").rpartition("|")[2].strip(), row


def test_the_picture_is_drawn_by_what_quantizes() -> None:
    """docs/two-precisions.svg is what tools/picture.py draws with the contract of today."""
    module = tool("picture")
    assert module.draw() == module.PICTURE.read_text(encoding="utf-8")


def test_the_quick_start_can_be_followed(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Its second block, line by line, on a smaller model, in shorter windows and by a method that takes no time."""
    block = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8").split("```bash\n")[2].partition("```")[0]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    name, model = lines.pop(0)[0].split("=")
    assert (ROOT / model / "evaluation.txt").is_file() and (ROOT / model / "calibration.txt").is_file()
    places = {f"${name}/evaluation.txt": text_file, f"${name}": tiny_model(), "build/quick": tmp_path / "quick", "256": "64"}
    for words in lines:
        words = [str(places.get(word, word)) for word in words] + ["--method", "rtn"] * (words[1] == "quantize")
        outcome = invoke(*words[1:])
        assert outcome.code == 0, outcome.err


def code(page: str) -> str:
    """The Python of a page."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
def test_the_page_on_methods_can_be_followed(target: str) -> None:
    """The method is short, is taken by its name, runs to the end, and does better than rounding to nearest."""
    source = code("add-a-method.md")
    assert len(source.splitlines()) < 10
    exec(source, dict(vars(methods)))  # puts it into the one table of methods
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64), torch.nn.Linear(64, 8))
    mixing = torch.randn(64, 64)
    batches = [torch.randn(64, 64) @ mixing for _ in range(4)]
    try:
        made = {
            method: duotone.quantize_module(net, batches, method=method, target=target, group_size=32, device="cpu")
            for method in ("rtn", "searched")
        }
    finally:
        del methods.METHODS["searched"]
    found = {layer.layer: layer for layer in made["searched"].report.layers}
    assert all(layer.method == "searched" for layer in found.values())
    x = torch.randn(64, 64) @ mixing
    with torch.no_grad():
        off = {method: float((one.module(x) - net(x)).norm() / net(x).norm()) for method, one in made.items()}
    assert off["searched"] < 0.9 * off["rtn"]


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_the_page_on_kernels_can_be_followed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend refuses in sentences, is chosen, keeps the operand, and gives the contract's product to the last rounding."""
    wide = ModuleType("duotone.kernels.wide")
    monkeypatch.setitem(sys.modules, wide.__name__, wide)
    exec(code("add-a-kernel.md"), vars(wide))
    monkeypatch.setattr(dispatch, "BACKENDS", (wide, cpu, reference))
    scheme, here = Scheme(target, 32), torch.device("cpu")
    assert dispatch.explain(scheme, here).runs == "float64 sums"
    assert dispatch.choose(scheme, torch.device("meta"))[1][0] == "wide: runs on a CPU, not on meta"
    assert dispatch.choose(Fp8Scheme(target), here)[1][0] == "wide: needs 4-bit codes"
    weight = make_weight(24, 80, scheme)
    layer = QuantizedLinear(weight, torch.ones(24))
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    x8, scale = quantize_activations(x, target, weight.input_scale)
    exact = x8.double() @ fp8_values(weight).double().T * weight.outer_scale * scale
    assert layer.backend is wide and torch.equal(layer(x), exact.float() + 1)
    assert torch.equal(wide.values(layer._packed), fp8_values(weight))
