"""Times OpenELM in PyTorch: the peer that `compare.py` runs beside Ulmus.

    torch_openelm.py train --threads 1 --dtype f32 [--compile] [--shape tiny] [--batch 4 --sequence 512] --steps 3
    torch_openelm.py infer --threads 1 --dtype bf16 --prompt 512 --generate 128 --runs 3
    torch_openelm.py train --device cuda --dtype bf16 --compile --shape openelm-1_1b --batch 8 --sequence 2048

The model is that of arXiv 2404.14619 in the forms that PyTorch is fastest with: fused RMS norm, scaled dot product
attention with grouped queries, tied head, fused AdamW; bf16 training is autocast over float32 weights, bf16
inference has bf16 weights; `--norm` has the RMS norm of the published code and layer norm, too. Prints one JSON object;
memory is peak resident memory above what importing PyTorch takes, on a GPU the most that was allocated there.
"""

import argparse
import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


def divisible(value, divisor):
    """The nearest multiple of the divisor that is at least the divisor and at least 90 % of the value."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def spread(low, high, count):
    return [round(low + (high - low) * i / (count - 1), 2) for i in range(count)]


class Shape:
    """The widths of a model, with the query heads and the FFN width of each layer."""

    def __init__(self, vocabulary, layers, width, head, group, qkv, ffn, divisor):
        self.vocabulary, self.width, self.head, self.group, self.divisor = vocabulary, width, head, group, divisor
        self.multipliers = spread(*ffn, layers)
        self.heads = [divisible(width * m, head * group) // head for m in spread(*qkv, layers)]
        self.ffn = [divisible(width * m, divisor) for m in self.multipliers]


SHAPES = {
    "openelm-270m": Shape(32_128, 16, 1280, 64, 4, (0.5, 1.0), (0.5, 4.0), 256),
    "openelm-450m": Shape(32_128, 20, 1536, 64, 4, (0.5, 1.0), (0.5, 4.0), 256),
    "openelm-1_1b": Shape(32_128, 28, 2048, 64, 4, (0.5, 1.0), (0.5, 4.0), 256),
    "openelm-3b": Shape(32_128, 36, 3072, 128, 4, (0.5, 1.0), (0.5, 4.0), 256),
    "quickstart": Shape(4096, 4, 128, 32, 2, (0.5, 1.0), (0.5, 4.0), 64),
}


class Norm(nn.Module):
    kind = "rms"

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.kind == "layer":
            return F.layer_norm(x, weight.shape, weight, None, 1e-5)
        if self.kind == "naive_rms":
            wide = x.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight
        return F.rms_norm(x, weight.shape, weight, 1e-6)


def rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Layer(nn.Module):
    def __init__(self, shape, heads, ffn):
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, heads // shape.group, shape.head
        self.attention_norm = Norm(shape.width)
        self.qkv = nn.Linear(shape.width, (heads + 2 * self.kv_heads) * shape.head, bias=False)
        self.query_norm, self.key_norm = Norm(shape.head), Norm(shape.head)
        self.out = nn.Linear(heads * shape.head, shape.width, bias=False)
        self.ffn_norm = Norm(shape.width)
        self.up = nn.Linear(shape.width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, shape.width, bias=False)

    def forward(self, x, cos, sin, cache=None, position=0):
        batch, length, _ = x.shape
        packed = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.head).transpose(1, 2)
        query, key, value = packed.split([self.heads, self.kv_heads, self.kv_heads], 1)
        query = rotate(self.query_norm(query), cos, sin)
        key = rotate(self.key_norm(key), cos, sin)
        if cache is not None:
            cache[0][:, :, position : position + length] = key
            cache[1][:, :, position : position + length] = value
            key, value = (kept[:, :, : position + length] for kept in cache)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class OpenElm(nn.Module):
    def __init__(self, shape, positions=2048):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, *sizes) for sizes in zip(shape.heads, shape.ffn))
        self.norm = Norm(shape.width)
        frequencies = 10_000.0 ** (-torch.arange(0, shape.head, 2).float() / shape.head)
        angles = torch.arange(positions)[:, None] * frequencies[None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def caches(self, batch, positions, dtype):
        return [
            [torch.zeros(batch, heads // self.shape.group, positions, self.shape.head, dtype=dtype) for _ in "kv"]
            for heads in self.shape.heads
        ]

    def forward(self, ids, caches=None, position=0, last_only=False):
        x = self.embedding(ids)
        here = slice(position, position + ids.shape[1])
        cos, sin = self.cos[here].to(x.dtype), self.sin[here].to(x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[index], position)
        return F.linear(self.norm(x[:, -1:] if last_only else x), self.embedding.weight)


def peak_bytes():
    if torch.get_default_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now():
    """The time in seconds when everything that was begun is done."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(model, arguments, dtype):
    vocabulary = model.shape.vocabulary
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def loss_of(ids):
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.float().reshape(-1, vocabulary), ids[:, 1:].reshape(-1))

    if arguments.compile:
        loss_of = torch.compile(loss_of)

    def step():
        ids = torch.randint(0, vocabulary, (arguments.batch, arguments.sequence + 1))
        begun = now()
        loss_of(ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return now() - begun

    step()
    seconds = [step() for _ in range(arguments.steps)]
    return {"tokens_per_second": arguments.batch * arguments.sequence / statistics.median(seconds)}


@torch.inference_mode()
def infer(model, arguments, dtype):
    model = model.to(dtype).eval()
    total = arguments.prompt + arguments.generate

    def run():
        caches = model.caches(1, total, dtype)
        ids = torch.randint(0, model.shape.vocabulary, (1, arguments.prompt))
        begun = now()
        token = model(ids, caches, 0, last_only=True)[:, -1].argmax(-1, keepdim=True)
        prompt = now() - begun
        begun = now()
        for position in range(arguments.prompt, total - 1):
            token = model(token, caches, position, last_only=True)[:, -1].argmax(-1, keepdim=True)
        return prompt, now() - begun

    run()
    prompts, generations = zip(*(run() for _ in range(arguments.runs)))
    return {
        "prompt_tokens_per_second": arguments.prompt / statistics.median(prompts),
        "generate_tokens_per_second": (arguments.generate - 1) / statistics.median(generations),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "infer"])
    parser.add_argument("--shape", choices=SHAPES, default="openelm-270m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--norm", choices=["rms", "naive_rms", "layer"], default="rms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.set_default_device(arguments.device)
    Norm.kind = arguments.norm
    imported = peak_bytes()
    model = OpenElm(SHAPES[arguments.shape])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    result = (train if arguments.what == "train" else infer)(model, arguments, dtype)
    result |= {"device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"}
    print(json.dumps({**result, "parameters": parameters, "peak_bytes": peak_bytes() - imported}))


if __name__ == "__main__":
    main()
