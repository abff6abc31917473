"""What travels along with the weights, and what must not."""

import json
from pathlib import Path

import pytest

from duotone.checkpoint.hub import copy_companions
from duotone.errors import DuotoneError


def sentence_model(folder: Path, *paths: str) -> Path:
    """A folder as sentence-transformers saves it, with these modules."""
    source = folder / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "config_sentence_transformers.json"):
        (source / name).write_text("{}")
    modules = [{"idx": i, "name": str(i), "path": path, "type": "any"} for i, path in enumerate(("", *paths))]
    (source / "modules.json").write_text(json.dumps(modules))
    (folder / "out").mkdir()
    return source


def test_modules_after_the_transformer_travel(tmp_path: Path) -> None:
    """Their settings and weights, but no pickle; a module without settings (Normalize) has an empty folder, or none."""
    source = sentence_model(tmp_path, "1_Pooling", "2_Dense", "3_Normalize", "4_Normalize")
    for folder, name in (("1_Pooling", "config.json"), ("2_Dense", "config.json"), ("2_Dense", "model.safetensors")):
        (source / folder).mkdir(exist_ok=True)
        (source / folder / name).write_text(folder + name)
    (source / "2_Dense" / "pytorch_model.bin").write_text("a pickle")
    (source / "3_Normalize").mkdir()
    (source / "model.safetensors").write_text("weights")
    copy_companions(source, tmp_path / "out")
    found = {file.relative_to(tmp_path / "out").as_posix(): file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found.keys() == {
        "tokenizer.json",
        "config_sentence_transformers.json",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }
    assert found["2_Dense/model.safetensors"].read_text() == "2_Densemodel.safetensors"
    assert (tmp_path / "out" / "3_Normalize").is_dir() and not (tmp_path / "out" / "4_Normalize").exists()


@pytest.mark.parametrize("path", ["..", "../other", "/etc", "1_Pooling/..", ".", "link", "tokenizer.json"])
def test_modules_elsewhere_are_refused(path: str, tmp_path: Path) -> None:
    """A path out of the folder, through a link, or to a file."""
    source = sentence_model(tmp_path, path)
    (tmp_path / "other").mkdir()
    (source / "1_Pooling").mkdir()
    (source / "link").symlink_to(tmp_path / "other")
    with pytest.raises(DuotoneError, match=r"modules\.json: found the path .*expected a folder directly beside it"):
        copy_companions(source, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '[{"name": "x"}]', "null", "[" * 100_000])
def test_a_listing_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    """Broken JSON, or JSON of another shape."""
    source = sentence_model(tmp_path)
    (source / "modules.json").write_text(text)
    with pytest.raises(DuotoneError, match=r"modules\.json: found no list of modules"):
        copy_companions(source, tmp_path / "out")
