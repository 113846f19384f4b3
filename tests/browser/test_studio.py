"""Compare and follow, as a person looks at them."""

import json
import shutil

import pytest

from inversion_dpo.run.config import to_yaml
from inversion_dpo.run.disk import read_json
from tests.slow import slow_but

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_run, tiny_config):
    """A finished tiny run with snapshots."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "run")
    given = ("training.snapshot_every=4", "evaluation.guidance_scale=1")
    (folder / "config.yaml").write_text(to_yaml(tiny_config(*given)))
    return folder


@pytest.fixture(scope="module")
def page(run, serve):
    """One page of the finished run for all tests that leave it as it is."""
    return serve(run)


SIZES = [(1280, False), (390, True)]


@pytest.mark.parametrize(("width", "dark"), slow_but(SIZES[:1], SIZES))
def test_compare_and_film_strip(browser, page, width, dark):
    browser.open(f"{page.address}/compare", width, 900, dark)
    driver = browser.driver
    assert len(browser.value("prompts").splitlines()) == 4  # the run's own
    driver.find_element("id", "go").click()
    browser.until("document.querySelectorAll('#grid .wipe').length === 4")
    assert "right of it adapter" in browser.text("legend")
    browser.until("[...document.querySelectorAll('#grid img')].every(i => i.naturalWidth === 64)")
    cut = "getComputedStyle(document.querySelector('.over')).clipPath"
    assert "50%" in browser.until(cut)
    driver.execute_script("slider.value = 20; slider.dispatchEvent(new Event('input'))")
    assert "20%" in browser.until(cut)
    browser.picture(f"compare-{width}")
    driver.find_element("id", "beside").click()
    assert browser.until(cut) == "none"

    driver.find_element("css selector", "#pick button").click()
    browser.until("document.querySelectorAll('#choices img').length === 2")
    driver.execute_script("document.querySelector('#choices button').click()")
    browser.until("!document.getElementById('film').hidden")
    assert len(driver.find_elements("css selector", "#frames img")) == 6
    assert "dB between" in browser.text("numbers")
    browser.until("again.naturalWidth === 64")
    browser.picture(f"film-{width}")
    assert browser.overflow() == 0 and browser.complaints() == []


def test_blind_on_request_hides_which_is_which_until_it_is_revealed(browser, page):
    browser.open(f"{page.address}/compare", 1280)
    driver = browser.driver
    driver.execute_script("side.value = 32")
    driver.find_element("id", "go").click()
    browser.until("document.querySelectorAll('#grid .wipe').length === 4")
    driver.find_element("id", "blind").click()
    shown = "[...document.querySelectorAll('#grid img')].every(i => i.naturalWidth === 32)"
    browser.until(shown)
    cuts = "[...document.querySelectorAll('#grid img')].map(i => getComputedStyle(i).clipPath)"
    assert set(browser.until(cuts)) == {"none"}  # a cut image would be the reference
    words = "grid.innerText + legend.innerText"
    assert not any(word in browser.until(words) for word in ("adapter", "reference"))
    driver.execute_script("document.querySelector('#grid img').click()")
    assert browser.until("document.querySelector('dialog .names').innerText") == "A\nB"
    assert "32 × 32 pixels" in browser.until("document.querySelector('dialog').innerText")
    browser.picture("compare-blind-enlarged")
    driver.execute_script("document.querySelector('dialog').close()")
    driver.find_element("id", "reveal").click()
    grid = browser.until("grid.innerText")
    assert "A = adapter, B = reference" in grid or "A = reference, B = adapter" in grid
    browser.picture("compare-blind")
    driver.find_element("id", "go").click()  # new samples are hidden again
    browser.until("!go.disabled && document.querySelectorAll('#grid .wipe').length === 4")
    assert "A =" not in browser.until("grid.innerText")
    driver.execute_script("model.value = 'reference'")
    driver.find_element("id", "go").click()  # one image has no sides and no secret
    browser.until("document.querySelectorAll('#grid img').length === 4")
    assert browser.text("legend").startswith("The reference.")
    assert not driver.find_element("id", "blind").is_displayed()
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "dark"), slow_but(SIZES[1:], SIZES))
def test_follow(browser, page, width, dark):
    browser.open(f"{page.address}/", width, 900, dark)
    browser.until("document.querySelectorAll('#panels svg').length === 8")
    assert browser.driver.current_url.endswith("/follow") and browser.text("phase") == "Trained"
    assert browser.text("count").startswith("8 of 8 steps")
    browser.until("document.querySelectorAll('#rows figure').length === 16", 60)
    row = browser.driver.find_element("css selector", "#rows .row").text.split("\n")
    assert row[1:] == ["reference", "step-000004", "step-000008", "adapter"] and len(row[0]) > 5
    key = "document.querySelectorAll('#panels figcaption')[1].innerText"
    assert "held out" in browser.until(key) and "at step" not in browser.until(key)
    browser.driver.execute_script(
        "const box = panels.querySelectorAll('svg')[1]; const at = box.getBoundingClientRect();"
        "box.dispatchEvent(new PointerEvent('pointermove', {clientX: at.left + at.width * 0.6}))"
    )
    assert "at step 4" in browser.until(key)
    browser.picture(f"follow-{width}")
    browser.driver.execute_script("rows.scrollIntoView()")
    browser.picture(f"follow-samples-{width}")
    assert browser.overflow() == 0 and browser.complaints() == []


def test_judging_blind_by_keys_leaves_the_win_rate_in_the_run(browser, page, run, tmp_path):
    browser.open(f"{page.address}/blind?labeller=anna", 390, 800, True)
    browser.until("!pair.hidden")
    browser.picture("blind-narrow-dark")
    assert browser.overflow() == 0
    browser.open(f"{page.address}/blind?labeller=anna", 1280)
    for number in range(4):
        browser.until(
            f"+document.getElementById('label').dataset.shown === {number} && !pair.hidden"
        )
        if number == 1:
            browser.picture("blind")
        browser.press("12tb"[number])
    browser.until("!document.getElementById('end').hidden")
    browser.until("document.getElementById('verdict').textContent")
    found = read_json(run / "people.json")
    assert found["pairs"] == 4 and found["even"] == 2 and found["wins"] + found["losses"] == 2
    assert f"{round(100 * found['win_rate'])}% of 4 pairs" in browser.text("verdict")
    browser.picture("blind-end")
    assert browser.complaints() == []

    from inversion_dpo import evaluate, report
    from inversion_dpo.evaluation.people import write_people

    shutil.copytree(run, tmp_path / "judged")
    assert evaluate(tmp_path / "judged")["people"] == found
    value, *interval = (f"{100 * found[k]:.1f}" for k in found if k.startswith("win_rate"))
    page_text = report(tmp_path / "judged").read_text()
    assert "Judged by people" in page_text and f"better one in {value}% " in page_text
    assert f"[{', '.join(interval)}]" in page_text
    metrics = tmp_path / "judged" / "metrics.json"
    assert json.loads(metrics.read_text())["people"] == found
    write_people(tmp_path / "judged", found, {}, 0)  # all labels were taken back
    assert "Judged by people" not in report(tmp_path / "judged").read_text()
    assert "people" not in json.loads(metrics.read_text())


@pytest.mark.slow  # it waits for the page to look again
def test_the_curves_grow_without_a_reload(browser, serve, run, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    browser.open(f"{serve(begun).address}/follow")
    browser.until("document.getElementById('phase').textContent === 'Waiting'")
    (begun / "metrics.jsonl").write_text("".join(rows[:3]))
    browser.until("document.getElementById('count').textContent.startsWith('3 of 8 steps')")
    (begun / "metrics.jsonl").write_text("".join(rows[:6]) + rows[6][:9])  # torn: being written
    browser.until("document.getElementById('count').textContent.startsWith('6 of 8 steps')")
    line = "document.querySelector('#panels polyline').getAttribute('points').split(' ').length"
    assert browser.until(line) == 6
    shutil.copytree(run / "snapshots", begun / "snapshots")
    assert browser.driver.find_elements("css selector", "#rows figure") == []
    browser.driver.find_element("id", "draw").click()  # not by itself: the run needs the machine
    browser.until("document.querySelectorAll('#rows figure').length === 12", 60)
    assert browser.complaints() == []


def test_what_the_data_says_is_shown_as_text(browser, serve, write_pairs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    evil = "<img src=x onerror=\"document.title='owned'\">"
    rows = pq.read_table(write_pairs(tmp_path / "pairs.parquet", 4)).to_pylist()
    rows = [row | {"caption": evil} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "evil.parquet")
    served = serve(tmp_path / "evil.parquet", tmp_path / "labels.sqlite")
    browser.open(f"{served.address}/label?labeller=me")
    browser.until("document.getElementById('label').dataset.shown === '0'")
    assert browser.text("caption") == evil
    browser.open(f"{served.address}/compare")
    assert browser.value("prompts") == evil
    assert "owned" not in browser.driver.title and browser.complaints() == []
