"""The server answers as OpenAI's would, with the model it was given."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

import duotone
from duotone.errors import DuotoneError
from duotone.runtime import serve as module
from duotone.runtime.generate import generate


@pytest.mark.skipif(not is_serve_available(), reason="the packages of 'duotone[serve]' are not installed")
def test_completions(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Health, the model's name, and a greedy completion: the text that `duotone generate` writes."""
    out = tmp_path / "out"
    duotone.quantize(tiny_model(), out, method="rtn", device="cpu")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = module.serve(out, port=port, device="cpu", in_background=True)

    def ask(path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    try:
        for _ in range(100):
            try:
                assert ask("/health")["status"] == "ok"
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        assert [model["id"] for model in ask("/v1/models")["data"]] == [str(out)]
        body = {"model": str(out), "prompt": "The red fox", "max_tokens": 6, "temperature": 0}
        text = ask("/v1/completions", body)["choices"][0]["text"]
    finally:
        server.kill_server()
    assert text == generate(out, "The red fox", 6, device="cpu").text


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one sentence."""
    monkeypatch.setattr(module, "is_serve_available", lambda: False)
    with pytest.raises(DuotoneError, match=r"pip install 'duotone\[serve\]'"):
        module.serve(tmp_path)
