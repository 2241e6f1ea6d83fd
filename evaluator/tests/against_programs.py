#!/usr/bin/env python3
"""Checks that other programs can read an export, and generate the same text as `evaluator generate --greedy`.

    python against_programs.py EVALUATOR EXPORT CONVERTER

EXPORT is the export folder of a run, CONVERTER llama.cpp's convert_hf_to_gguf.py. Needs mlx-lm and llama-cpp-python. Both
decode in float32 as we do but sum in other orders, which has not changed any text so far.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import mlx_lm
from mlx_lm.generate import stream_generate

PROMPTS = ["The", "The trait", "fn main", "Größe: ±5 °C", "日本語", "# Usage\n\n", "  let x = 1;\n"]
TOKENS = 48


def ours(evaluator, export, prompt):
    command = [evaluator, "generate", "--model", export, "--prompt", prompt, "--max-tokens", str(TOKENS), "--greedy"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def mlx(model, tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    made = [response.token for response in stream_generate(model, tokenizer, ids, max_tokens=TOKENS)]
    return tokenizer.decode(ids + made, skip_special_tokens=True)


def llama(model, prompt):
    ids, made = model.tokenize(prompt.encode(), add_bos=True), []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if token == model.token_eos() or len(made) == TOKENS:
            break
        made.append(token)
    return model.detokenize(ids + made).decode()


def main():
    evaluator, export, converter = sys.argv[1:]
    # It needs no code of the model, and so is not to ask whether it may run it.
    mlx_model, tokenizer = mlx_lm.load(export, tokenizer_config={"trust_remote_code": False})
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        convert = [sys.executable, converter, export, "--outtype", "f32", "--outfile", gguf]
        subprocess.run(convert, check=True, capture_output=True)
        context = json.loads((Path(export) / "config.json").read_text())["max_context_length"]
        llama_model = llama_cpp.Llama(str(gguf), n_ctx=context, verbose=False)
    wrong = 0
    for prompt in PROMPTS:
        expected = ours(evaluator, export, prompt)
        for program, text in [("mlx-lm", mlx(mlx_model, tokenizer, prompt)), ("llama.cpp", llama(llama_model, prompt))]:
            if text.strip() != expected.strip():
                wrong += 1
                print(f"{program} after {prompt!r}:\n  {text!r}\ninstead of\n  {expected!r}")
    print(f"{len(PROMPTS)} prompts, 2 programs: {wrong} texts differ")
    sys.exit(wrong > 0)


main()
