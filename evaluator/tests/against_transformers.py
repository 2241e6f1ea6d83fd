#!/usr/bin/env python3
"""Checks that transformers, peft and trl can use an export, and compute what we compute.

    python against_transformers.py EVALUATOR LOGITS EXPORT

EXPORT is the export folder of a run, LOGITS the program of the evaluator's example of that name. Needs torch,
transformers and peft, and trl for transformers 5. Everything is float32 on one thread; logits may differ by what other orders of summation give.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The", "The trait", "fn main", "Größe: ±5 °C", "日本語", "# Usage\n\n", "  let x = 1;\n"]
TOKENS = 48
TOLERANCE = 1e-4
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
FAILURES = []


def check(what, holds, detail=""):
    print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}")
    if not holds:
        FAILURES.append(what)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()


def tokenizer_of(folder):
    if VERSION >= (4, 45):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    # Their tokenizers do not read the file that ours is written in today, but SentencePiece's.
    return transformers.LlamaTokenizer.from_pretrained(folder, legacy=False)


def text_of_ours(evaluator, model, tokenizer, prompt):
    command = [evaluator, "generate", "--model", model, "--tokenizer", tokenizer, "--prompt", prompt]
    command += ["--max-tokens", str(TOKENS), "--greedy"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def logits_of_ours(program, model, ids):
    lines = subprocess.run([program, model, *map(str, ids)], capture_output=True, check=True, text=True).stdout
    return torch.tensor([json.loads(line) for line in lines.splitlines()])


@torch.no_grad()
def compare_logits(what, program, folder, ids):
    model = load(folder)
    difference = (model(torch.tensor([ids])).logits[0] - logits_of_ours(program, folder, ids)).abs().max().item()
    check(f"{what}: logits", difference < TOLERANCE, f"differ by {difference:.1e}")
    return model


@torch.no_grad()
def compare_texts(evaluator, export, model, tokenizer):
    lengths = []
    hook = model.transformer.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": model.generation_config.eos_token_id}
    singles = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        lengths.clear()
        cached = model.generate(ids, attention_mask=mask, **options)
        check(f"{prompt!r}: cached", set(lengths[1:]) <= {1}, str(lengths[:3]))
        check(
            f"{prompt!r}: without a cache",
            torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options)),
        )
        text, expected = tokenizer.decode(cached[0], skip_special_tokens=True), text_of_ours(
            evaluator, export, export, prompt
        )
        check(f"{prompt!r}: text", text.strip() == expected.strip(), f"{text!r} for {expected!r}")
        singles.append(cached[0, ids.shape[1] :].tolist())
    hook.remove()
    # All prompts at once, filled up on the left.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    made = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)[
        :, batch.input_ids.shape[1] :
    ]
    for prompt, row, single in zip(PROMPTS, made.tolist(), singles):
        check(f"{prompt!r}: in a batch", row[: len(single)] == single)
    beams = [
        model.generate(batch.input_ids, attention_mask=batch.attention_mask, num_beams=3, use_cache=cache, **options)
        for cache in (True, False)
    ]
    check("beams", torch.equal(*beams))


def train_with_peft(folder, model, ids):
    """An adapter that has not learnt changes nothing, one that learns lowers the loss, and one that is stored comes back."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        base = model(ids).logits
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj", "out_proj", "proj_1", "proj_2"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        check("peft: a new adapter", torch.equal(model(ids).logits, base))
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for step in range(4):
        if step == 2:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check("peft: training", losses == sorted(losses, reverse=True), str([round(loss, 3) for loss in losses]))
    model.eval()
    with tempfile.TemporaryDirectory() as stored, torch.no_grad():
        model.save_pretrained(stored)
        again = peft.PeftModel.from_pretrained(load(folder), stored).eval()
        check("peft: a stored adapter", torch.equal(again(ids).logits, model(ids).logits))


def train_with_trl(folder, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [[("user", f"Count to {number}."), ("assistant", f"It is {number}, of course.")] for number in range(16)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    with tempfile.TemporaryDirectory() as output:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
        options |= {"max_steps": 4, "max_length": 64, "learning_rate": 1e-3, "logging_steps": 1, "report_to": []}
        config = SFTConfig(output_dir=output, save_strategy="no", use_cpu=True, bf16=False, **options)
        trainer = SFTTrainer(load(folder), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    check("trl: training", losses == sorted(losses, reverse=True), str(losses))


def main():
    evaluator, logits, export = sys.argv[1:]
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    tokenizer = tokenizer_of(export)
    ids = tokenizer(" ".join(PROMPTS) * 2).input_ids[:64]
    check("BOS is there once", ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id)
    model = compare_logits("the export", logits, export, ids)
    compare_texts(evaluator, export, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # What transformers writes, we read.
        saved = folder / "saved"
        model.save_pretrained(saved)
        compare_logits("saved by transformers", logits, saved, ids)
        with torch.no_grad():
            half = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, torch_dtype=torch.bfloat16)
            difference = (
                (half.eval()(torch.tensor([ids])).logits.float() - model(torch.tensor([ids])).logits)
                .abs()
                .mean()
                .item()
            )
        check("bfloat16", half.dtype == torch.bfloat16 and difference < 0.1, f"differs by {difference:.1e} in the mean")
        # The same weights with layer norms.
        layer_norm = folder / "layer_norm"
        shutil.copytree(export, layer_norm)
        config = json.loads((layer_norm / "config.json").read_text())
        config |= {"model_type": "openelm_layer_norm", "normalization_layer_name": "layer_norm"}
        config |= {"architectures": ["OpenELMLayerNormForCausalLM"]}
        config["auto_map"] = {
            key: value.replace(".OpenELM", ".OpenELMLayerNorm") for key, value in config["auto_map"].items()
        }
        (layer_norm / "config.json").write_text(json.dumps(config))
        compare_logits("layer norm", logits, layer_norm, ids)
        # As CoreNet stores them. The shape is that of the tensors.
        weights = {name.removeprefix("transformer."): weight for name, weight in model.state_dict().items()}
        for name, checkpoint in [("weights", weights), ("training", {"iterations": 1, "model_state_dict": weights})]:
            (folder / name).mkdir()
            path = folder / name / "checkpoint.pt"
            torch.save(checkpoint, path)
            texts = [text_of_ours(evaluator, place, export, PROMPTS[1]) for place in (path, export)]
            check(f"a .pt file of {name}", texts[0] == texts[1], repr(texts[0]))
    train_with_peft(export, model, ids)
    if VERSION >= (5, 0):
        train_with_trl(export, tokenizer)
    print(f"{len(FAILURES)} failures")
    sys.exit(bool(FAILURES))


main()
