"""What a conversion costs by the model's shape alone: counted on its own code, with its weights on the meta device."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from linearize_cli.conversion.attention_probe import Probe, inputs_of, recording
from linearize_cli.conversion.layer_selection import conversion_record
from linearize_cli.conversion.phantom import Phantom, learning_inputs, saved_bytes, shortened, watched
from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.batch import Batch
from linearize_cli.models.layer import Layer
from linearize_cli.runtime import linearize
from linearize_cli.runtime.dispatch import converted
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.training.attention_transfer import Transfer
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.streamed_layers import LayerBlocks
from linearize_cli.training.student import student_and_teacher

FEW = 8  # tokens of a forward whose products are counted
MOST = 256  # and of one whose activations are


@dataclass(frozen=True)
class Costs:
    """Numbers that a conversion's memory and time follow from.

    Attributes:
        parameters, bytes: of the base model.
        layers: bytes of each decoder layer's weights; empty where the layers stand in no one list.
        linear: parameters that conversion adds.
        others: parameters that distillation trains beside these, LoRA's or the model's own.
        copied: bytes of the teacher's own weights, where the model's own are trained.
        products: multiply-adds a token outside attention, in one forward.
        softmax, attention: FLOPs a token of all softmax attention that becomes linear, and of what it becomes.
        stays: FLOPs a token of the softmax attention that stays.
        width: of the hidden states.
        transfer, distill: bytes a token that autograd keeps in each layer, in either stage.
        loss: bytes a token that it keeps outside the layers, in distillation.
        forward: bytes a token of what the modules of the largest layer return.
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
    transfer: list[float]
    distill: list[float]
    loss: float
    forward: float


def costs(
    model: PreTrainedModel, linear: list[Layer], softmax: list[Layer], recipe: Recipe, length: int
) -> Costs:
    """Converts `model`, which is on the meta device, and counts.

    Args:
        length: tokens of a block.
    """
    base = dict(parameters=sum(p.numel() for p in model.parameters()), bytes=model.get_memory_footprint())
    try:
        blocks = LayerBlocks.of(model, [layer.name for layer in linear], 1, "meta")
        layers = list(blocks.layers(model))
    except UserError:
        layers = []
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    native, returns = model.config._attn_implementation, [0] * len(layers)
    results: list[int] = [0] * len(layers)

    def see(index: int, output: object) -> None:
        returns[index] = len(output) if isinstance(output, tuple) else 0

    leaves = [[x for x in layer.modules() if next(x.children(), None) is None] for layer in layers]
    owner = [i for i, some in enumerate(leaves) for _ in some]

    def add(index: int, output: object) -> None:
        results[owner[index]] += sum(x.nbytes for x in tree_flatten(output)[0] if isinstance(x, torch.Tensor))

    def ids(tokens: int) -> torch.Tensor:
        return torch.zeros(1, tokens, dtype=torch.int64)

    products = FlopCounterMode(display=False)
    seen = (watched(layers, see), watched(sum(leaves, []), add), recording(model, Probe()))
    with ExitStack() as opened, torch.no_grad(), products, Phantom():
        for context in seen:
            opened.enter_context(context)
        model(**inputs_of(model, ids(FEW)), use_cache=False)
    linearize(model, conversion_record(model, recipe, linear, softmax))
    model.requires_grad_(False)
    learning = linear_parameters(model)
    for parameter in learning:
        parameter.requires_grad_(True)
    tokens = min(length, MOST)
    batch_ids = ids(tokens).repeat(2, 1)  # of one row alone, some copies are none
    inputs = inputs_of(model, batch_ids) | {"use_cache": False}
    batch = Batch(inputs, inputs.get("decoder_input_ids", batch_ids))
    kinds = [kind(layer) for layer in layers]
    first = [kinds.index(x) for x in kinds]

    def saved(objective: nn.Module, behind_others: bool = False) -> tuple[list[float], float]:
        with ExitStack() as opened:
            opened.enter_context(shortened(layers, set(first), returns))
            if behind_others:
                opened.enter_context(learning_inputs([layers[i] for i in set(first)]))
            counted = opened.enter_context(saved_bytes(layers))
            opened.enter_context(Phantom())
            objective(batch)
        return [counted[i] / batch_ids.numel() for i in first], counted[None] / batch_ids.numel()

    transfer, rest = saved(Transfer(model, native)) if learning else ([0.0] * len(layers), 0.0)
    added = sum(p.numel() for p in learning)
    student, teacher = student_and_teacher(model, recipe.recover.distill.lora, on_meta=True)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    held = {id(p) for p in student.parameters()}
    copied = [p for p in teacher.parameters() if id(p) not in held] if teacher else []
    objective = Distillation(student, native, recipe.recover.distill, teacher)
    distill, loss = saved(objective)
    distill[1:] = saved(objective, behind_others=True)[0][1:]
    return Costs(
        **base,
        layers=sizes,
        linear=added,
        others=trained - added,
        copied=sum(p.nbytes for p in copied),
        products=products.get_total_flops() / 2 / FEW,
        softmax=sum(softmax_flops(layer, length) for layer in linear),
        attention=attention_flops(model, tokens),
        stays=sum(softmax_flops(layer, length) for layer in softmax),
        width=model.config.get_text_config().hidden_size,
        transfer=transfer or [rest],
        distill=distill or [loss],
        loss=loss if distill else 0.0,
        forward=max(results, default=0) / FEW,
    )


def kind(layer: nn.Module) -> tuple:
    """Equal for layers of the same modules with parameters of the same shapes."""
    modules = tuple((name, type(x).__name__) for name, x in layer.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def softmax_flops(layer: Layer, length: int) -> float:
    """FLOPs a token of both products of softmax attention; a causal token sees half of the others on average."""
    g, seen = layer.geometry, (length + 1) / 2 if layer.causal else length
    return 2 * g["heads"] * (g["key_dim"] + g["value_dim"]) * seen


def attention_flops(model: PreTrainedModel, tokens: int) -> float:
    """FLOPs a token of the products of all linear layers in one forward, counted on one layer of each equation."""
    modules = [module.linear_attention for module in converted(model).values()]
    one = {module.equation: module for module in modules}
    total = 0.0
    for equation, count in Counter(module.equation for module in modules).items():
        heads = ((equation.heads, equation.key_dim), (equation.kv_heads, equation.key_dim))
        shapes = (*heads, (equation.kv_heads, equation.value_dim))
        with FlopCounterMode(display=False) as counter, Phantom(), torch.no_grad():
            one[equation](*(torch.zeros(1, h, tokens, width) for h, width in shapes), None)
        total += count * counter.get_total_flops() / tokens
    return total
