"""The server's side of the scorer scene-graph: retries, limits, and a key that stays secret."""

import base64
import importlib.util
import io
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.endpoint import (
    KEY,
    Endpoint,
    Turn,
    checked_url,
    key_of_environment,
)

path = Path(__file__).parents[2] / "chat_server.py"
spec = importlib.util.spec_from_file_location("chat_server", path)
chat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat)

SECRET = "sk-s3cr3t-0123456789"
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
ASK = (IMAGE, "be exact", [Turn("user", "what?")], {"type": "object"})


def ask(url, retries=3, timeout=5.0, key=SECRET):
    """(reply or error, seconds that were waited)."""
    waits = []
    server = Endpoint(url, "seer", key, timeout, retries, 77)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        try:
            return server.answer(*ASK), waits
        except ScorerError as error:
            return error, waits


def test_the_request_has_the_image_the_schema_and_the_key():
    with chat.serving(["fine"]) as (url, script):
        reply, waits = ask(url + "/")
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("fine", 100, 20)
    assert (reply.requests, reply.fault, waits) == (1, "", [])
    request, headers = script.seen[0]
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("seer", 0, 77)
    form = request["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"] == {"type": "object"}
    system, user = request["messages"]
    assert system == {"role": "system", "content": "be exact"}
    text, picture = user["content"]
    assert text == {"type": "text", "text": "what?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), IMAGE)


def test_without_a_key_none_is_sent(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with chat.serving(["fine"]) as (url, script):
        ask(url, key=None)
    assert "Authorization" not in script.seen[0][1]


@pytest.mark.parametrize("key", [SECRET, None])
def test_nothing_of_openais_environment_is_sent(monkeypatch, key):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "a-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: a-secret\nX-Key: a-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with chat.serving(["fine"]) as (url, script):
        reply, _ = ask(url, key=key)
    _, headers = script.seen[0]
    assert reply.text == "fine" and "a-secret" not in str(headers)
    assert headers.get("Authorization") == (key and f"Bearer {SECRET}")


def test_later_is_waited_for():
    busy = (429, {"Retry-After": "7"}, b"{}", 0)
    broken = (500, {}, b"oops", 0)
    cut = (200, {"Content-Length": "99"}, b'{"choices": [', 0)
    with chat.serving([busy, broken, cut, "fine"]) as (url, script):
        reply, waits = ask(url, retries=3)
    assert reply.text == "fine" and reply.requests == len(script.seen) == 4
    assert waits[0] == 7 and len(waits) == 3
    assert all(0 <= wait <= 2**k for k, wait in enumerate(waits[1:], start=1))


def test_no_endless_loop():
    with chat.serving(lambda _: (503, {}, b"", 0)) as (url, script):
        error, waits = ask(url)
        assert len(script.seen) == 4 and len(waits) == 3
        assert "HTTP 503" in str(error) and "requests: 4" in str(error)
    with chat.serving(lambda _: (429, {"Retry-After": "86400"}, b"", 0)) as (url, script):
        error, waits = ask(url)
        assert len(script.seen) == 1 and waits == []
        assert "asks to wait 86400 s" in str(error)
    error, waits = ask("http://127.0.0.1:9/v1")  # nobody there
    assert "APIConnectionError" in str(error) and len(waits) == 3


def test_a_silent_server_is_asked_again():
    silent = (200, {}, b"{}", 0.4)
    with chat.serving([silent, "fine"]) as (url, _):
        reply, _ = ask(url, timeout=0.2)
        assert reply.text == "fine" and reply.requests == 2
    with chat.serving(lambda _: silent) as (url, _):
        error, _ = ask(url, retries=1, timeout=0.2)
        assert "APITimeoutError, requests: 2" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_what_will_not_change_is_not_asked_again(status, caplog):
    said = f'{{"error": "bad key {SECRET} here"}}'.encode()
    with (
        caplog.at_level(logging.DEBUG),
        chat.serving(lambda _: (status, {"Location": "http://127.0.0.1:9/"}, said, 0)) as (
            url,
            script,
        ),
    ):
        error, _ = ask(url)
    text = str(error)
    assert len(script.seen) == 1 and f"HTTP {status}" in text and KEY in text
    assert "bad key *** here" in text or status == 302  # whose body is not looked at
    assert SECRET not in text + caplog.text and "\n" not in text
    assert ("a redirect to http://127.0.0.1:9/" in text) == (status == 302)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": []},
        {"choices": [{"message": None}]},
        [],
        "text",
        {"choices": [{"message": {"content": ["parts"]}}]},
        {"error": {"message": "out of quota"}},
    ],
)
def test_what_is_no_completion_is_one_line(body):
    import json

    with chat.serving([(200, {}, json.dumps(body).encode(), 0)]) as (url, _):
        error, _ = ask(url)
    assert "no chat completion" in str(error) and "\n" not in str(error)
    assert json.dumps(body)[:12] in str(error)  # what the server says of itself


def test_a_response_that_is_no_json_is_no_completion():
    with chat.serving([(200, {}, b'{"choices": [', 0)]) as (url, _):
        error, _ = ask(url)
    assert "no chat completion" in str(error) and KEY in str(error)


def test_refused_cut_and_without_usage():
    answers = [
        chat.completion(None, refusal="no"),
        chat.completion("{", "length"),
        chat.completion("", "content_filter"),
        {"choices": [{"message": {"content": "x"}}]},
    ]
    with chat.serving(answers) as (url, _):
        assert [ask(url)[0].fault for _ in range(3)] == ["refused", "cut", "refused"]
        last, _ = ask(url)
    assert (last.text, last.prompt_tokens, last.fault) == ("x", 0, "")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("localhost:8000/v1", "https://HOST/v1"),
        ("ftp://host/v1", "https://HOST/v1"),
        ("https:///v1", "https://HOST/v1"),
        ("https://me:pass@host/v1", "no name, password"),
        ("https://host/v1?key=1", "no name, password"),
        ("http://host/v1", "unencrypted"),
    ],
)
def test_a_url_that_cannot_be_used(url, reason):
    with pytest.raises(ScorerError, match=reason) as refusal:
        checked_url(url, SECRET)
    assert "pass@" not in str(refusal.value) and SECRET not in str(refusal.value)
    assert checked_url("http://host/v1", None) == "http://host/v1"
    assert checked_url("http://localhost:1/v1/", SECRET) == "http://localhost:1/v1"


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert key_of_environment() is None
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    assert key_of_environment() == SECRET
    monkeypatch.setenv(KEY, "two\nlines")
    with pytest.raises(ScorerError, match=KEY) as refusal:
        key_of_environment()
    assert "two" not in str(refusal.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ScorerError, match=r"openai: pip install 'inversion-dpo\[vlm\]'"):
        Endpoint("http://localhost:1/v1", "a", None)
