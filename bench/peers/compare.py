"""Every tool on one model, side by side: same calibration tokens, same evaluation text, each in the arithmetic that would run.

    python bench/peers/compare.py MODEL --calibration TEXT... --text TEXT... [--seeds 0 1 2] [--peers llmcompressor:gptq ...]

Appends rows to bench/records/comparison.jsonl, each as soon as it is measured. The peers' environments come from setup.sh; a
peer without one gets a row that says so. MODEL is a local folder or a hub id; an encoder is judged by its sentence embeddings.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arithmetic import ARITHMETICS, place
from layouts import read_peer
from safetensors.torch import save_file

from duotone.bench import AccuracyBench, activation_floor, append_records, provenance, quantize_in_a_process
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.checkpoint.hub import locate_model
from duotone.errors import DuotoneError
from duotone.evaluation import score_windows, summarize
from duotone.models.tokenizer import load_tokenizer
from duotone.questions import load_piqa, load_piqa_goals, load_story_cloze
from duotone.runtime.load import load
from duotone.tasks import embedding_fidelity, fits_context, multiple_choice

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "comparison.jsonl"
#: environment:recipe -> (tool, uses gradients, its key in ARITHMETICS)
PEERS = {
    "llmcompressor:gptq": ("llm-compressor", False, "llm-compressor"),
    "llmcompressor:rtn": ("llm-compressor", False, "llm-compressor"),
    "gptqmodel:gptq-gar": ("GPTQModel", False, "gptqmodel"),
    "inc:dpq": ("Neural Compressor", False, "inc"),
    "modelopt:w4a8_awq": ("ModelOpt", False, "modelopt"),
    "autoround:w4a16-200": ("AutoRound", True, "autoround"),
    "autoround:w4a16-light": ("AutoRound", True, "autoround"),
    "autoround:fp8_to_int_sym": ("AutoRound", True, "autoround fp8"),
}


@dataclass(frozen=True)
class Judge:
    """What every candidate is held against: the original model, the windows or sentences, and the multiple-choice tasks.

    tasks: of each its items, and which of them the original gets right.
    """

    reference: Any
    tokenizer: Any
    windows: TokenWindows | None
    sentences: tuple[str, ...]
    tasks: dict[str, tuple[Any, tuple[bool, ...]]]

    def columns(self, model: Any, with_tasks: bool) -> dict[str, Any]:
        """The measured columns of a row."""
        empty = dict.fromkeys(("kl", "kl_stderr", "perplexity", "reference_perplexity", "bits_per_byte", "top1_agreement"))
        if self.windows is None:
            found = embedding_fidelity(model, self.reference, self.tokenizer, self.sentences, "cpu")
            tasks = {
                "embedding_error": [found.relative_error, found.relative_error_stderr],
                "rank_correlation": [found.rank_correlation, found.rank_correlation_stderr],
                "neighbor_agreement": [found.neighbor_agreement, found.neighbor_agreement_stderr],
            }
            return empty | {"tokens": None, "tasks": tasks}
        scores = score_windows(model, self.windows, self.reference, torch.device("cpu"))
        assert scores.kl is not None
        result = asdict(summarize(scores, self.windows))
        tasks = {name: self._choice(model, *task) for name, task in self.tasks.items()} if with_tasks else {}
        by_window = {"kl_windows": _short(scores.kl), "nll_windows": _short(scores.nll)}
        return {key: result[key] for key in empty} | {"tokens": result["tokens"], "tasks": tasks} | by_window

    def _choice(self, model: Any, items: Any, original: tuple[bool, ...]) -> dict[str, float]:
        """Accuracy, and of the items those that the original gets right and this model wrong (lost), or the reverse."""
        found = multiple_choice(model, self.tokenizer, items, "cpu")
        pairs = list(zip(original, found.correct_norm, strict=True))
        return {
            "items": len(items), "accuracy": found.accuracy_norm, "stderr": found.stderr_norm,
            "lost": pairs.count((True, False)), "gained": pairs.count((False, True)),
        }  # fmt: skip


def _short(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def main() -> None:
    """Measure all that was asked for, row after row."""
    arguments = _arguments()
    torch.set_grad_enabled(False)
    bench = AccuracyBench(
        arguments.model, tuple(arguments.text), tuple(arguments.calibration), group_size=arguments.group_size,
        samples=arguments.samples, seq_len=arguments.seq_len, eval_samples=arguments.eval_samples,
    )  # fmt: skip
    judge = _judge(bench, arguments)
    model = Path(bench.model).name
    texts = [Path(text.partition("#")[0]).name for text in (bench.text if judge.windows is not None else ["piqa goals"])]
    for seed in arguments.seeds:
        seeded = replace(bench, seed=seed)
        common = {"model": model, "text": texts, "group_size": bench.group_size}
        for row in _rows(seeded, judge, arguments, with_original=seed == arguments.seeds[0] and bool(judge.tasks)):
            whole = provenance(seed) | common | row
            append_records(arguments.records, [whole])
            value = whole["kl"] if whole["kl"] is not None else whole["tasks"].get("embedding_error", [None])[0]
            said = whole["refused"] or f"{value:.5f} in {whole['quantize_seconds'] or 0:.1f} s"
            print(f"{model} seed {seed} {whole['tool']} {whole['method']} {whole['arithmetic']}: {said}", flush=True)


def _rows(bench: AccuracyBench, judge: Judge, arguments: Any, with_original: bool) -> Iterator[dict[str, Any]]:
    folder = locate_model(bench.model)
    tokens = draw_windows(load_tokenizer(folder), bench.calibration, bench.seq_len, bench.samples, bench.seed)
    said = {
        "text": [Path(text.partition("#")[0]).name for text in bench.calibration],
        "tokens": tokens.tokens.numel(), "windows": len(tokens.tokens), "sha256": tokens.sha256, "seed": bench.seed,
    }  # fmt: skip
    if with_original:
        yield _row("original", "none", "bf16", None, "nominal") | judge.columns(judge.reference, with_tasks=True)
    for method in arguments.methods:
        yield _our_row(bench, judge, method, said)
    for peer in arguments.peers:
        yield from _peer_rows(bench, judge, peer, tokens, said, arguments.timeout)


def _row(tool: str, method: str, scheme: str, calibration: Any, arithmetic: str) -> dict[str, Any]:
    """A row without its measurements."""
    return dict.fromkeys(
        ("bits_per_weight", "quantized_macs_share", "kl", "kl_stderr", "kl_activation_floor", "perplexity", "bits_per_byte",
         "top1_agreement", "quantize_seconds", "peak_bytes", "refused", "tokens")
    ) | {
        "tool": tool, "method": method, "effort": "default", "target": "hopper", "scheme": scheme, "calibration": calibration,
        "arithmetic": arithmetic, "tasks": {},
    }  # fmt: skip


def _our_row(bench: AccuracyBench, judge: Judge, method: str, calibration: Any) -> dict[str, Any]:
    method, _, effort = method.partition(":")
    bench = replace(bench, effort=effort or bench.effort)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = quantize_in_a_process(bench, method, "hopper", out)
        model = load(out, torch.float32, "cpu")
    floor = None
    if judge.windows is not None:
        floor = activation_floor(locate_model(bench.model), model, judge.windows, judge.reference)
    return _row("duotone", method, "w4a8", calibration, "contract") | judge.columns(model, with_tasks=True) | {
        "effort": bench.effort,
        "bits_per_weight": report["bits_per_weight"], "quantized_macs_share": report["quantized_macs_share"],
        "kl_activation_floor": floor, "quantize_seconds": sum(report["seconds"].values()), "peak_bytes": report["peak_bytes"],
        "phase_seconds": report["seconds"],
    }  # fmt: skip


def _peer_rows(
    bench: AccuracyBench, judge: Judge, peer: str, tokens: TokenWindows, calibration: Any, timeout: float | None
) -> Iterator[dict[str, Any]]:
    tool, gradient, key = PEERS[peer]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        facts = run_peer(bench, peer, tokens, out, timeout)
        shared = {
            "versions": provenance(0)["versions"] | {tool: facts["version"]}, "gradient": gradient,
            "quantize_seconds": facts["seconds"], "peak_bytes": facts["peak_bytes"], "refused": facts["refused"],
        }  # fmt: skip
        method = peer.partition(":")[2]
        if facts["refused"]:
            yield _row(tool, method, "w4", calibration, "contract") | shared | {"quantize_seconds": None}
            return
        shared |= _sizes(out, judge.reference)
        for arithmetic in ARITHMETICS[key]:
            model = load(locate_model(bench.model), torch.float32, "cpu")
            place(model, out, key, arithmetic, tokens.tokens)
            scheme = "w4a16" if ARITHMETICS[key][arithmetic][1] == "none" else "w4a8"
            yield _row(tool, method, scheme, calibration, arithmetic) | judge.columns(model, with_tasks=False) | shared


def run_peer(bench: AccuracyBench, peer: str, tokens: TokenWindows, out: Path, timeout: float | None = None) -> dict[str, Any]:
    """What the tool's script says of itself; what it printed if it said nothing. timeout: seconds until it is given up."""
    environment, _, recipe = peer.partition(":")
    python = HERE / ".venvs" / environment / "bin" / "python"
    if not python.exists():
        reason = f"no environment: run bench/peers/setup.sh {environment}"
        return {"version": None, "seconds": None, "peak_bytes": None, "refused": reason}
    out.mkdir(parents=True)
    save_file({"input_ids": tokens.tokens}, out.parent / "tokens.safetensors")
    command = [
        python,
        HERE / f"{environment}_peer.py",
        locate_model(bench.model).resolve(),
        out.parent / "tokens.safetensors",
        out,
    ]
    command += ["--recipe", recipe, "--group-size", str(bench.group_size), "--seed", str(bench.seed)]
    path = os.pathsep.join((str(python.parent), os.environ.get("PATH", "")))
    variables = os.environ | {"PATH": path, "PYTHONPATH": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=out.parent, env=variables, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        refused = f"not done after {timeout:.0f} seconds"
        return {"version": None, "seconds": None, "peak_bytes": None, "refused": refused}
    said = out / "peer.json"
    if not said.exists():
        raise DuotoneError(f"{peer}: ended with {done.returncode} and no peer.json: {done.stderr.strip()[-500:]}")
    return json.loads(said.read_text(encoding="utf-8"))


def _sizes(out: Path, reference: Any) -> dict[str, Any]:
    """Stored bits of a quantized weight, and the share of all linears' weights that is quantized."""
    linears = read_peer(out)
    weights = sum(linear.level.numel() for linear in linears.values())
    scales = sum(linear.scale.numel() for linear in linears.values())
    everything = sum(module.weight.numel() for module in reference.modules() if isinstance(module, torch.nn.Linear))
    return {"bits_per_weight": 4 + 16 * scales / weights, "quantized_macs_share": weights / everything}


def _judge(bench: AccuracyBench, arguments: Any) -> Judge:
    folder = locate_model(bench.model)
    reference, tokenizer = load(folder, torch.float32, "cpu"), load_tokenizer(folder)
    if not reference.can_generate():
        return Judge(reference, tokenizer, None, tuple(load_piqa_goals(arguments.piqa)[: arguments.items]), {})
    windows = draw_windows(tokenizer, bench.text, bench.seq_len, bench.eval_samples, seed=0)
    fits = fits_context(reference, tokenizer)
    tasks = {}
    if arguments.piqa:
        tasks["piqa"] = [item for item in load_piqa(arguments.piqa) if fits(item)][: arguments.items]
    if arguments.stories:
        tasks["story_endings"] = load_story_cloze(arguments.stories, arguments.endings, 0, fits)
    original = {name: multiple_choice(reference, tokenizer, items, "cpu").correct_norm for name, items in tasks.items()}
    return Judge(reference, tokenizer, windows, (), {name: (items, original[name]) for name, items in tasks.items()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", default=[], help="text to judge on, which no model here has seen")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument(
        "--methods", nargs="*", default=["rtn", "gptq", "dpq-paper", "dpq", "dpq:high"], help="METHOD or METHOD:EFFORT"
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--piqa", help="folder of valid.jsonl and valid-labels.lst: a task, or an encoder's sentences")
    parser.add_argument("--stories", help="text of short stories: the story-ending task")
    parser.add_argument("--items", type=int, default=500, help="of PIQA at most")
    parser.add_argument("--endings", type=int, default=500, help="of stories")
    parser.add_argument("--timeout", type=float, help="seconds after which a peer is given up, as a refusal")
    parser.add_argument("--records", type=Path, default=RECORDS)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except DuotoneError as error:
        sys.exit(f"compare.py: {error}")
