"""The server: what it serves, what it refuses."""

import io
import json
from itertools import islice

import pytest
from PIL import Image
from starlette.requests import Request

from inversion_dpo.data.images import FORMATS
from inversion_dpo.labels.questions import WebError
from inversion_dpo.web.app import make_app
from inversion_dpo.web.guard import hosts_for, is_loopback
from inversion_dpo.web.labelling import image_route
from inversion_dpo.web.server import address, listen, tunnel

EVIL = "<script>alert(1)</script>"
OUTSIDE = (
    "/image/" + "0" * 64,
    "/image/../labels.sqlite",
    "/image/%2e%2e%2flabels.sqlite",
    "/static/../app.py",
    "/static/%2e%2e/app.py",
    "/static/..%2fapp.py",
    "/labels.sqlite",
)


@pytest.fixture
def page(label_page, serve):
    return serve(make_app([label_page], f"data {EVIL}", hosts_for("127.0.0.1", False)))


def label(page, key="r1", choice="left", **headers):
    state = json.loads(page.get("/api/label/next")[2])
    sent = {"request": key, "labeller": "me", "pair": state["pair"]["pair"], "choice": choice}
    return page.post("/api/label/choose", sent, **headers)


def test_a_label_gives_the_next_pair(page, store):
    before = json.loads(page.get("/api/label/next?labeller=me")[2])
    assert before["done"] == 0 and before["total"] == 16
    status, after = label(page)
    assert status == 200 and after["done"] == 1 and after["pair"] == before["after"]
    assert len(store.votes()) == 1
    status, back = page.post("/api/label/undo", {"request": "u1", "labeller": "me"})
    assert status == 200 and back["pair"] == before["pair"] and back["done"] == 0


def test_images_are_those_of_the_pairs_and_nothing_else(page, store):
    sha256 = store.ahead("me")[0].left
    status, headers, body = page.get(f"/image/{sha256}")
    assert status == 200 and body == store.image(sha256)
    assert headers["content-type"] == "image/png"
    for path in OUTSIDE:
        assert page.get(path)[0] == 404


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_image_that_is_read_is_served_as_that(form):
    """Browsers are told not to guess."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form)
    served = image_route([lambda _: buffer.getvalue()]).endpoint(
        Request({"type": "http", "path_params": {"sha256": "x"}})
    )
    assert served.media_type == f"image/{form.lower()}"


def test_another_sites_name_is_refused(page):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert page.get("/label", host=host)[0] == 400
    for host in ("localhost", f"127.0.0.1:{page.port}"):
        assert page.get("/label", host=host)[0] == 200


def test_another_sites_writes_are_refused(page, store):
    for origin in (
        "http://evil.example",
        "null",
        "http://[",
        "",
        f"http://127.0.0.1:{page.port + 1}",
    ):
        assert label(page, origin=origin)[0] == 403
    assert label(page, content_type="text/plain")[0] == 403
    assert page.ask("POST", "/api/label/undo", "{}", origin="http://evil.example")[0] == 403
    assert store.votes() == {}
    assert label(page, origin=f"http://127.0.0.1:{page.port}")[0] == 200


def test_no_site_is_invited_and_the_page_is_confined(page):
    for path in ("/label", "/api/label/next", "/static/label.js", "/image/none"):
        _, headers, _ = page.get(path, origin="http://evil.example")
        assert not any(name.startswith("access-control") for name in headers)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert page.ask("OPTIONS", "/api/label/choose", origin="http://evil.example")[0] == 403


def test_what_comes_from_data_or_the_address_is_escaped(page):
    _, _, body = page.get("/label?labeller=%3Cscript%3Ealert(1)%3C/script%3E")
    assert EVIL.encode() not in body and b"&lt;script&gt;" in body


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "first"},
        {"choice": None},
        {"labeller": ""},
        {"labeller": " "},
        {"labeller": 7},
        {"labeller": "x" * 41},
        {"labeller": "a\nb"},
        {"labeller": "\ud800"},
        {"request": ""},
        {"request": "x" * 65},
        {"pair": None},
        {"pair": ["x"]},
    ],
)
def test_what_makes_no_sense_is_refused(page, store, change):
    pair = store.ahead("me")[0].pair
    good = {"request": "r", "labeller": "me", "pair": pair, "choice": "tie"}
    assert page.post("/api/label/choose", good | change)[0] == 400
    assert store.votes() == {}


def test_a_name_that_cannot_be_told_from_another_is_refused_in_plain_words(page):
    status, _, body = page.get("/label?labeller=anna%E2%80%8D")  # a joiner, which nobody sees
    assert status == 400 and b"a name has 1 to 40 characters, all visible" in body


def test_a_file_that_is_gone_is_tried_again_with_the_reason(page, store):
    store.path.rename(store.path.with_name("moved"))
    status, body = label(page, "one", "left")
    assert status == 503 and b"was moved or deleted" in body
    store.path.with_name("moved").rename(store.path)
    assert label(page, "one", "left")[0] == 200


def test_bodies_that_are_no_objects_are_refused(page):
    for body in ("", "nonsense", "[]", "1", "[" * 50_000):
        assert (
            page.ask("POST", "/api/label/choose", body, content_type="application/json")[0] == 400
        )
    body = json.dumps({"labeller": "x" * 100_000})
    assert page.ask("POST", "/api/label/choose", body, content_type="application/json")[0] == 413


def test_a_request_id_used_twice_for_different_things_is_a_conflict(page):
    assert label(page, "same", "left")[0] == 200
    assert label(page, "same", "left")[0] == 409  # the next pair, under the old id


def test_the_team(page, store):
    for name, last in (("anna", "tie"), ("ben", "bad")):
        for k, asked in enumerate(islice(store.pairs(), 4)):
            store.label(f"{name}{k}", name, asked.pair, last if k == 3 else "tie")
    team = json.loads(page.get("/api/label/team")[2])
    assert team["labellers"] == [{"labeller": "anna", "done": 4}, {"labeller": "ben", "done": 4}]
    assert team["pairs"] == 4 and team["same"] == 0.75 and team["split"] == 1
    assert team["verdict"] is None


def test_only_loopback_unless_told_otherwise():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(WebError, match="--allow-remote"):
            hosts_for(host, False)
        assert hosts_for(host, True) == ["*"]


def test_a_taken_port_says_so():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(WebError, match=f"127.0.0.1:{port}.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("connection", "expected"),
    [
        (None, None),
        ("", None),
        ("10.0.0.2 5000 10.0.0.9 22", "ssh -N -L 8000:127.0.0.1:8000 anna@10.0.0.9"),
        ("fd::2 5000 fd::9 2222", "ssh -N -L 8000:127.0.0.1:8000 -p 2222 anna@fd::9"),
    ],
)
def test_the_tunnel_is_worded_where_the_machine_was_reached_by_ssh(
    monkeypatch, connection, expected
):
    monkeypatch.setenv("USER", "anna")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    if connection is not None:
        monkeypatch.setenv("SSH_CONNECTION", connection)
    assert tunnel(8000) == expected
