"""A real OpenAI client talks to a server in this process."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from modelglue.mixture import Mixture
from modelglue.models.sampling import Sampling
from modelglue.serve import Engine, Limits, host_of
from modelglue.serve.run import serving
from tests.mixture.making import alone, mixture
from tests.models.tiny import letters

TEXTS = ["abc", "12", "what word is it?", "3 4 5 6", "letters: a", "99 abc", "x", "0"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of another class, size and tokenizer; both have chat templates."""
    made = tmp_path_factory.mktemp("served")
    mixture(made)
    for name in ("llama", "neox"):
        (made / name / "chat_template.jinja").write_text(TEMPLATE.replace("a: ", "a: " if name == "llama" else "b: "))
    mixture(made, None)
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(Engine(host_of(Mixture.load(folder / "mixture"))), "mixed") as address:
        yield address


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[str]:
    """The same where one expert at a time is in memory."""
    with serving(Engine(host_of(Mixture.load(folder / "mixture", "lru:1"))), "mixed") as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(folder: Path, texts: list[str], tokens: int = 8, until: tuple[str, ...] = (), sampling: Sampling | None = None) -> list[str]:
    mixed = Mixture.load(folder / "mixture")
    return [answer.text for answer in mixed.generate_routed(texts, until=until, max_new_tokens=tokens, sampling=sampling)]


# -- answers ----------------------------------------------------------------------------------------------------------------------


def test_completions_are_what_generate_says(client: openai.OpenAI, folder: Path) -> None:
    answers = [client.completions.create(model="mixed", prompt=text, max_tokens=8, temperature=0) for text in TEXTS]
    assert [answer.choices[0].text for answer in answers] == expected(folder, TEXTS)
    mixed = Mixture.load(folder / "mixture")
    for text, answer, route in zip(TEXTS, answers, mixed.route(TEXTS), strict=True):
        model = alone(folder, route.name)
        ids = model.encoder.encode([text])[0]
        assert answer.object == "text_completion"
        assert answer.model == "mixed"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
        if answer.choices[0].finish_reason == "length":
            assert answer.usage.completion_tokens == 8
        assert answer.model_extra == {"modelglue": [{"expert": route.name, "weight": 1.0}]}


