"""Configurations that must be refused before a weight is read, each with path, value, origin, rule and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_config

from inference_shardformer import ConfigSources, InferenceShardformer
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.violations import ConfigViolations, Violation
from inference_shardformer.errors import (
    BackendUnavailableError,
    ConfigError,
    EnvironmentMismatchError,
    InferenceShardformerError,
    TensorParallelSizeError,
)

S, I = "shard", "inference"  # noqa: E741
CACHE, SCHEDULER, SAMPLING = f"{I}.cache", f"{I}.scheduler", f"{I}.sampling"
COUNT, SIZE = "an integer, at least 1, or auto", "an integer, at least 1, at most 1024"
TEMPERATURE = "a number, at least 0, at most 100"
IDLE = "a value that can take effect, but "
KNOWN = "the name of a known setting"

# (settings as --set takes them, the path that is refused, the beginning of the rule, words of the remedy)
CASES: list[tuple[str, str, str, str]] = [
    # types and ranges
    *[
        (f"tp_size={value}", f"{S}.tp_size", COUNT, "auto")
        for value in ("0", "-2", "1.5", "true", "two", "null", "[2]")
    ],
    *[(f"device={value}", f"{S}.device", "one of auto, cpu, cuda", "auto") for value in ("gpu", "0", "cuda:1")],
    *[
        (f"threads_per_rank={value}", f"{S}.threads_per_rank", "an integer, at least 1, at most 4096, or auto", "auto")
        for value in ("0", "all", "2.0", "1000000000000000000000000000000")
    ],
    *[
        (f"timeout_s={value}", f"{S}.timeout_s", "a number, above 0, at most 3600", "30.0")
        for value in ("0", "-1", "4000")
    ],
    ("timeout_s=5min", f"{S}.timeout_s", "a number, above 0", "did you mean 300.0 (seconds)?"),
    ("timeout_s=500ms", f"{S}.timeout_s", "a number, above 0", "did you mean 0.5 (seconds)?"),
    *[(f"dtype={value}", f"{I}.dtype", "one of auto, fp32, bf16, fp16", "auto") for value in ("int8", "float32", "16")],
    ("dtype=bf61", f"{I}.dtype", "one of auto, fp32", "did you mean bf16?"),
    *[(f"max_model_len={value}", f"{I}.max_model_len", COUNT, "auto") for value in ("0", "long", "10.5")],
    *[(f"seed={value}", f"{I}.seed", "an integer, at least 0", "0") for value in ("-1", str(2**63), "dice")],
    *[(f"strict={value}", f"{I}.strict", "true or false", "true") for value in ("1", "very")],
    ("attention.backend=''", f"{I}.attention.backend", "text, not empty", "auto"),
    ("attention.backend=3", f"{I}.attention.backend", "text, not empty", "auto"),
    *[(f"cache.block_size={value}", f"{CACHE}.block_size", SIZE, "auto") for value in ("0", "1025", "16.0", "Auto")],
    *[(f"cache.num_blocks={value}", f"{CACHE}.num_blocks", COUNT, "auto") for value in ("0", "0.5", "many")],
    *[
        (f"cache.memory_limit={value}", f"{CACHE}.memory_limit", "an integer, above 1, or a number", "auto")
        for value in ("0", "1.5", "-3", "most")
    ],
    ("cache.memory_limit=2GiB", f"{CACHE}.memory_limit", "an integer", "did you mean 2147483648 (bytes)?"),
    ("cache.memory_limit=50%", f"{CACHE}.memory_limit", "an integer", "did you mean 0.5"),
    *[
        (f"scheduler.max_num_seqs={value}", f"{SCHEDULER}.max_num_seqs", "an integer, at least 1, at most 65536", "64")
        for value in ("0", "65537", "auto")
    ],
    *[
        (f"scheduler.max_num_batched_tokens={value}", f"{SCHEDULER}.max_num_batched_tokens", "an integer", "2048")
        for value in ("0", "2k")
    ],
    *[
        (f"sampling.temperature={value}", f"{SAMPLING}.temperature", TEMPERATURE, "0.0")
        for value in ("-0.1", "101", ".nan", "hot")
    ],
    *[(f"sampling.top_p={value}", f"{SAMPLING}.top_p", "a number, above 0, at most 1", "1.0") for value in ("0", "2")],
    *[(f"sampling.top_k={value}", f"{SAMPLING}.top_k", "an integer, at least 0", "0") for value in ("-1", "0.5")],
    *[
        (f"sampling.max_new_tokens={value}", f"{SAMPLING}.max_new_tokens", "an integer", "64")
        for value in ("0", "auto")
    ],
    ("sampling.max_new_tokens=9tokens", f"{SAMPLING}.max_new_tokens", "an integer", "did you mean 9 (tokens)?"),
    ("sampling.repetition_penalty=0", f"{SAMPLING}.repetition_penalty", "a number, above 0", "1.0"),
    ("sampling.no_repeat_ngram_size=-1", f"{SAMPLING}.no_repeat_ngram_size", "an integer, at least 0", "0"),
    ("sampling.ignore_eos=no_idea", f"{SAMPLING}.ignore_eos", "true or false", "false"),
    ("prompt.template=none of it", f"{I}.prompt.template", "", "null"),
    ("weights.trust_remote_code=1", f"{I}.weights.trust_remote_code", "true or false", "false"),
    # names
    ("cache.blok_size=1", "cache.blok_size", KNOWN, "inference.cache.block_size"),
    ("block_sise=1", "block_sise", KNOWN, "inference.cache.block_size"),
    ("tpsize=2", "tpsize", KNOWN, "shard.tp_size"),
    ("something=2", "something", KNOWN, "docs/configuration.md"),
    ("cache=3", CACHE, "a group of settings: block_size", "inference.cache.block_size"),
    ("inference=3", I, "a group of settings: attention", "inference."),
    ("cache.block_size", "cache.block_size", "path=value", "--set"),
    ("attention.options.sdpa=1", f"{I}.attention.options.sdpa", "options under the names", "NAME.OPTION"),
    ("attention.options.sdpa.x=1", f"{I}.attention.options.sdpa.x", "left out: attention backend sdpa takes", "remove"),
    (
        "attention.options.spda.x=1",
        f"{I}.attention.options.spda.x",
        "of a plug-in that can be used: unknown attention backend",
        "name",
    ),
    # the model, the ranks, the machine
    ("max_model_len=257", f"{I}.max_model_len", "at most 256, the model's context", "use at most 256"),
    ("tp_size=2", f"{S}.tp_size", "what the ranks and devices of this run allow: tp_size=2", "torchrun"),
    ("tp_size=3", f"{S}.tp_size", "possible for this model: tp_size=3", "use one of 1, 2, 4, 8"),
    ("device=cuda", f"{S}.device", "what the ranks and devices of this run allow", "shard.device='cpu'"),
    ("attention.backend=sdpaa", f"{I}.attention.backend", "possible for this model: unknown", "auto"),
    # accepted, and without effect
    ("sampling.top_k=5", f"{SAMPLING}.top_k", f"{IDLE}sampling.temperature is 0", "inference.strict=false"),
    ("sampling.top_p=0.5", f"{SAMPLING}.top_p", f"{IDLE}sampling.temperature is 0", "a temperature above 0"),
    ("sampling.temperature=1 sampling.top_k=1", f"{SAMPLING}.temperature", f"{IDLE}sampling.top_k is 1", "raise top_k"),
    ("sampling.temperature=1 sampling.top_k=160", f"{SAMPLING}.top_k", f"{IDLE}the model has 160 tokens", "lower it"),
    ("sampling.max_new_tokens=256", f"{SAMPLING}.max_new_tokens", f"{IDLE}max_model_len is 256", "at most 255"),
    ("sampling.ignore_eos=true", f"{SAMPLING}.ignore_eos", f"{IDLE}the model names no end", "remove it"),
    (
        "scheduler.max_num_seqs=4096",
        f"{SCHEDULER}.max_num_seqs",
        f"{IDLE}scheduler.max_num_batched_tokens is 2048",
        "2048",
    ),
    (
        "cache.num_blocks=64 cache.memory_limit=0.5",
        f"{CACHE}.memory_limit",
        f"{IDLE}cache.num_blocks is 64",
        "one of the",
    ),
    ("cache.num_blocks=9 scheduler.max_num_seqs=10", f"{SCHEDULER}.max_num_seqs", f"{IDLE}cache.num_blocks is 9", "9"),
    ("cache.num_blocks=2 max_model_len=40", f"{I}.max_model_len", f"{IDLE}2 blocks of 16 tokens", "at most 33"),
    ("attention.profile=p.json", f"{I}.attention.profile", f"{IDLE}attention.backend is auto", "to tuned"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights: whatever got past the checks would fail on them."""
    path = tmp_path_factory.mktemp("model")
    config = tiny_config("gqa")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def attempt(folder: Path, *sets: str, **sources: object) -> InferenceShardformer:
    """A shardformer that has tried to load."""
    settings = ConfigSources(**{"environ": {}, "sets": sets, **sources})
    shardformer = InferenceShardformer(sources=settings)
    shardformer.from_pretrained(folder)
    return shardformer


