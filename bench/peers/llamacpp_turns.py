"""llama.cpp on a random Q4_0 model of a config's shape; runs in its own environment, and takes a turn for every line it reads.

    PYTHON llamacpp_turns.py CONFIG.json PROMPT_TOKENS NEW_TOKENS THREADS HEAD

PYTHON has llama-cpp-python, built from its source package, and gguf. Answers a line of JSON: first what it is, then for each
turn the seconds until the prompt is read and those of each new token. HEAD is what the output head is stored in: Q6_K, as
llama.cpp's own Q4_0 has it, or BF16, as a W4A8 checkpoint does.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

#: (type, values of a block, its bytes)
KINDS = {
    "Q4_0": (gguf.GGMLQuantizationType.Q4_0, 32, 18),
    "Q6_K": (gguf.GGMLQuantizationType.Q6_K, 256, 210),
    "BF16": (gguf.GGMLQuantizationType.BF16, 1, 2),
}


def main() -> None:
    """Write the model, load it, take turns."""
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prompt_tokens, new_tokens, threads = map(int, sys.argv[2:5])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, config, sys.argv[5])
        size = path.stat().st_size
        model = llama_cpp.Llama(
            str(path), n_ctx=prompt_tokens + new_tokens + 8, n_batch=512, n_threads=threads, n_threads_batch=threads,
            use_mmap=False, verbose=False,
        )  # fmt: skip
    print(json.dumps({"version": llama_cpp.__version__, "weight_bytes": size}), flush=True)
    prompt = np.random.default_rng(0).integers(3, config["vocab_size"], prompt_tokens).tolist()
    for _ in sys.stdin:
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        token = int(np.argmax(model.scores[prompt_tokens - 1]))  # the logits of the last token, as greedy search needs them
        first = time.perf_counter()
        for i in range(new_tokens - 1):
            model.eval([token])
            token = int(np.argmax(model.scores[prompt_tokens + i]))
        done = time.perf_counter()
        print(json.dumps([first - begin, (done - first) / (new_tokens - 1)]), flush=True)


def write_model(path: Path, config: dict[str, Any], head: str) -> None:
    """A GGUF file of random weights without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    add(writer, "token_embd.weight", "Q4_0", config["vocab_size"], hidden)
    add(writer, "output.weight", head, config["vocab_size"], hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, queries),
            "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide),
        }  # fmt: skip
        for name, (rows, columns) in shapes.items():
            add(writer, f"blk.{layer}.{name}.weight", "Q4_0", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, kind: str, rows: int, columns: int) -> None:
    """A tensor of random codes under small scales."""
    number, block, size = KINDS[kind]
    data = np.random.default_rng(len(name)).integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if kind == "BF16":
        data[..., 1] = 0x3C  # about a hundredth
    elif kind == "Q4_0":
        data[..., :2] = scale
    else:
        data[..., 192:208] = 1
        data[..., 208:] = scale
    writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=number)


if __name__ == "__main__":
    main()