def test_several_prompts_and_choices(client: openai.OpenAI, folder: Path) -> None:
    answer = client.completions.create(model="mixed", prompt=TEXTS[:3], max_tokens=8, temperature=0.9, top_p=0.9, seed=5, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    first = expected(folder, TEXTS[:3], sampling=Sampling(0.9, 0.9, 5))
    assert [answer.choices[place].text for place in (0, 2, 4)] == first
    assert all(answer.choices[place].text != answer.choices[place + 1].text for place in (0, 2, 4))
    again = client.completions.create(model="mixed", prompt=TEXTS[:3], max_tokens=8, temperature=0.9, top_p=0.9, seed=5, n=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.usage is not None
    assert (
        answer.usage.prompt_tokens
        == sum(
            client.completions.create(model="mixed", prompt=text, max_tokens=1).usage.prompt_tokens  # type: ignore[union-attr]
            for text in TEXTS[:3]
        )
    )


def test_prompts_of_experts_that_take_turns_in_memory(narrow: str, folder: Path) -> None:
    with openai.OpenAI(base_url=f"{narrow}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="mixed", prompt=TEXTS, max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == expected(folder, TEXTS)


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="mixed", prompt="abc", max_tokens=30).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_stop_strings(client: openai.OpenAI, folder: Path) -> None:
    whole = expected(folder, ["abc"], 20)[0]
    stop = whole[3:5]
    answer = client.completions.create(model="mixed", prompt="abc", max_tokens=20, temperature=0, stop=[stop, "never"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model="mixed", prompt="abc", max_tokens=20, temperature=0, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]


def test_chat_uses_the_experts_own_template_and_routes_on_the_contents(client: openai.OpenAI, folder: Path) -> None:
    mixed = Mixture.load(folder / "mixture")
    for contents in (["abc", "word letters"], ["12", "345 67"]):
        messages: Any = [{"role": "system", "content": contents[0]}, {"role": "user", "content": [{"type": "text", "text": contents[1]}]}]
        answer = client.chat.completions.create(model="mixed", messages=messages, max_completion_tokens=6, temperature=0)
        (route,) = mixed.route(["\n".join(contents)])
        last = "a: " if route.name == "llama" else "b: "
        prompt = f"system: {contents[0]}\nuser: {contents[1]}\n{last}"
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == alone(folder, route.name).generate([prompt], until=[], max_new_tokens=6)[0]
    assert {route.name for route in mixed.route(["abc\nword letters", "12\n345 67"])} == {"llama", "neox"}


def test_chat_without_a_number_of_tokens_fills_the_models_room(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mixed", messages=[{"role": "user", "content": "abc"}], temperature=0)
    assert answer.usage is not None
    assert answer.choices[0].finish_reason == "stop" or answer.usage.total_tokens == 64


def test_streams_in_openais_form(client: openai.OpenAI, folder: Path) -> None:
    chunks = list(
        client.chat.completions.create(
            model="mixed", messages=[{"role": "user", "content": "abc"}], max_tokens=6, temperature=0, stream=True,
            stream_options={"include_usage": True}, n=2,
        )
    )  # fmt: skip
    whole = client.chat.completions.create(model="mixed", messages=[{"role": "user", "content": "abc"}], max_tokens=6, temperature=0)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[0].message.content
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mixed"]
    assert client.models.retrieve("mixed").id == "mixed"


# -- many at once -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["url", "narrow"])
def test_32_streams_at_once_and_one_killed_client_disturbs_nobody(place: str, folder: Path, request: pytest.FixtureRequest) -> None:
    """Every stream is what it would be alone, whoever joins and leaves the batches of experts that may have to take turns."""
    url = request.getfixturevalue(place)
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(32)]
    first = threading.Event()

    def kill_one() -> None:
        """A client that asks for a long text, reads a little, and dies."""
        body = json.dumps({"model": "mixed", "prompt": "abc", "max_tokens": 40, "temperature": 1.0, "stream": True, "n": 4}).encode()
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as wire:
            wire.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )  # fmt: skip
            wire.recv(200)
            first.set()
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # reset, not closed politely

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="mixed", prompt=texts[number], max_tokens=12, temperature=0.8 if number % 2 else 0, seed=number, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = asyncio.run(all_of_them())
    killer.join()
    assert first.is_set()
    mixed = Mixture.load(folder / "mixture")
    for number, text in enumerate(texts):
        sampling = Sampling(0.8, 1.0, number) if number % 2 else None
        assert found[number] == mixed.generate_routed([text], until=[], max_new_tokens=12, sampling=sampling)[0].text


# -- bad requests -----------------------------------------------------------------------------------------------------------------


def _post(url: str, body: bytes | dict[str, Any], path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    wire = http.client.HTTPConnection(parts.hostname, parts.port)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        wire.request("POST", path, data, {"Content-Type": "application/json", **headers})
        answer = wire.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        wire.close()


ASKED = {"model": "mixed", "prompt": "abc", "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "mixd"}, 404, "there is no model 'mixd'. Did you mean 'mixed'? This server has 'mixed'."),
        ({"max_tokns": 3}, 400, "there is no parameter 'max_tokns'. Did you mean 'max_tokens'"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
        ({"max_tokens": 5000}, 400, "max_tokens is 5000; this server writes 4096 at most."),
        ({"n": 17}, 400, "the request asks for 17 choices; allowed are 16 at most."),
        ({"prompt": [1, 2, 3]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "a" * 63}, 400, "this model holds 64 tokens; the prompt has 64, and max_tokens is 2. Shorten the prompt"),
        ({"logprobs": 5}, 400, "logprobs is 5; allowed is False: this server does not do more. Leave it out."),
        ({"logprobs": 0}, 400, "logprobs is 0; allowed is False"),
        ({"prompt": "a\ud800"}, 400, "the body holds half of a surrogate pair, which is no text."),
        ({"model": "\udfff"}, 400, "the body holds half of a surrogate pair"),
        ({"max_tok\ud800": 1}, 400, "the body holds half of a surrogate pair"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty is 0.5; allowed is 0"),
    ],
)
def test_requests_that_cannot_be_answered(url: str, change: dict[str, Any], status: int, said: str) -> None:
    for stream in (False, True):
        found, body = _post(url, {**ASKED, "stream": stream, **change})
        assert found == status
        assert said in body["error"]["message"]
        assert body["error"]["type"] == "invalid_request_error"
        assert set(body["error"]) == {"message", "type", "param", "code"}


def test_parameters_that_ask_for_nothing_are_accepted(url: str) -> None:
    status, body = _post(url, {**ASKED, "user": "me", "frequency_penalty": 0, "logprobs": None, "best_of": 1, "echo": False})
    assert (status, len(body["choices"])) == (200, 1)


def test_bodies_that_are_no_request(url: str) -> None:
    assert _post(url, b'{"model": "mixed", ')[1]["error"]["message"].startswith("the body is not JSON")
    assert _post(url, b"\xff\xfe")[0] == 400
    assert _post(url, b"[" * 100_000)[0] == 400
    assert _post(url, b"[1]")[1]["error"]["message"] == "the body is list; allowed is a JSON object."
    status, body = _post(url, ASKED, **{"Content-Type": "text/plain"})
    assert (status, body["error"]["message"]) == (415, "the content type must be application/json.")
    status, body = _post(url, ASKED, path="/v1/embeddings")
    assert status == 404
    assert "Known are /v1/models" in body["error"]["message"]


def test_a_page_that_calls_itself_localhost_gets_no_answer(url: str) -> None:
    status, body = _post(url, ASKED, Host="evil.example")
    assert (status, body["error"]["code"]) == (421, "invalid_host")


def test_errors_reach_the_client_library_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="abc")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="mixed", prompt="a" * 80)
    assert caught.value.code == "context_length_exceeded"


# -- a single model, keys and limits ----------------------------------------------------------------------------------------------


def test_a_single_model_with_a_key(folder: Path) -> None:
    engine = Engine(host_of(alone(folder, "llama")), Limits(body=300, tokens=8, choices=2))
    with serving(engine, "llama", api_key="secret") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            answer = client.completions.create(model="llama", prompt="abc", max_tokens=8, temperature=0)
            assert answer.choices[0].text == alone(folder, "llama").generate(["abc"], until=[], max_new_tokens=8)[0]
            assert answer.model_extra == {}
            with pytest.raises(openai.BadRequestError, match="this server writes 8 at most"):
                client.completions.create(model="llama", prompt="abc", max_tokens=9)
            with pytest.raises(openai.APIStatusError, match="the body is larger than 300 bytes") as caught:
                client.completions.create(model="llama", prompt="a" * 300)
            assert caught.value.status_code == 413
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        ):
            client.models.list()


def test_a_model_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    from tests.models.tiny import saved_model

    saved_model(tmp_path / "plain", "llama", tokenizer=letters())
    with (
        serving(Engine(host_of(alone(tmp_path, "plain"))), "plain") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="this model has no chat template"),
    ):
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "abc"}])


def test_a_body_that_never_ends(folder: Path) -> None:
    with serving(Engine(host_of(alone(folder, "llama")), Limits(timeout=0.05)), "llama") as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as wire:
            wire.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            assert wire.recv(100).startswith(b"HTTP/1.1 408 ")
