"""The numbers from which the memory and the time of a conversion are estimated, as formulas of its modules'
shapes.

No model runs here. Counts of parameters are exact. Bytes of activations are those of the tensors that
autograd keeps, within about a factor of 1.5.
"""

from dataclasses import dataclass

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.chunked import STORED
from linearize_kernels.parts.decay import MEMORIES
from torch import nn
from transformers import PreTrainedModel

from linearize_cli.conversion.layer_selection import conversion_record
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.layer import Layer
from linearize_cli.runtime import linearize
from linearize_cli.runtime.dispatch import converted
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.training.student import layer_of, lora_targets, vocabulary_parameters

FP32 = 4  # bytes
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k")  # as configs name it
RECOMPUTED = {
    ("sliding", "softmax", "shared"),
    ("group", "relu2", "none"),
}  # forms that keep their inputs alone


@dataclass(frozen=True)
class LayerBytes:
    """The bytes per token that autograd keeps in one decoder layer.

    Attributes:
        linear: queries, keys, values, outputs and errors of linear attention.
        inner: features and scores of linear attention, in attentions that always keep them.
        recomputable: features and scores of linear attention, in attentions whose backward can compute them
            again.
        stored_up_to: number of tokens in memory up to which `recomputable` is kept.
        softmax: queries, keys, values and outputs of softmax attention.
        around: everything outside attention.
        trained: True if attention transfer trains a parameter of the layer.
    """

    linear: int
    inner: int
    recomputable: int
    stored_up_to: float
    softmax: int
    around: float
    trained: bool

    def attention(self, tokens: int) -> int:
        """Return the bytes per token that autograd keeps in linear attention, with `tokens` tokens in memory."""
        recomputed = tokens > self.stored_up_to
        return self.linear + self.inner + (0 if recomputed else self.recomputable)

    def transfer(self, tokens: int) -> int:
        """Return the bytes per token that autograd keeps during transfer, with `tokens` tokens in memory."""
        return self.attention(tokens) if self.trained else 0

    def distill(self, tokens: int) -> float:
        """Return the bytes per token that autograd keeps during distillation, with `tokens` tokens in memory."""
        return self.attention(tokens) + self.softmax + self.around


@dataclass(frozen=True)
class Costs:
    """Sizes and costs that the memory and time estimates are made from.

    Numbers of weights are totals of the model. FLOPs and bytes of activations are per token.

    Attributes:
        parameters: number of parameters of the base model.
        bytes: bytes of the base model.
        layers: bytes of the weights of each decoder layer. Empty if the layers are not in one list.
        linear: number of parameters that the conversion adds.
        others: number of further parameters that distillation trains: LoRA's, or the model's own without
            LoRA.
        copied: bytes of the weights that the frozen teacher holds besides the student's. 0 with LoRA.
        products: multiply-adds per token outside attention, in one forward of the whole model.
        softmax: FLOPs per token of softmax attention in all layers that become linear.
        attention: FLOPs per token of linear attention in all layers that become linear.
        stays: FLOPs per token of softmax attention in all layers that stay softmax.
        width: size of the hidden states.
        vocabulary: number of logits per token. 0 without an LM head.
        kept: bytes that autograd keeps, layer by layer.
        forward: bytes per token of the outputs of all modules in the largest layer.
    """

    parameters: int
    bytes: int
    layers: list[int]
    linear: int
    others: int
    copied: int
    products: float
    softmax: float
    attention: float
    stays: float
    width: int
    vocabulary: int
    kept: list[LayerBytes]
    forward: float

    def recomputed(self, tokens: int) -> int:
        """Return the bytes per token of the features and scores of one layer whose backward computes them
        again, with `tokens` tokens in memory. 0 if no layer does.
        """
        return max((x.recomputable for x in self.kept if tokens > x.stored_up_to), default=0)


def costs(
    model: PreTrainedModel,
    linear: list[Layer],
    softmax: list[Layer],
    recipe: Recipe,
    length: int,
    device: str = "cpu",
) -> Costs:
    """Compute the costs of a conversion from the shapes of a model. The model is linearized here.

    Args:
        model: a model on the meta device.
        linear: the layers that become linear.
        softmax: the layers that stay softmax.
        recipe: the method and its training settings.
        length: tokens of a block.
        device: the torch device to train on.
    """
    attentions, lora, head = linear + softmax, recipe.recover.distill.lora, model.get_output_embeddings()
    width, itemsize = model.config.get_text_config().hidden_size, model.dtype.itemsize
    lists = dict.fromkeys(layer_of(model, layer.name).rpartition(".")[0] for layer in attentions)
    layers = {f"{name}.{i}": x for name in lists for i, x in model.get_submodule(name).named_children()}
    inside = [[x for x in attentions if f"{x.name}.".startswith(f"{name}.")] for name in layers]
    projections = [sum(multiply_adds(model, x.name) for x in own) for own in inside]
    outside = [multiply_adds(model, name) - part for name, part in zip(layers, projections, strict=True)]
    base = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=model.get_memory_footprint(),
        layers=[sum(p.nbytes for p in x.parameters()) for x in layers.values()] if len(lists) == 1 else [],
        products=multiply_adds(model),
    )
    vocabulary = {id(p) for p in vocabulary_parameters(model)}
    weights = [] if lora else [p for p in model.parameters() if id(p) not in vocabulary]

    linearize(model, conversion_record(model, recipe, linear, softmax))
    modules = {name: module.linear_attention for name, module in converted(model).items()}
    updated = [model.get_submodule(name) for name in lora_targets(model, lora.targets)] if lora else []
    updates = sum(lora.rank * sum(module.weight.shape) for module in updated)
    kept, forward = [], []
    for own, part in zip(inside, outside, strict=True):
        attended = [modules[x.name] for x in own if x.name in modules]
        again = [x for x in attended if recomputable(x)]
        around = part / width * itemsize + 4 * width * FP32
        kept.append(
            LayerBytes(
                linear=sum(input_bytes(x, itemsize) for x in attended),
                inner=sum(inner_bytes(x) for x in attended if x not in again),
                recomputable=sum(map(inner_bytes, again)),
                # On a GPU the Triton kernels never keep them.
                stored_up_to=0 if device.startswith("cuda") else stored_tokens(again),
                softmax=itemsize * sum(heads_width(x) for x in own if x.name not in modules),
                around=around,
                trained=any(linear_parameters(x) for x in attended),
            )
        )
        forward.append(around + itemsize * sum(map(heads_width, own)))
    return Costs(
        **base,
        linear=sum(p.numel() for p in linear_parameters(model)),
        others=updates + sum(p.numel() for p in weights),
        copied=sum(p.nbytes for p in weights),
        softmax=sum(softmax_flops(layer, length) for layer in linear),
        attention=sum(linear_flops(module) for module in modules.values()),
        stays=sum(softmax_flops(layer, length) for layer in softmax),
        width=width,
        vocabulary=0 if head is None else len(head.weight),
        kept=kept,
        forward=max(forward),
    )


