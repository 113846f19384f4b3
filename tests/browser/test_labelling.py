"""A person at the keyboard: label, lose the server, go on, export, train."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.cli.main import main
from tests.pair_files import read_pairs, write_edits
from tests.slow import slow_but

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def unlabelled(write_pairs, tmp_path_factory):
    """24 pairs of warm against cool."""
    return write_pairs(tmp_path_factory.mktemp("unlabelled") / "unlabelled.parquet", 24)


@pytest.fixture
def labelling(serve, unlabelled, tmp_path):
    """The page over these pairs."""
    return serve(unlabelled, tmp_path / "labels.sqlite")


def warmth(data):
    """Red less blue, the mean over an encoded image."""
    red, _, blue = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float).mean((0, 1))
    return red - blue


def warmer(browser, server):
    """The side, left or right, of the warmer of the two images that are shown."""
    sides = {}
    for side in ("left", "right"):
        path = browser.driver.find_element("id", side).get_attribute("src")
        sides[side] = warmth(server.get(path.removeprefix(server.address)))
    return max(sides, key=sides.get)


def shown(browser):
    """How many answers this page has seen stored."""
    return int(browser.driver.find_element("id", "label").get_attribute("data-shown"))


def press(browser, key):
    """Press a key and wait until the answer is stored and the next pair is there."""
    before = shown(browser)
    browser.press(key)
    browser.until(f"+document.getElementById('label').dataset.shown === {before + 1}")


def ready(browser):
    browser.until("document.getElementById('label').dataset.shown === '0'")


def label_warm(browser, server, count, keys):
    for _ in range(count):
        press(browser, keys[warmer(browser, server)])


def fetched_ahead(browser, server):
    """Wait for the pictures of the pair after this one: a kill would cut them on their way."""
    labeller = browser.driver.find_element("id", "label").get_attribute("data-labeller")
    after = json.loads(server.get(f"/api/label/next?labeller={labeller}"))["after"]
    for side in ("left", "right"):
        address = f"{server.address}/image/{after[side]}"
        browser.until(f"performance.getEntriesByName('{address}').length > 0")


DIGITS = {"left": "1", "right": "2"}
ARROWS = {"left": "\ue012", "right": "\ue014"}  # WebDriver's codes of the arrow keys


def test_label_kill_restart_export_train(
    browser, server, unlabelled, tmp_path, tiny_config, capsys
):
    server = server(unlabelled, "--labels", tmp_path / "labels.sqlite")
    browser.open(f"{server.address}/label?labeller=me")
    ready(browser)
    browser.picture("label")
    label_warm(browser, server, 7, DIGITS)
    label_warm(browser, server, 6, ARROWS)
    press(browser, "t")
    press(browser, "u")  # a tie by mistake
    press(browser, "T")
    press(browser, "b")
    assert browser.text("count") == "15 of 24"

    fetched_ahead(browser, server)
    server.kill()
    browser.press("b")  # while nobody listens
    browser.until("!document.getElementById('note').hidden")
    assert "Not stored yet" in browser.text("note")
    server.start()
    browser.until("document.getElementById('count').textContent === '16 of 24'")
    assert not browser.driver.find_element("id", "note").is_displayed()
    label_warm(browser, server, 4, DIGITS)

    browser.open(f"{server.address}/label?labeller=me")
    ready(browser)
    assert browser.text("count") == "20 of 24"
    assert browser.complaints() == []

    pairs = tmp_path / "labelled.parquet"
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "export", str(tmp_path / "labels.sqlite"), "-o", str(pairs)])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "18 pairs: 17 preferences, 1 tie," in out and "2 both bad, 4 not labelled" in out
    found = read_pairs(pairs)
    assert len(found.pairs) == 17 and found.ties == 1
    assert all(warmth(p.winner) > warmth(p.loser) for p in found.pairs)

    from inversion_dpo.training.recipe import train

    train(tiny_config(f"data.pairs={pairs}", "training.steps=3"), tmp_path / "run")
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").exists()


def test_the_image_that_is_edited_stands_beside_both(browser, serve, tmp_path):
    """And is there at full pixels after the two edits."""
    data = write_edits(tmp_path / "edits.parquet", 4)
    page = serve(data, tmp_path / "labels.sqlite", settings=["data.allow_giveaways=true"])
    browser.open(f"{page.address}/label?labeller=me")
    ready(browser)
    browser.picture("label-edits")
    found = [browser.driver.find_element("id", name).rect for name in ("source", "left", "right")]
    assert [r["x"] for r in found] == sorted(r["x"] for r in found)
    assert max(r["y"] for r in found) - min(r["y"] for r in found) < found[0]["height"] / 4
    browser.press("z")
    browser.press("z")
    browser.press("z")
    source = browser.driver.find_element("id", "source").get_attribute("src")
    assert browser.driver.find_element("css selector", ".view img").get_attribute("src") == source
    press(browser, "1")
    assert browser.complaints() == []


def test_a_key_held_down_labels_once_and_typing_a_name_labels_nothing(browser, labelling):
    browser.open(f"{labelling.address}/label?labeller=me")
    ready(browser)
    for repeat in (False, True, True):
        event = f"{{key: '1', bubbles: true, repeat: {str(repeat).lower()}}}"
        browser.driver.execute_script(
            f"document.body.dispatchEvent(new KeyboardEvent('keydown', {event}))"
        )
    browser.until("document.getElementById('label').dataset.shown === '1'")
    browser.driver.find_element("id", "change").click()
    browser.driver.find_element("id", "name").send_keys("bt12u")
    team = json.loads(labelling.get("/api/label/team"))
    assert team["labellers"] == [{"labeller": "me", "done": 1}]


def test_a_labeller_gives_a_name_once(browser, labelling):
    browser.open(f"{labelling.address}/")
    browser.picture("label-name")
    browser.press("1")  # nobody labels yet
    browser.driver.find_element("id", "name").clear()
    browser.driver.find_element("id", "name").send_keys("anna \ue007")
    browser.until("document.getElementById('label').dataset.shown === '0'")
    assert browser.driver.current_url.endswith("labeller=anna")
    assert json.loads(labelling.get("/api/label/team"))["labellers"] == []
    browser.open(f"{labelling.address}/label")
    assert browser.until("document.getElementById('name').value") == "anna"


def test_two_labellers_their_agreement_and_what_comes_next(browser, labelling):
    for name in ("anna", "ben"):
        browser.open(f"{labelling.address}/label?labeller={name}")
        ready(browser)
        for number in range(12 + 2 * (name == "ben")):
            press(browser, "t" if number else "b")
    team = json.loads(labelling.get("/api/label/team"))
    assert 2 <= team["pairs"] <= 5  # a share in common; the others differ
    browser.open(f"{labelling.address}/label?labeller=ben")
    ready(browser)
    browser.until("document.getElementById('team').textContent.includes('ben 14')")
    text = browser.text("team")
    assert f"On {team['pairs']} pairs labelled by two or more" in text
    assert "Without a majority a pair counts as a tie, and training leaves ties out" in text
    while not browser.until("String(!document.getElementById('end').hidden)") == "true":
        press(browser, "t")
    assert "Every pair has a label" in browser.text("ended")
    assert "inversion-dpo pairs export" in browser.text("end")
    browser.picture("label-team")


@pytest.mark.parametrize("dark", slow_but([False], [False, True]))
def test_a_narrow_window_shows_everything(browser, labelling, dark):
    browser.open(f"{labelling.address}/label?labeller=me", 390, 800, dark)
    ready(browser)
    assert browser.overflow() == 0
    for choice in ("left", "right", "tie", "bad", "undo"):
        button = browser.driver.find_element("css selector", f"[data-choice={choice}]")
        box = button.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 40
    browser.picture("label-narrow-dark" if dark else "label-narrow")
    browser.driver.find_element("css selector", ".look").click()  # enlarges, and votes nothing
    browser.until("document.querySelector('dialog').open")
    assert "64 × 64 pixels" in browser.until("document.querySelector('dialog').innerText")
    browser.press("z")
    other = "document.querySelector('dialog img').src === right.src"
    assert browser.until(other)
    browser.picture("label-enlarged-dark" if dark else "label-enlarged")
    browser.driver.execute_script("document.querySelector('dialog').close()")
    browser.driver.find_element("css selector", "[data-choice=tie]").click()
    browser.until("document.getElementById('count').textContent === '1 of 24'")
    assert browser.complaints() == []


def test_long_captions_and_odd_shapes_leave_the_buttons_in_sight(browser, serve, tmp_path):
    """And what is transparent is shown over white in the dark, as training sees it."""
    images = [Image.new("RGBA", size, (255, 0, 0, 0)) for size in ((20, 400), (600, 30))]
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "PNG")
    row = {f"jpg_{k}": [file.getvalue()] for k, file in enumerate(files)}
    pq.write_table(pa.table({"caption": ["x" * 2000], **row}), tmp_path / "odd.parquet")
    page = serve(tmp_path / "odd.parquet", tmp_path / "labels.sqlite")
    for size in ((1280, 900), (390, 900)):
        browser.open(f"{page.address}/label?labeller=me", *size, dark=True)
        ready(browser)
        assert browser.overflow() == 0
        for side in ("left", "right"):
            button = browser.driver.find_element("css selector", f"[data-choice={side}]").rect
            assert button["y"] + button["height"] <= size[1]
            shown = browser.driver.find_element("id", side).rect
            assert shown["height"] < shown["width"] or shown["width"] <= 30  # white is not wider
        paper = "getComputedStyle(document.getElementById('left')).backgroundColor"
        assert browser.until(paper) == "rgb(255, 255, 255)"


KINDS = [("thumbs", "12t"), ("ratings", "52t")]


@pytest.mark.parametrize(("kind", "keys"), slow_but(KINDS[:1], KINDS))
def test_single_images_by_keys_and_back_through_the_reader(
    browser, serve, write_pairs, tmp_path, capsys, kind, keys
):
    data, labels = write_pairs(tmp_path / "data.parquet", 4), tmp_path / "x.sqlite"
    page = serve(data, labels, kind)
    for size in ((1100, 900, False), (390, 800, True)):
        browser.open(f"{page.address}/label?labeller=me", *size)
        ready(browser)
        assert browser.overflow() == 0
        browser.picture(f"label-{kind}-{size[0]}")
    press(browser, keys[1])
    press(browser, "u")
    for number in range(8):
        path = browser.driver.find_element("id", "left").get_attribute("src")
        warm = warmth(page.get(path.removeprefix(page.address))) > 0
        press(browser, keys[2] if number == 7 else keys[0] if warm else keys[1])
    assert "You have seen all images" in browser.text("ended")
    assert browser.complaints() == []
    with pytest.raises(SystemExit):
        main(["pairs", "export", str(labels), "-o", str(tmp_path / "out.parquet")])
    assert "7 images" in capsys.readouterr().out
    pairs = read_pairs(tmp_path / "out.parquet").pairs
    assert pairs and all(warmth(p.winner) > warmth(p.loser) for p in pairs)
