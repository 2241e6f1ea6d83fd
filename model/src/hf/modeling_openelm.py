# SPDX-License-Identifier: Apache-2.0
"""OpenELM (arXiv 2404.14619) for transformers.

Ulmus writes this file beside the weights that it exports, so that transformers can load them:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Parameters and fields of the configuration have the names of the published models. Letters in comments are sizes:
B batch, S new tokens, K cached and new tokens, H heads, D width of a head, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# transformers 5 gave the cache another name; callers use both.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def divisible(value, divisor):
    """The multiple of the divisor nearest to a value; at least the divisor, and at least 90 % of the value."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def expand(multipliers, layers):
    """One multiplier per layer, from one for all, those of the first and the last layer, or one per layer."""
    if isinstance(multipliers, (int, float)):
        return [multipliers] * layers
    if len(multipliers) != 2:
        return list(multipliers)
    first, last = multipliers
    step = (last - first) / (max(layers, 2) - 1)
    values = [last if 0 < i == layers - 1 else first + step * i for i in range(layers)]
    return [round(value, 2) for value in values]


class OpenELMConfig(PretrainedConfig):
    """The shape of an OpenELM; the defaults are those of OpenELM-270M."""

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }

    def __init__(
        self,
        vocab_size=32000,
        max_context_length=2048,
        num_transformer_layers=16,
        model_dim=1280,
        head_dim=64,
        qkv_multipliers=(0.5, 1.0),
        num_query_heads=None,
        num_kv_heads=None,
        num_gqa_groups=4,
        ffn_multipliers=(0.5, 4.0),
        ffn_with_glu=True,
        ffn_dim_divisor=256,
        activation_fn_name="swish",
        normalization_layer_name="rms_norm",
        normalize_qk_projections=True,
        share_input_output_layers=True,
        rope_freq_constant=10000,
        rope_max_length=4096,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    ):
        for name, value, known in [
            ("ffn_with_glu", ffn_with_glu, [True]),
            ("activation_fn_name", activation_fn_name, ["swish", "silu"]),
            ("normalization_layer_name", normalization_layer_name, ["rms_norm", "layer_norm"]),
            ("normalize_qk_projections", normalize_qk_projections, [True]),
        ]:
            if value not in known:
                raise ValueError(f"{name} = {value!r} is not implemented here; known: {known}")
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.qkv_multipliers = qkv_multipliers
        self.num_gqa_groups = num_gqa_groups
        if num_query_heads is None:
            widths = [model_dim * value for value in expand(qkv_multipliers, num_transformer_layers)]
            num_query_heads = [divisible(width, head_dim * num_gqa_groups) // head_dim for width in widths]
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads or [heads // num_gqa_groups for heads in num_query_heads]
        self.ffn_multipliers = ffn_multipliers
        self.ffn_with_glu = ffn_with_glu
        self.ffn_dim_divisor = ffn_dim_divisor
        self.activation_fn_name = activation_fn_name
        self.normalization_layer_name = normalization_layer_name
        self.normalize_qk_projections = normalize_qk_projections
        self.share_input_output_layers = share_input_output_layers
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = share_input_output_layers
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)

    @property
    def ffn_dims(self):
        """The hidden width of each layer's FFN."""
        multipliers = expand(self.ffn_multipliers, self.num_transformer_layers)
        return [divisible(self.model_dim * value, self.ffn_dim_divisor) for value in multipliers]


class OpenELMLayerNormConfig(OpenELMConfig):
    """An OpenELM with layer norms. It is a type of its own, so that programs which know RMS norm alone refuse it."""

    model_type = "openelm_layer_norm"

    def __init__(self, normalization_layer_name="layer_norm", **kwargs):
        super().__init__(normalization_layer_name=normalization_layer_name, **kwargs)


class OpenELMNorm(nn.Module):
    """RMS norm, or layer norm without bias. Statistics are float32 whatever the type of the input."""

    def __init__(self, config, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.centred = config.normalization_layer_name == "layer_norm"

    def forward(self, x):
        wide = x.float()
        if self.centred:
            normed = F.layer_norm(wide, wide.shape[-1:], eps=1e-5)
        else:
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(x) * self.weight


def rotary(config, position_ids):
    """Cosines and sines of the rotary embedding: float32 [B, 1, S, D / 2]."""
    # Computed rather than kept in a buffer: nothing can be lost or rounded when the model is loaded or cast.
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = config.rope_freq_constant ** (-index / config.head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the pairs (j, j + D / 2) of each head: [B, H, S, D]."""
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).type_as(x)


class OpenELMAttention(nn.Module):
    """Attention with grouped queries, whose queries and keys are normed. `span` counts cached and new tokens."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.heads, self.kv_heads = config.num_query_heads[index], config.num_kv_heads[index]
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, rows, bias=False)
        self.q_norm = OpenELMNorm(config, config.head_dim)
        self.k_norm = OpenELMNorm(config, config.head_dim)
        self.out_proj = nn.Linear(self.heads * config.head_dim, config.model_dim, bias=False)
        self.out_proj.to_residual = True

    def forward(self, x, cos, sin, mask, cache, span):
        batch, length, _ = x.shape
        packed = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = packed.split([self.heads, self.kv_heads, self.kv_heads], 1)
        query, key = rotate(self.q_norm(query), cos, sin), rotate(self.k_norm(key), cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
            # A cache of fixed size is longer than what it holds.
            key, value = key[:, :, :span], value[:, :, :span]
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and length > 1)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, -1))


