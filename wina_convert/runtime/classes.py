"""Which of transformers' classes a model is loaded with. Imports transformers, so the loader imports this only when it loads."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads the whole of a model: AutoModelForCausalLM, wherever that leaves nothing out.

    For some models of more than text it does: it knows none of the type, or takes the text part alone. For these it is
    AutoModelForImageTextToText.
    """
    kind = type(config)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    whole = causal is not None and getattr(causal, "config_class", kind) is not kind.sub_configs.get("text_config")
    wrapped = not whole and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
