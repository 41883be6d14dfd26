"""Captured decode steps: a recorder that replays by running again stands for a device, so that stale inputs show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import hf_greedy, ragged_prompts, save_tiny_model, tiny_config, tiny_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import AttentionMetadata, Feature
from inference_shardformer.attention.captured import captured_batch, refill
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.config.loader import gather, merge_layers
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.engine import scheduler
from inference_shardformer.engine.graphs import DecodeGraphs, Recording, graph_sizes
from inference_shardformer.errors import BackendUnavailableError, ConfigError
from inference_shardformer.explaining.offline import explain
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.mixtral import MixtralPolicy
from inference_shardformer.policies.opt import OPTPolicy
from inference_shardformer.resolving.graphs import choose_graphs, graph_reasons


class Capturable(ReferenceAttention):
    """The reference with plans that keep their addresses."""

    name = "capturable"
    capabilities = replace(ReferenceAttention.capabilities, features=frozenset(Feature))

    def plan_capture(self, num_decodes, kv_cache):
        return AttentionMetadata(captured_batch(num_decodes, kv_cache, self.spec.device), kv_cache)

    def replan(self, batch, meta):
        refill(meta.batch, batch)


class Rerun:
    """Records by keeping the step; a replay writes what it gives into the first result, as a device would."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step):
        self.recorded += 1
        logits = torch.full_like(step(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            logits.copy_(step())

        return Recording(replay, logits)


@pytest.fixture
def capturable(monkeypatch):
    BACKENDS.names()
    monkeypatch.setattr(BACKENDS, "_entries", {**BACKENDS._entries})
    BACKENDS.register("capturable", Capturable)
    return "capturable"


@pytest.fixture
def attached(capturable):
    """An engine over a tiny model, its model, and how many requests it may run at once."""
    opened = []

    def attach(case: str = "gqa", seqs: int = 8, overlap: str = "off"):
        model = tiny_model(case)
        settings = {
            "attention": {"backend": capturable},
            "dtype": "fp32",
            "cache": {"block_size": 4, "num_blocks": 200},
            "scheduler": {"max_num_seqs": seqs, "overlap": overlap},
        }
        shardformer = InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings))
        opened.append(shardformer)
        shardformer.optimize(model)
        return shardformer.attach(model)

    yield attach
    for shardformer in opened:
        shardformer.close()


def _with_graphs(engine, sizes) -> tuple[DecodeGraphs, Rerun]:
    recorder = Rerun()
    graphs = DecodeGraphs(sizes, recorder)
    engine._runner.graphs = graphs
    return graphs, recorder


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_greedy_tokens_equal_hugging_face_at_every_padding(attached, overlap) -> None:
    prompts = ragged_prompts(7, 160)
    lengths = [3, 9, 14, 5, 11, 1, 8]  # the batch shrinks step by step
    expected = [hf_greedy(tiny_model("gqa"), *request) for request in zip(prompts, lengths, strict=True)]
    engine = attached(overlap=overlap)
    graphs, recorder = _with_graphs(engine, (1, 2, 4, 8))
    params = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in lengths]
    outputs = engine.generate(prompts, params)
    assert [list(output.token_ids) for output in outputs] == expected
    assert graphs.captured == (1, 2, 4, 8)
    assert recorder.recorded == 4  # each size once
    assert recorder.replayed > 8


def test_a_second_batch_replays_what_the_first_recorded(attached) -> None:
    engine = attached()
    _, recorder = _with_graphs(engine, (2,))
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    for seed in (1, 2):
        prompts = ragged_prompts(2, 160, seed=seed)
        outputs = engine.generate(prompts, params)
        assert [list(output.token_ids) for output in outputs] == [hf_greedy(tiny_model("gqa"), p, 6) for p in prompts]
    assert recorder.recorded == 1


def test_drawn_tokens_are_those_of_an_eager_engine(attached) -> None:
    prompts = ragged_prompts(3, 160)
    params = SamplingParams(max_new_tokens=8, temperature=0.9, top_k=20, seed=3, ignore_eos=True)
    eager = [output.token_ids for output in attached().generate(prompts, params)]
    engine = attached()
    graphs, _ = _with_graphs(engine, (4,))
    assert [output.token_ids for output in engine.generate(prompts, params)] == eager
    assert graphs.captured == (4,)


def test_prompts_in_chunks_of_one_token_are_scored_as_an_eager_engine_does(attached, monkeypatch) -> None:
    prompts = ragged_prompts(3, 160, longest=9)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, prompt_logprobs=3, logprobs=2)
    expected = attached().generate(prompts, params)
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 1)
    engine = attached()
    _, recorder = _with_graphs(engine, (1, 2, 4))
    for output, eager in zip(engine.generate(prompts, params), expected, strict=True):
        assert output.token_ids == eager.token_ids
        for mine, its in zip(output.prompt_logprobs[1:], eager.prompt_logprobs[1:], strict=True):
            assert [each.token_id for each in mine.top] == [each.token_id for each in its.top]
            assert mine.chosen.logprob == pytest.approx(its.chosen.logprob, abs=1e-4)
    assert recorder.replayed > sum(map(len, prompts)) - 3