def violations(error: InferenceShardformerError) -> dict[str, Violation]:
    assert isinstance(error, ConfigViolations)
    return {violation.path: violation for violation in error.violations}


def test_there_are_enough_cases():
    assert len({case[0] for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize(("settings", "path", "rule", "remedy"), CASES, ids=[case[0] for case in CASES])
def test_a_wrong_configuration_is_refused_before_loading(folder, settings, path, rule, remedy):
    # a second mistake, so that errors with a class of their own are told as violations too
    with pytest.raises(ConfigError) as caught:
        attempt(folder, *settings.split(" ") if "template" not in settings else [settings], "cache.block_siz=1")
    found = violations(caught.value)
    assert set(found) == {path, "cache.block_siz"}
    violation = found[path]
    assert violation.rule.startswith(rule)
    assert violation.rule
    assert remedy in violation.remedy
    assert violation.given
    assert violation.given.startswith((path, "--set"))
    assert str(violation.origin).startswith(("option --set", "default"))
    for text in (violation.given, violation.rule, violation.remedy):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("tp_size=2", EnvironmentMismatchError),
        ("device=cuda", EnvironmentMismatchError),
        ("attention.backend=sdpaa", BackendUnavailableError),
    ],
)
def test_a_single_mistake_keeps_its_own_error(folder, setting, error):
    with pytest.raises(error):
        attempt(folder, setting)


