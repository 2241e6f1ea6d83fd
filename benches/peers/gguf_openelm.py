"""Writes an OpenELM model with random weights as GGUF, to time llama.cpp with it.

    gguf_openelm.py openelm-270m q8_0 FILE.gguf        formats: f32, f16, bf16, q8_0

Needs the packages gguf, numpy and torch (whose shapes `torch_openelm.py` knows).
"""

import sys

import gguf
import numpy as np

from torch_openelm import SHAPES

FORMATS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def main():
    name, format_name, path = sys.argv[1:]
    shape, kind = SHAPES[name], FORMATS[format_name]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "openelm")
    writer.add_block_count(len(shape.heads))
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv([heads // shape.group for heads in shape.heads])
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")

    def matrix(tensor, outputs, inputs):
        values = random.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5
        writer.add_tensor(f"{tensor}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(tensor, width):
        writer.add_tensor(f"{tensor}.weight", np.ones(width, dtype=np.float32))

    matrix("token_embd", shape.vocabulary, shape.width)
    norm("output_norm", shape.width)
    for index, (heads, ffn) in enumerate(zip(shape.heads, shape.ffn)):
        block = f"blk.{index}."
        norm(block + "attn_norm", shape.width)
        norm(block + "ffn_norm", shape.width)
        norm(block + "attn_q_norm", shape.head)
        norm(block + "attn_k_norm", shape.head)
        matrix(block + "attn_qkv", (heads + 2 * (heads // shape.group)) * shape.head, shape.width)
        matrix(block + "attn_output", shape.width, heads * shape.head)
        matrix(block + "ffn_gate", ffn, shape.width)
        matrix(block + "ffn_up", ffn, shape.width)
        matrix(block + "ffn_down", shape.width, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