def test_prompts_and_large_batches_run_as_they_are(attached) -> None:
    engine = attached(seqs=4)
    graphs, recorder = _with_graphs(engine, (1,))
    assert graphs.num_padding(num_decodes=2, num_seqs=2) == 0  # larger than what is captured
    assert graphs.num_padding(num_decodes=1, num_seqs=2) == 0  # a prompt is in it
    assert DecodeGraphs((4, 1, 4), Rerun()).num_padding(num_decodes=3, num_seqs=3) == 1
    engine.generate(ragged_prompts(4, 160), SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert recorder.recorded == 0


def test_a_switch_forgets_what_was_recorded_and_comes_back(attached) -> None:
    engine = attached()
    graphs, recorder = _with_graphs(engine, (2,))
    prompts, params = ragged_prompts(2, 160), SamplingParams(max_new_tokens=5, ignore_eos=True)
    wanted = [output.token_ids for output in engine.generate(prompts, params)]
    engine.switch_backend("reference")  # which captures nothing
    assert graphs.sizes == ()
    assert [output.token_ids for output in engine.generate(prompts, params)] == wanted
    assert recorder.recorded == 1
    engine.switch_backend("capturable")
    assert [output.token_ids for output in engine.generate(prompts, params)] == wanted
    assert recorder.recorded == 2


def test_a_step_that_cannot_be_captured_is_a_typed_error(attached) -> None:
    engine = attached()

    def refuses(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    engine._runner.graphs = DecodeGraphs((1,), refuses)
    with pytest.raises(BackendUnavailableError, match=r"1 sequences could not be captured.*not permitted") as caught:
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
    assert "inference.graphs=none" in caught.value.remedy


def test_padding_writes_nothing_of_its_own(attached) -> None:
    """Blocks that no request holds stay as they were."""
    engine = attached()
    _with_graphs(engine, (8,))
    for tensor in engine._runner.kv_cache.layer(0):
        tensor.fill_(7.0)
    prompts = [[5, 6, 7], [9, 8]]
    engine.generate(prompts, SamplingParams(max_new_tokens=3, ignore_eos=True))
    keys = engine._runner.kv_cache.layer(0).keys.flatten(0, 1)
    touched = (keys != 7.0).flatten(1).any(dim=1).sum()
    assert int(touched) == sum(len(prompt) + 2 for prompt in prompts)  # the last token is never fed back


@pytest.mark.parametrize(("largest", "sizes"), [(1, (1,)), (6, (1, 2, 4, 6)), (40, (1, 2, 4, 8, 16, 32, 40))])
def test_sizes(largest, sizes) -> None:
    assert graph_sizes(largest) == sizes


FACTS = LlamaPolicy().facts(tiny_config("gqa"))
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"device": torch.device("cpu")}, ["no_graphs"]),
        ({"backends": ["capturable", "reference"]}, ["feature_graphs"]),
        ({"facts": replace(FACTS, length_dependent_rope=True)}, []),
        ({"policy": MixtralPolicy()}, ["host_work"]),
        ({"policy": MixtralPolicy(), "experts": "triton"}, []),
        ({"policy": OPTPolicy()}, ["host_work"]),
        ({"all_reduce": "gloo"}, ["all_reduce"]),
        ({"all_reduce": "nccl"}, []),
        ({"all_reduce": "shm", "backends": ["sdpa"]}, ["feature_graphs", "all_reduce"]),
    ],
)
def test_reasons(capturable, changes, codes) -> None:
    usual = {"facts": FACTS, "policy": LlamaPolicy(), "device": CUDA, "backends": [capturable], "all_reduce": "none"}
    given = {**usual, **changes}
    reasons = graph_reasons(given.pop("facts"), given.pop("policy"), **given)
    assert [reason.code for reason in reasons] == codes
    assert all(reason.message and reason.remedy for reason in reasons)


@pytest.mark.parametrize(
    ("asked", "limit", "device", "largest", "refused"),
    [
        ("auto", 64, CUDA, 64, False),
        ("auto", 1000, CUDA, 256, False),
        (32, 64, CUDA, 32, False),
        (128, 64, CUDA, 64, False),
        ("none", 64, CUDA, 0, False),
        ("auto", 64, torch.device("cpu"), 0, False),
        (8, 64, torch.device("cpu"), 0, True),
    ],
)
def test_what_the_setting_means(capturable, asked, limit, device, largest, refused) -> None:
    sources = ConfigSources(sets=(f"graphs={asked}", f"scheduler.max_num_seqs={limit}"), environ={})
    merged, violations = merge_layers(gather(sources)), []
    chosen = choose_graphs(
        merged, FACTS, LlamaPolicy(), device=device, backends=[capturable], all_reduce="none", violations=violations
    )
    assert chosen.largest == largest
    assert chosen.reason or asked == "none"
    assert [violation.path for violation in violations] == (["inference.graphs"] if refused else [])


def test_a_cpu_refuses_a_number_and_explains_auto(tmp_path) -> None:
    save_tiny_model("gqa", tmp_path)
    with pytest.raises(ConfigError, match="a device of type cpu captures nothing"):
        explain(tmp_path, sources=ConfigSources(sets=("graphs=8",), environ={}))
    text = explain(tmp_path, sources=ConfigSources(environ={})).as_text()
    assert "a device of type cpu captures nothing [no_graphs]" in " ".join(text.split())
