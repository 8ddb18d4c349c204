"""Adapters for attention modules of transformers that compute softmax themselves.

An adapter is a base class placed before such a module's class (see `adapt.adapt`). If the module's config
selects an attention implementation named `linearize...`, it passes queries, keys and values to the attention
interface. Otherwise the module's own forward runs.
"""

import sys
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize_cli.runtime.places import of_self_attention

_state: ContextVar = ContextVar("linearize_state", default=None)


class Adapter:
    """The base class of adapters, which send a module's queries, keys and values to transformers' attention
    interface.

    Attributes:
        config: the module's config.
        original: the module's class in transformers.
        is_causal: True if a token does not see later tokens.
        native_mask: True if the model's own code works on the attention mask, so that it must stay a mask of
            the base model's kind. False if it may be replaced by the compact mask of pads.
        mask_is_all: True if the mask alone hides and biases tokens. False if the attention module also does
            so itself.
        mask_has_biases: True if the model adds its position bias to its mask.
    """

    config: PreTrainedConfig
    original: type
    is_causal = True
    native_mask = False
    mask_is_all = True
    mask_has_biases = False

    def selected(self) -> bool:
        """Return True if the config selects one of our attention implementations."""
        return self.config._attn_implementation.startswith("linearize")

    def attend(self, query, key, value, mask, scaling, **kwargs) -> Tensor:
        """Call the attention implementation that the config selects.

        Args:
            query: `[B, heads, T, D]`. It is converted to the value's dtype.
            key, value: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            mask: the base model's attention mask, or None.
            scaling: the factor of q·k in the scores.
            kwargs: more arguments of the implementation, such as `position_bias`.

        Returns:
            The output `[B, T, heads, Dv]`.
        """
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(
            self, query.to(value.dtype), key.to(value.dtype), value, mask, scaling=scaling, **kwargs
        )[0]

    def heads(self, x: Tensor, dim: int) -> Tensor:
        """Split the heads: `[B, T, heads * dim]` to `[B, heads, T, dim]`."""
        return x.unflatten(-1, (-1, dim)).transpose(1, 2)


class Method(Adapter):
    """The adapter of GPT-J and similar models, which compute attention in a method `_attn` of their own."""

    scale_attn: Tensor | float

    def forward(self, *args, linearize_state=None, **kwargs):
        token = _state.set(linearize_state)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _state.reset(token)

    def _attn(self, query, key, value, attention_mask=None):
        if not self.selected():
            return super()._attn(query, key, value, attention_mask)
        kwargs = {"linearize_state": _state.get(), **self.extra(query.shape[-2], key.shape[-2])}
        out = self.attend(query, key, value, attention_mask, self.attention_scale(), **kwargs)
        return out.transpose(1, 2), None

    def attention_scale(self) -> float:
        """Return the factor of q·k in the scores."""
        return 1.0 / float(self.scale_attn)

    def extra(self, queries: int, keys: int) -> dict[str, Tensor]:
        """Return more keyword arguments for the attention function, such as masks. The base class has none.

        Args:
            queries, keys: the numbers of queries and keys.
        """
        return {}


class GPTNeo(Method):
    """The adapter of GPT-Neo, whose scores are not scaled. Its local layers hide tokens beyond their window
    themselves.
    """

    layer_id: int
    bias: Tensor
    q_proj: nn.Linear
    mask_is_all = False

    @property
    def layer_idx(self) -> int:
        return self.layer_id

    def attention_scale(self) -> float:
        return 1.0

    def extra(self, queries: int, keys: int) -> dict[str, Tensor]:
        visible = self.bias[:, :, keys - queries : keys, :keys]
        hidden = torch.finfo(self.q_proj.weight.dtype).min
        return {
            "position_bias": torch.zeros_like(visible, dtype=self.q_proj.weight.dtype).masked_fill(
                ~visible, hidden
            )
        }


