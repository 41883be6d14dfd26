"""Selection on machines we do not have: golden verdicts, and each fact moves the verdicts it should and no other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from selection_profiles import GOLDEN, LIBRARIES, NEEDY, PROFILES, Profile, absent, candidates

from inference_shardformer.attention.base import Requirement
from inference_shardformer.attention.selector import judge, select
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.probing.facts import HostFacts

BY_NAME = {backend.name: backend for backend in NEEDY}
NO_DEVICE = {"device", "device_missing"}


def codes(profile: Profile) -> dict[str, list[str]]:
    return {
        verdict.name: [r.code for r in verdict.reasons] for verdict in judge(profile.attention_spec(), profile.survey())
    }


def changed(before: dict[str, list[str]], after: dict[str, list[str]]) -> set[str]:
    assert list(before) == list(after)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("name", PROFILES)
def test_golden(name):
    written = (GOLDEN / f"{name}.json").read_text()
    assert written == PROFILES[name].to_json(), "if this is meant: python tests/support/selection_profiles.py"


def test_every_file_has_a_profile():
    assert {path.stem for path in GOLDEN.iterdir()} == set(PROFILES)
    assert len(PROFILES) >= 20


@pytest.mark.parametrize("name", PROFILES)
def test_a_golden_file_gives_the_host_back(name):
    document = json.loads((GOLDEN / f"{name}.json").read_text())
    assert HostFacts.from_json(json.dumps(document["host"])) == PROFILES[name].host


@pytest.mark.parametrize("name", PROFILES)
def test_auto_takes_the_first_that_serves_and_names_are_never_replaced(name):
    profile = PROFILES[name]
    spec, survey, found = profile.attention_spec(), profile.survey(), codes(profile)
    able = [candidate for candidate in found if not found[candidate]]
    if able:
        assert select(spec, "auto", survey).name == able[0]
    else:
        with pytest.raises(BackendUnavailableError, match="no attention backend can serve"):
            select(spec, "auto", survey)
    for candidate in found:
        if candidate in able:
            assert select(spec, candidate, survey).name == candidate
        else:
            with pytest.raises(BackendUnavailableError, match=f"'{candidate}' cannot serve"):
                select(spec, candidate, survey)


@pytest.mark.parametrize("name", PROFILES)
def test_every_refusal_says_what_to_do(name):
    profile = PROFILES[name]
    for verdict in judge(profile.attention_spec(), profile.survey()):
        for reason in verdict.reasons:
            assert reason.code
            assert reason.message
            assert reason.remedy


def can_run(requirement: Requirement, profile: Profile) -> bool:
    """Whether the hardware lets the library work, decided here from its declaration."""
    device = torch.device(profile.device)
    cards = profile.host.accelerators
    card = cards[device.index or 0] if device.type != "cpu" else None
    platform = card.platform if card else "cpu"
    too_early = (
        card is not None and card.capability is not None and card.capability < (requirement.min_capability or (0, 0))
    )
    too_late = (
        card is not None and card.capability is not None and card.capability > (requirement.max_capability or (99, 0))
    )
    too_early = too_early or too_late
    return platform in requirement.platforms and not too_early and set(requirement.isa) <= set(profile.host.cpu.isa)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (name, found.name)
        for name, profile in PROFILES.items()
        for found in profile.libraries.values()
        if found.status == "ok"
    ],
)
def test_a_library_that_goes_away_moves_who_needs_it_and_nobody_else(name, module):
    profile = PROFILES[name]
    before = codes(profile)
    rest = {other: result for other, result in profile.libraries.items() if other != module}
    after = codes(replace(profile, libraries=rest))
    requirement = LIBRARIES[module]
    affected = {
        fake.name
        for fake in NEEDY
        if requirement in fake.requires and not NO_DEVICE & {*before[fake.name]} and can_run(requirement, profile)
    }
    assert changed(before, after) == affected
    for candidate in affected:
        assert sorted(after[candidate]) == sorted([*before[candidate], "missing"])


@pytest.mark.parametrize("name", [name for name in PROFILES if PROFILES[name].device == "cpu"])
@pytest.mark.parametrize("flag", ["amx_bf16", "amx_tile", "avx512f", "avx2"])
def test_an_instruction_set_that_goes_away(name, flag):
    profile = PROFILES[name]
    cpu = replace(profile.host.cpu, isa=tuple(each for each in profile.host.cpu.isa if each != flag))
    before, after = codes(profile), codes(replace(profile, host=replace(profile.host, cpu=cpu)))
    affected = {
        fake.name
        for fake in NEEDY
        for each in fake.requires
        if flag in each.isa and can_run(each, profile) and not NO_DEVICE & {*before[fake.name]}
    }
    assert changed(before, after) == affected
    assert all("wrong_device" in after[candidate] for candidate in affected)


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5), (8, 0), (9, 0), (12, 0)])
def test_the_compute_capability_alone_decides(capability):
    profile = PROFILES["cuda_sm90"]
    cards = tuple(replace(card, capability=capability) for card in profile.host.accelerators)
    after = codes(replace(profile, host=replace(profile.host, accelerators=cards)))
    on_cuda = {
        "flash_attn": ((8, 0), (99, 0)),
        "flash_attn4": ((9, 0), (11, 9)),
        "flashinfer": ((8, 0), (99, 0)),
        "varlen": ((8, 0), (99, 0)),
        "triton": ((8, 0), (99, 0)),
    }
    refused = {candidate for candidate, (least, last) in on_cuda.items() if not least <= capability <= last}
    assert {candidate for candidate in on_cuda if "wrong_device" in after[candidate]} == refused
    assert changed(codes(profile), after) == refused


@pytest.mark.parametrize(
    ("fake", "fact", "value", "code"),
    [
        ("flash_attn", "dtypes", (torch.float16,), "dtype"),
        ("flash_attn", "features", frozenset(), "feature_chunked_prefill"),
        ("triton", "devices", ("xpu",), "device"),
        ("flashinfer", "gqa_ratios", BY_NAME["flashinfer"].capabilities.gqa_ratios.only(1), "gqa_ratio"),
    ],
)
def test_a_capability_that_goes_away_moves_its_backend_and_nobody_else(monkeypatch, fake, fact, value, code):
    profile = PROFILES["cuda_sm90"]
    before = codes(profile)
    monkeypatch.setattr(BY_NAME[fake], "capabilities", replace(BY_NAME[fake].capabilities, **{fact: value}))
    after = codes(profile)
    assert changed(before, after) == {fake}
    assert code in after[fake]


@pytest.mark.parametrize("name", [name for name in PROFILES if PROFILES[name].native is None])
def test_native_kernels_that_go_away_move_the_native_backend_on_a_cpu_and_nobody_else(name):
    profile = PROFILES[name]
    gone = PROFILES["cpu_without_native"].native
    before, after = codes(profile), codes(replace(profile, native=gone))
    assert changed(before, after) == ({"cpu"} if profile.device == "cpu" else set())
    if profile.device == "cpu":
        assert after["cpu"] == [*before["cpu"], gone.code]


def test_a_library_that_nobody_probed_is_not_taken_for_a_working_one():
    profile = PROFILES["cuda_sm90"]
    survey = replace(profile.survey(), probes={})
    (flash,) = (verdict for verdict in judge(profile.attention_spec(), survey) if verdict.name == "flash_attn")
    assert [reason.code for reason in flash.reasons] == ["not_probed"]


@pytest.mark.parametrize("name", ["cuda_sm90", "rocm", "mps", "xpu", "cpu_amx_bf16"])
def test_selection_asks_no_device_and_starts_nothing(name, monkeypatch):
    """A function of its arguments: the machine that runs this test has no say."""
    profile = PROFILES[name]
    spec, survey = profile.attention_spec(), profile.survey()
    expected = judge(spec, survey)

    def touched(*_args, **_kwargs):
        raise AssertionError("selection looked at this machine")

    for place in ("torch.cuda.is_available", "torch.cuda.device_count", "torch.xpu.is_available", "subprocess.Popen"):
        monkeypatch.setattr(place, touched)
    monkeypatch.setattr("builtins.__import__", touched)
    assert judge(spec, survey) == expected


def test_the_order_of_registration_does_not_matter():
    profile = PROFILES["cuda_sm80"]
    survey = replace(profile.survey(), candidates=tuple(reversed(candidates())))
    assert judge(profile.attention_spec(), survey) == judge(profile.attention_spec(), profile.survey())


def test_a_missing_library_says_how_to_get_it():
    profile = PROFILES["cuda_sm80_bare"]
    with pytest.raises(
        BackendUnavailableError, match=r"'triton' cannot serve.*triton is not installed \[missing\]"
    ) as caught:
        select(profile.attention_spec(), "triton", profile.survey())
    assert absent(LIBRARIES["triton"]).remedy in caught.value.remedy
    assert "or to one that can serve: sdpa, reference" in caught.value.remedy
