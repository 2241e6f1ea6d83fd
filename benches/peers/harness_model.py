"""OpenELM with random weights for lm-evaluation-harness and for Ulmus: one folder that both read, and data sets of a folder."""

import json
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent.parent / "tests/golden/tiny"


def write_model(folder, shape, seed=5):
    """A model in Hugging Face layout, with the state that PyTorch's has; the tokenizer is the small one of the tests."""
    import torch
    from safetensors.torch import save_file
    from torch_openelm import OpenElm

    torch.manual_seed(seed)
    model = OpenElm(shape)
    names = {
        "attention_norm": "attn_norm", "qkv": "attn.qkv_proj", "query_norm": "attn.q_norm", "key_norm": "attn.k_norm",
        "out": "attn.out_proj", "ffn_norm": "ffn_norm", "up": "ffn.proj_1", "down": "ffn.proj_2",
    }
    tensors = {"transformer.token_embeddings.weight": model.embedding.weight, "transformer.norm.weight": model.norm.weight}
    for index, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            tensors[f"transformer.layers.{index}.{theirs}.weight"] = getattr(layer, ours).weight
    folder.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "peer.pt")
    config = json.loads((TINY / "config.json").read_text())
    config.update(
        vocab_size=shape.vocabulary, model_dim=shape.width, head_dim=shape.head, num_transformer_layers=len(shape.heads),
        num_gqa_groups=shape.group, num_query_heads=shape.heads, num_kv_heads=[heads // shape.group for heads in shape.heads],
        ffn_multipliers=shape.multipliers, ffn_dim_divisor=shape.divisor, qkv_multipliers=[0.5, 1.0], max_context_length=2048,
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).write_bytes((TINY / name).read_bytes())


def harness_model(folder, shape, **settings):
    """The model of a folder as lm-evaluation-harness takes it; it was made in float32 on the CPU, and is never trained."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from torch_openelm import OpenElm
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
    from transformers.modeling_outputs import CausalLMOutput

    module = OpenElm(shape)
    module.load_state_dict(torch.load(folder / "peer.pt"))

    class Wrapped(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = module

        def forward(self, input_ids, **_):
            return CausalLMOutput(logits=self.inner(input_ids))

        def tie_weights(self, *_, **__):
            pass

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return HFLM(
        pretrained=Wrapped(PretrainedConfig()), tokenizer=tokenizer, backend="causal", add_bos_token=True, device="cpu",
        **settings,
    )


def read_from(data):
    """Lets the harness read its data sets from a folder."""
    import datasets
    from datasets.load import load_dataset as load

    def local(path, name=None, **_):
        folder = data / path
        files = folder.glob(f"{name}/*.parquet") if name else folder.glob("data/*.parquet")
        return load("parquet", data_files={file.name.split("-")[0]: str(file) for file in files})

    datasets.load_dataset = local
