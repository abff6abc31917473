"""The house is kept true: imports point one way, files stay small, nothing reads the environment or unpickles."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "duotone"

#: Tiers, upper ones first: a file imports only from its own room or from rooms above it.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "phases"),
    ("device", "ranks"),
    ("formats",),
    ("scheme",),
    ("contract",),
    ("qweight",),
    ("kernels",),
    ("solver", "checkpoint"),
    ("models",),
    ("transforms",),
    ("calibrate", "runtime"),
    ("vllm_plugin",),
    ("loadability",),
    ("settings",),
    ("choices", "inspection"),
    ("plan",),
    ("checking", "explanation", "converting", "advice"),
    ("outcome",),
    ("floors", "card"),
    ("unfinished", "publishing", "gpu_costs"),
    ("run", "estimate"),
    ("solving", "opening"),
    ("output",),
    ("pipeline",),
    ("evaluation", "questions", "modules"),
    ("tasks",),
    ("harness",),
    ("examining",),
    ("sensitivity",),
    ("goals",),
    ("bench", "report", "comparing", "advising"),
    ("report_bench", "report_sensitivity"),
    ("page",),
    ("speed",),
    ("speed_gpu", "speed_model"),
    ("cli_options",),
    ("cli_advise", "cli_bench", "cli_eval", "cli_hub", "cli_layouts", "cli_quantize", "cli_report", "cli_sensitivity"),
    ("cli", "__init__"),
    ("__main__",),
)
#: (room, room of a tier above it that it must not know): the quantizing and the running wing meet in the file on disk.
FORBIDDEN = {
    ("runtime", "solver"),
    ("runtime", "transforms"),
    ("models", "solver"),
    ("models", "kernels"),
    ("calibrate", "checkpoint"),
    ("calibrate", "kernels"),
}
#: The longest file and function the house allows (ARCHITECTURE: about 300 and 60).
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 320, 66, 8

FILES = sorted(SOURCE.rglob("*.py"))


def room(module: str) -> str:
    """The room of a dotted module: its second name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def room_of_file(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every duotone module a file imports, inside functions too, but not for type checking only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "duotone":
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "duotone"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_up(path: Path) -> None:
    """A file imports only from its own room and from tiers above it."""
    tier_of = {name: i for i, tier in enumerate(TIERS) for name in tier}
    own = room_of_file(path)
    assert own in tier_of, f"{own} has no tier: say where it stands"
    for module in imports(path):
        other = room(module)
        assert other == own or tier_of[other] < tier_of[own], f"{path.name} ({own}) imports {module}, which is not above it"
        assert (own, other) not in FORBIDDEN, f"{path.name} ({own}) must not know {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_size(path: Path) -> None:
    """Files, functions and parameter lists stay readable; a command's options, and a GPU program's pointers, are their own."""
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not path.name.startswith("cli"):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name
            is_program = path.parent == SOURCE / "kernels" / "gpu" and path.name.endswith("kernels.py")
            assert is_program or len(node.args.args) + len(node.args.kwonlyargs) <= MAX_PARAMETERS, node.name


def test_no_environment_no_pickle_no_remote_code() -> None:
    """Nothing unpickles or runs code from a model folder; one file reads one environment variable, DUOTONE_NATIVE."""
    for path in FILES:
        text = path.read_text()
        if path == SOURCE / "kernels" / "native.py":
            text = text.replace('os.environ.get("DUOTONE_NATIVE")', "")
        for forbidden in ("os.environ", "getenv", "torch.load", "import pickle", "trust_remote_code=True", "eval("):
            assert forbidden not in text.replace(".eval(", "").replace("model.eval()", ""), f"{path.name} holds {forbidden}"


def test_tier_table_matches_the_tree() -> None:
    """Every room of the table exists: a renamed room must not leave its rule behind."""
    rooms = {room_of_file(path) for path in FILES}
    assert {name for tier in TIERS for name in tier} == rooms
