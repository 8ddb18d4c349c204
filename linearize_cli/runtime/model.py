"""The model class of a linearized checkpoint: its base model's class with converted layers."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from linearize_kernels.equation import LinearAttention
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto

from linearize_cli.checksums import check_folder
from linearize_cli.runtime.adapt import adapt
from linearize_cli.runtime.bundle import auto_map, copy_code
from linearize_cli.runtime.config import HEADS, LinearizedConfig, auto_class, base_of, with_head
from linearize_cli.runtime.dispatch import attach
from linearize_cli.runtime.layer import NO_PAGES, linearized
from linearize_cli.runtime.places import has_layer
from linearize_cli.runtime.tree import Tree, read_tree

_classes: dict[type, type] = {}

if TYPE_CHECKING:
    Base = PreTrainedModel  # of which a mixin before the base model's class uses methods and attributes
else:
    Base = object


class LinearizeMixin(Base):
    """The mixin of linearized model classes, placed before the base model's class.

    It attaches linear attention to the modules that `config.linearize` lists.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.attach_linear_attention()
        self.post_init()

    def attach_linear_attention(self) -> None:
        """Attach linear attention to the modules that `config.linearize` lists.

        Raises:
            ValueError: the model has no module of a listed name.
        """
        record = self.config.linearize
        adapt(self)
        names = {name for name, _ in self.named_modules()}
        missing = [name for name in (*record["layers"], *record["softmax"]) if name not in names]
        if missing:
            raise ValueError(
                f"{type(self).__name__} does not match this linearized model: it has no {missing[0]}"
            )
        attach(
            self,
            {name: linearized(record["attention"], geometry) for name, geometry in record["layers"].items()},
        )

    @classmethod
    def is_custom_code(cls) -> bool:
        # With True, transformers skips the buffers that a base model computes for its parts (Falcon-H1).
        return False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # transformers initializes a module through its nearest PreTrainedModel, which does not know ours.
        for module in self.modules():
            if isinstance(module, LinearAttention) and not getattr(module, "_is_hf_initialized", False):
                # Tensors on the meta device are on disk. The loaded ones must not be reset either.
                tensors = (x for x in (*module.parameters(), *module.buffers()) if not x.is_meta)
                if not all(getattr(x, "_is_hf_initialized", False) for x in tensors):
                    module.reset_parameters()
                part: Any
                for part in module.modules():
                    part._is_hf_initialized = True
        super().initialize_weights()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model, together with the code that loads it on machines where `linearize` is not
        installed.
        """
        self.config.auto_map = auto_map(*auto_models(self.config))
        result = super().save_pretrained(save_directory, *args, **kwargs)
        far = self.config.linearize["attention"].get("far") or {}
        copy_code(Path(save_directory), far.get("feature_map"))
        return result

    def read_tree(self, cache: Cache, ids: Tensor, parents: Sequence[int]) -> Tree:
        """Compute the logits of the nodes of a token tree that continues every row of a cache. The cache is
        not changed.

        Args:
            cache: the cache after the rows' prefixes.
            ids: `[B, N]`, the nodes' tokens.
            parents: the index of each node's parent, -1 for a root. Parents come before their children.

        Raises:
            ValueError: the parents are not a tree of N nodes, or the cache holds no prefix.
            NotImplementedError: the model cannot verify trees (see `tree.read_tree`).
        """
        return read_tree(self, cache, ids, parents)

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(NO_PAGES)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            # Our cache layers must be in place before past recording is activated: others cannot record.
            for name, geometry in self.config.linearize["layers"].items():
                module = self.get_submodule(name)
                if geometry.get("causal", True) and has_layer(cache, module.layer_idx):
                    layer = module.linear_attention.place(cache, module.layer_idx)
                    # `generate` makes masks for compilable caches. Such a model makes its own from the pads.
                    layer.is_compileable &= not getattr(module, "native_mask", False)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return result


def linearized_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class `Linearized<Base>` of linearized models of a base class."""
    if base not in _classes:
        assert base.config_class is not None
        name, base_type = f"Linearized{base.__name__}", base.config_class.model_type
        namespace = {
            "__module__": __name__,
            "config_class": LinearizedConfig.concrete(base_type),
            "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), "linear_attention"},
            "_supports_attention_backend": AutoLinearized._supports_attention_backend,
            # Linear layers read pads from the mask of softmax layers, which a BlockMask does not allow.
            "_supports_flex_attn": False,
        }
        _classes[base] = type(name, (LinearizeMixin, base), namespace)
        # transformers finds weight renamings (for example of MoE experts) by class name or model type.
        for source in (base.__name__, base_type):
            mapping = get_checkpoint_conversion_mapping(source)
            if mapping is not None:
                register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
                break
        add_to_tasks(base.__name__, name)
        add_lora_targets(base_type)
    return _classes[base]


def add_to_tasks(base: str, name: str) -> None:
    """Add a linearized class to transformers' lists of the models of each task. A pipeline logs an error of 200 lines
    about a model whose class is in none.

    Args:
        base: the name of the base model's class.
        name: the name of the linearized class. As a key it is no model type, so that nothing else finds the entry.
    """
    for models in vars(modeling_auto).values():
        if type(models) is OrderedDict:  # the lazy mappings would import every model
            known = chain.from_iterable([x] if isinstance(x, str) else x for x in models.values())
            if base in known:
                models[name] = name


