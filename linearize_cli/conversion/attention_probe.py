"""A probe of a model: it records the arguments with which the modules call the attention interface."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linearize_cli.errors import UserError
from linearize_cli.runtime.dispatch import find_cache

PROBE = "linearize_probe"
ALONE = "it does not run on tokens alone"


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask that is True where a query sees a key, from a boolean or an additive mask."""
    return mask if mask.dtype == torch.bool else mask > -1e4


@dataclass
class Call:
    """The arguments with which an attention module called transformers' attention interface.

    Attributes:
        query, key, value: the shapes of the three tensors, `[B, heads, T, D]`.
        mask: the attention mask. None if the module got no mask.
        extra: the other keyword arguments.
        count: the number of the module's calls in one forward.
    """

    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: torch.Tensor | None
    extra: dict[str, Any]
    count: int = 1


@dataclass
class Probe:
    """An attention function that records the last call of each attention module, in `calls`, and returns
    zeros.
    """

    calls: dict[nn.Module, Call] = field(default_factory=dict)

    def __call__(self, module, query, key, value, attention_mask, **extra):
        count = self.calls[module].count + 1 if module in self.calls else 1
        self.calls[module] = Call(query.shape, key.shape, value.shape, attention_mask, extra, count)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@contextmanager
def recording(model: PreTrainedModel, recorder: Callable) -> Iterator[None]:
    """Use `recorder` as the model's attention function while the context is open.

    The model is in eval mode meanwhile, and makes full additive masks.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    configs = [c for c in configs if hasattr(c, "_attn_implementation_internal")]
    before = [c._attn_implementation_internal for c in configs]
    training = model.training
    AttentionInterface.register(PROBE, recorder)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        model.eval()
        for config in configs:
            config._attn_implementation_internal = PROBE
        yield
    finally:
        model.train(training)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[nn.Module, Call]:
    """Run three tokens through a model, and return the recorded attention call of each module that makes one.

    The first forward finds the modules. The second one has a cache and shows which modules can receive a
    linear attention's state: they get a marker in their keyword arguments. A model that does not return its
    cache loses the states, so its markers are removed.

    Raises:
        UserError: the model does not run with a `DynamicCache`.
    """
    recorder, hooks = Probe(), []
    inputs = inputs_of(model, torch.arange(1, 4, device=model.device)[None])
    with recording(model, recorder):
        try:
            with running(model, ALONE):
                model(**inputs, use_cache=False)
            if not recorder.calls:
                return {}
            for module in recorder.calls:
                hooks.append(module.register_forward_pre_hook(send_marker, with_kwargs=True))
            recorder.calls.clear()
            with running(model, "it does not run with transformers' DynamicCache"):
                output = model(**inputs, **own_cache(model), use_cache=True)
            if getattr(output, "past_key_values", None) is None:
                for call in recorder.calls.values():
                    call.extra.pop("linearize_state", None)
        finally:
            for hook in hooks:
                hook.remove()
    return recorder.calls


@contextmanager
def running(model: PreTrainedModel, otherwise: str) -> Iterator[None]:
    """Turn any exception of the model's own code into a UserError while the context is open.

    Some model types fail with the sizes of some configs.

    Args:
        otherwise: the reason in the message, such as "it does not run on tokens alone".
    """
    try:
        yield
    except Exception as error:  # third-party code may raise any exception
        raise UserError(
            f"{type(model).__name__} cannot be converted: {otherwise} ({type(error).__name__}: {error})",
            "Choose another model.",
        ) from error


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the model's inputs for token ids `[B, T]`.

    The decoder of an encoder-decoder gets one token less than its encoder, so that cross-attention can be
    recognized.
    """
    decoder = {"decoder_input_ids": ids[:, :-1]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}


