"""Seven levels against an oracle: over random assignments, the value, its origin and what it beat are the oracle's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.loader import gather, load_config, merge_layers
from inference_shardformer.config.origins import Level
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources, Flag
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.resolving.presets import with_preset
from inference_shardformer.resolving.resolution import Choices, Decided, HostFacts, resolve

# Every kind of field, with its default and values that no "auto" decides anew. Values are unlike each other.
FIELDS: dict[str, tuple[object, list[object]]] = {
    "shard.timeout_s": (30.0, [1.5, 20.0, 3600.0]),
    "inference.dtype": ("auto", ["fp32", "bf16", "fp16"]),
    "inference.seed": (0, [1, 7, 2**40]),
    "inference.strict": (True, [False, True]),
    "inference.cache.block_size": ("auto", [1, 8, 1024]),
    "inference.scheduler.max_num_seqs": (64, [1, 2, 65536]),
    "inference.sampling.temperature": (0.0, [0.5, 1.0, 100.0]),
    "inference.sampling.top_p": (1.0, [0.1, 0.9]),
    "inference.sampling.max_new_tokens": (64, [1, 5, 10**6]),
    "inference.weights.trust_remote_code": (False, [True, False]),
}
DECIDED = {"inference.dtype": "fp32", "inference.cache.block_size": 16}  # what "auto" becomes
FLAGS = {"inference.dtype": "--dtype", "inference.seed": "--seed", "inference.sampling.top_p": "--top-p"}
NOT_PRESET = ("shard.", "inference.weights.", "inference.strict")
LEVELS = ("preset", "file 0", "file 1", "variable", "command line", "call")
REQUEST = ("temperature", "top_p", "max_new_tokens")
FACTS = LlamaPolicy().facts(tiny_config("gqa"))
HOST = HostFacts(1, 1, "cpu", "a test")

assignments = st.dictionaries(
    st.tuples(st.sampled_from(LEVELS), st.sampled_from(list(FIELDS))).filter(
        lambda key: key[0] != "preset" or not key[1].startswith(NOT_PRESET)
    ),
    st.integers(0, 2),
    max_size=24,
)


class Folder:
    """Two files, in JSON and TOML by turns; each line of TOML holds one setting."""

    def __init__(self, path: Path) -> None:
        self.names = (str(path / "first.json"), str(path / "second.toml"))

    def write(self, given: dict[str, dict[str, object]]) -> None:
        Path(self.names[0]).write_text(json.dumps(_tree(given["file 0"]), indent=1))
        lines = [f"{path} = {json.dumps(value)}" for path, value in given["file 1"].items()]
        Path(self.names[1]).write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("levels"))


def _tree(flat: dict[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree


def _origin(level: str, path: str, value: object, folder: Folder, given: dict[str, dict[str, object]]) -> str:
    """The oracle of origins: what a user would answer to "where did I write that?"."""
    if level == "preset":
        return "preset Preset"
    if level == "file 0":
        text = Path(folder.names[0]).read_text().splitlines()
        name = f'"{path.rpartition(".")[2]}"'
        (line,) = (number for number, row in enumerate(text, 1) if row.strip().startswith(name))
        return f"file {folder.names[0]}:{line}"
    if level == "file 1":
        return f"file {folder.names[1]}:{list(given['file 1']).index(path) + 1}"
    if level == "variable":
        return f"variable INFERENCE_SHARDFORMER_{path.replace('.', '__').upper()}"
    if level == "command line":
        return f"option {FLAGS.get(path, f'--set {path}={json.dumps(value)}')}"
    return "call argument"


def _resolved(given: dict[str, dict[str, object]], folder: Folder):
    class Preset(LlamaPolicy):
        def preset(self, facts):
            return given["preset"]

    line = given["command line"]
    sources = ConfigSources(
        files=folder.names,
        environ={
            f"INFERENCE_SHARDFORMER_{p.replace('.', '__').upper()}": json.dumps(v) for p, v in given["variable"].items()
        },
        sets=tuple(f"{path}={json.dumps(value)}" for path, value in line.items() if path not in FLAGS),
        flags=tuple(Flag(FLAGS[path], path, json.dumps(value)) for path, value in line.items() if path in FLAGS),
    )
    called = _tree(given["call"])
    shard, inference = ShardConfig(**called.get("shard", {})), InferenceConfig(**called.get("inference", {}))
    merged = merge_layers(with_preset(gather(sources, shard, inference), Preset(), FACTS))
    assert merged.violations == ()
    return resolve(merged, facts=FACTS, host=HOST, choices=Choices(Decided("sdpa", "a test")))


@given(drawn=assignments, request_values=st.dictionaries(st.sampled_from(REQUEST), st.integers(0, 1)))
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_value_origin_and_what_was_beaten_equal_the_oracle(folder, drawn, request_values):
    given_at: dict[str, dict[str, object]] = {level: {} for level in LEVELS}
    for (level, path), choice in drawn.items():
        values = FIELDS[path][1]
        given_at[level][path] = values[choice % len(values)]
    folder.write(given_at)
    config = _resolved(given_at, folder)
    for path, (default, _) in FIELDS.items():
        said = [
            (given_at[level][path], _origin(level, path, given_at[level][path], folder, given_at))
            for level in reversed(LEVELS)
            if path in given_at[level]
        ]
        expected = [*said, (default, "default")]
        decision = config.decision(path)
        found = [(decision.value, str(decision.origin)), *((item.value, str(item.origin)) for item in decision.beaten)]
        if default == "auto" and not said:
            assert decision.value == DECIDED[path]
            continue
        assert found == expected, path
        assert [type(value) for value, _ in found] == [type(value) for value, _ in expected], path

    defaults = config.inference.sampling
    brought = {name: FIELDS[f"inference.sampling.{name}"][1][choice] for name, choice in request_values.items()}
    final = SamplingParams(**brought).resolve(defaults)
    for name in REQUEST:
        assert getattr(final, name) == brought.get(name, config.decision(f"inference.sampling.{name}").value)


def test_levels_are_ordered_as_documented():
    order = ["DEFAULT", "PRESET", "FILE", "ENVIRONMENT", "CLI", "CALL", "UPDATE", "REQUEST"]
    assert [level.name for level in sorted(Level)] == order


@pytest.mark.parametrize(
    ("preset", "rule"),
    [
        ({"shard.tp_size": 2}, "left out of a preset"),
        ({"weights.trust_remote_code": True}, "left out of a preset"),
        ({"inference.strict": False}, "left out of a preset"),
        ({"cache.blok_size": 3}, "the name of a known setting"),
        ({"attention.options": 3}, "options under the names of their plug-ins"),
        ({"cache.block_size": 0}, "an integer, at least 1"),
    ],
)
def test_a_preset_that_oversteps_is_refused(preset, rule):
    class Preset(LlamaPolicy):
        def preset(self, facts):
            return preset

    merged = merge_layers(with_preset(gather(ConfigSources(environ={})), Preset(), FACTS))
    (violation,) = merged.violations
    assert violation.rule.startswith(rule)
    assert str(violation.origin) == "preset Preset"


def test_presets_are_empty_unless_a_policy_says_so():
    assert LlamaPolicy().preset(FACTS) == {}


@pytest.mark.parametrize("word", ["on", "off"])
@pytest.mark.parametrize("setting", ["scheduler.overlap", "cache.prefix_caching"])
def test_on_and_off_are_words_wherever_they_are_written(setting: str, word: str, tmp_path: Path) -> None:
    group, name = setting.split(".")
    (tmp_path / "run.yaml").write_text(f"inference:\n  {group}:\n    {name}: {word}\n")
    variable = f"INFERENCE_SHARDFORMER_INFERENCE__{group}__{name}".upper()
    for sources in (
        ConfigSources(environ={}, sets=(f"{setting}={word}",)),
        ConfigSources(environ={}, files=(tmp_path / "run.yaml",)),
        ConfigSources(environ={variable: word}),
    ):
        assert getattr(getattr(load_config(sources).inference, group), name) == word
