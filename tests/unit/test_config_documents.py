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


def test_a_document_that_contains_itself_ends(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("inference: &x\n  cache: *x\n")
    assert read_document(str(path)).place("inference.cache") == f"{path}:2"
