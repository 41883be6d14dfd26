"""Sizes, what a spec needs, and what a class must declare to be a backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference_shardformer.attention import contract
from inference_shardformer.attention.base import ANY_SIZE, AttentionBackend, Feature, Sizes
from inference_shardformer.attention.contract import contract_problem
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.spec import ENGINE_FEATURES
from inference_shardformer.conformance.cases import MIXED, Case
from inference_shardformer.errors import PluginError

SPEC = Case(MIXED).spec(torch.device("cpu"))


@pytest.mark.parametrize(
    ("sizes", "inside", "outside", "words"),
    [
        (ANY_SIZE, {1, 7, 4096}, {0, -1}, "any size"),
        (Sizes.only(128, 64, 64), {64, 128}, {0, 63, 65, 192}, "64 or 128"),
        (Sizes.multiples_of(8), {8, 16, 800}, {0, 1, 4, 12}, "a multiple of 8"),
        (Sizes.multiples_of(8, low=16, high=32), {16, 24, 32}, {8, 20, 40}, "a multiple of 8 from 16 to 32"),
        (Sizes(low=3, high=5), {3, 4, 5}, {2, 6}, "any size from 3 to 5"),
        (Sizes(low=3), {3, 300}, {2}, "any size from 3"),
    ],
    ids=str,
)
def test_sizes_hold_what_they_say(sizes: Sizes, inside: set[int], outside: set[int], words: str) -> None:
    assert {size for size in inside | outside if size in sizes} == inside
    assert sizes.smallest == min(inside)
    assert str(sizes) == words


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Sizes.only(0, 16),
        lambda: Sizes.multiples_of(0),
        lambda: Sizes(low=0),
        lambda: Sizes(low=9, high=8),
        lambda: Sizes.multiples_of(16, low=17, high=31),
    ],
)
def test_sizes_that_hold_nothing_or_no_sizes_are_refused(declare) -> None:
    with pytest.raises(PluginError, match="declares sizes below 1, or none at all"):
        declare()


def test_a_spec_needs_what_its_fields_imply() -> None:
    assert SPEC.needs == ENGINE_FEATURES
    assert replace(SPEC, sliding_window=4).needs == ENGINE_FEATURES | {Feature.SLIDING_WINDOW}
    assert replace(SPEC, softcap=30.0, sinks=True, features=frozenset()).needs == {Feature.SOFTCAP, Feature.SINKS}
    assert replace(SPEC, features=frozenset({Feature.GRAPHS})).needs == {Feature.GRAPHS}


def test_keys_are_stored_in_the_type_of_the_queries_unless_said() -> None:
    assert SPEC.cache_dtype == torch.float32
    assert replace(SPEC, kv_dtype=torch.bfloat16).cache_dtype == torch.bfloat16


def declared(**changes: object) -> type[AttentionBackend]:
    return type("Declared", (ReferenceAttention,), changes)


class Unfinished(AttentionBackend):
    """Implements nothing."""

    name = "unfinished"
    contract_version = 1
    capabilities = ReferenceAttention.capabilities


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        (42, "42 is not a subclass of AttentionBackend"),
        (int, "is not a subclass of AttentionBackend"),
        (declared(contract_version=None), "declares no contract_version; write contract_version = 1"),
        (declared(contract_version=0), "is written for contract 0, this is contract 1"),
        (declared(contract_version=2), "is written for contract 2, this is contract 1"),
        (declared(contract_version="1"), "is written for contract '1', this is contract 1"),
        (declared(contract_version=True), "is written for contract True"),
        (declared(capabilities={"dtypes": ()}), "declares no capabilities"),
        (declared(name=""), "its name is ''"),
        (declared(name="Shouting"), "its name is 'Shouting'"),
        (Unfinished, "it does not implement attend, plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_class_must_declare(loaded: object, words: str) -> None:
    assert words in contract_problem(loaded)


def test_a_whole_declaration_has_no_problem() -> None:
    assert contract_problem(ReferenceAttention) is None


def test_a_backend_must_state_its_version_itself() -> None:
    assert not hasattr(AttentionBackend, "contract_version")


def test_the_version_before_this_one_is_loaded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CONTRACT_VERSION", 3)
    monkeypatch.setattr(contract, "SUPPORTED_VERSIONS", (2, 3))
    assert contract_problem(declared(contract_version=2)) is None
    assert contract_problem(declared(contract_version=3)) is None
    assert contract_problem(declared(contract_version=1)) == (
        "it is written for contract 1, this is contract 3, which also loads contract 2"
    )
