"""Configuration files: every format gives the same mapping, and an error names the file."""

from __future__ import annotations

import pytest

from inference_shardformer.config.documents import read_document
from inference_shardformer.errors import ConfigError

YAML = "shard:\n  tp_size: 2\ninference:\n  cache:\n    block_size: 32\n  sampling: {top_p: 5e-1}\n"
JSON = '{\n "shard": {\n\t"tp_size": 2},\n "inference": {"cache": {\n "block_size": 32},\n "sampling": {"top_p": 0.5}}}'
TOML = '[shard]\ntp_size = 2\n[inference]\ncache."block_size" = 32\nsampling = {top_p = 0.5}\n'


@pytest.mark.parametrize(
    ("name", "text", "lines"), [("a.yaml", YAML, (2, 5, 6)), ("a.json", JSON, (3, 5, 6)), ("a.TOML", TOML, (2, 4, 5))]
)
def test_formats_agree_and_know_their_lines(tmp_path, name, text, lines):
    path = tmp_path / name
    path.write_text(text)
    document = read_document(str(path))
    assert document.tree == {
        "shard": {"tp_size": 2},
        "inference": {"cache": {"block_size": 32}, "sampling": {"top_p": 0.5}},
    }
    paths = ("shard.tp_size", "inference.cache.block_size", "inference.sampling.top_p")
    assert [document.place(p) for p in paths] == [f"{path}:{line}" for line in lines]
    assert document.place("nowhere.at.all") == str(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ini", b"x", "unknown format .ini"),
        ("noext", b"x", "(no suffix)"),
        ("a.yaml", b"a: [1", "cannot be parsed"),
        ("a.yaml", b"- 1\n- 2\n", "holds a list, not a mapping"),
        ("a.yaml", b"shard:\n  tp_size: 2\n  tp_size: 4\n", "line 3: shard.tp_size is given a second time"),
        ("a.yaml", b"a: !!python/object:os.system x\n", "cannot be parsed"),
        ("a.yaml", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"{'a': 1}", "cannot be parsed"),
        ("a.json", b'{"a": 1, "a": 2}', "given a second time"),
        ("a.json", b"3", "holds a int"),
        ("a.toml", b"a = \n", "cannot be parsed"),
        ("a.toml", b"a = 1\na = 2\n", "cannot be parsed"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_document(str(path))
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_document(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "inference: &x\n  cache: *x\n",
        "inference:\n  seed: &x [*x]\n",
        "{a: " * 40 + "1" + "}" * 40,
        "[" * 3000 + "]" * 3000,
    ],
    ids=["in itself", "a list in itself", "40 mappings", "3000 lists"],
)
def test_yaml_that_is_nested_too_deeply_is_refused(tmp_path, text):
    refused_as_too_deep(tmp_path / "a.yaml", text)


@pytest.mark.parametrize("levels", [40, 90000])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path, levels):
    refused_as_too_deep(tmp_path / "a.json", '{"a": ' + "[" * levels + "]" * levels + "}")


@pytest.mark.parametrize("levels", [40, 3000])
def test_toml_that_is_nested_too_deeply_is_refused(tmp_path, levels):
    refused_as_too_deep(tmp_path / "a.toml", "a = " + "[" * levels + "]" * levels)


def refused_as_too_deep(path, text):
    path.write_text(text)
    with pytest.raises(ConfigError, match="deeper than any setting, or without end"):
        read_document(str(path))


def test_an_alias_used_many_times_is_not_deep(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("inference:\n  cache: &x {block_size: 8}\n  a: [*x, *x, [*x]]\n")
    assert read_document(str(path)).tree["inference"]["a"][2] == [{"block_size": 8}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "shard:\n  tp_size: 2\n"), ("a.json", '{"shard":\n {"tp_size": 2}}'), ("a.toml", TOML)],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_byte_order_mark_and_line_ends_change_nothing(tmp_path, name, text, newline):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", newline).encode())
    document = read_document(str(path))
    assert document.tree["shard"] == {"tp_size": 2}
    assert document.place("shard.tp_size") == f"{path}:2"


def test_scalars_of_yaml_are_those_of_yaml_1_2(tmp_path):
    """As editors read them, and JSON Schema: `on` is no boolean, 010 is ten, a date and 1:30 are text."""
    path = tmp_path / "a.yaml"
    scalars = "on, off, yes, y, 010, 0o10, 0x10, 1_000, 1:30, 2020-01-01, 1e3, .5, -.inf, ~, null, TRUE, =, 1."
    path.write_text(f"a: [{scalars}]")
    assert read_document(str(path)).tree["a"] == [
        *("on", "off", "yes", "y"),
        *(10, 8, 16, 1000),
        *("1:30", "2020-01-01"),
        *(1000.0, 0.5, float("-inf"), None, None, True, "=", 1.0),
    ]


TOML_OF_MANY_LINES = """
# [no.table]
[inference.prompt]
template = '''
[shard]
foo = 3
'''
next = 1
["inference"."attention".options."a.b"]
list = [ # 1
  [1, 2],
  "x = y",
]
"k = v" = "s"
last = {deep = {er = 1}}
[[tables]]
x = 1
"""


def test_lines_of_toml_are_those_of_its_statements(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(TOML_OF_MANY_LINES)
    options = "inference.attention.options.a.b"
    assert read_document(str(path)).lines == {
        "inference": 9,  # a header names its parents as well
        "inference.prompt": 3,
        "inference.prompt.template": 4,
        "inference.prompt.next": 8,
        "inference.attention": 9,
        "inference.attention.options": 9,
        options: 9,
        f"{options}.list": 10,
        f"{options}.k = v": 14,
        f"{options}.last": 15,
        f"{options}.last.deep": 15,
        f"{options}.last.deep.er": 15,
        "tables": 16,
        "tables.x": 17,
    }


def test_json_that_yaml_could_not_read_is_read(tmp_path):
    """A long key, and characters that YAML forbids; braces, colons and quotes in texts are no syntax."""
    path = tmp_path / "a.json"
    odd, long = "x\x7f\x80{[", "k" * 3000
    last = '"last": {"e":\n 3}'
    path.write_text(f'{{"{odd}": "a\\"b: {{\\\\", "{long}":\n [{{"a": 1}}, {{"a": {{"b":\n 2}}}}],\n {last}}}')
    document = read_document(str(path))
    assert document.tree[odd] == 'a"b: {\\'
    assert document.lines == {odd: 1, long: 1, "last": 4, "last.e": 4}


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
@pytest.mark.parametrize("depth", [1, 12], ids=["shallow", "deep"])
def test_a_key_given_twice_is_found_in_lists_and_at_any_depth(tmp_path, name, depth):
    path = tmp_path / name
    path.write_text('{"a": [' + '{"b": ' * depth + '{"c": 1,\n "c": 1}' + "}" * depth + "]}")
    with pytest.raises(ConfigError, match=r"line 2: c is given a second time \(first on line 1\)"):
        read_document(str(path))
