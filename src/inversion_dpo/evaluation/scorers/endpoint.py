"""Ask a vision-language model behind an OpenAI-compatible server, with the ``openai`` client.

The form of the requests: https://platform.openai.com/docs/api-reference/chat/create and
https://platform.openai.com/docs/guides/structured-outputs; servers such as vLLM take the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from inversion_dpo.data.images import data_uri, png
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.preprocess import Pixels

KEY = "INVERSION_DPO_API_KEY"  # no other environment variable is ever sent
GIVEN = "evaluation.parser.url or evaluation.checkpoints"  # where its address stands
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOP = 20  # likeliest tokens that a server is asked for; OpenAI gives no more
CONNECT_SECONDS = 10.0
RETRIED = "x-stainless-retry-count"  # the client's own count of a request's earlier tries
# The client would also send the values of OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID, ...
SENT = {"accept", "connection", "content-length", "content-type", "host"}
SENT |= {RETRIED, "x-stainless-raw-response"}  # which the client reads again


@dataclass(frozen=True)
class Turn:
    """One message: its role (user, assistant) and text; the first user's has the image."""

    role: str
    text: str


@dataclass(frozen=True)
class Reply:
    """A reply and its cost. ``fault``: refused or cut, else empty."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1
    fault: str = ""


class Backend(Protocol):
    """A vision-language model behind a server or on this machine."""

    @property
    def identity(self) -> str:
        """Everything that an answer depends on besides images and question."""

    def answer(
        self, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
    ) -> Reply:
        """Reply to a conversation about an image."""

    def say(self, images: Sequence[Pixels], text: str) -> Reply:
        """Answer a question about the images."""

    def starts(self, images: Sequence[Pixels], text: str, word: str) -> float | None:
        """Return the probability that the answer is ``word``; None if it cannot be had."""


class Endpoint:
    """A server that is asked again after 408, 409, 429, 5xx, timeouts and broken connections.

    The client waits as long as Retry-After says, at most two minutes, else for a growing time.
    Redirects are not followed. The key is sent in a header and appears in no message.

    Args:
        url: up to ``/v1``; https, or http on this machine, or without a key.
        model: its name on the server.
        key: None sends none.
        timeout: seconds without a byte from the server.
        retries: further tries of a request.
        max_tokens: of an answer.

    Raises:
        ScorerError: the URL cannot be used, or the server refuses or does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        timeout: float = 120.0,
        retries: int = 5,
        max_tokens: int = 1000,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ScorerError(
                f"{url} is asked with openai: pip install 'inversion-dpo[vlm]'"
            ) from error

        self.url, self.model, self._key = checked_url(url, key), model, key
        self.max_tokens = max_tokens
        self.identity = f"{self.url} {model} {max_tokens}"
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",
            timeout=openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            max_retries=retries,
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"request": [self._with_our_headers]}
            ),
        )

    def answer(
        self, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
    ) -> Reply:
        """Return the model's reply to a conversation about an image uint8 [H, W, 3]."""
        return self._send(payload(self, image, system, turns, schema), reply_of)

    def say(self, images: Sequence[Pixels], text: str) -> Reply:
        """Return the model's reply to one question about images uint8 [H, W, 3]."""
        return self._send(question(self, images, text), reply_of)

    def starts(self, images: Sequence[Pixels], text: str, word: str) -> float | None:
        """Return the probability of ``word`` as the answer's first token, whatever its case.

        If only its opposite is among the 20 likeliest tokens, it is 1 less the opposite's; None if
        neither is. Only Yes and No are known as opposites.
        """
        ask = question(self, images, text) | {"max_tokens": 1, "logprobs": True}
        tokens = self._send(ask | {"top_logprobs": TOP}, tokens_of)
        opposite = {"yes": "no", "no": "yes"}.get(word.lower())
        ours, theirs = (
            math.fsum(math.exp(p) for token, p in tokens if token.strip().lower() == w)
            for w in (word.lower(), opposite)
        )
        return min(1.0, ours) or (max(0.0, 1 - theirs) if theirs else None)

    def _send(self, ask: Mapping[str, Any], read: Callable[[Any, int], Any]) -> Any:
        import openai

        create, said = self._client.chat.completions.with_raw_response.create, ""
        try:
            response = create(**ask)
            said = f": {' '.join(response.text.split())[:300]}"
            return read(response.parse(), response.retries_taken + 1)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            reason = f"{type(error).__name__}, requests: {int(error.request.headers[RETRIED]) + 1}"
            if isinstance(error, openai.APIStatusError):
                told, text = error.response.headers, " ".join(error.response.text[:300].split())
                wait, other = told.get("Retry-After"), told.get("Location", "")[:200]
                reason = f"HTTP {error.status_code}, {reason}"
                reason += f", which asks to wait {wait} s" if wait else ""
                reason += f", a redirect to {other or 'nothing'}" if error.status_code < 400 else ""
                reason += f": {text}" if text else ""
            raise ScorerError(self.complaint(reason)) from error
        except (AttributeError, IndexError, TypeError, ValueError, openai.OpenAIError) as error:
            raise ScorerError(self.complaint(f"no chat completion ({error!r}){said}")) from error

    def _with_our_headers(self, request: Any) -> None:
        """Remove every header that is not ours from a request, and add the key."""
        for name in {name.lower() for name in request.headers} - SENT:
            del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def complaint(self, reason: str) -> str:
        """Write one line with the server and the remedy, without the key."""
        text = f"server {self.url} ({GIVEN}): {reason}"
        return (text.replace(self._key, "***") if self._key else text) + (
            f". Earlier answers are kept: check the server, the model and {KEY}, then run again"
        )


