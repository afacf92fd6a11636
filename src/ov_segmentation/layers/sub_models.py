"""Models of transformers as parts of ours."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig


def build_sub_model(model_class: Any, config: PreTrainedConfig) -> Any:
    """A `model_class` by its part of a configuration, in torch's default dtype as all that is built beside it.

    `_from_config` alone takes the dtype of `config`, which a configuration read from a checkpoint has for every part.
    Loading and `from_config` set the default to what they are asked for.
    """
    return model_class._from_config(config, dtype=torch.get_default_dtype())
