"""The whole loop: sample pairs, label them by key presses that prefer warm colours, train, look.

    python examples/warm_labels.py --output runs/warm

Needs the extra [web], selenium, and Chromium with its driver (Debian: chromium, chromium-driver).
Chromium opens the page of `inversion-dpo web`; for each pair the script takes a picture of what
the window shows, and presses 1 or 2 for the image with more red than blue, t where they hardly
differ. It knows no score and no seed. Then the labels are exported, a policy is trained on them,
and reference and policy are compared on held-out prompts from the same noise. With --rounds 2 the
policy's own samples are labelled the same way, and a second policy is trained on from it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

SETTINGS = ("objective.t_min=0.7", "training.steps=60", "training.snapshot_every=20")
# ... of which the first two were chosen on validation prompts; docs/diary.md says what was tried
TIE = 6.0  # red less blue, of 255: a smaller difference is hardly seen
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--window-size=1100,900",
)


def command(*arguments: object) -> list[str]:
    """``inversion-dpo ...`` of this Python."""
    return [sys.executable, "-m", "inversion_dpo", *map(str, arguments)]


def run(*arguments: object) -> None:
    """Say the command, run it."""
    print("$ inversion-dpo", *arguments, flush=True)
    subprocess.run(command(*arguments), check=True)


def chromium(profile: str) -> Any:
    """Open a headless window."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        raise SystemExit("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options, Service(driver))


def warmth(window: Any, side: str) -> float:
    """Red less blue, the mean over the picture of one image as the window shows it."""
    picture = window.find_element("id", side).screenshot_as_png
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)
    red, _, blue = pixels.mean((0, 1))
    return float(red - blue)


def key_for(window: Any) -> str:
    """1 if the left image is warmer, 2 if the right one is, t if that is hardly seen."""
    difference = warmth(window, "left") - warmth(window, "right")
    if abs(difference) < TIE:
        return "t"
    return "1" if difference > 0 else "2"


@contextmanager
def page(*arguments: object) -> Iterator[tuple[Any, str]]:
    """`inversion-dpo web ...` and a window: (window, address)."""
    serving = subprocess.Popen(
        command("web", *arguments, "--port", 0), stdout=subprocess.PIPE, text=True
    )
    try:
        found = (re.search(r"open (http\S+)/ ", line) for line in serving.stdout or ())
        address = next(match[1] for match in found if match)
        with tempfile.TemporaryDirectory() as profile:
            window = chromium(profile)
            try:
                yield window, address
            finally:
                window.quit()
    finally:
        serving.terminate()
        serving.wait()


def save(window: Any, path: Path) -> None:
    """Save what the window shows."""
    window.save_screenshot(str(path))
    Image.open(path).convert("RGB").save(path, optimize=True)


def until(window: Any, script: str) -> None:
    """Wait for a JavaScript expression to be true."""
    WebDriverWait(window, 120, 0.02).until(lambda w: w.execute_script(f"return {script}"))


def label(pairs: Path, labels: Path, picture: Path) -> Counter[str]:
    """Press a key for every pair; returns which keys were pressed how often."""
    pressed: Counter[str] = Counter()
    with page(pairs, "--labels", labels) as (window, address):
        window.get(f"{address}/label?labeller=me")
        while True:
            until(window, f"document.getElementById('label').dataset.shown === '{pressed.total()}'")
            if not window.find_element("id", "pair").is_displayed():
                return pressed
            if pressed.total() == 5:
                save(window, picture)
            key = key_for(window)
            ActionChains(window, duration=0).send_keys(key).perform()
            pressed[key] += 1


def look(run_folder: Path, output: Path) -> None:
    """Pictures of the pages on which the run is followed and compared."""
    with page(run_folder) as (window, address):
        window.set_window_size(1100, 1250)
        window.get(f"{address}/follow")
        until(window, "document.body.dataset.rounds > 0")
        save(window, output / "follow.png")
        window.set_window_size(1100, 1600)
        window.get(f"{address}/compare")
        window.find_element("id", "go").click()
        until(window, "document.querySelectorAll('#grid .over').length === 4")
        window.find_element("css selector", "#pick button").click()
        until(window, "document.querySelectorAll('#choices img').length === 2")
        window.execute_script("document.querySelector('#choices button').click()")
        until(window, "!film.hidden && again.naturalWidth > 0")
        window.execute_script("scrollTo(0, 0)")
        save(window, output / "compare.png")


def share_warm(run_folder: Path) -> dict[str, Any]:
    """Share of held-out samples whose ground is nearer to warm than to cool, and its gain.

    The interval is a 95% bootstrap over prompts of the paired difference.
    """
    table = pq.read_table(run_folder / "per_prompt.parquet")
    sides = ("reference", "policy")
    warm = {who: table[f"{who}.warmth"].to_numpy() > 0.5 for who in sides}
    gain = warm["policy"].astype(float) - warm["reference"]
    rng = np.random.default_rng(0)
    means = gain[rng.integers(0, len(gain), (10_000, len(gain)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    shares = {who: round(float(values.mean()), 3) for who, values in warm.items()}
    interval = [round(float(low), 3), round(float(high), 3)]
    return {**shares, "gain": round(float(gain.mean()), 3), "interval": interval}


def found(run_folder: Path, pressed: Counter[str]) -> dict[str, Any]:
    """Tell what a round came to, on held-out prompts, over the model before all rounds."""
    metrics = json.loads((run_folder / "metrics.json").read_text())
    kept = ("warmth", "sg_iou", "entity_iou")
    return {
        "keys": dict(pressed),
        "share of warm grounds": share_warm(run_folder),
        **{k: {m: round(v, 3) for m, v in metrics[k].items()} for k in kept},
        "win rate": metrics["win_rate"],
    }


def main() -> None:
    """Sample, label, export, train, evaluate; prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/warm"))
    parser.add_argument("--pairs", type=int, default=36)
    parser.add_argument("--prompts", type=int, default=200, help="held-out ones")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="KEY=VALUE of the training")
    asked = parser.parse_args()
    out = asked.output
    pairs, labels, labelled = out / "pairs.parquet", out / "labels.sqlite", out / "labelled.parquet"
    run("pairs", "sample", "-o", pairs, "--count", asked.pairs, "--seed", 10_000 * asked.seed)
    pressed = label(pairs, labels, out / "labelling.png")
    print("keys pressed:", dict(pressed))
    run("pairs", "export", labels, "-o", labelled)
    settings = (f"data.pairs={labelled}", f"training.seed={asked.seed}", *SETTINGS, *asked.settings)
    run("train", "-o", out / "run", *settings)
    run("evaluate", out / "run", f"evaluation.limit={asked.prompts}")
    result = found(out / "run", pressed)
    look(out / "run", out)
    for number in range(2, asked.rounds + 1):
        own = out / "run" / f"round-{number}"
        again = (
            "demo",
            "-o",
            out / "run",
            "--rounds",
            number,
            "--people",
            asked.pairs,
            *settings,
            f"evaluation.limit={asked.prompts}",
        )
        run(*again)  # samples, and waits for labels
        there = own / "pairs"
        pressed = label(there / "samples.parquet", there / "labels.sqlite", out / "again.png")
        run(*again)
        result[f"round {number}"] = found(own, pressed)
    text = json.dumps(result, indent=1)
    (out / "result.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
