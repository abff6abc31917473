"""Load a checkpoint in transformers, with Duotone's linears: for what calls from_pretrained itself.

Run: python examples/in_transformers.py
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import duotone

MODEL = Path(__file__).resolve().parents[1] / "assets" / "duotone-10m"


def main(method: str = "rtn") -> None:
    """rtn needs no text and takes a second; examples/quantize.py has the method to use."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "duotone-10m-W4AFP8"
        duotone.quantize(MODEL, folder, method=method, device="cpu")
        with duotone.use_in_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print(model.get_submodule("model.layers.0.mlp.down_proj"))
        inputs = tokenizer("To install the package, ", return_tensors="pt")
        print(tokenizer.decode(model.generate(inputs.input_ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]))


if __name__ == "__main__":
    main()