def test_an_impossible_split_and_an_absent_rank_are_told_together(folder):
    with pytest.raises(ConfigViolations) as caught:
        attempt(folder, "tp_size=3")
    rules = [violation.rule for violation in caught.value.violations]
    assert any("this is a single process" in rule for rule in rules)
    assert any("num_attention_heads=8 is not a multiple of 3" in rule for rule in rules)
    assert any(isinstance(violation.error, TensorParallelSizeError) for violation in caught.value.violations)


def test_everything_wrong_is_told_at_once(folder, tmp_path):
    (tmp_path / "a.yaml").write_text("inference:\n  max_model_len: 300\n  cache: {blocksize: 3}\n")
    (tmp_path / "b.toml").write_text("[inference\n")
    with pytest.raises(ConfigViolations) as caught:
        attempt(
            folder,
            "sampling.top_k=4",
            "attention.backend=sdap",
            "attention.options.reference.x=1",
            files=(tmp_path / "a.yaml", tmp_path / "b.toml", tmp_path / "c.json"),
            environ={"INFERENCE_SHARDFORMER_SHARD__TIMEOUT": "3", "INFERENCE_SHARDFORMER_SHARD__TP_SIZE": "x"},
        )
    found = violations(caught.value)
    assert set(found) == {
        "inference.max_model_len",
        "inference.cache.blocksize",
        str(tmp_path / "b.toml"),
        str(tmp_path / "c.json"),
        "INFERENCE_SHARDFORMER_SHARD__TIMEOUT",
        "shard.tp_size",
        "inference.sampling.top_k",
        "inference.attention.backend",
        "inference.attention.options.reference.x",
    }
    assert (
        found["INFERENCE_SHARDFORMER_SHARD__TIMEOUT"].remedy == "did you mean INFERENCE_SHARDFORMER_SHARD__TIMEOUT_S?"
    )
    assert str(found["inference.max_model_len"].origin) == f"file {tmp_path}/a.yaml:2"


IDLE_CASES = [case for case in CASES if case[2].startswith(IDLE)]


@pytest.mark.parametrize("case", IDLE_CASES, ids=[case[0] for case in IDLE_CASES])
def test_permissive_records_one_event_and_goes_on(folder, case, caplog):
    settings, path, rule, _ = case
    shardformer = InferenceShardformer(
        sources=ConfigSources(environ={}, sets=(*settings.split(" "), "strict=false", "dtype=fp32"))
    )
    config = tiny_config("gqa")
    from transformers import LlamaForCausalLM

    with shardformer:
        assert shardformer.events == ()
        shardformer.optimize(LlamaForCausalLM(config))
        matching = [event for event in shardformer.events if event.path == path]
        (event,) = matching
        assert event.code == "ineffective_value"
        assert rule in event.message
        assert isinstance(event, ConfigEvent)
        assert [record.message for record in caplog.records].count(f"{event.message} [{event.code}]") == 1
        assert event.message in str(shardformer.explain())


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("sampling: {top_k: 5, temperature: 0.8}", "sampling.temperature=0"),
        ("cache: {memory_limit: 0.5}", "cache.num_blocks=300"),
        ("scheduler: {max_num_seqs: 100}", "scheduler.max_num_batched_tokens=50"),
    ],
)
def test_overriding_a_value_is_no_mistake(folder, tmp_path, low, high):
    from inference_shardformer import explain

    (tmp_path / "a.yaml").write_text(f"inference:\n  {low}\n")
    sources = ConfigSources(files=(tmp_path / "a.yaml",), sets=(high,), environ={})
    assert explain(folder, sources=sources).events == ()


def test_values_that_say_off_are_never_idle(folder):
    from inference_shardformer import explain

    sets = ("sampling.top_k=0", "sampling.top_p=1.0", "sampling.ignore_eos=false", "sampling.temperature=0", "seed=3")
    assert explain(folder, sources=ConfigSources(sets=sets, environ={})).events == ()


def test_violations_of_the_model_come_with_those_of_the_settings(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ConfigViolations) as caught:
        attempt(tmp_path, "cache.block_size=0")
    assert [violation.path for violation in caught.value.violations] == ["inference.cache.block_size", "model"]


def test_top_k_of_one_leaves_nothing_to_both_of_the_others(folder):
    with pytest.raises(ConfigViolations) as caught:
        attempt(folder, "sampling.temperature=1", "sampling.top_k=1", "sampling.top_p=0.5")
    assert set(violations(caught.value)) == {f"{SAMPLING}.temperature", f"{SAMPLING}.top_p"}
