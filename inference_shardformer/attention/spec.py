"""AttentionSpec: what a backend must serve on one rank; Reason: why one cannot."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from inference_shardformer.attention.capabilities import Feature

# The engine packs decodes, prompts and pieces of prompts into one batch, whatever the model is.
ENGINE_FEATURES = frozenset({Feature.CHUNKED_PREFILL, Feature.MIXED_BATCH})


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend must serve on one rank. Head counts are those of this rank.

    `scale` multiplies the scores before anything else. `sliding_window` is the number of tokens a query sees, itself
    included; `None` means all of them. `softcap` squashes scaled scores to `softcap * tanh(score / softcap)`; `None`
    leaves them alone. `sinks`: each layer brings one more logit per head, see `attend_with_sinks`. `kv_dtype` is the
    type that keys and values are stored in; `None`: that of the queries. `features` are needed beside what the other
    fields imply.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    block_size: int
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_dtype: torch.dtype | None = None
    features: frozenset[Feature] = ENGINE_FEATURES

    def facts(self) -> dict[str, str]:
        """The spec as text by name, the device without its number; what it does not ask for is left out."""
        shown = {each.name: getattr(self, each.name) for each in fields(self)}
        shown |= {"device": self.device.type, "features": "+".join(sorted(each.value for each in self.features))}
        return {name: str(value).removeprefix("torch.") for name, value in shown.items() if value not in (None, False)}

    def in_words(self) -> str:
        """What distinguishes the layers of a model, in a few words."""
        words = [f"{self.num_heads} heads", f"{self.num_kv_heads} key/value heads", f"head_dim {self.head_dim}"]
        words.append(str(self.dtype).removeprefix("torch."))
        words += [f"window {self.sliding_window}"] if self.sliding_window is not None else []
        words += [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        words += [f"scale {self.scale:.4g}"] if self.scale != self.head_dim**-0.5 else []
        return ", ".join([*words, *(["sinks"] if self.sinks else [])])

    @property
    def needs(self) -> frozenset[Feature]:
        """Every feature that a backend must have to serve this."""
        implied = {
            Feature.SLIDING_WINDOW: self.sliding_window is not None,
            Feature.SOFTCAP: self.softcap is not None,
            Feature.SINKS: self.sinks,
        }
        return self.features | {feature for feature, needed in implied.items() if needed}

    @property
    def cache_dtype(self) -> torch.dtype:
        """The type that keys and values are stored in."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype


class Reason(NamedTuple):
    """Why a backend cannot serve a spec: a stable code, a sentence with the values, and what to do about it."""

    code: str
    message: str
    remedy: str
