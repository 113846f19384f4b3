"""An OpenAI-compatible server on this machine that says what a test has written down for it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep


def completion(content, finish="stop", refusal=None, usage=(100, 20)):
    """A chat completion's JSON."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }


class Script:
    """What the server does: ``answer`` of every request, called with its JSON.

    It returns a text, the answer; a dictionary, the response's JSON; or (status, headers, bytes,
    seconds to wait); bytes in a list drip. ``seen``: the requests' JSON and headers. ``most``:
    requests at once.
    """

    def __init__(self, answer):
        self.answer, self.seen, self.now, self.most = answer, [], 0, 0
        self.lock = threading.Lock()

    def respond(self, request, headers):
        with self.lock:
            self.seen.append((request, headers))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            given = self.answer(request)
            if isinstance(given, tuple):
                sleep(given[3])
                return given[:3]
            body = completion(given) if isinstance(given, str) else given
            return 200, {}, json.dumps(body).encode()
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def serving(answer):
    """Yields (URL up to /v1, Script); ``answer`` as a list: one response after the other."""
    if isinstance(answer, list):
        left = iter(answer)
        script = Script(lambda request: next(left))
    else:
        script = Script(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, content = script.respond(json.loads(body), dict(self.headers))
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for piece in content if isinstance(content, list) else [content]:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    sleep(0.05 if isinstance(content, list) else 0)
            except OSError:
                pass  # the client has gone
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", script
    finally:
        server.shutdown()
        server.server_close()
