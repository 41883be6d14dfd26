"""Drafted policies: source that is clean, verified on a small model, right on another one, and refusing what is open.

All families that were tried, with what became of each: `python tests/support/families_without_policy.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families_without_policy import family_config
from transformers import AutoModelForCausalLM

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig, simulate
from inference_shardformer.drafting.draft import Draft, draft_policy, load_source
from inference_shardformer.drafting.rows import DraftFacts, DraftRow, DraftTable
from inference_shardformer.drafting.shrink import small_model
from inference_shardformer.drafting.source import class_name, policy_source
from inference_shardformer.errors import CheckpointError, UnsupportedModelError
from inference_shardformer.policies.registry import supported_architectures
from inference_shardformer.verification.verify import verify_sharding

# A norm over all heads, a scale of its own, alternating windows, packed projections, a layer that hands nothing on.
SAMPLE = (
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "Cohere2ForCausalLM",
    "PersimmonForCausalLM",
    "StableLmForCausalLM",
    "Glm4ForCausalLM",
)
REFUSED = ("BloomForCausalLM", "FalconForCausalLM", "GptOssForCausalLM")


def drafted(architecture: str) -> Draft:
    assert architecture not in supported_architectures()
    config = family_config(architecture)
    if config is None:
        pytest.skip(f"this transformers has no {architecture}")
    return draft_policy(config)


@pytest.fixture(scope="module", params=SAMPLE)
def draft(request: pytest.FixtureRequest) -> Draft:
    return drafted(request.param)


def test_a_draft_verifies_on_1_2_and_4_ranks(draft: Draft) -> None:
    assert draft.is_verified, draft.table.undecided or str(draft.reports[-1])
    assert [report.tp_size for report in draft.reports] == [1, 2, 4]


def test_its_source_is_clean_and_tells_how_sure_it_is(draft: Draft, tmp_path: Path) -> None:
    file = tmp_path / "my_policy.py"
    file.write_text(draft.source)
    project = Path(__file__).parents[2] / "pyproject.toml"
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", str(project), str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    told = sum(draft.source.count(f"# {word}: ") for word in ("certain", "likely", "guess"))
    assert told == len(draft.table.rows)


def test_what_verified_is_right_on_another_model(draft: Draft, tmp_path: Path) -> None:
    architecture = draft.table.architecture
    model = small_model(family_config(architecture), architecture, seed=7)
    model.save_pretrained(tmp_path)
    prompts = [torch.randint(3, 157, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (23, 2)]
    expected = [
        model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    config = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"block_size": 8, "num_blocks": 20}})

    def work(rank):
        with rank.shardformer(ShardConfig(threads_per_rank=1), config) as shardformer:
            engine = shardformer.attach(shardformer.from_pretrained(tmp_path, policy=draft.policy()))
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True))
            return [list(output.token_ids) for output in outputs]

    assert simulate(2, work)[0] == expected


def test_an_embedding_is_scaled_as_the_native_one_is() -> None:
    """BioGPT multiplies its embeddings by a root, or by nothing: `scale_embedding` says."""
    config = family_config("BioGptForCausalLM")
    policy = draft_policy(config, verifies=False).policy()
    for is_scaled in (True, False):
        config.scale_embedding = is_scaled
        report = verify_sharding(small_model(config, "BioGptForCausalLM", seed=5), tp_size=2, policy=policy)
        assert report.passed, str(report)


def test_a_tied_head_keeps_its_bias(tmp_path: Path) -> None:
    """Phi's output head has a bias of its own, also where its weight is the embedding's."""
    config = family_config("PhiForCausalLM")
    policy = draft_policy(config, verifies=False).policy()
    config.tie_word_embeddings = True
    model = small_model(config, "PhiForCausalLM", seed=5)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.randn_like(model.lm_head.bias))
    assert verify_sharding(model, tp_size=2, policy=policy).passed

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with InferenceShardformer(ShardConfig(threads_per_rank=1), InferenceConfig(dtype="fp32")) as shardformer:
        sharded, shared = shardformer.optimize(model, policy=policy)
        assert ("model.embed_tokens.weight", "lm_head.weight") in shared
        shardformer.save_pretrained(sharded, tmp_path)
        after = shardformer.unshard(sharded).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.lm_head.bias, before["lm_head.bias"])


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_decided_makes_the_policy_refuse(architecture: str) -> None:
    draft = drafted(architecture)
    assert not draft.is_verified
    assert draft.table.undecided
    told = " ".join(draft.source.replace("#", " ").split())
    assert all(" ".join(question.split()) in told for question in draft.table.undecided)
    with pytest.raises(UnsupportedModelError, match="open"):
        draft.policy().facts(family_config(architecture))


def test_a_wrong_row_does_not_verify() -> None:
    """What the verification of drafts is for: the same table with one row that is wrong."""
    draft = drafted("GraniteForCausalLM")
    model = small_model(family_config("GraniteForCausalLM"), "GraniteForCausalLM")
    for right, wrong in (
        ("float(hf_config.attention_multiplier)", "2 * float(hf_config.attention_multiplier)"),
        ('kv_heads("model.layers.*.self_attn.k_proj")', 'replicate("model.layers.*.self_attn.k_proj")'),
        ('row("model.layers.*.mlp.down_proj")', 'replicate("model.layers.*.mlp.down_proj")'),
        ('column("model.layers.*.mlp.up_proj")', 'replicate("model.layers.*.mlp.up_proj")'),
    ):
        assert draft.source.count(right) == 1
        policy = load_source(draft.source.replace(right, wrong), class_name(draft.table.architecture))
        assert not verify_sharding(model, tp_size=2, policy=policy).passed, wrong


def test_an_open_question_stands_in_the_source() -> None:
    row = DraftRow("vocab_head", "output", "certain", "the output head", (("tied_to", "None"),))
    source = policy_source(DraftTable("OddForCausalLM", (row,), DraftFacts(), ("who knows",)))
    assert "class OddPolicy(Policy):" in source
    assert "#   - who knows" in source
    assert 'frozenset({"output.weight"})' in source
    compile(source, "odd", "exec")


def test_there_must_be_something_to_draft_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        draft_policy(tmp_path)
    config = family_config("GraniteForCausalLM")
    config.architectures = ["NobodysForCausalLM"]
    with pytest.raises(UnsupportedModelError):
        draft_policy(config)
    with pytest.raises(UnsupportedModelError, match="small"):
        small_model(family_config("GraniteForCausalLM"), "NobodysForCausalLM")


def test_native_attention_refuses_what_the_facts_do_not_say() -> None:
    draft = drafted("GraniteForCausalLM")
    source = draft.source.replace("float(hf_config.attention_multiplier)", "0.5")
    model = small_model(family_config("GraniteForCausalLM"), "GraniteForCausalLM")
    first = verify_sharding(model, tp_size=1, policy=load_source(source, "GranitePolicy")).first
    assert first is not None
    assert (first.check, first.module) == ("run", "model.layers.0.self_attn")
    assert "asks for a scale" in first.message
