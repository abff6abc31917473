"""An OpenAI-style server: transformers' own, with models loaded by our runtime."""

from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from duotone.checkpoint.hub import locate_model
from duotone.errors import DuotoneError
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load


def serve(
    model: str | Path, host: str = "localhost", port: int = 8000, device: str = "auto", *, in_background: bool = False
) -> Any:
    """Answer /v1/chat/completions, /v1/completions and what else `transformers serve` knows, until interrupted.

    in_background: return the running server (its `kill_server` ends it) instead. Raises DuotoneError for an unusable model,
    or without the packages that serving takes.
    """
    if not is_serve_available():
        raise DuotoneError("serving takes packages that are not installed: pip install 'duotone[serve]'")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    folder = locate_model(model)
    network = load(folder, device=device)
    check_causal(network, "generation")

    class Manager(model_manager.ModelManager):
        """Hands out the model that is loaded already; there is no other."""

        def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return network

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return load_tokenizer(folder)

        @staticmethod
        def get_gen_models(  # pyright: ignore[reportIncompatibleVariableOverride]
            cache_dir: str | None = None,
        ) -> list[dict[str, Any]]:
            """The one that is served, not what a download folder may hold."""
            del cache_dir
            return [{"id": str(model), "owned_by": "duotone", "object": "model", "created": int(folder.stat().st_mtime)}]

    with mock.patch.object(model_manager, "ModelManager", Manager):
        return Serve(force_model=str(model), device=str(network.device), host=host, port=port, non_blocking=in_background)
