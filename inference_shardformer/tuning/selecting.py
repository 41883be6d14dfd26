"""Selects the backend that was asked for: `tuned` is looked up in its profile, everything else is for the selector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selecting import select_each
from inference_shardformer.attention.selector import Selection, select
from inference_shardformer.attention.survey import Survey
from inference_shardformer.config.inference import TUNED, AttentionConfig
from inference_shardformer.tuning.choice import praise
from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.fingerprint import fingerprint_of, spec_key
from inference_shardformer.tuning.profile import TuningProfile


def select_backends(groups: LayerGroups, attention: AttentionConfig, survey: Survey) -> tuple[Selection, ...]:
    """The selection for `attention.backend` in each group of layers; a refusal names the layers."""
    return select_each(groups, lambda spec: select_backend(spec, attention, survey))


def select_backend(spec: AttentionSpec, attention: AttentionConfig, survey: Survey) -> Selection:
    """The selection for `attention.backend`. Measures nothing.

    Raises `TuningProfileError` if "tuned" was asked for without a profile that holds here, and what `select` raises.
    """
    if attention.backend != TUNED:
        return select(spec, attention.backend, survey)
    if attention.profile is None:
        raise TuningProfileError(
            "attention.backend=tuned takes its choice from attention.profile, which is not set",
            remedy="measure first: `inference-shardformer bench backends --model MODEL --save FILE`, then set "
            "attention.profile=FILE",
        )
    path = Path(attention.profile).expanduser()
    profile = TuningProfile.load(path)
    profile.check(path, fingerprint_of(survey, spec, attention.options))
    entry = profile.entry(path, spec_key(spec))
    selection = select(spec, entry.choice, survey)
    return replace(
        selection,
        requested=TUNED,
        reason=f"tuned: profile {attention.profile}, {praise(entry.measurements, entry.choice)}",
    )