def multiply_adds(model: PreTrainedModel, name: str = "") -> float:
    """Return the multiply-adds per token of all matrices in a part of a model, without embeddings.

    Of a mixture of experts, only the experts that a token is sent to count.

    Args:
        name: the name of the part. Empty for the whole model.
    """
    config = model.config.get_text_config()
    experts = next((getattr(config, key) for key in EXPERTS_PER_TOKEN if hasattr(config, key)), None)
    total = 0.0
    for module in model.get_submodule(name).modules():
        if isinstance(module, nn.Embedding):
            continue
        for p in module.parameters(recurse=False):
            stacked = p.dim() == 3 and not isinstance(module, nn.Conv1d)
            share = experts / len(p) if stacked and experts else 1
            total += p.numel() * share if p.dim() > 1 else 0
    return total


def heads_width(layer: Layer) -> int:
    """Return the number of entries of a token's queries, keys, values and attention outputs in a layer."""
    g = layer.geometry
    return (g["heads"] + g["kv_heads"]) * (g["key_dim"] + g["value_dim"])


def softmax_flops(layer: Layer, length: int) -> float:
    """Return the FLOPs per token of a layer's softmax attention over a block of `length` tokens.

    A causal token sees half of the block on average.
    """
    g, seen = layer.geometry, (length + 1) / 2 if layer.causal else length
    return 2 * g["heads"] * (g["key_dim"] + g["value_dim"]) * seen


def reach(attention: LinearAttention) -> tuple[int, int]:
    """Return how many keys a query is compared with: in the local part, and through features in its own
    chunk.

    The rest of the linear part is read from the state. The second number is 0 if the local part covers whole
    groups.
    """
    eq = attention.equation
    if eq.scope == "group" and eq.size:
        return eq.size, 0
    return eq.chunk + (eq.recent if eq.causal else 2 * eq.recent), eq.chunk


def feature_count(attention: LinearAttention) -> int:
    """Return the number of features per head, 0 without a linear part."""
    return 0 if attention.far is None else attention.far.state_width[0]


def linear_flops(attention: LinearAttention) -> float:
    """Return the FLOPs per token of a linear attention layer: scores, features within the chunk, state and
    parameters.
    """
    eq, features, (local, chunk) = attention.equation, feature_count(attention), reach(attention)
    scores = eq.heads * (eq.key_dim + eq.value_dim) * local
    within = eq.heads * (features + eq.value_dim) * chunk if features else 0
    state = (eq.heads + eq.far_heads) * features * eq.value_dim
    return 2 * (scores + within + state + sum(p.numel() for p in attention.parameters()))


def input_bytes(attention: LinearAttention, itemsize: int) -> int:
    """Return the bytes per token of a layer's queries, keys and values, and of its output and the output's
    error in fp32.
    """
    eq = attention.equation
    inputs = eq.heads * eq.key_dim + eq.kv_heads * (eq.key_dim + eq.value_dim)
    return itemsize * inputs + 2 * FP32 * eq.heads * eq.value_dim


def inner_bytes(attention: LinearAttention) -> int:
    """Return the bytes per token that autograd keeps inside linear attention: the features twice, the scores
    four times, and with a decay per feature also the decayed features of each pair of a query and a key.
    """
    eq, memory, compared = attention.equation, MEMORIES[attention.equation.memory], reach(attention)[0]
    features = 2 * (eq.heads + eq.far_heads) * feature_count(attention)
    # A pair's decays are kept in transfer, its decayed keys too in distillation: 1.5 times on average. The
    # delta rule has two more such pairs, of keys with keys.
    decayed = 1.5 * (3 if memory.unit_keys else 1) * feature_count(attention) if memory.per_channel else 0
    return round(FP32 * (features + (4 * eq.heads + decayed * eq.far_heads) * compared))


def recomputable(attention: LinearAttention) -> bool:
    """Return True if the backward of a layer can compute its features and scores again, so that autograd keeps
    only its inputs in long texts.
    """
    eq = attention.equation
    plain = eq.softcap is None and not eq.bias and eq.memory == "none" and eq.feature_map != "linformer"
    return plain and eq.size > 0 and (eq.scope, eq.score, eq.combine) in RECOMPUTED


def stored_tokens(attentions: list[LinearAttention]) -> float:
    """Return the largest number of tokens of a step for which a CPU keeps the features and scores of these
    layers, because recomputing them would take longer.
    """
    return min((STORED / attention.equation.heads for attention in attentions), default=0)
