"""The server as clients meet it: real processes, ranks and connections, the texts of Hugging Face."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

import openai
from servers import COMMAND, Server, served, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference_shardformer.cli.models import resolve_model

PROMPTS = ["def fibonacci(n):", "class Stack:", "import os\n", "for i in range("]
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}def{% endif %}"
)
MESSAGES = [{"role": "system", "content": "a stack"}, {"role": "user", "content": "write it"}]
CHAT_PROMPT = "# system: a stack\n# user: write it\ndef"
NUM_TOKENS = 24
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What Hugging Face continues a prompt with; greedy, in the type of the weights."""
    folder = resolve_model("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    texts = {}
    for prompt in [*PROMPTS, CHAT_PROMPT]:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        texts[prompt] = tokenizer.decode(output, skip_special_tokens=True)
    return texts


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def server(request, tmp_path_factory):
    """One server for the module; it idles longer than ranks wait for each other before the first test begins."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "chat.jinja").write_text(TEMPLATE)
    options = ["--model", "demo", "--tp", request.param, "--dtype", "fp32", "--chat-template", "chat.jinja"]
    limits = ["--max-num-seqs", 4, "--max-queue", 6, "--set", "shard.timeout_s=2.0"]
    with served(folder, *options, *limits, "--served-model-name", "demo", "--served-model-name", "two") as server:
        time.sleep(3.0)
        yield server


def complete(server: Server, prompt: object, **more: object) -> dict:
    status, answer = server.post(
        "/v1/completions", **{"model": "demo", "prompt": prompt, "max_tokens": NUM_TOKENS, **more}
    )
    assert status == 200, answer
    return answer


def test_completions_are_those_of_hugging_face_streamed_or_not(server, expected):
    answer = complete(server, PROMPTS)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [expected[prompt] for prompt in PROMPTS]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]

    options = {"model": "two", "prompt": PROMPTS, "max_tokens": NUM_TOKENS}
    events = server.events("/v1/completions", **options, stream_options={"include_usage": True})
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == answer["usage"]
    streamed, ends = ["", "", "", ""], {}
    for event in events[:-1]:
        assert event["usage"] is None
        (choice,) = event["choices"]
        assert choice["index"] not in ends
        streamed[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert streamed == texts
    assert ends == {choice["index"]: choice["finish_reason"] for choice in answer["choices"]}
    assert len(events) > NUM_TOKENS


def test_chat_goes_through_the_template(server, expected):
    options = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": NUM_TOKENS}
    status, answer = server.post("/v1/chat/completions", **options)
    assert status == 200, answer
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected[CHAT_PROMPT], "refusal": None}
    first, *events = server.events("/v1/chat/completions", **options)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected[CHAT_PROMPT]
    assert events[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]


def test_the_openai_client_understands_it(server, expected):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo", "two"]
        one = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=NUM_TOKENS)
        assert one.choices[0].text == expected[PROMPTS[0]]
        pieces = client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=NUM_TOKENS, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(pieces)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[CHAT_PROMPT]
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
        scored = client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, logit_bias={"5": -100}
        )
        for token in scored.choices[0].logprobs.content:
            assert token.logprob <= 0
            assert [token.token, token.logprob] == [token.top_logprobs[0].token, token.top_logprobs[0].logprob]
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", prompt="x", n=2)
        assert (caught.value.param, caught.value.code) == ("n", "unsupported_field")
        with pytest.raises(openai.NotFoundError, match="demo, two"):
            client.completions.create(model="gpt", prompt="x")


def test_sampling_of_requests_is_theirs_alone(server, expected):
    """Concurrent clients of all kinds; a seed gives the same text alone and in company."""
    alone = complete(server, PROMPTS[1], temperature=0.8, seed=7, top_k=50)
    jobs = [
        lambda: complete(server, PROMPTS[0]),
        lambda: complete(server, PROMPTS[1], temperature=0.8, seed=7, top_k=50),
        lambda: server.post("/v1/completions", model="demo", prompt="x", temperature=-1),
        lambda: complete(server, PROMPTS[2], temperature=1.5, repetition_penalty=1.3),
        lambda: server.post("/v1/completions", model="demo", prompt=[99999]),
        lambda: complete(server, PROMPTS[3]),
        lambda: server.request("POST", "/v1/completions", b"{"),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        greedy, seeded, bad, _, foreign, other, broken = [
            future.result() for future in [pool.submit(job) for job in jobs]
        ]
    assert greedy["choices"][0]["text"] == expected[PROMPTS[0]]
    assert other["choices"][0]["text"] == expected[PROMPTS[3]]
    assert seeded["choices"] == alone["choices"]
    assert [bad[0], foreign[0], broken[0]] == [400] * 3
    assert bad[1]["error"]["param"] == "temperature"
    assert "99999" in foreign[1]["error"]["message"]


def test_stop_text_and_token_ids_as_prompt(server, expected):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    whole = expected[PROMPTS[0]]
    answer = complete(server, tokenizer.encode(PROMPTS[0]), stop=[whole[10:13]])
    assert answer["choices"][0]["text"] == whole[: whole.index(whole[10:13])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert complete(server, [tokenizer.encode(p) for p in PROMPTS[:2]])["choices"][1]["text"] == expected[PROMPTS[1]]


def test_what_cannot_fit_is_refused(server):
    status, answer = server.post("/v1/completions", model="demo", prompt="x " * 3000)
    assert status == 400
    assert answer["error"]["param"] == "prompt"
    assert "max_model_len=1024" in answer["error"]["message"]
    status, answer = server.post("/v1/completions", model="demo", prompt=["x"] * 11)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    until(lambda: server.metric("requests_running") == 0)


def test_a_client_that_leaves_ends_its_request(server):
    before = server.metric("requests_total", finish_reason="abort")
    for stream in (True, False):
        body = {"model": "demo", "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
        content = json.dumps(body).encode()
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content))
            connection.sendall(content)
            until(lambda: server.metric("requests_running") == 1)
        until(lambda: server.metric("requests_running") == 0)
    assert server.metric("requests_total", finish_reason="abort") == before + 2
    until(lambda: server.metric("cache_blocks_free") == server.metric("cache_blocks"))


def test_health_models_explanation_and_unknown_routes(server):
    assert server.get("/health") == (200, {"status": "ready"})
    status, models = server.get("/v1/models/two")
    assert (status, models["id"]) == (200, "two")
    assert server.get("/v1/models/three")[0] == 404
    status, explanation = server.get("/explain")
    decided = explanation["model"]
    assert (status, decided["architecture"]) == (200, "LlamaForCausalLM")
    assert "shard.timeout_s" in server.request("GET", "/explain?format=text")[1].decode()
    status, answer = server.get("/v1/completions")
    assert (status, answer["error"]["code"]) == (405, "unknown_route")
    assert server.get("/nothing")[0] == 404


def test_metrics_count(server):
    server_before = {name: server.metric(name) for name in ("prompt_tokens_total", "generated_tokens_total")}
    first = server.metric("time_to_first_token_seconds_count")
    following = server.metric("time_per_output_token_seconds_count")
    cost = complete(server, PROMPTS, ignore_eos=True)["usage"]
    assert server.metric("prompt_tokens_total") == server_before["prompt_tokens_total"] + cost["prompt_tokens"]
    assert server.metric("generated_tokens_total") == server_before["generated_tokens_total"] + 4 * NUM_TOKENS
    assert server.metric("time_to_first_token_seconds_count") == first + 4
    assert server.metric("time_per_output_token_seconds_count") == following + 4 * (NUM_TOKENS - 1)


def test_a_killed_rank_is_named_and_ends_the_server(tmp_path):
    with served(tmp_path, "--model", "demo", "--tp", 2) as server, ThreadPoolExecutor(2) as pool:
        long = {"model": "demo", "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
        whole = pool.submit(server.post, "/v1/completions", **long)
        streamed = pool.submit(server.request, "POST", "/v1/completions", {**long, "stream": True})
        until(lambda: server.metric("requests_running") == 2)
        ranks = server.ranks()
        began = time.monotonic()
        ranks[1].kill()
        status, answer = whole.result()
        assert (status, answer["error"]["code"]) == (503, "rank_failure")
        assert "rank 1 failed during" in answer["error"]["message"]
        last = streamed.result()[1].decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == answer["error"]["message"]
        status, health = server.get("/health")
        assert (status, health["status"]) == (503, "failed")
        assert health["error"]["message"] == answer["error"]["message"]
        assert server.process.wait(timeout=20) == 4
        assert time.monotonic() - began < 15
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        log = server.log.read_text()
        assert log.count("error: ") == 1
        assert "Traceback" not in log


@pytest.mark.parametrize(
    ("tp", "number", "code"), [(1, signal.SIGTERM, 0), (2, signal.SIGTERM, 0), (2, signal.SIGINT, 130)]
)
def test_a_signal_lets_requests_finish_and_ends_all_ranks(tmp_path, tp, number, code):
    with served(tmp_path, "--model", "demo", "--tp", tp, "--grace", 20) as server, ThreadPoolExecutor(1) as pool:
        body = {"model": "demo", "prompt": "def f", "max_tokens": 300, "ignore_eos": True}
        running = pool.submit(server.post, "/v1/completions", **body)
        until(lambda: server.metric("requests_running") == 1)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(number)
        status, answer = running.result()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 300)
        assert server.process.wait(timeout=30) == code, server.log.read_text()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        assert "Traceback" not in server.log.read_text()


def test_requests_beyond_the_grace_are_told_so(tmp_path):
    with served(tmp_path, "--model", "demo", "--grace", 0) as server, ThreadPoolExecutor(1) as pool:
        body = {"model": "demo", "prompt": "def f", "max_tokens": 1000, "ignore_eos": True}
        running = pool.submit(server.post, "/v1/completions", **body)
        until(lambda: server.metric("requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        status, answer = running.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")
        assert server.process.wait(timeout=30) == 0


def test_keys_and_torchrun(tmp_path):
    (tmp_path / "keys").write_text("secret\n\nother\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "scripts" / "serve.py")]
    with served(tmp_path, "--model", "demo", "--api-key-file", "keys", command=command) as server:
        body = {"model": "demo", "prompt": "x", "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            status, answer = server.request("POST", "/v1/completions", body, **headers)
            assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
        assert server.request("GET", "/explain")[0] == 401
        assert server.request("POST", "/v1/completions", body, Authorization="Bearer other")[0] == 200
        assert server.request("GET", "/health")[0] == 200
        ranks = server.ranks()
        assert len(ranks) == 2
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=40)
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        assert "stopped    by SIGTERM" in server.log.read_text()


def test_an_address_in_use_is_refused_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "serve", "--model", "demo", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 3
    assert f"--port {port}" in done.stderr
    assert "model" not in done.stderr.split("error:")[0]
