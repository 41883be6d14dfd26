"""Fields of a Hugging Face configuration that a policy serves with one value alone, refused by name otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from inference_shardformer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_served(hf_config: PreTrainedConfig, architecture: str, served: Mapping[str, object]) -> None:
    """Raise `UnsupportedModelError` for every field that differs from the value in `served`.

    `None` and an absent field count as `False`, and an empty list as `None`.
    """
    found = {name: getattr(hf_config, name, None) for name in served}
    refused = [name for name in served if (found[name] or None) != (served[name] or None)]
    if refused:
        shown = ", ".join(f"{name}={found[name]!r}" for name in refused)
        needed = ", ".join(f"{name}={served[name]!r}" for name in refused)
        raise UnsupportedModelError(
            f"{architecture} with {shown} is not served",
            remedy=f"this policy needs {needed}; for another model pass policy= with a Policy of your own",
        )
