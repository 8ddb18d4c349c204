"""The config of a linearized model: its base model's config with a `linearize` record."""

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "linearized"
PREFIX = "Linearized"
_concrete: dict[str, type[PreTrainedConfig]] = {}
_registered: list[type] = []


class LinearizedConfig(PreTrainedConfig):
    """Resolves to a subclass of the base model's config class when it is loaded.

    `config.linearize` holds `base_class`, `base_model_type`, `attention` (the recipe's part), `layers`
    (module name -> geometry), `softmax` (names of the layers kept) and `method`.
    """

    model_type = MODEL_TYPE

    @staticmethod
    def concrete(base_model_type: str) -> type[PreTrainedConfig]:
        """The config class of linearized models of one base type."""
        if base_model_type not in _concrete:
            base = CONFIG_MAPPING[base_model_type]
            name = PREFIX + base.__name__
            cls = type(name, (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
            _concrete[base_model_type] = cls
            for model_class in _registered:
                AutoModelForCausalLM.register(cls, model_class, exist_ok=True)
        return _concrete[base_model_type]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        return cls.concrete(config_dict["linearize"]["base_model_type"]).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """`Linearized<Base>Config`: so pickle finds it, in a process that has not made it yet too."""
    return LinearizedConfig.concrete(base_of(name).model_type)


def base_of(name: str) -> type:
    """The class of transformers that `Linearized<Base>` names.

    Raises:
        AttributeError: there is none.
    """
    base = getattr(transformers, name[len(PREFIX) :], None) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"no class of transformers is behind {name!r}")
    return base


def register(model_class: type) -> None:
    """Let the Auto classes load linearized models without `trust_remote_code`."""
    AutoConfig.register(MODEL_TYPE, LinearizedConfig, exist_ok=True)
    _registered.append(model_class)
