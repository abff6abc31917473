"""A checkpoint to the hub: verified whole, then only the files that belong to one, with its model card."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx's or httpx2's, as the hub's version has it
)

from duotone.card import CARD
from duotone.checkpoint.journal import is_unfinished
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import SIDECAR, read_sidecar, recorded_inputs
from duotone.checkpoint.source import SourceFolder, load_finite, open_source
from duotone.errors import DuotoneError
from duotone.models.anatomy import anatomy_of
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, expected_tensors, find_linears
from duotone.runtime.kv_cache import stored_scales
from duotone.runtime.load import check_complete, config_dtype

#: done, total, what: called after each linear that was verified.
Progress = Callable[[int, int, str], None]

#: What a checkpoint consists of besides its shards: by name, never by a pattern that a user's own file could match.
_BELONGS = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json|duotone(-evaluation)?\.json|README\.md"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|[\w.-]+\.tiktoken|chat_template\.(jinja|json)|(pre)?processor_config\.json"
    r"|modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json|(LICENSE|LICENCE|NOTICE)[\w.-]*"
)
#: Of a module's folder that modules.json of a sentence-transformers model names.
_BELONGS_TO_A_MODULE = {"config.json", "model.safetensors"}


@dataclass(frozen=True)
class Published:
    """What was uploaded. left: files of the folder that are no part of a checkpoint. notes: what the card leaves open."""

    repo: str
    revision: str
    commit: str
    private: bool
    files: list[str]
    total_bytes: int
    left: list[str]
    notes: list[str] = field(default_factory=list)


def push(
    checkpoint: str | Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    api: HfApi | None = None,
) -> Published:
    """Verify a checkpoint and upload it as a model repository of the hub, made where there is none, in one commit.

    repo: owner/name. private: a repository that is there already has to be private then. revision: a branch, made where there
    is none. Raises DuotoneError, before anything is sent, for a folder that is no whole checkpoint of ours or has no card and
    where no token is; and for what the hub refuses.
    """
    folder, api = Path(checkpoint), api or HfApi()
    verify(folder, progress)
    notes = _card_notes(folder)
    files, left = _sorted_out(open_source(folder))
    if not (api.token or get_token()):
        raise DuotoneError("the hub: found no token to write with, expected one: hf auth login, or HF_TOKEN")
    branch = revision or "main"
    try:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=private)
        is_private = bool(api.model_info(repo).private)
        if private and not is_private:
            raise DuotoneError(f"{repo}: is there already and public, expected a private one or none; nothing was uploaded")
        if revision is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        parts = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        done = api.create_commit(repo, parts, commit_message="Upload a checkpoint made by duotone", revision=branch)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise DuotoneError(f"{repo}: {_refusal(error, api)}") from None
    size = sum((folder / name).stat().st_size for name in files)
    return Published(repo, branch, done.oid, is_private, files, size, left, notes)


def verify(folder: Path, progress: Progress | None = None) -> None:
    """Read a checkpoint from end to end, a linear at a time.

    Raises DuotoneError unless it was made by Duotone, its run has ended, every tensor that its architecture needs is there, of
    the right shape and finite, and every quantized linear and scale of an FP8 cache can be read.
    """
    if is_unfinished(folder):
        raise DuotoneError(f"{folder}: holds a run that has not ended, expected a checkpoint; go on with it by --resume")
    sidecar, stored = read_sidecar(folder), open_source(folder)
    if sidecar is None or stored.config.get("quantization_config") is None:
        raise DuotoneError(f"{folder}: found no {SIDECAR} and quantization_config, expected a checkpoint that duotone made")
    model = build_skeleton(stored.config, config_dtype(stored.config))
    source, linears = named_source(stored, model), find_linears(model)
    stored_scales(source, anatomy_of(source.config, model, recorded_inputs(folder)), model)
    layers, odd = packed_layers(source), sorted(set(sidecar.get("layers", {})).symmetric_difference(packed_layers(stored)))
    if odd:
        raise DuotoneError(f"{folder}: {SIDECAR} and the shards do not name the same quantized linears, first {odd[0]}")
    for layer in layers:
        if layer not in linears:
            raise DuotoneError(f"{folder}: holds a packed weight {layer!r}, found no such linear in this architecture")
        linears[layer].register_parameter("weight", None)
    others, reader = check_complete(model, source), WeightReader(source)
    for name, shape in expected_tensors(model).items():
        if source.tensors[name].shape != shape:
            raise DuotoneError(f"{name}: found shape {list(source.tensors[name].shape)}, expected {list(shape)}")
    for done, name in enumerate([*others, *layers], 1):
        if name in linears:
            found, linear = reader.read(name).shape, linears[name]
            if found != (linear.out_features, linear.in_features):
                raise DuotoneError(f"{name}: found shape {list(found)}, expected {[linear.out_features, linear.in_features]}")
        else:
            load_finite(source, (name,))
        if progress is not None:
            progress(done, len(others) + len(layers), name)


def _sorted_out(source: SourceFolder) -> tuple[list[str], list[str]]:
    """The files of a checkpoint, and what else lies in its folder."""
    shards = {spec.file for spec in source.tensors.values()}
    modules = {path.name for path in source.path.iterdir() if path.is_dir() and (source.path / "modules.json").is_file()}
    files, left = [], []
    for name in sorted(_walk(source.path)):
        parent, _, leaf = name.rpartition("/")
        of_module = parent in modules and re.fullmatch(r"\d+_\w+", parent) and leaf in _BELONGS_TO_A_MODULE
        belongs = name in shards or of_module or (not parent and _BELONGS.fullmatch(leaf))
        (files if belongs else left).append(name)
    return files, left


def _walk(folder: Path) -> Iterator[str]:
    """Every file below a folder, by its path in it; links to folders are not followed."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _card_notes(folder: Path) -> list[str]:
    """What the hub would like to know and the card does not say. Raises DuotoneError for a card that the hub cannot read."""
    path = folder / CARD
    if not path.is_file():
        raise DuotoneError(f"{path}: found no model card, expected the one that quantize writes")
    try:
        data = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise DuotoneError(f"{path}: its front matter is not what the hub reads ({' '.join(str(error).split())})") from None
    lacking = [name for name in ("base_model", "license") if not data.get(name)]
    return [f"{CARD} names no {name}: the hub {_WHAT_FOR[name]}" for name in lacking]


_WHAT_FOR = {"base_model": "does not link it to its original", "license": "shows none"}


def _refusal(error: Exception, api: HfApi) -> str:
    """One sentence of what the hub or the way to it said."""
    response = getattr(error, "response", None)
    said = " ".join(str(getattr(error, "server_message", None) or error).split()) or type(error).__name__
    if isinstance(error, HFValidationError):
        return f"is no name of a repository, expected owner/name ({said})"
    if response is None:
        return f"the hub at {api.endpoint} cannot be reached ({said})"
    if response.status_code in {401, 403, 404}:
        return f"the hub does not let this token write there, expected one with the right to ({response.status_code}: {said})"
    return f"the hub refuses ({response.status_code}: {said})"