class GPTNeoXJapanese(Method):
    """The adapter of GPT-NeoX Japanese."""

    norm_factor: float

    def attention_scale(self) -> float:
        return 1.0 / self.norm_factor


class Bloom(Adapter):
    """The adapter of Bloom, which passes ALiBi as a separate argument."""

    mask_is_all = False

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        if not self.selected():
            return super().forward(hidden_states, residual, alibi, attention_mask, layer_past, **kwargs)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = alibi.unflatten(0, (-1, self.num_heads))
        out = self.attend(
            query, key, value, attention_mask, self.inv_norm_factor, position_bias=bias, **kwargs
        )
        out = dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training)
        return out + residual, None


class Falcon(Adapter):
    """The adapter of Falcon, with rotary positions, or with ALiBi, which the model adds to its mask."""

    @property
    def native_mask(self) -> bool:
        """Return True if the model uses ALiBi, because it adds ALiBi to its mask. Return False with rotary
        positions.
        """
        return self.config.alibi

    mask_has_biases = native_mask

    def forward(self, hidden_states, alibi, attention_mask, *args, **kwargs):
        if not self.selected():
            return super().forward(hidden_states, alibi, attention_mask, *args, **kwargs)
        cache, rotary = kwargs.pop("layer_past", None), kwargs.pop("position_embeddings", None)
        heads = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in heads)
        if alibi is None:
            query, key = modeling(self).apply_rotary_pos_emb(query, key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = self.attend(query, key, value, attention_mask, self.inv_norm_factor, **kwargs)
        return self.dense(out.flatten(2)), None


class Mpt(Adapter):
    """The adapter of MPT, whose mask is True at hidden tokens."""

    native_mask = True
    mask_is_all = False

    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
        if not self.selected():
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask, **kwargs)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (self.heads(x, self.head_dim) for x in mixed.chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        bias = None if position_bias is None else position_bias[None, :, :, -key.shape[-2] :]
        visible = None if attention_mask is None else ~attention_mask
        out = self.attend(query, key, value, visible, self.softmax_scale, position_bias=bias, **kwargs)
        return self.out_proj(out.flatten(2)), None


class Bart(Adapter):
    """The adapter of XGLM, TrOCR and MVP, for the decoder's self-attention only."""

    def forward(
        self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **kwargs
    ):
        if not self.selected() or key_value_states is not None or kwargs.get("attn_prompt") is not None:
            return super().forward(hidden_states, key_value_states, past_key_values, attention_mask, **kwargs)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (self.heads(project(hidden_states), self.head_dim) for project in projections)
        key, value = appended(past_key_values, key, value, self.layer_idx)
        out = self.attend(query, key, value, attention_mask, self.scaling, **kwargs)
        return self.out_proj(out.flatten(2)), None


class Bert(Adapter):
    """The adapter of RemBERT, RoFormer, Megatron-BERT and BigBird as decoders."""

    is_decoder: bool

    @property
    def is_causal(self) -> bool:
        return self.is_decoder

    def forward(self, hidden_states, attention_mask=None, *args, encoder_hidden_states=None, **kwargs):
        if not self.selected() or encoder_hidden_states is not None:
            return super().forward(
                hidden_states, attention_mask, *args, encoder_hidden_states=encoder_hidden_states, **kwargs
            )
        cache, rotary = kwargs.pop("past_key_values", None), kwargs.pop("sinusoidal_pos", None)
        projections = (self.query, self.key, self.value)
        size = self.attention_head_size
        heads = [self.heads(project(hidden_states), size) for project in projections]
        if rotary is not None:
            turned = self.apply_rotary_position_embeddings(rotary, *heads[: 3 if self.rotary_value else 2])
            heads[: len(turned)] = turned
        key, value = appended(cache, *heads[1:], self.layer_idx)
        out = self.attend(heads[0], key, value, attention_mask, size**-0.5, **kwargs)
        return out.flatten(2), None


class Git(Bert):
    """The adapter of GIT, whose text attention is causal."""

    is_causal = True

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)


