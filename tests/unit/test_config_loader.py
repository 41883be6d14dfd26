"""Layers of configuration: who wins, where it came from, and everything that is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from inference_shardformer.config.calls import call_assignments
from inference_shardformer.config.fields import ROOTS, all_fields, all_groups, full_path, suggest
from inference_shardformer.config.inference import CacheConfig, InferenceConfig
from inference_shardformer.config.loader import MergedConfig, load_config
from inference_shardformer.config.origins import DEFAULT, Level, Origin
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources, Flag
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError

BLOCK = "inference.cache.block_size"
VARIABLE = "INFERENCE_SHARDFORMER_INFERENCE__CACHE__BLOCK_SIZE"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def load(*, inference: InferenceConfig | None = None, **sources) -> MergedConfig:
    """What these sources and no others say."""
    return load_config(ConfigSources(**{"environ": {}, **sources}), inference=inference)


def refused(**sources) -> dict[str, tuple[str, str, str]]:
    """The violations of a load that must fail: path -> origin, rule, remedy."""
    with pytest.raises(ConfigViolations) as caught:
        load(**sources)
    return {item.path: (str(item.origin), item.rule, item.remedy) for item in caught.value.violations}


def test_defaults_alone():
    loaded = load()
    assert loaded.shard == ROOTS["shard"]()
    assert loaded.inference == ROOTS["inference"]()
    assert not loaded.stacks
    assert {loaded.origin(path) for path in all_fields()} == {DEFAULT}


def test_files_are_merged_leaf_by_leaf(tmp_path):
    first = write(tmp_path, "a.yaml", "shard:\n  tp_size: 2\ninference:\n  cache: {block_size: 8, num_blocks: 4}\n")
    second = write(tmp_path, "b.json", '{\n\t"inference": {\n\t\t"cache": {"block_size": 32}}}')
    third = write(tmp_path, "c.toml", '[shard]\ndevice = "cpu"\n\n[inference.sampling]\ntemperature = 1\n')
    loaded = load(files=[first, second, third])
    assert (loaded.shard.tp_size, loaded.shard.device) == (2, "cpu")
    assert (loaded.inference.cache.block_size, loaded.inference.cache.num_blocks) == (32, 4)
    assert loaded.inference.sampling.temperature == 1.0
    origins = {path: str(loaded.origin(path)) for path in loaded.stacks}
    assert origins == {
        "shard.tp_size": f"file {first}:2",
        "inference.cache.num_blocks": f"file {first}:4",
        BLOCK: f"file {second}:3",
        "shard.device": f"file {third}:2",
        "inference.sampling.temperature": f"file {third}:5",
    }


def test_flags_and_last_set_win():
    loaded = load(
        sets=["cache.block_size=8", "inference.cache.block_size=64"],
        flags=[Flag("--tp", "shard.tp_size", "4"), Flag("--dtype", "inference.dtype", "bf16")],
        environ={"INFERENCE_SHARDFORMER_SHARD__TP_SIZE": "2", "UNRELATED": "x"},
    )
    assert (loaded.shard.tp_size, loaded.inference.dtype, loaded.inference.cache.block_size) == (4, "bf16", 64)
    assert str(loaded.origin("shard.tp_size")) == "option --tp"


def test_empty_files_and_groups_assign_nothing(tmp_path):
    files = [write(tmp_path, "a.yaml", "# nothing\n"), write(tmp_path, "b.yaml", "inference:\n  cache:\n")]
    assert load(files=files) == load()


def test_every_violation_of_every_source_at_once(tmp_path):
    name = write(
        tmp_path, "run.yaml", "shard:\n  devise: cpu\ninference:\n  dtype: bf15\n  cache: 3\ncache: {block_size: 1}\n"
    )
    found = refused(
        files=[name],
        environ={"INFERENCE_SHARDFORMER_SHARD__TP_SIZ": "2", "INFERENCE_SHARDFORMER_INFERENCE__SEED": "-1"},
        sets=["scheduler.max_num_seqs=2GiB", "no_equals", "attention=sdpa", "sampling.top_q=1", "shard.tp_size=2"],
        flags=[Flag("--temperature", "inference.sampling.temperature", "nan"), Flag("--tp", "shard.tp_size", "2")],
    )
    assert found["shard.devise"] == (f"file {name}:2", "the name of a known setting", "did you mean shard.device?")
    assert found["inference.dtype"][:2] == (f"file {name}:4", "one of auto, fp32, bf16, fp16")
    assert found["inference.dtype"][2].startswith("did you mean bf16?")
    assert (
        found["inference.cache"][1]
        == "a group of settings: block_size, dtype, memory_limit, num_blocks, prefix_caching"
    )
    assert found["cache"] == (f"file {name}:6", "the name of a known setting", "did you mean inference.cache?")
    assert "INFERENCE_SHARDFORMER_SHARD__TP_SIZE?" in found["INFERENCE_SHARDFORMER_SHARD__TP_SIZ"][2]
    assert found["inference.seed"][0] == "variable INFERENCE_SHARDFORMER_INFERENCE__SEED"
    assert found["inference.scheduler.max_num_seqs"][1] == "an integer, at least 1, at most 65536"
    assert found["no_equals"][1] == "path=value"
    assert found["inference.attention"][1] == "a group of settings: backend, options, profile"
    assert found["sampling.top_q"][2] == "did you mean inference.sampling.top_p?"
    assert found["inference.sampling.temperature"][0] == "option --temperature"
    assert found["shard.tp_size"][1] == "given once on the command line, and --tp gives it too"
    assert len(found) == 12


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("shard.tp_size", ["0", "-1", "1.5", "true", "two", '"2"', "null", "", "[1]"]),
        ("shard.device", ["gpu", "0", "null"]),
        ("shard.timeout_s", ["0", "-1", "1e9", "nan", "true", "soon"]),
        ("inference.cache.block_size", ["0", "1025", "16.0", "false"]),
        ("inference.cache.memory_limit", ["0", "1.5", "-3", "2GiB", "true"]),
        ("inference.sampling.temperature", ["-0.1", "inf", ".nan", "101", "hot", "false"]),
        ("inference.sampling.top_p", ["0", "1.01", "nan"]),
        ("inference.sampling.top_k", ["-1", "2.0"]),
        ("inference.sampling.max_new_tokens", ["0", "many"]),
        ("inference.seed", ["-1", str(2**63)]),
        ("inference.weights.trust_remote_code", ["1", "maybe"]),
        ("inference.attention.backend", ['""', "1", "null"]),
    ],
)
def test_values_that_break_a_rule(path, texts):
    for text in texts:
        found = refused(sets=[f"{path}={text}"])
        assert found[path][1] == all_fields()[path].rule, text
        assert "default" in found[path][2]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("shard.tp_size", "auto", "auto"),
        ("shard.timeout_s", "1e2", 100.0),
        ("inference.cache.memory_limit", "0.5", 0.5),
        ("inference.cache.memory_limit", "auto", "auto"),
        ("inference.cache.memory_limit", "1_000_000", 1_000_000),
        ("inference.sampling.temperature", "1", 1.0),
        ("inference.weights.trust_remote_code", "true", True),
        ("inference.attention.backend", "sdpa", "sdpa"),
    ],
)
def test_values_that_are_read_from_text(path, text, value):
    loaded = load(sets=[f"{path}={text}"])
    found = {"shard": loaded.shard, "inference": loaded.inference}
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_text_of_violations_names_value_origin_rule_and_remedy():
    with pytest.raises(ConfigError) as caught:
        load(sets=["cache.block_size=0", "dtype=int8"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 configuration values were refused"
    block = lines.index(f"  {BLOCK} = 0")
    assert [line.split(":")[0].strip() for line in lines[block + 1 : block + 4]] == ["from", "rule", "remedy"]
    assert caught.value.exit_code == 2
    assert "at most 1024" in caught.value.message
    assert f"{BLOCK}: change it there" in caught.value.remedy


def test_short_paths_have_one_meaning():
    tops = [set(model.model_fields) for model in ROOTS.values()]
    for one, other in itertools.combinations(tops, 2):
        assert not one & other
    assert not set().union(*tops) & set(ROOTS)
    for path in all_fields():
        assert full_path(path.partition(".")[2]) == path
        assert full_path(path) == path
        assert suggest(f"{path}x") == path
    assert {"shard", "inference", "inference.cache"} <= all_groups()
    assert suggest("zzzzzz") == ""


def test_what_a_call_gave_is_known():
    shard = ShardConfig(tp_size=2)
    inference = InferenceConfig(dtype="bf16", attention={"backend": "auto"}, cache=CacheConfig(block_size=16))
    given = {path: (value, origin) for path, value, origin in call_assignments(shard, inference)}
    values = {"shard.tp_size": 2, "inference.dtype": "bf16", "inference.attention.backend": "auto", BLOCK: 16}
    assert given == {path: (value, Origin(Level.CALL)) for path, value in values.items()}
    assert not list(call_assignments(ShardConfig(), InferenceConfig()))


def test_what_is_beaten_is_kept_in_order(tmp_path):
    texts = [f"inference: {{cache: {{block_size: {size}}}}}" for size in (1, 2)]
    files = tuple(write(tmp_path, f"{i}.yaml", text) for i, text in enumerate(texts))
    called = InferenceConfig(cache={"block_size": 5})
    loaded = load(files=files, environ={VARIABLE: "3"}, sets=("cache.block_size=4",), inference=called)
    assert loaded.inference.cache.block_size == 5
    assert loaded.origin(BLOCK) == Origin(Level.CALL)
    assert [item.value for item in loaded.beaten(BLOCK)] == [4, 3, 2, 1, "auto"]
    assert str(loaded.beaten(BLOCK)[3].origin) == f"file {files[0]}:1"
    assert loaded.beaten("inference.seed") == ()


def test_the_environment_is_read_unless_it_is_given(monkeypatch):
    monkeypatch.setenv(VARIABLE, "7")
    assert load_config().inference.cache.block_size == 7
    assert load().inference.cache.block_size == "auto"


def test_files_may_name_their_schema_version(tmp_path):
    good = write(tmp_path, "a.yaml", "schema_version: 1\nshard: {tp_size: 2}\n")
    assert load(files=[good]).shard.tp_size == 2
    new = write(tmp_path, "b.yaml", "# later\nschema_version: 99\nshard: {tp_size: 2}\n")
    with pytest.raises(ConfigError, match="needs a newer version"):
        load(files=[new])
    found = refused(files=[new, write(tmp_path, "c.yaml", "shard: {tp_siz: 2}")])
    assert found[f"{new}:2"][0] == f"file {new}:2"


def test_options_of_plug_ins_are_merged_leaf_by_leaf(tmp_path):
    name = write(
        tmp_path, "a.yaml", "inference:\n  attention:\n    options:\n      toy: {tile: 4, deep: {er: [1, 2]}}\n"
    )
    variable = "INFERENCE_SHARDFORMER_INFERENCE__ATTENTION__OPTIONS__TOY__SPLIT"
    called = InferenceConfig(attention={"options": {"toy": {"called": True}}})
    loaded = load(files=[name], environ={variable: "3"}, sets=["attention.options.toy.tile=8"], inference=called)
    options = loaded.inference.attention.options
    assert options == {"toy": {"tile": 8, "deep": {"er": (1, 2)}, "split": 3, "called": True}}
    assert hash(loaded.inference) == hash(loaded.inference.model_copy())
    tile = "inference.attention.options.toy.tile"
    assert str(loaded.origin(tile)) == "option --set attention.options.toy.tile=8"
    assert [item.value for item in loaded.beaten(tile)] == [4]


@pytest.mark.parametrize("text", ["attention.options=3", "attention.options.toy=3", "attention.options.toy.=3"])
def test_an_option_needs_the_name_of_its_plug_in(text):
    (violation,) = refused(sets=[text]).values()
    assert violation[1] == "options under the names of their plug-ins"
    assert "inference.attention.options.NAME.OPTION" in violation[2]


TEMPLATE = "inference.prompt.template"


@pytest.mark.parametrize(
    "text",
    [
        "### Human: {input_text} ### Assistant:",
        "Q: {input_text}",
        "{input_text}",
        "- {input_text}",
        "[INST]{input_text}[/INST]",
        " <s> {input_text}\n",
        "&a {input_text}",
        "'{input_text}",
    ],
)
@pytest.mark.parametrize("way", ["set", "variable"])
def test_a_text_setting_takes_the_text_as_it_is(text, way):
    variable = all_fields()[TEMPLATE].variable
    sources = {"sets": [f"prompt.template={text}"]} if way == "set" else {"environ": {variable: text}}
    assert load(**sources).inference.prompt.template == text


def test_quotes_around_a_text_are_those_of_yaml():
    assert load(sets=[r'prompt.template="{input_text}\n"']).inference.prompt.template == "{input_text}\n"
    assert load(sets=["prompt.template=' {input_text}'"]).inference.prompt.template == " {input_text}"
    assert load(sets=["attention.profile='123'"]).inference.attention.profile == "123"


@pytest.mark.parametrize("nothing", ["", " ", "~", "null"])
def test_a_text_that_may_be_left_out_is_left_out(nothing):
    assert load(sets=[f"attention.profile={nothing}"]).inference.attention.profile is None


@pytest.mark.parametrize("path", ["shard.tp_size", "inference.attention.backend", "inference.strict"])
def test_an_empty_variable_is_shown_as_one(path):
    variable = all_fields()[path].variable
    with pytest.raises(ConfigViolations, match=f"{path} = ''\n    from:   variable {variable}"):
        load(environ={variable: ""})


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_words_that_yaml_1_1_took_for_booleans(tmp_path, word):
    file = write(tmp_path, "a.yaml", f"inference:\n  scheduler: {{overlap: {word}}}\n")
    variable = all_fields()["inference.scheduler.overlap"].variable
    for sources in ({"sets": [f"scheduler.overlap={word}"]}, {"files": [file]}, {"environ": {variable: word}}):
        assert load(**sources).inference.scheduler.overlap == word


def test_one_spelling_of_a_path_in_a_file(tmp_path):
    file = write(tmp_path, "a.yaml", "inference:\n  cache.block_size: 16\n  cache:\n    block_size: 32\n")
    (found,) = refused(files=[file]).items()
    assert found == (
        BLOCK,
        (f"file {file}:4", "given once in a file, and it is given twice", "drop one of the two spellings"),
    )


def test_lines_below_a_merge_key_are_those_of_the_keys(tmp_path):
    file = write(
        tmp_path, "a.yaml", "inference:\n  cache: &a {num_blocks: 2}\n  scheduler:\n    <<: *a\n    overlap: 1\n"
    )
    origins = {path: origin for path, (origin, *_) in refused(files=[file]).items()}
    assert origins["inference.scheduler.overlap"] == f"file {file}:5"
    assert set(origins) == {"inference.scheduler.num_blocks", "inference.scheduler.overlap"}


def test_an_option_that_is_no_value_of_a_configuration_is_told_with_its_path(tmp_path):
    file = write(tmp_path, "a.toml", "[inference.attention.options.toy]\nday = 2020-01-01\n")
    (found,) = refused(files=[file]).items()
    path, (origin, rule, remedy) = found
    assert (path, origin) == ("inference.attention.options.toy.day", f"file {file}:2")
    assert rule.endswith("not a date")
    assert "in quotes" in remedy


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("SHARD.TP_SIZE", "did you mean shard.tp_size?"),
        ("shard.world", "remove it; shard has all_reduce, device, policy, threads_per_rank, timeout_s, tp_size"),
        ("inference.prompt.foo", "remove it; inference.prompt has template"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest_or_by_its_neighbours(name, remedy):
    assert refused(sets=[f"{name}=1"])[name][2] == remedy


def test_the_prefix_of_variables_is_no_likeness():
    name = "INFERENCE_SHARDFORMER_CONFIG"
    assert refused(environ={name: "x"})[name][2].startswith("remove it")
    lower = "INFERENCE_SHARDFORMER_shard__tp_size"
    assert refused(environ={lower: "2"})[lower][2] == "did you mean INFERENCE_SHARDFORMER_SHARD__TP_SIZE?"
