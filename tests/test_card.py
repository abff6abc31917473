"""The model card of a checkpoint, as the hub's own library reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import duotone
from duotone.card import card_around, model_card, put_evaluation
from duotone.checkpoint.sidecar import EVALUATION_RECORD, read_record
from duotone.errors import DuotoneError

ModelMaker = Callable[..., Path]
FIGURES = {
    "perplexity": 12.5, "tokens": 4096, "reference_perplexity": 12.25, "kl": 0.01, "kl_stderr": 0.001, "top1_agreement": 0.9,
}  # fmt: skip


def test_the_card_of_a_checkpoint(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """What was done, how well, and what was left out; no path of this machine; no promise that vLLM would break."""
    model, sizes = tiny_model(hidden_size=256, intermediate_size=384, head_dim=64), {"samples": 4, "seq_len": 64}
    duotone.quantize(model, tmp_path / "out", calibration=(str(text_file),), device="cpu", **sizes)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None and {"duotone", "w4a8", "compressed-tensors"} <= set(card.data.tags)
    for words in ("# tiny, W4A8", "INT4 in groups of 128", "14 linears", "dpq, effort default", "256 tokens of", "`lm_head`"):
        assert words in card.text, words
    assert str(tmp_path) not in card.content and text_file.name in card.text and "vllm serve" in card.text
    duotone.quantize(tiny_model(), tmp_path / "odd", method="rtn", group_size=32, device="cpu")
    odd = (tmp_path / "odd" / "README.md").read_text()
    assert "vllm serve" not in odd and "will not load in vLLM: group_size is 32" in odd and "calibration |" not in odd


def test_a_hub_model_is_named_as_the_base(tmp_path: Path) -> None:
    """Then the hub links it; a folder's name is no hub id, and cannot break out of the card."""
    sidecar = {
        "settings": {"group_size": 128, "target": "hopper", "method": "rtn", "effort": "default", "order": "none", "seed": 0},
        "layers": {"a": {}}, "bits_per_weight": 4.125, "quantized_macs_share": 0.9, "calibration": None, "kept": {},
        "notes": [], "producer": "duotone 0",
    }  # fmt: skip
    card = ModelCard(model_card("meta-llama/Llama-3.2-1B", sidecar, True))
    assert card.data.base_model_relation == "quantized" and card.data.license is None
    assert card.data.base_model == "meta-llama/Llama-3.2-1B" and "# Llama-3.2-1B, W4A8" in card.text
    wicked = tmp_path / "a\n---\nlicense: mit | x"
    wicked.mkdir()
    card = ModelCard(model_card(str(wicked), sidecar, False))
    assert card.data.license is None and card.data.pipeline_tag is None and "mit \\| x" in card.text


def test_the_license_is_the_base_models(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """As its own card says it, name and link of another one too; of a card that cannot be read nothing."""
    folder = shutil.copytree(tiny_model(), tmp_path / "base")
    for card, meant in {
        "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE.txt\ntags:\n- x\n---\n# A": (
            "other",
            "llama3.2",
            "LICENSE.txt",
        ),
        "---\nlicense:\n- mit\n- apache-2.0\n---\n": (None, None, None),
        "---\nlicense: [a\n---\n": (None, None, None),
        "no front matter": (None, None, None),
    }.items():
        (folder / "README.md").write_text(card)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        duotone.quantize(folder, out, method="rtn", group_size=32, device="cpu")
        data = ModelCard.load(out / "README.md").data
        assert (data.license, data.get("license_name"), data.get("license_link")) == meant
        assert "x" not in data.tags and data.library_name == "transformers"


def test_figures_take_the_place_of_those_before(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """All else stays, a user's own words too; a card without the place is refused before any work."""
    duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, device="cpu")
    path = tmp_path / "out" / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    before, after = card_around(tmp_path / "out")
    for kl in (0.01, 0.02):
        put_evaluation(tmp_path / "out", ["/some/where/held_out.txt#text"], FIGURES | {"kl": kl})
        card = path.read_text()
        assert card.startswith(before) and card.endswith(after) and after.endswith("My own words.\n")
        assert f"| {kl:.5f} ± 0.00100 |" in card and "/some/where" not in card
        assert "On 4096 tokens of held_out.txt#text:" in card
    assert "0.01000" not in path.read_text() and "Not measured yet" not in path.read_text()
    record = read_record(tmp_path / "out", EVALUATION_RECORD)
    assert record == {"format_version": 1, "text": ["held_out.txt#text"], "figures": FIGURES | {"kl": 0.02}}
    path.write_text("# Mine\n")
    with pytest.raises(DuotoneError, match=r"README\.md: found no place for an evaluation"):
        card_around(tmp_path / "out")
