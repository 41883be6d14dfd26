"""The files that a command line names: prompts and workloads, with everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest

from inference_shardformer.cli.prompts import Prompt, collect_prompts
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.workload import read_workload


def write(tmp_path, text: str | bytes) -> str:
    path = tmp_path / "input"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_prompts_come_first_then_the_lines_of_the_file(tmp_path):
    lines = [
        '{"prompt": "line\\u2028separator \u2028 kept"}',
        "",
        '  {"prompt_token_ids": [0, 7], "max_new_tokens": 3}  ',
    ]
    prompts = collect_prompts(["a", "b"], write(tmp_path, "\r\n".join(lines)))
    separator = "line\u2028separator \u2028 kept"
    assert prompts == [Prompt("a"), Prompt("b"), Prompt(separator), Prompt([0, 7], 3)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list, not an object"),
        ("{}", "needs exactly one of"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "needs exactly one of"),
        ('{"promt": "a"}', "unknown key 'promt', did you mean 'prompt'?"),
        ('{"prompt": "a", "temperature": 1}', "unknown key 'temperature'"),
        ('{"prompt": ""}', '"prompt" is empty'),
        ('{"prompt": 3}', '"prompt" is a int, not text'),
        ('{"prompt": "\\ud800"}', '"prompt" is not valid Unicode at place 0'),
        ('{"prompt_token_ids": []}', '"prompt_token_ids" is empty'),
        ('{"prompt_token_ids": "1 2"}', "is a str, not a list of token ids"),
        ('{"prompt_token_ids": [1, -2]}', "holds -2 at place 1"),
        ('{"prompt_token_ids": [1.0]}', "holds 1.0 at place 0"),
        ('{"prompt_token_ids": [true]}', "holds True at place 0"),
        ('{"prompt": "a", "max_new_tokens": 0}', '"max_new_tokens" is 0'),
        ('{"prompt": "a", "max_new_tokens": true}', '"max_new_tokens" is True'),
        ('{"prompt": "a", "max_new_tokens": null}', '"max_new_tokens" is None'),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, problem):
    name = write(tmp_path, f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(UsageError) as caught:
        collect_prompts([], name)
    assert "line 3: " in caught.value.message
    assert problem in caught.value.message
    assert "1 of 2 lines are malformed" in caught.value.message
    assert "prompt_token_ids" in caught.value.remedy


def test_all_malformed_lines_are_reported_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        collect_prompts(["fine"], write(tmp_path, "{\n" * 120))
    assert "line 1:" in caught.value.message
    assert "line 100:" in caught.value.message
    assert "line 101:" not in caught.value.message
    assert "and 20 more" in caught.value.message


@pytest.mark.parametrize(
    ("texts", "content", "words"),
    [
        ([], None, "no prompt given"),
        ([""], None, "is empty"),
        (["ok", "\udcff"], None, "is not valid Unicode"),
        ([], "\n\n", "holds no prompt"),
        ([], b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_no_usable_prompt(tmp_path, texts, content, words):
    with pytest.raises(UsageError, match=words):
        collect_prompts(texts, None if content is None else write(tmp_path, content))


def test_an_empty_prompt_beside_others_is_left_to_the_engine():
    assert collect_prompts(["", "b"], None) == [Prompt(""), Prompt("b")]


def test_files_that_cannot_be_opened(tmp_path):
    for read in (lambda: collect_prompts([], str(tmp_path / "none")), lambda: read_workload(str(tmp_path))):
        with pytest.raises(UsageError, match="cannot be read"):
            read()


def test_a_workload_and_its_warm_up(tmp_path):
    requests = [{"prompt": [0, 5], "max_new": 2}, {"prompt": [3], "max_new": 4}]
    workload = read_workload(write(tmp_path, json.dumps({"max_running": 2, "requests": requests})))
    assert (workload.max_running, workload.prompts, workload.max_new) == (2, [[0, 5], [3]], [2, 4])
    shifted = workload.shifted()
    assert shifted.prompts == [[1, 0], [4]]
    assert (shifted.max_running, shifted.max_new) == (2, [2, 4])


def test_everything_wrong_with_a_workload_is_reported_at_once(tmp_path):
    content = {
        "max_runing": 1,
        "requests": [{"prompt": [], "max_new": 1}, {"promt": [1], "max_new": 0}, 7, {"prompt": [-1], "max_new": 1}],
    }
    with pytest.raises(UsageError) as caught:
        read_workload(write(tmp_path, json.dumps(content)))
    for words in (
        "did you mean 'max_running'?",
        '"max_running" is None',
        'requests[0]: "prompt" is empty',
        'requests[1]: "prompt" is missing',
        'requests[1]: "max_new" is 0',
        "requests[2]: is a int",
        'requests[3]: "prompt" holds -1',
    ):
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not JSON"), ("[]", "not an object"), ('{"max_running": 1, "requests": []}', "at least one request")],
)
def test_files_that_are_no_workload(tmp_path, content, words):
    with pytest.raises(UsageError, match=words):
        read_workload(write(tmp_path, content))


def test_a_workload_that_is_not_there_is_told_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        read_workload(str(tmp_path / "none.json"))
    assert str(caught.value).count("remedy") == 1
    assert "cannot be read (No such file or directory)" in caught.value.message