class OpenELMFeedForward(nn.Module):
    """SwiGLU: the first half of `proj_1` gates the second."""

    def __init__(self, config, index):
        super().__init__()
        width = config.ffn_dims[index]
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.proj_2.to_residual = True

    def forward(self, x):
        gate, up = self.proj_1(x).chunk(2, -1)
        return self.proj_2(F.silu(gate) * up)


class OpenELMDecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.attn = OpenELMAttention(config, index)
        self.ffn = OpenELMFeedForward(config, index)
        self.ffn_norm = OpenELMNorm(config, config.model_dim)
        self.attn_norm = OpenELMNorm(config, config.model_dim)

    def forward(self, x, cos, sin, mask, cache, span):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, span)
        return x + self.ffn(self.ffn_norm(x))


class OpenELMPreTrainedModel(PreTrainedModel):
    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_cache_class = True
    _supports_sdpa = True

    def _init_weights(self, module):
        std = self.config.model_dim**-0.5
        if getattr(module, "to_residual", False):
            std *= (2 * self.config.num_transformer_layers) ** -0.5
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, OpenELMNorm):
            nn.init.ones_(module.weight)


def visible(attention_mask, position_ids, past, length):
    """Which of K keys each of the last S queries sees, as bool [B or 1, 1, S, K]; None stands for the causal mask.

    `attention_mask` is 1 for tokens and 0 for padding [B, K], or None. Without padding, positions that restart within a
    row begin another document, and documents do not see each other.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    documents = None
    if attention_mask is None and past == 0:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if bool(restarts.any()):
            documents = F.pad(restarts.cumsum(-1), (1, 0))
    if attention_mask is None and documents is None and (past == 0 or length == 1):
        return None
    key = torch.arange(past + length, device=position_ids.device)
    query = key[past:, None]
    mask = (key <= query)[None]
    if attention_mask is not None:
        # Padding sees itself, for a softmax over nothing is not a number.
        mask = mask & (attention_mask[:, None, : past + length].bool() | (key == query))
    if documents is not None:
        mask = mask & (documents[:, None] == documents[:, :, None])
    return mask[:, None]


class OpenELMModel(OpenELMPreTrainedModel):
    """Embedding, decoder layers and the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        layers = range(config.num_transformer_layers)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, index) for index in layers)
        self.norm = OpenELMNorm(config, config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.token_embeddings

    def set_input_embeddings(self, value):
        self.token_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        if output_attentions:
            raise ValueError("this model does not keep attention weights; leave out output_attentions")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        recompute = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if cache is not None and recompute:
            raise ValueError("layers that are recomputed would fill the cache twice; leave it out")
        if cache is None and use_cache and not recompute:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = position_ids
        if positions is None and attention_mask is not None and attention_mask.dim() == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + length]
        if positions is None:
            positions = torch.arange(past, past + length, device=x.device)[None]
        mask = visible(attention_mask, positions, past, length)
        cos, sin = rotary(self.config, positions)
        states = [x]
        for layer in self.layers:
            if recompute:
                x = self._gradient_checkpointing_func(layer.__call__, x, cos, sin, mask, None, length)
            else:
                x = layer(x, cos, sin, mask, cache, past + length)
            states.append(x)
        states[-1] = x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The model with its head, whose weight is the embedding's unless `share_input_output_layers` is false."""

    # Releases before 5 look at the keys alone.
    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value):
        self.transformer.token_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.transformer

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits [B, S, V], of the last `logits_to_keep` tokens if that is not 0.

        With `labels`, which are not shifted and -100 where nothing is to be predicted, also the mean loss per label:
        over this batch, or over `num_items_in_batch` labels if it is one of several that make up a step.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        x = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept] if labels is None else x)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1).to(logits.device)
            flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
            if num_items_in_batch is None:
                loss = F.cross_entropy(flat, targets)
            else:
                loss = F.cross_entropy(flat, targets, reduction="sum") / num_items_in_batch
            logits = logits[:, kept]
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: getattr(output, CACHE)}
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, cache=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else int(cache.get_seq_length())
        inputs = {"past_key_values": cache, "attention_mask": attention_mask, "use_cache": kwargs.get("use_cache")}
        if inputs_embeds is None:
            return {**inputs, "input_ids": input_ids[:, past:]}
        if past == 0:
            return {**inputs, "inputs_embeds": inputs_embeds}
        # The prompt is not among the ids.
        return {**inputs, "input_ids": input_ids[:, -1:]}


class OpenELMLayerNormForCausalLM(OpenELMForCausalLM):
    config_class = OpenELMLayerNormConfig
