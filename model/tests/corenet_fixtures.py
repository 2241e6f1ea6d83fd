#!/usr/bin/env python3
"""Writes the checkpoints of tests/golden/corenet, as torch.save writes those of a small OpenELM.

    python corenet_fixtures.py FOLDER

Element i of all parameters in their order is (37·i mod 251 − 125) / 128, which bfloat16 holds exactly.
"""

import sys
from pathlib import Path

import torch
from torch import nn


def group(**modules):
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def norm(width):
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(width))
    return module


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def layer(heads, kv_heads, ffn, width=8, head=2):
    attn = group(
        qkv_proj=linear(width, (heads + 2 * kv_heads) * head),
        q_norm=norm(head),
        k_norm=norm(head),
        out_proj=linear(heads * head, width),
    )
    return group(
        attn=attn,
        ffn=group(proj_1=linear(width, 2 * ffn), proj_2=linear(ffn, width)),
        ffn_norm=norm(width),
        attn_norm=norm(width),
    )


def main():
    folder = Path(sys.argv[1])
    layers = nn.ModuleList([layer(2, 1, 4), layer(4, 2, 8)])
    model = group(token_embeddings=nn.Embedding(10, 8), layers=layers, norm=norm(8))
    begin = 0
    with torch.no_grad():
        for parameter in model.parameters():
            index = torch.arange(begin, begin + parameter.numel())
            parameter.copy_(((index * 37 % 251 - 125) / 128).reshape(parameter.shape))
            begin += parameter.numel()
    torch.save(model.state_dict(), folder / "checkpoint_average.pt")

    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    # A view of a larger storage.
    padded = torch.cat([weights["token_embeddings.weight"], torch.zeros(2, 8, dtype=torch.bfloat16)])
    weights["token_embeddings.weight"] = padded[:10]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.norm.weight.grad = torch.ones(8)
    optimizer.step()
    training = {
        "iterations": 49999,
        "epoch": 0,
        "model_state_dict": weights,
        "optim_state_dict": optimizer.state_dict(),
        "best_metric": 2.5,
        "is_interval_ckpt": True,
        "gradient_scaler_state_dict": {"scale": 65536.0, "_growth_tracker": torch.tensor(3)},
    }
    torch.save(training, folder / "training_checkpoint_epoch_0_iter_49999.pt")


main()
