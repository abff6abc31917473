"""What vLLM will refuse is said before the work, one sentence a reason."""

from collections.abc import Callable
from pathlib import Path

import pytest

from duotone.checkpoint.source import open_source
from duotone.loadability import vllm_warnings
from duotone.plan import QuantizeConfig, make_plan
from duotone.scheme import GAUDI, Scheme

ModelMaker = Callable[..., Path]
FITTING = {"model.layers.0.mlp.up_proj": (256, 128)}


def test_a_fitting_checkpoint_gives_no_warning() -> None:
    """Group 128, symmetric, multiples of 128."""
    assert vllm_warnings(Scheme(), FITTING, []) == []


@pytest.mark.parametrize(
    ("scheme", "shapes", "split", "words"),
    [
        (Scheme(GAUDI), FITTING, [], ["target gaudi"]),
        (Scheme(group_size=64), FITTING, [], ["group_size is 64", "128"]),
        (Scheme(symmetric=False), FITTING, [], ["asymmetric"]),
        (Scheme(), {"a.down_proj": (256, 172)}, [], ["a.down_proj is 256 x 172", "multiples of 128", "1 layers"]),
        (Scheme(), FITTING, ["a.q_proj"], ["a.q_proj stays BF16", "fused"]),
    ],
)
def test_each_refusal_is_one_sentence(
    scheme: Scheme, shapes: dict[str, tuple[int, int]], split: list[str], words: list[str]
) -> None:
    """It names what was found and what the kernel needs."""
    (reason,) = vllm_warnings(scheme, shapes, split)
    assert reason.startswith("will not load in vLLM: ") and all(word in reason for word in words)


def test_partly_ignored_groups_are_found(tiny_model: ModelMaker) -> None:
    """Ignoring q alone splits a fused group; ignoring all three, or a linear that reads its input alone, does not."""
    source = open_source(tiny_model())
    names = {
        ("re:.*q_proj",): ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        ("re:.*[qkv]_proj", "re:.*o_proj", "re:.*down_proj"): [],
        (): [],
    }
    for ignore, expected in names.items():
        assert make_plan(source, QuantizeConfig(ignore=ignore)).split_groups == expected
