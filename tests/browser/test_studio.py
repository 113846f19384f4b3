"""Compare and follow, as a person looks at them."""

import shutil

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_pipeline, pair_file):
    """A finished tiny run with snapshots."""
    from inversion_dpo.run.config import load_config
    from inversion_dpo.run.folder import claim
    from inversion_dpo.training.recipe import train

    folder = tmp_path_factory.mktemp("runs") / "run"
    config = load_config(
        None,
        [
            f"model.path={tiny_pipeline}",
            f"data.pairs={pair_file}",
            "data.holdout=0.25",
            "inversion.steps=5",
            "inversion.batch_size=8",
            "policy.rank=4",
            "training.steps=8",
            "training.batch_size=4",
            "training.eval_every=4",
            "training.learning_rate=1e-3",
            "training.snapshot_every=4",
            "evaluation.sample_steps=3",
        ],
    )
    claim(folder, config)
    train(config, folder)
    return folder


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (400, True)])
def test_compare_and_film_strip(browser, server, run, width, dark):
    browser.open(f"{server(run).address}/compare", width, 900, dark)
    driver = browser.driver
    driver.find_element("id", "go").click()
    browser.until("document.querySelectorAll('#grid .wipe').length === 4")
    assert driver.find_element("id", "which").text == "adapter"
    browser.until("[...document.querySelectorAll('#grid img')].every(i => i.naturalWidth === 64)")
    cut = "getComputedStyle(document.querySelector('.over')).clipPath"
    assert "50%" in browser.until(cut)
    driver.execute_script("slider.value = 20; slider.dispatchEvent(new Event('input'))")
    assert "20%" in browser.until(cut)
    driver.find_element("id", "beside").click()
    assert browser.until(cut) == "none"

    driver.find_element("css selector", "#pick button").click()
    browser.until("document.querySelectorAll('#choices img').length === 2")
    driver.execute_script("document.querySelector('#choices button').click()")
    browser.until("!document.getElementById('film').hidden")
    assert len(driver.find_elements("css selector", "#frames img")) == 6
    assert "dB between" in browser.text("numbers")
    browser.until("again.naturalWidth === 64")
    assert browser.overflow() == 0 and browser.complaints() == []
    browser.picture(f"compare-{width}")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (400, True)])
def test_follow(browser, server, run, width, dark):
    browser.open(f"{server(run).address}/follow", width, 900, dark)
    browser.until("document.querySelectorAll('#panels svg').length >= 6")
    assert browser.text("count").startswith("step 8 of 8") and "finished" in browser.text("count")
    browser.until("document.querySelectorAll('#rows .film').length === 4", 60)
    names = [h.text for h in browser.driver.find_elements("css selector", "#rows h3")]
    assert names == ["reference", "step-000004", "step-000008", "adapter"]
    assert browser.overflow() == 0 and browser.complaints() == []
    browser.picture(f"follow-{width}")


def test_the_curves_grow_without_a_reload(browser, server, run, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    browser.open(f"{server(begun).address}/follow")
    browser.until("document.getElementById('count').textContent.startsWith('not training yet')")
    (begun / "metrics.jsonl").write_text("".join(rows[:3]))
    browser.until("document.getElementById('count').textContent.startsWith('step 3 of 8')")
    (begun / "metrics.jsonl").write_text("".join(rows[:6]) + rows[6][:9])  # torn: being written
    browser.until("document.getElementById('count').textContent.startsWith('step 6 of 8')")
    line = "document.querySelector('#panels polyline').getAttribute('points').split(' ').length"
    assert browser.until(line) == 6
    shutil.copytree(run / "snapshots", begun / "snapshots")
    browser.until("document.querySelectorAll('#rows .film').length === 3", 60)
    assert browser.complaints() == []


def test_what_the_data_says_is_shown_as_text(browser, server, write_pairs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    evil = "<img src=x onerror=\"document.title='owned'\">"
    rows = pq.read_table(write_pairs(tmp_path / "pairs.parquet", 4)).to_pylist()
    rows = [row | {"caption": evil} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "evil.parquet")
    served = server(tmp_path / "evil.parquet", "--labels", tmp_path / "labels.sqlite")
    browser.open(f"{served.address}/label")
    browser.until("document.getElementById('label').dataset.shown === '0'")
    assert browser.text("caption") == evil
    browser.open(f"{served.address}/compare")
    prompt = browser.driver.find_element("id", "prompt")
    assert prompt.get_attribute("value") == evil
    assert "owned" not in browser.driver.title and browser.complaints() == []