def payload(
    server: Endpoint, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the request's JSON; the first turn holds the image as a PNG in a data URL."""
    messages: list[dict[str, Any]] = [{"role": t.role, "content": t.text} for t in turns]
    picture = {"type": "image_url", "image_url": {"url": data_uri(png(image))}}
    messages[0]["content"] = [{"type": "text", "text": turns[0].text}, picture]
    return {
        "model": server.model,
        "messages": [{"role": "system", "content": system}, *messages],
        "temperature": 0,
        "max_tokens": server.max_tokens,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "scene_graph", "strict": True, "schema": dict(schema)},
        },
    }


def question(server: Endpoint, images: Sequence[Pixels], text: str) -> dict[str, Any]:
    """Build the request of one question: the images first, as PNG in data URLs, no schema."""
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(png(i))}} for i in images]
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": server.max_tokens,
    }


def tokens_of(completion: Any, requests: int) -> list[tuple[str, float]]:
    """Read the likeliest first tokens with their log-probabilities; none for a refusal.

    ValueError if the server gives none, or one that cannot be.
    """
    read = completion.choices[0].logprobs
    first = (read.content or [None])[0] if read else None
    found = [(str(t.token), float(t.logprob)) for t in first.top_logprobs or []] if first else []
    if not found and not reply_of(completion, requests).fault.replace("cut", ""):
        raise ValueError("no top_logprobs, which this score needs: choose a server that gives them")
    if odd := [p for _, p in found if not p < 1e-3]:  # NaN too
        raise ValueError(f"a log-probability of {odd[0]}")
    return found


def reply_of(completion: Any, requests: int) -> Reply:
    """Read a chat completion's text and tokens; AttributeError or the like for any other object."""
    choice, used = completion.choices[0], completion.usage
    text = choice.message.content or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    declined = choice.message.refusal or choice.finish_reason == "content_filter"
    fault = "refused" if declined else "cut" if choice.finish_reason == "length" else ""
    tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
    return Reply(text, *tokens, requests, fault)


def checked_url(url: str, key: str | None) -> str:
    """Strip the last slash of a URL; ScorerError if the key would be sent unencrypted."""
    parts, where = urlsplit(url), f"server {url.partition('@')[2] or url} ({GIVEN})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ScorerError(f"{where}: write https://HOST/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ScorerError(
            f"{where}: no name, password or query belongs here; the key goes into {KEY}"
        )
    if key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ScorerError(f"{where}: {KEY} is set and would be sent unencrypted: use https")
    return url.rstrip("/")


def key_of_environment() -> str | None:
    """Return the key or None; ScorerError, without its text, if it cannot be a header."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ScorerError(f"{KEY} holds a space or a sign that no key has: set it again")
    return key or None