def add_lora_targets(base_type: str) -> None:
    """Let PEFT's `LoraConfig` without `target_modules` take the modules that it takes in the base model.

    Args:
        base_type: the model type of the base model. PEFT goes by the model type, which linearized models share.
    """
    try:  # transformers' loader of remote code requires every package that is imported outside a `try`
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets
    except ImportError:
        return
    own = LinearizedConfig.model_type
    targets[own] = list(dict.fromkeys([*targets.get(own, ()), *targets.get(base_type, ())]))


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Return the class `Linearized<Base>` by name, creating it if needed, so that pickle finds it."""
    return linearized_class(base_of(name))


def concrete_model(config) -> type[PreTrainedModel]:
    """Return the model class `Linearized<Base>` of a linearized config."""
    return linearized_class(getattr(transformers, config.linearize["base_class"]))


class AutoLinearized:
    """The base class of the entry points through which transformers' Auto classes load an artifact.

    config.json names one subclass for each Auto class (`auto_map`). Its `from_pretrained` returns a model of
    the class `Linearized<Base>`, not an instance of the subclass.

    Attributes:
        auto_class: the name of the Auto class, such as "AutoModelForCausalLM".
    """

    auto_class: str
    _auto_class = None
    # Servers that bring their own attention and KV cache (vLLM, SGLang) read these two, and then refuse the model. They
    # would run it without its state.
    _supports_attention_backend = False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        cls._auto_class = auto_class

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, config=None, checksums=True, subfolder="", **kwargs
    ):
        """Load an artifact (see transformers' `PreTrainedModel.from_pretrained`).

        Args:
            checksums: False to load files that differ from the checksums in linearize.json. Only the code inside an
                artifact compares them, for a local folder: `linearize_cli.load` has its own comparison, and the Hub's
                client compares what it downloads.

        Raises:
            ValueError: a file differs.
        """
        folder = Path(pretrained_model_name_or_path)
        if checksums and not subfolder and folder.is_dir() and not __name__.startswith("linearize_cli."):
            check_folder(folder)
        if config is None:
            config = LinearizedConfig.from_pretrained(pretrained_model_name_or_path)
        config = with_head(config, cls.auto_class)
        return concrete_model(config).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, subfolder=subfolder, **kwargs
        )

    @classmethod
    def _from_config(cls, config, **kwargs):
        config = with_head(config, cls.auto_class)
        return concrete_model(config)._from_config(config, **kwargs)


class LinearizedForCausalLM(AutoLinearized):
    auto_class = "AutoModelForCausalLM"


class LinearizedForSeq2SeqLM(AutoLinearized):
    auto_class = "AutoModelForSeq2SeqLM"


class LinearizedForMaskedLM(AutoLinearized):
    auto_class = "AutoModelForMaskedLM"


class LinearizedForSequenceClassification(AutoLinearized):
    auto_class = "AutoModelForSequenceClassification"


class LinearizedModel(AutoLinearized):
    auto_class = "AutoModel"


class LinearizedForTokenClassification(AutoLinearized):
    auto_class = "AutoModelForTokenClassification"


class LinearizedForQuestionAnswering(AutoLinearized):
    auto_class = "AutoModelForQuestionAnswering"


class LinearizedForImageTextToText(AutoLinearized):
    auto_class = "AutoModelForImageTextToText"


AUTO_MODELS: dict[str, type[AutoLinearized]] = {
    model.auto_class: model
    for model in (
        LinearizedForCausalLM,
        LinearizedForSeq2SeqLM,
        LinearizedForMaskedLM,
        LinearizedForSequenceClassification,
        LinearizedModel,
        LinearizedForTokenClassification,
        LinearizedForQuestionAnswering,
        LinearizedForImageTextToText,
    )
}


def auto_models(config) -> list[type[AutoLinearized]]:
    """Return the entry points in AUTO_MODELS that can load a linearized model: with its own head first, then
    others.
    """
    record = config.linearize
    own = auto_class(record["base_class"])
    others = [name for name, classes in HEADS.items() if record["base_model_type"] in classes]
    return [AUTO_MODELS[name] for name in dict.fromkeys([own, *others]) if name is not None]


def linearize(model: PreTrainedModel, record: dict) -> PreTrainedModel:
    """Attach linear attention to a model in place, and give it the class and config of a linearized model.

    Args:
        model: a model of transformers.
        record: the content of `config.linearize`: the base class, the recipe's attention, the layers to
            convert and those that stay softmax (see `LinearizedConfig`).

    Returns:
        The same model.
    """
    base, config = type(model), model.config
    config.__class__ = LinearizedConfig.concrete(record["base_model_type"])
    config.linearize = record
    config.architectures = [f"Linearized{base.__name__}"]
    model.__class__ = concrete_model(config)
    changed: Any = model
    changed.attach_linear_attention()
    return model


def linear_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the conversion added."""
    return [p for m in model.modules() if isinstance(m, LinearAttention) for p in m.parameters()]