def own_cache(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """Return the cache argument of a model's forward, as a dict: a `DynamicCache`.

    The dict is empty if the model takes no cache or is an encoder-decoder.
    """
    takes = "past_key_values" in signature(model.forward).parameters
    return (
        {"past_key_values": DynamicCache(config=model.config)}
        if takes and not model.config.is_encoder_decoder
        else {}
    )


def is_cross(call: Call) -> bool:
    """Return True if a call is cross-attention. In the probe, its keys are longer than its queries."""
    return call.query[2] != call.key[2]


def is_causal(module: nn.Module, call: Call) -> bool:
    """Return True if a call's attention is causal, by its mask or, without a mask, by the module's
    `is_causal`.
    """
    if call.mask is None:
        return bool(getattr(module, "is_causal", True))
    seen = visible(call.mask[0, 0])
    return bool((seen == torch.ones_like(seen).tril()).all())


def send_marker(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Add a marker to a module's keyword arguments in the place of a linear attention's state.

    It is a forward pre-hook. The runtime passes the real state in the same way
    (`runtime.dispatch.pass_state`). Return None, which changes nothing, if the module gets no cache or takes
    no further keyword arguments.
    """
    parameters = signature(module.forward).parameters.values()
    if find_cache(args, kwargs) is None or all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
        return None
    return args, {**kwargs, "linearize_state": PROBE}


def score_bias(module: nn.Module, call: Call) -> Tensor | None:
    """Return the sum of all biases that are added to the scores, broadcastable to `[B, heads, T, T]`.

    It is minus infinity where the mask hides the scores. Return None if nothing is added to the scores.
    """
    terms = [x for name, x in call.extra.items() if isinstance(x, Tensor) and name != "s_aux"]
    terms = [x for x in [*terms, call.mask] if x is not None and x.is_floating_point()]
    if not terms:
        return None
    bias = sum(terms)
    seen = visible(bias)
    if call.mask is not None:
        seen = seen & visible(call.mask)
    if is_causal(module, call):
        seen = seen & torch.ones(bias.shape[-1], bias.shape[-1], dtype=torch.bool, device=bias.device).tril()
    return torch.where(seen, bias, float("-inf"))


def has_bias(module: nn.Module, call: Call) -> bool:
    """Return True if a bias other than 0 is added to visible scores. Cross-attention counts as without a
    bias.
    """
    bias = None if is_cross(call) else score_bias(module, call)
    return bias is not None and bool((bias.isfinite() & (bias != 0)).any())


@dataclass
class BiasProbe:
    """An attention function that records the position biases of some modules and returns zeros.

    Attributes:
        wanted: the modules whose biases are recorded.
        reach: the number of token distances to record.
        found: the bias by distance of each module, `[heads, reach]` if causal, else `[heads, 2 reach - 1]`. A
            module whose bias is not a function of distance is missing.
    """

    wanted: set[nn.Module]
    reach: int
    found: dict[nn.Module, Tensor] = field(default_factory=dict)

    def __call__(self, module, query, key, value, attention_mask, **extra):
        if module in self.wanted:
            call = Call(query.shape, key.shape, value.shape, attention_mask, extra)
            curve = by_distance(score_bias(module, call), self.reach, is_causal(module, call))
            if curve is not None:
                self.found[module] = curve.expand(query.shape[1], -1)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def by_distance(bias: Tensor, reach: int, causal: bool) -> Tensor | None:
    """Return a bias as a function of token distance, 0 at distance 0, or None if it is not a function of
    distance.

    Softmax does not change if all scores of a query shift by the same number, as ALiBi's do in some models,
    so such shifts are removed. Distances beyond the text get the last value. Rounding errors of bfloat16 are
    tolerated.

    Args:
        bias: `[1, heads, T, T]`, minus infinity at hidden scores. A bias that requires gradients depends on
            the tokens.
        reach: the number of distances.
        causal: False to return both directions.

    Returns:
        `[heads, reach]` if causal, else `[heads, 2 reach - 1]`.
    """
    if bias.requires_grad:
        return None
    bias = bias[0].float() - bias[0].float().diagonal(dim1=-2, dim2=-1)[..., None]
    back = one_side(bias, reach)
    if causal or back is None:
        return back
    ahead = one_side(bias.transpose(-1, -2), reach)
    return None if ahead is None else torch.cat([ahead[:, 1:].flip(-1), back], -1)


def one_side(bias: Tensor, reach: int) -> Tensor | None:
    """Return a bias as a function of the distance back, 0 to `reach - 1`: the values of its diagonals.

    Args:
        bias: `[heads, T, T]`, minus infinity at hidden scores.

    Returns:
        `[heads, reach]`, or None if a diagonal has different values.
    """
    scale = bias[bias.isfinite()].abs().max()
    curve = []
    for distance in range(min(reach, bias.shape[-1])):
        values = bias.diagonal(-distance, -2, -1)
        if not values.isfinite().all():
            if values.isfinite().any():
                return None
            break
        if (values - values[:, :1]).abs().max() > scale / 256:
            return None
        curve.append(values[:, 0])
    curve += curve[-1:] * (reach - len(curve))
    return torch.stack(curve, -1)


def probe_bias(model: PreTrainedModel, calls: dict[nn.Module, Call], reach: int) -> dict[nn.Module, Tensor]:
    """Return the position bias of each module whose bias is a function of distance alone.

    During the probe, the embeddings' output alone requires gradients. A bias that requires gradients was then
    computed from the tokens, so it is not a function of distance.

    Args:
        calls: the modules and their recorded calls.
        reach: the number of distances.

    Returns:
        biases `[heads, reach]`, or `[heads, 2 reach - 1]` for a bidirectional module. Other modules are
            missing.
    """
    recorder = BiasProbe({module for module, call in calls.items() if has_bias(module, call)}, reach)
    if not recorder.wanted:
        return {}
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    ids = torch.arange(min(reach + 8, limit or reach + 8), device=model.device)[None] % config.vocab_size
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_() * 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        with recording(model, recorder), torch.enable_grad(), running(model, ALONE):
            model(**inputs_of(model, ids), use_cache=False)
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return recorder.found
