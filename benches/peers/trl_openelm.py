"""Times fine-tuning of OpenELM with TRL and PEFT: the peers that `compare.py` runs beside Ulmus.

    trl_openelm.py sft --threads 2 --batch 4 --sequence 256 --steps 3
    trl_openelm.py dpo --threads 2 --batch 4 --sequence 256          # two pairs
    trl_openelm.py sft --adapter lora --rank 32

The model is the module that Ulmus exports for transformers, with random weights; the steps are those of TRL's own trainers, in float32 on
the CPU, with fused AdamW, without checkpointing of activations and, for pairs, with the reference's log-probabilities computed before.
Texts have as many words as tokens are wanted, of a tokenizer that knows each word. A step is timed from the end of the one before, so
that it includes what the trainer does between two. Prints one JSON object; memory is peak resident memory above what importing takes.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from torch_openelm import SHAPES

MODELING = Path(__file__).resolve().parents[2] / "model/src/hf/modeling_openelm.py"
LINEARS = ["qkv_proj", "out_proj", "proj_1", "proj_2"]


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_of(shape):
    spec = importlib.util.spec_from_file_location("modeling_openelm", MODELING)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.OpenELMConfig(
        vocab_size=shape.vocabulary,
        max_context_length=2048,
        num_transformer_layers=len(shape.heads),
        model_dim=shape.width,
        head_dim=shape.head,
        num_query_heads=shape.heads,
        num_kv_heads=[heads // shape.group for heads in shape.heads],
        num_gqa_groups=shape.group,
        ffn_multipliers=shape.multipliers,
        ffn_with_glu=True,
        ffn_dim_divisor=shape.divisor,
        activation_fn_name="swish",
        normalization_layer_name="rms_norm",
        normalize_qk_projections=True,
        share_input_output_layers=True,
        rope_freq_constant=10_000,
        rope_max_length=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    return module.OpenELMForCausalLM(config)


def tokenizer_of(vocabulary):
    words = {word: at for at, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"w{at}": at for at in range(len(words), vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


class Clock(TrainerCallback):
    """The times at which steps end."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sft", "dpo"])
    parser.add_argument("--shape", choices=SHAPES, default="openelm-270m")
    parser.add_argument("--adapter", choices=["lora", "dora"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences; two are a pair")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a pair's prompt")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    imported = peak_bytes()
    model = model_of(SHAPES[arguments.shape])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokenizer = tokenizer_of(SHAPES[arguments.shape].vocabulary)
    source = random.Random(0)
    words = lambda count: " ".join(f"w{source.randrange(3, 30_000)}" for _ in range(count))
    adapter = arguments.adapter and LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank,
        lora_dropout=0.0,
        target_modules=LINEARS,
        use_dora=arguments.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    clock = Clock()
    steps = arguments.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder,
            max_steps=steps,
            max_length=arguments.sequence,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        more = dict(model=model, processing_class=tokenizer, peft_config=adapter, callbacks=[clock])
        if arguments.what == "sft":
            rows = [{"text": words(arguments.sequence - 1)} for _ in range(steps * arguments.batch)]
            config = SFTConfig(per_device_train_batch_size=arguments.batch, **common)
            trainer = SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **more)
        else:
            answer = arguments.sequence - arguments.prompt - 1
            row = lambda: {"prompt": words(arguments.prompt), "chosen": " " + words(answer), "rejected": " " + words(answer)}
            rows = [row() for _ in range(steps * arguments.batch // 2)]
            config = DPOConfig(
                per_device_train_batch_size=arguments.batch // 2, beta=0.01, precompute_ref_log_probs=True, **common
            )
            trainer = DPOTrainer(args=config, train_dataset=Dataset.from_list(rows), **more)
        # What the trainer prints is no result.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    seconds = [end - begun for begun, end in zip(clock.ends, clock.ends[1:])]
    tokens = arguments.batch * arguments.sequence
    print(
        json.dumps(
            {
                "tokens_per_second": tokens / statistics.median(seconds),
                "parameters": parameters,
                "peak_bytes": peak_bytes() - imported,
            }
        )
    )


if __name__ == "__main__":
    main()
