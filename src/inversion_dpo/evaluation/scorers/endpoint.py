"""A vision-language model behind an OpenAI-compatible server: ``POST URL/chat/completions``.

The form of the requests: https://platform.openai.com/docs/api-reference/chat/create and
https://platform.openai.com/docs/guides/structured-outputs; servers such as vLLM take the same.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from inversion_dpo.data.images import data_uri, png
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.preprocess import Pixels

KEY = "INVERSION_DPO_API_KEY"  # the only variable of the environment that is ever sent
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # the server may answer later
LONGEST_WAIT = 300.0  # seconds between the tries of one request, all together
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
MOST_BYTES = 8 << 20  # of a response
CONNECT_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One message: who speaks (user, assistant) and what; the first user's has the image."""

    role: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What came back, and what it cost. ``fault``: refused or cut, else empty."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1
    fault: str = ""


class Endpoint:
    """Asks a server, again after 408, 409, 425, 429, 5xx, timeouts and broken connections.

    Between tries it waits as long as Retry-After says, else at most 1, 2, 4, ... seconds, with full
    jitter (Brooker, Exponential Backoff and Jitter, 2015,
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). Redirects are not
    followed. The key is sent in a header and appears in no message.

    Args:
        url: up to ``/v1``; https, or http on this machine, or without a key.
        model: the server's name for it.
        key: None: none is sent.
        timeout: seconds for one request, its answer included.
        retries: further tries of a request.
        max_tokens: of an answer.
        sleep: waits so many seconds.

    Raises:
        ScorerError: a URL that cannot be used; a server that refuses or does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        timeout: float = 120.0,
        retries: int = 5,
        max_tokens: int = 1000,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model, self._key = checked_url(url, key), model, key
        self.timeout, self.retries, self.max_tokens = timeout, retries, max_tokens
        self._sleep, self._session = sleep, requests.Session()
        self.identity = f"{self.url} {model} {max_tokens}"

    def answer(
        self, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
    ) -> Reply:
        """The model's reply to an image uint8 [H, W, 3] and a conversation about it."""
        body, tries = self._asked(payload(self, image, system, turns, schema))
        return reply_of(body, tries, self.complaint)

    def _asked(self, payload: Mapping[str, Any]) -> tuple[Any, int]:
        """The JSON of the response, and how many requests it took."""
        waited = 0.0
        for tries in range(1, self.retries + 2):
            asked = None
            try:
                status, headers, content = self._post(payload)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reason = type(error).__name__
            else:
                body, asked = _json(content), retry_after(headers)
                if status == 200 and body is not None:
                    return body, tries
                if status not in (*AGAIN, 200):
                    raise ScorerError(self.complaint(f"HTTP {status}: {_excerpt(content)}"))
                reason = f"HTTP {status}" if status != 200 else "a response that is no JSON"
            pause = random.uniform(0, min(LONGEST_PAUSE, 2.0 ** (tries - 1)))
            waited += pause if asked is None else asked
            if tries > self.retries or waited > LONGEST_WAIT:
                break
            logger.debug("%s: %s, tried again", self.model, reason)
            self._sleep(pause if asked is None else asked)
        reason += f", which asks to wait {asked:.0f} s" if asked else ""
        raise ScorerError(self.complaint(f"no answer to {tries} requests, the last: {reason}"))

    def _post(self, payload: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """One request; requests.Timeout if the whole of it takes longer than the timeout."""
        end = time.monotonic() + self.timeout
        with self._session.post(
            f"{self.url}/chat/completions",
            json=payload,
            auth=self._authorised,
            stream=True,
            allow_redirects=False,
            timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
        ) as response:
            content = b""
            # what is there, not as much as asked for: a server that drips must not hold us up
            while part := response.raw.read1(1 << 16, decode_content=True):
                content += part
                if len(content) > MOST_BYTES:
                    raise ScorerError(self.complaint(f"a response above {MOST_BYTES} bytes"))
                if time.monotonic() > end:
                    raise requests.Timeout("it drips")
            return response.status_code, response.headers, content

    def _authorised(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Also without a key: else requests would look for one in ~/.netrc."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def complaint(self, reason: str) -> str:
        """One line with the server and the remedy, without the key."""
        text = f"evaluation.parser.url={self.url}: {reason}"
        return (text.replace(self._key, "***") if self._key else text) + (
            ". What was answered before is kept: check the server, the model and "
            f"{KEY}, then run again"
        )


def payload(
    server: Endpoint, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
) -> dict[str, Any]:
    """The request's JSON; the image is a PNG in a data URL in the first turn."""
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


def reply_of(body: Any, tries: int, complaint: Callable[[str], str]) -> Reply:
    """A chat completion's text and tokens; ScorerError if it is no chat completion."""
    try:
        choice = body["choices"][0]
        message, used = choice["message"], body.get("usage") or {}
        text = message.get("content") or ""
        stopped = choice.get("finish_reason")
        asked, said = (int(used.get(k) or 0) for k in ("prompt_tokens", "completion_tokens"))
        if not isinstance(text, str):
            raise TypeError("content is no text")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ScorerError(complaint(f"no chat completion ({error!r})")) from error
    declined = message.get("refusal") or stopped == "content_filter"
    fault = "refused" if declined else "cut" if stopped == "length" else ""
    return Reply(text, asked, said, tries, fault)


def checked_url(url: str, key: str | None) -> str:
    """The URL without its last slash; ScorerError if the key would be sent in the clear."""
    parts, where = urlsplit(url), f"evaluation.parser.url={url.partition('@')[2] or url}"
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
    """The key, if there is one; ScorerError, without it, if it cannot be a header."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ScorerError(f"{KEY} holds a character that no key has")
    return key or None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); None without."""
    said = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _excerpt(content: bytes) -> str:
    return " ".join(content[:300].decode("utf-8", "replace").split())
