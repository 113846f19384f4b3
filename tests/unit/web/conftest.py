"""A served page without a browser."""

import http.client
import json
import threading
from collections import Counter

import pytest


class Page:
    """Requests to the server; each gives (status, headers, body)."""

    def __init__(self, port):
        self.port = port

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return found

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, value, **headers):
        headers = {"content_type": "application/json", **headers}
        status, _, body = self.ask("POST", path, json.dumps(value), **headers)
        return status, body if status != 200 else json.loads(body)


@pytest.fixture
def serve():
    """Serve an application in a thread; call with it, get a Page."""
    import uvicorn

    from inversion_dpo.web.server import listen

    running = []

    def start(app):
        listening = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        running.append((server, thread, listening))
        return Page(listening.getsockname()[1])

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def store(pair_file, tmp_path):
    """Sixteen pairs to be labelled."""
    from inversion_dpo.labels.questions import questions
    from inversion_dpo.labels.store import LabelStore
    from inversion_dpo.run.fields import DataConfig

    store = LabelStore(tmp_path / "labels.sqlite")
    store.add(questions(DataConfig(pairs=str(pair_file)), None, Counter()))
    yield store
    store.close()


@pytest.fixture
def label_page(store):
    """The page that asks about the store's pairs."""
    from inversion_dpo.web.app import label_tab
    from inversion_dpo.web.labelling import Asking

    asking = Asking("label", "Which?", "pairs export", lambda who: (store, store.total()))
    return label_tab(asking, "Label", store.image)