class DiffLlama(Adapter):
    """The adapter of DiffLlama.

    Its two softmax attentions share queries and keys, so they are computed as one with values twice as wide.
    """

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs
    ):
        if not self.selected():
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (self.heads(project(hidden_states), self.head_dim) for project in projections)
        query, key = modeling(self).apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        wide = torch.cat(value.chunk(2, 1), -1).repeat(1, 2, 1, 1)
        out = self.attend(query, key, wide, attention_mask, self.scaling, **kwargs)
        first, second = out.chunk(2, 2)
        gains = (self.lambda_q1 * self.lambda_k1, self.lambda_q2 * self.lambda_k2)
        gains = [gain.sum(-1, dtype=torch.float32).exp().to(query.dtype) for gain in gains]
        out = self.groupnorm(first - (gains[0] - gains[1] + self.lambda_init) * second)
        return self.o_proj((1 - self.lambda_init) * out.flatten(2)), None


class Indexed(Adapter):
    """The adapter of DeepSeek's sparse attention, in which an indexer chooses the keys that a query sees.

    The attention module already calls transformers' attention interface, so its forward stays. The model must
    only keep making its own mask (`native_mask`). `Indexer` replaces the choice of keys.
    """

    native_mask = True


class Indexer(Adapter):
    """The adapter of the module that chooses which keys DeepSeek's sparse attention reads.

    It chooses all keys, because a linear layer sees all of them, and it stores no index keys in the cache.
    The softmax teacher then sees all keys too. That equals the original attention up to `index_topk` tokens,
    and differs beyond.
    """

    def forward(self, hidden_states, q_resid, position_embeddings, attention_mask, *args, **kwargs):
        if not self.selected():
            return super().forward(
                hidden_states, q_resid, position_embeddings, attention_mask, *args, **kwargs
            )
        keys = torch.arange(attention_mask.shape[-1], device=hidden_states.device)
        return keys.expand(*hidden_states.shape[:2], -1)


def modeling(module: Adapter):
    """Return transformers' Python module that defines the original class of an adapted attention module."""
    return sys.modules[module.original.__module__]


def appended(cache: Cache | None, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Append keys and values to a layer of the self-attention cache, and return all keys and values of that
    layer.

    Without a cache (None), they are returned unchanged.

    Args:
        key, value: the new ones, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        index: the layer's index in the cache.
    """
    return (key, value) if cache is None else of_self_attention(cache).update(key, value, index)


# `package.Class` under transformers.models -> its adapter.
ADAPTERS: dict[str, type[Adapter]] = {
    "axk2.AXK2Attention": Indexed,
    "axk2.AXK2Indexer": Indexer,
    "big_bird.BigBirdSelfAttention": Bert,
    "bloom.BloomAttention": Bloom,
    "codegen.CodeGenAttention": Method,
    "deepseek_v32.DeepseekV32Attention": Indexed,
    "deepseek_v32.DeepseekV32Indexer": Indexer,
    "diffllama.DiffLlamaAttention": DiffLlama,
    "falcon.FalconAttention": Falcon,
    "git.GitSelfAttention": Git,
    "glm_moe_dsa.GlmMoeDsaAttention": Indexed,
    "glm_moe_dsa.GlmMoeDsaIndexer": Indexer,
    "gpt_neo.GPTNeoSelfAttention": GPTNeo,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": GPTNeoXJapanese,
    "gptj.GPTJAttention": Method,
    "hy_v4.HYV4Attention": Indexed,
    "hy_v4.HYV4Indexer": Indexer,
    "megatron_bert.MegatronBertSelfAttention": Bert,
    "mpt.MptAttention": Mpt,
    "mvp.MvpAttention": Bart,
    "rembert.RemBertSelfAttention": Bert,
    "roformer.RoFormerSelfAttention": Bert,
    "trocr.TrOCRAttention": Bart,
    "xglm.XGLMAttention": Bart,
}
