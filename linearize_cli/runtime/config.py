"""The config of a linearized model: its base model's config with a `linearize` record."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "linearized"
PREFIX = "Linearized"
# Auto class -> model type -> the class that it loads. The first entry that fits a class counts, because some
# encoder-decoders are also listed as masked language models.
AUTO_CLASSES: dict[str, Mapping[str, Sequence[str]]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    # Only encoders: other base models lack the head that they are converted with.
    "AutoModel": {
        kind: base
        for kind, base in modeling_auto.MODEL_MAPPING_NAMES.items()
        if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    },
}
# The same for Auto classes that load a model with another head than it was converted with. It may be new.
HEADS: dict[str, Mapping[str, Sequence[str]]] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
_concrete: dict[str, type[PreTrainedConfig]] = {}
_registered: list[type[Any]] = []


class LinearizedConfig(PreTrainedConfig):
    """The config class of artifacts. Loading returns an instance of a subclass of the base model's config
    class.

    `config.linearize` holds `base_class` (the base model's class), `base_model_type`, `attention` (that
    section of the recipe), `layers` (for each converted module's name, the sizes of its heads), `softmax`
    (the names of attention modules that were kept softmax) and `method` (the conversion method).
    """

    model_type = MODEL_TYPE

    @staticmethod
    def concrete(base_model_type: str) -> type[PreTrainedConfig]:
        """Return the config class of linearized models of a base model type."""
        if base_model_type not in _concrete:
            base = CONFIG_MAPPING[base_model_type]
            name = PREFIX + base.__name__
            cls = type(name, (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
            _concrete[base_model_type] = cls
            for model_class in _registered:
                getattr(transformers, model_class.auto_class).register(cls, model_class, exist_ok=True)
        return _concrete[base_model_type]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        return cls.concrete(config_dict["linearize"]["base_model_type"]).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """Return the class `Linearized<Base>Config` by name, creating it if needed, so that pickle finds it."""
    return LinearizedConfig.concrete(base_of(name).model_type)


def base_of(name: str) -> type[Any]:
    """Return the class `<Base>` of transformers for the name `Linearized<Base>`.

    Raises:
        AttributeError: transformers has no such class, or the name does not begin with `Linearized`.
    """
    base = getattr(transformers, name[len(PREFIX) :], None) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"{name!r} does not name a linearized class of transformers")
    return base


def auto_class(base_class: str) -> str | None:
    """Return the name of the Auto class that loads a class of transformers, or None if it is not in
    AUTO_CLASSES.
    """
    return next((name for name, classes in AUTO_CLASSES.items() if base_class in classes.values()), None)


def with_head(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config for loading a linearized model through an Auto class, which may give it another head.

    If the Auto class loads the model's own class, the config is returned unchanged. Otherwise it is a copy
    with another base class and adapted module names.

    Args:
        name: the name of the Auto class, such as "AutoModelForTokenClassification".

    Raises:
        ValueError: transformers has no class with that head for this model type, or could not load the body's
            weights into it.
    """
    record = config.linearize
    base, own = record["base_class"], auto_class(record["base_class"])
    wanted = HEADS.get(name, {}).get(record["base_model_type"])
    if name == own or wanted == base:
        return config
    refusal = ValueError(f"this is a linearized {base}: load it with {own}")
    if not isinstance(wanted, str):
        raise refusal
    before, after = (body_prefix(cls, record["base_model_type"]) for cls in (base, wanted))
    if before and after and after != before:  # transformers would not find the weights of the body
        raise refusal
    config, record = copy.copy(config), dict(record, base_class=wanted)
    record["layers"] = {after + k.removeprefix(before): geometry for k, geometry in record["layers"].items()}
    record["softmax"] = [after + k.removeprefix(before) for k in record["softmax"]]
    config.linearize, config.architectures = record, [PREFIX + wanted]
    return config


def body_prefix(cls: str, model_type: str) -> str:
    """Return the prefix of the body's module names in a class of transformers. It is empty if the class is
    the body itself.

    Args:
        cls: the name of the class.
        model_type: the model type that it belongs to.
    """
    if HEADS["AutoModel"].get(model_type) == cls:
        return ""
    return getattr(transformers, cls).base_model_prefix + "."


def register(*model_classes: type[Any]) -> None:
    """Register the config class and model classes of artifacts, so that Auto classes load them without remote
    code.

    Args:
        model_classes: subclasses of `model.AutoLinearized`.
    """
    AutoConfig.register(MODEL_TYPE, LinearizedConfig, exist_ok=True)
    _registered.extend(model_classes)
