"""`duotone push`: the hub's own client against a stand-in for the hub on this machine."""

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import duotone
from duotone.checkpoint.journal import RECORD
from duotone.cli import app
from duotone.errors import DuotoneError
from duotone.publishing import push, verify

ModelMaker = Callable[..., Path]


@dataclass
class Hub:
    """What the stand-in was told. repositories: by name, whether private. refuse: a status for all that writes."""

    url: str
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    refuse: int | None = None

    @property
    def api(self) -> HfApi:
        """The hub's client, pointed at it."""
        return HfApi(endpoint=self.url, token="hf_of_nobody")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The requests that one commit takes, answered as the hub does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            if name not in told.repositories:
                return self._answer({"error": "Repository not found"}, 404)
            return self._answer({"id": name, "private": told.repositories[name], "siblings": [], "tags": []})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if told.refuse is not None:
                self._answer({"error": "not yours"}, told.refuse)
            elif self.path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                exists = name in told.repositories
                told.repositories.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
                self._answer({"url": f"{told.url}/{name}"}, 409 if exists else 200)
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/branch/" in self.path:
                told.branches.append(self.path.rpartition("/")[2])
                self._answer({})
            elif "/preupload/" in self.path:  # all of it as it is, nothing by way of another store
                named = [file["path"] for file in json.loads(content)["files"]]
                kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self._answer({"files": [{"path": name} | kept for name in named]})
            elif "/commit/" in self.path:
                for line in map(json.loads, content.decode().splitlines()):
                    if line["key"] == "file":
                        told.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                told.commits.append(self.path.rpartition("/")[2])
                self._answer({"success": True, "commitOid": "c0ffee", "commitUrl": f"{told.url}/me/model/commit/c0ffee"})

        def _answer(self, value: object, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def checkpoint(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    """A quantized model."""
    duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, device="cpu")
    return tmp_path / "out"


def test_what_arrives(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Every byte of what belongs to a checkpoint, in one commit, and nothing else; from there it loads."""
    for stray in ("notes.txt", "secrets.json", "old.safetensors", "run.log", "code.py"):
        (checkpoint / stray).write_text("mine")
    (checkpoint / "runs").mkdir()
    (checkpoint / "runs" / "config.json").write_text("{}")
    told: list[tuple[int, int, str]] = []
    done = push(checkpoint, "me/model", progress=lambda *step: told.append(step), api=hub.api)
    assert set(done.files) == set(hub.files) and hub.commits == ["main"] and hub.branches == []
    assert {"README.md", "config.json", "duotone.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(
        done.files
    )
    assert done.left == [
        "code.py",
        "duotone-run.json",
        "notes.txt",
        "old.safetensors",
        "run.log",
        "runs/config.json",
        "secrets.json",
    ]
    assert all((checkpoint / name).read_bytes() == content for name, content in hub.files.items())
    assert done.total_bytes == sum(map(len, hub.files.values())) and (done.commit, done.private) == ("c0ffee", False)
    assert told[-1][0] == told[-1][1] == len(told) > 14
    (tmp_path / "there").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "there" / name).write_bytes(content)
    verify(tmp_path / "there")
    duotone.load(tmp_path / "there")


def test_the_card_goes_along(hub: Hub, checkpoint: Path) -> None:
    """As it stands, a user's words too; what it does not say is told."""
    card = ModelCard.load(checkpoint / "README.md")
    done = push(checkpoint, "me/model", api=hub.api)
    assert [note.partition(":")[0] for note in done.notes] == ["README.md names no base_model", "README.md names no license"]
    card.data.base_model, card.data.license = "someone/tiny", "apache-2.0"
    card.save(checkpoint / "README.md")
    assert push(checkpoint, "me/model", api=hub.api).notes == []
    assert hub.files["README.md"] == (checkpoint / "README.md").read_bytes()


def test_private_means_private(hub: Hub, checkpoint: Path) -> None:
    """A new repository is; one that is there and public is left alone."""
    assert push(checkpoint, "me/new", private=True, api=hub.api).private and hub.repositories["me/new"]
    hub.files.clear()
    hub.repositories["me/open"] = False
    with pytest.raises(DuotoneError, match=r"^me/open: is there already and public, .*nothing was uploaded$"):
        push(checkpoint, "me/open", private=True, api=hub.api)
    assert not hub.files


def test_a_branch(hub: Hub, checkpoint: Path) -> None:
    """Is made where there is none, and gets the commit."""
    assert push(checkpoint, "me/model", revision="w4a8", api=hub.api).revision == "w4a8"
    assert (hub.branches, hub.commits) == (["w4a8"], ["w4a8"])


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_hub_refuses(hub: Hub, checkpoint: Path, status: int) -> None:
    """One sentence with its status; of a missing right what is missing."""
    hub.refuse = status
    words = "the hub refuses" if status == 500 else "does not let this token write there"
    with pytest.raises(DuotoneError, match=rf"^me/model: the hub .*{words.removeprefix('the hub ')}.*{status}") as caught:
        push(checkpoint, "me/model", api=hub.api)
    assert "\n" not in str(caught.value) and not hub.files


def test_no_right_to_one_that_is_there(hub: Hub, checkpoint: Path) -> None:
    """The commit is what is refused then."""
    hub.repositories["me/model"], hub.refuse = False, 403
    with pytest.raises(DuotoneError, match=r"^me/model: the hub does not let this token write there.*403"):
        push(checkpoint, "me/model", api=hub.api)


def test_no_token_no_network_no_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is sent, or in a sentence."""
    with pytest.raises(DuotoneError, match=r"me/model: the hub at http://127\.0\.0\.1:9 cannot be reached"):
        push(checkpoint, "me/model", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_of_nobody"))
    with pytest.raises(DuotoneError, match="no name of a repository, expected owner/name"):
        push(checkpoint, "a/b/c", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_of_nobody"))
    monkeypatch.setattr("duotone.publishing.get_token", lambda: None)
    with pytest.raises(DuotoneError, match="found no token to write with"):
        push(checkpoint, "me/model", api=HfApi(endpoint="http://127.0.0.1:9"))


def without(tensors: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        kept = {
            name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith(tensors)
        }
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "duotone.json").unlink(), r"found no duotone\.json"),
        (lambda folder: (folder / "README.md").unlink(), r"README\.md: found no model card"),
        (lambda folder: (folder / "README.md").write_text("---\ntags: [a\n---\n"), r"README\.md: its front matter is not what"),
        (lambda folder: (folder / RECORD).write_text("{}"), "holds a run that has not ended"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "model.safetensors"),
        (without("model.layers.1.mlp.up_proj"), "do not name the same quantized linears, first model.layers.1.mlp.up_proj"),
        (without("model.norm"), r"found no tensor 'model\.norm\.weight'"),
        (without("model.layers.0.mlp.up_proj.weight_scale"), "up_proj: the checkpoint lacks"),
        (not_a_number, r"model\.norm\.weight holds 1 NaN"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_no_whole_checkpoint(hub: Hub, checkpoint: Path, damage: Callable[[Path], None], words: str) -> None:
    """Is refused before anybody is asked anything."""
    damage(checkpoint)
    with pytest.raises(DuotoneError, match=words):
        push(checkpoint, "me/model", api=hub.api)
    assert not hub.repositories and not hub.files


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("mixtral", {"num_local_experts": 2}), ("gpt2", {"n_embd": 128, "n_layer": 2})]
)
def test_names_of_the_folders_own(model_type: str, sizes: dict, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A checkpoint is whole too where its tensors are called or laid otherwise than the model's."""
    out = tmp_path / "out"
    duotone.quantize(tiny_model(model_type, **sizes), out, method="rtn", group_size=32, device="cpu")
    read: list[str] = []
    verify(out, lambda _, __, name: read.append(name))
    tensors = load_file(out / "model.safetensors")
    packed = [name for name in tensors if name.endswith(".weight_packed")]
    assert len(set(read)) == len(read) == len(packed) + sum(".weight_" not in name for name in tensors)
    del tensors[packed[-1].replace("_packed", "_scale")]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(DuotoneError, match=r"lacks .*weight_scale"):
        verify(out)


def test_another_model_is_none_of_ours(tiny_model: ModelMaker, hub: Hub) -> None:
    """An ordinary folder, though whole, is not uploaded."""
    with pytest.raises(DuotoneError, match="expected a checkpoint that duotone made"):
        push(tiny_model(), "me/model", api=hub.api)


def test_the_command(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON object on standard output, or a table that names what stays here."""
    monkeypatch.setattr("duotone.publishing.HfApi", lambda: hub.api)
    (checkpoint / "run.log").write_text("mine")
    done = CliRunner().invoke(app, ["push", str(checkpoint), "me/model", "--private", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["repo"] == "me/model" and told["private"] and set(told["files"]) == set(hub.files)
    done = CliRunner().invoke(app, ["push", str(checkpoint), "me/model", "--revision", "next", "--quiet"])
    assert done.exit_code == 0 and "me/model (private)" in done.stdout and "run.log" in done.stdout and "on next" in done.stdout
