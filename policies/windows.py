"""The sliding window of every layer, from the fields in which Hugging Face's configurations tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SlidingWindows = tuple[int | None, ...]  # [num_layers], or empty where no layer has a window

_SLIDING, _FULL = "sliding_attention", "full_attention"


def no_windows(hf_config: PreTrainedConfig) -> SlidingWindows:
    """For families without windows; refuses a configuration that asks for one nevertheless."""
    layer_types = set(getattr(hf_config, "layer_types", None) or ()) - {_FULL}
    if getattr(hf_config, "sliding_window", None) or layer_types:
        raise UnsupportedModelError(
            f"sliding_window={getattr(hf_config, 'sliding_window', None)} with layer_types {sorted(layer_types)} is "
            f"not served for {hf_config.model_type}, whose layers see all tokens",
            remedy="remove the fields from config.json, or pass policy= with a Policy that serves them",
        )
    return ()


def same_window_everywhere(hf_config: PreTrainedConfig) -> SlidingWindows:
    """For families whose layers share `sliding_window`; layer types that say otherwise are refused."""
    window = getattr(hf_config, "sliding_window", None)
    own = _SLIDING if window is not None else _FULL
    others = sorted(set(getattr(hf_config, "layer_types", None) or ()) - {own})
    if others:
        raise UnsupportedModelError(
            f"layer_types {others} beside sliding_window={window} are not served for {hf_config.model_type}: all its "
            "layers see the same window",
            remedy="remove layer_types from config.json, or pass policy= with a Policy that serves them",
        )
    return _expanded(hf_config, [own] * int(hf_config.num_hidden_layers))


def windows_of_last_layers(hf_config: PreTrainedConfig) -> SlidingWindows:
    """For families with `use_sliding_window`: the layers from `max_window_layers` on, or as `layer_types` says."""
    if not getattr(hf_config, "use_sliding_window", False):
        return no_windows(hf_config) if getattr(hf_config, "layer_types", None) else ()
    first = int(hf_config.max_window_layers)
    layers = range(int(hf_config.num_hidden_layers))
    layer_types = getattr(hf_config, "layer_types", None) or [_SLIDING if i >= first else _FULL for i in layers]
    return _expanded(hf_config, layer_types)


def windows_by_pattern(hf_config: PreTrainedConfig, *, every: int) -> SlidingWindows:
    """For families whose every `every`-th layer sees all tokens, unless `layer_types` says otherwise."""
    layers = range(int(hf_config.num_hidden_layers))
    layer_types = getattr(hf_config, "layer_types", None) or [_SLIDING if (i + 1) % every else _FULL for i in layers]
    return _expanded(hf_config, layer_types)


def _expanded(hf_config: PreTrainedConfig, layer_types: Sequence[str]) -> SlidingWindows:
    """One window for each layer of the model."""
    window = getattr(hf_config, "sliding_window", None)
    unknown = sorted(set(layer_types) - {_SLIDING, _FULL})
    if unknown or len(layer_types) != hf_config.num_hidden_layers:
        raise UnsupportedModelError(
            f"layer_types {unknown or list(layer_types)} of this {hf_config.model_type} are not served",
            remedy=f"name {_SLIDING!r} or {_FULL!r} for each of the {hf_config.num_hidden_layers} layers",
        )
    if _SLIDING not in layer_types:
        return ()
    if not isinstance(window, int) or window < 1:
        raise UnsupportedModelError(
            f"sliding_window={window} of this {hf_config.model_type} is no number of tokens",
            remedy="give the tokens that a query sees, itself included",
        )
    return tuple(window if kind == _SLIDING else None for kind in layer_types)
