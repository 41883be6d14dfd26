"""The application in this process over a tiny engine: answers, events, clients that leave, and failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from asgi_client import Answered, call

from inference_shardformer import AsyncEngine, SamplingParams
from inference_shardformer.serving import body as body_module
from inference_shardformer.serving import server as server_module
from inference_shardformer.serving.app import build_app
from inference_shardformer.serving.chat_template import ChatTemplate
from inference_shardformer.serving.formats import ChatFormat, Text
from inference_shardformer.serving.metrics import Metrics
from inference_shardformer.serving.service import Service
from inference_shardformer.serving.token_texts import TokenTexts

SOON_S = 20.0
LETTERS = range(97, 123)


class App:
    """The application with its engine, and the calls of a test."""

    def __init__(self, engine: object, *, max_queue: int = 256, api_keys: tuple[str, ...] = ()) -> None:
        self.engine = engine
        self.metrics = Metrics(num_blocks=engine.kv_cache.num_blocks)
        self.async_engine = AsyncEngine(engine, max_queue=max_queue, on_step=self.metrics.note_step)
        self.asgi = build_app(
            Service(
                engine=self.async_engine,
                models=("m",),
                template=ChatTemplate(None),
                tokens=TokenTexts(engine.tokenizer),
                metrics=self.metrics,
                explain=lambda: ({"decided": 1}, "decided: 1"),
                api_keys=api_keys,
            )
        )

    async def get(self, path: str, **headers: str) -> Answered:
        return await call(self.asgi, "GET", path, headers=headers)

    async def complete(self, *, leave_after: int | None = None, **fields: object) -> Answered:
        body = {"model": "m", "prompt": [1, 2], **fields}
        return await call(self.asgi, "POST", "/v1/completions", body, leave_after=leave_after)

    async def metric(self, line: str) -> float:
        text = b"".join((await self.get("/metrics")).bodies).decode()
        (found,) = [each for each in text.splitlines() if each.startswith(f"inference_shardformer_{line} ")]
        return float(found.rpartition(" ")[2])


def run(app: App, use: Callable[[App], Awaitable[None]]) -> None:
    async def main() -> None:
        async with app.async_engine:
            await use(app)

    asyncio.run(asyncio.wait_for(main(), SOON_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_text_with_line_breaks_and_foreign_letters_is_one_event_each(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=[0xE6, 0x97, 0xA5, 10, 13, 34, 97])
    (expected,) = setup.engine().generate([[1, 2]])

    async def use(app: App) -> None:
        streamed = await app.complete(stream=True)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in streamed.headers
        *events, done = streamed.events
        assert done == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert "".join(choice["text"] for choice in choices) == expected.text
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert all(choice["text"] for choice in choices[:-1])
        assert (await app.complete()).content["choices"][0]["text"] == expected.text

    run(App(setup.engine()), use)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [[[1, 2]], [[1, 2], [3], [4, 5, 6]]], ids=["one", "three"])
def test_a_client_that_leaves_ends_all_it_asked_for(tiny: SimpleNamespace, stream: bool, prompts: list) -> None:
    engine = tiny.Setup(max_model_len=4000, num_blocks=2000, alphabet=LETTERS).engine()

    async def use(app: App) -> None:
        answered = await app.complete(prompt=prompts, max_tokens=1000, stream=stream, leave_after=5 if stream else 0)
        assert len(answered.bodies) < 20
        await until(lambda: app.async_engine.num_unfinished == 0)
        assert await app.metric('requests_total{finish_reason="abort"}') == len(prompts)
        assert (await app.complete(max_tokens=3)).status == 200

    run(App(engine), use)
    tiny.assert_all_free(engine)


def test_an_error_in_the_midst_of_a_stream_is_its_last_event(tiny: SimpleNamespace) -> None:
    whole = tiny.Setup(alphabet=LETTERS).greedy([1, 2], 16)
    poison = next(token for token in whole[3:] if token not in whole[:3])
    engine = tiny.Setup(alphabet=LETTERS, poison=poison).engine()

    async def use(app: App) -> None:
        *pieces, last = (await app.complete(stream=True)).events
        assert (
            "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces).encode().startswith(bytes(whole[:3]))
        )
        error = json.loads(last)["error"]
        assert (error["code"], error["type"]) == ("request", "invalid_request_error")
        assert "not finite" in error["message"]
        answered = await app.complete()
        assert (answered.status, answered.content["error"]["code"]) == (400, "request")
        assert await app.metric('requests_total{finish_reason="error"}') == 2

    run(App(engine), use)


def test_a_queue_without_room_for_all_prompts_takes_none(tiny: SimpleNamespace) -> None:
    async def use(app: App) -> None:
        answered = await app.complete(prompt=[[1]] * 4)
        assert (answered.status, answered.content["error"]["code"]) == (429, "queue_full")
        assert answered.headers["retry-after"] == "1"
        await until(lambda: app.async_engine.num_unfinished == 0)
        assert app.engine._core.num_added == 0
        assert (await app.complete(prompt=[[1]] * 3)).status == 200

    run(App(tiny.Setup(max_num_seqs=2).engine(), max_queue=1), use)


def test_a_failure_reaches_requests_and_health(tiny: SimpleNamespace) -> None:
    async def main() -> None:
        app = App(tiny.Setup(fail_at=5).engine())
        await app.async_engine.start()
        streamed, whole = await asyncio.gather(app.complete(stream=True), app.complete())
        assert whole.status == 503
        assert "the model broke" in whole.content["error"]["message"]
        assert json.loads(streamed.events[-1]) == whole.content
        for answered in (await app.get("/health"), await app.complete()):
            assert answered.status == 503
            assert answered.content["error"] == whole.content["error"]

    asyncio.run(asyncio.wait_for(main(), SOON_S))


def test_a_server_that_stops_refuses_and_ends_what_runs(tiny: SimpleNamespace) -> None:
    async def use(app: App) -> None:
        running = asyncio.ensure_future(app.complete(max_tokens=3000))
        await until(lambda: app.async_engine.num_unfinished == 1)
        app.async_engine.refuse()
        refused, health = await app.complete(), await app.get("/health")
        assert (refused.status, refused.content["error"]["code"]) == (503, "stopping")
        assert (health.status, health.content) == (503, {"status": "stopping"})
        await app.async_engine.drain(0.0)
        ended = await running
        assert (ended.status, ended.content["error"]["code"]) == (503, "stopping")

    run(App(tiny.Setup(max_model_len=4000, num_blocks=2000).engine()), use)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
    ids=["nothing", "half", "list", "bytes", "nan", "deep", "long number"],
)
def test_a_body_that_is_no_object(tiny: SimpleNamespace, content: bytes, words: str) -> None:
    async def use(app: App) -> None:
        answered = await call(app.asgi, "POST", "/v1/completions", content)
        assert (answered.status, answered.content["error"]["code"]) == (400, "invalid_json")
        assert words in answered.content["error"]["message"]

    run(App(tiny.Setup().engine()), use)


def test_a_body_beyond_the_limit(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "MAX_BODY_BYTES", 100)

    async def use(app: App) -> None:
        assert (await app.complete(prompt="x" * 200)).status == 413
        assert (await app.complete()).status == 200

    run(App(tiny.Setup().engine()), use)


def test_keys_explanation_and_what_no_rule_foresaw(tiny: SimpleNamespace) -> None:
    async def use(app: App) -> None:
        assert (await app.get("/v1/models")).status == 401
        let_in = {"Authorization": "bearer clé"}
        assert (await app.get("/v1/models", Authorization="Bearer cl")).status == 401
        assert (await app.get("/health")).status == 200
        assert (await app.get("/explain", **let_in)).content == {"decided": 1}
        assert b"".join((await app.get("/explain?format=text", **let_in)).bodies) == b"decided: 1"
        object.__setattr__(app.asgi.state.service, "explain", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await app.get("/explain", **let_in)
        assert await app.metric('http_responses_total{route="/v1/models",status="401"}') == 2

    run(App(tiny.Setup().engine(), api_keys=("other", "clé")), use)


def test_logprobs_are_those_of_the_engine_streamed_or_not(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=[0xE6, 0x97, 0xA5, 97, 98, 256, 10], sampling={"ignore_eos": True})
    (expected,) = setup.engine().generate([[1, 2]], SamplingParams(logprobs=2))
    names = {97: "a", 98: "b", 10: "\n", 256: "<special>"}

    def name(token_id: int) -> str:
        return names.get(token_id, f"token_id:{token_id}")

    async def use(app: App) -> None:
        whole = (await app.complete(logprobs=2)).content["choices"][0]["logprobs"]
        assert whole["tokens"] == [name(token_id) for token_id in expected.token_ids]
        assert whole["token_logprobs"] == pytest.approx([each.chosen.logprob for each in expected.logprobs])
        assert whole["top_logprobs"] == [
            {name(token.token_id): pytest.approx(token.logprob) for token in each.top} for each in expected.logprobs
        ]
        assert sorted(whole["text_offset"]) == whole["text_offset"]
        *events, _ = (await app.complete(logprobs=2, stream=True)).events
        pieces = [json.loads(event)["choices"][0]["logprobs"] for event in events]
        for kind in ("tokens", "token_logprobs", "top_logprobs"):
            assert [value for piece in pieces for value in piece[kind]] == whole[kind]
        assert (await app.complete()).content["choices"][0]["logprobs"] is None

    run(App(setup.engine()), use)


def test_a_chat_s_logprobs_have_the_bytes_of_tokens(tiny: SimpleNamespace) -> None:
    (expected,) = tiny.Setup(alphabet=[0xE6, 97]).engine().generate([[1, 2]], SamplingParams(logprobs=1))
    form = ChatFormat("m", tokens=TokenTexts(tiny.ByteTokenizer()))
    text = Text(expected.text, "length", expected.logprobs)
    (choice,) = form.whole([text], {})["choices"]
    for told, token in zip(choice["logprobs"]["content"], expected.logprobs, strict=True):
        is_letter = token.chosen.token_id == 97
        assert (told["token"], told["bytes"]) == (("a", [97]) if is_letter else ("token_id:230", None))
        assert told["logprob"] == token.chosen.logprob
        assert [each["logprob"] for each in told["top_logprobs"]] == [each.logprob for each in token.top]
    piece, end = form.pieces(0, text)
    assert piece["choices"][0]["logprobs"] == choice["logprobs"]
    assert end["choices"][0]["logprobs"] is None


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with server_module.bind("127.0.0.1", 0) as bound:
        assert server_module.url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with pytest.raises(server_module.EnvironmentMismatchError, match="no-such-host"):
        server_module.bind("no-such-host.invalid", 1)
