"""`cache.block_size=auto` follows the backend that will serve, on every machine of the golden files."""

from __future__ import annotations

from dataclasses import replace

import pytest
from selection_profiles import PROFILES

from inference_shardformer.attention.block_size import choose_block_size
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selector import select


def _groups_of(name: str, layers: int = 2):
    spec = PROFILES[name].attention_spec()
    return lambda size: LayerGroups.of([replace(spec, block_size=size)] * layers)


@pytest.mark.parametrize(
    ("profile", "requested", "size", "chosen"),
    [
        ("cuda_sm80", "auto", 256, "flash_attn"),  # the preferred one gets what it needs
        ("cuda_sm90_torch_alone", "auto", 256, "varlen"),
        ("cuda_sm90_crash", "flash_attn4", 16, "flash_attn4"),
        ("cuda_sm80_fp32", "auto", 16, "triton"),  # no library in fp32, so nothing needs large blocks
        ("cuda_sm80_bare", "auto", 16, "sdpa"),
        ("cpu_avx512", "auto", 16, "cpu"),
        ("cuda_sm80", "varlen", 256, "varlen"),
        ("cuda_sm80", "tuned", 256, "flash_attn"),
    ],
)
def test_the_size_is_what_the_winner_takes(profile, requested, size, chosen) -> None:
    groups_of, survey = _groups_of(profile), PROFILES[profile].survey()
    assert choose_block_size(requested, groups_of, survey) == size
    asked = "auto" if requested == "tuned" else requested
    assert select(groups_of(size).specs[0], asked, survey).name == chosen


def test_a_backend_that_cannot_serve_anyway_leaves_the_usual_size_and_its_verdict() -> None:
    assert choose_block_size("flash_attn", _groups_of("cuda_sm80_bare"), PROFILES["cuda_sm80_bare"].survey()) == 16
    assert choose_block_size("no_such", _groups_of("cuda_sm80"), PROFILES["cuda_sm80"].survey()) == 16


def test_one_size_must_suit_all_layers() -> None:
    """Every other layer has sinks, which flash_attn lacks: the first backend that serves both kinds decides."""
    spec = PROFILES["cuda_sm90"].attention_spec()

    def groups_of(size: int) -> LayerGroups:
        return LayerGroups.of([replace(spec, block_size=size), replace(spec, block_size=size, sinks=True)])

    assert choose_block_size("auto", groups_of, PROFILES["cuda_sm90"].survey()) == 16
