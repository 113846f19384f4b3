"""Chromium, headless; the page in a thread, or in a process of its own that can be killed."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Thread

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-features=OptimizationGuideModelDownloading,OptimizationHints,MediaRouter,Translate",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
MISSING = "no Chromium: apt-get install chromium chromium-driver (Debian) runs the browser tests"


class Browser:
    """A window on one page, at the size and in the colours that are asked for."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address, width=1100, height=900, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        colours = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": colours})
        self.driver.get(address)

    def until(self, script, seconds=30):
        """Wait until a JavaScript expression is true; its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        return wait.until(lambda driver: driver.execute_script(f"return {script}"), script)

    def press(self, key):
        """One key, as a person presses it."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(key).perform()

    def text(self, name):
        return self.driver.find_element("id", name).text

    def value(self, name):
        return self.driver.find_element("id", name).get_attribute("value")

    def overflow(self):
        """By how many pixels the page is wider than its window."""
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    def picture(self, name):
        """Save what is seen where SCREENSHOTS says, for the documentation."""
        if folder := os.environ.get("SCREENSHOTS"):
            from PIL import Image

            path = Path(folder) / f"{name}.png"
            self.driver.save_screenshot(str(path))
            Image.open(path).convert("RGB").save(path, optimize=True)

    def complaints(self):
        """Errors that the page raised, a server that is away left out."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "ERR_CONNECTION" not in entry["message"]
        ]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium by its own driver; skipped where there is none, a failure in CI."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail(MISSING) if os.environ.get("CI") == "true" else pytest.skip(MISSING)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, Service(driver))
    yield Browser(started)
    started.quit()


class Place:
    """Where a page is served."""

    port = 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200, path
        body = response.read()
        connection.close()
        return body


class Page(Place):
    """What ``inversion-dpo web`` serves, from a thread of the tests, where it starts at once."""

    def __init__(self, given, labels=None, kind="pairs", settings=()):
        import uvicorn

        from inversion_dpo.cli.label import DEFAULT, QUESTIONS, page_of, subject_of
        from inversion_dpo.web.guard import hosts_for
        from inversion_dpo.web.server import listen

        about = subject_of(str(given), DEFAULT, list(settings), labels, kind)
        asked, hosts = (kind, QUESTIONS[kind]), hosts_for("127.0.0.1", False)
        app, self.closing = page_of(about, 1000, asked, hosts)
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        how = {"log_level": "error", "timeout_graceful_shutdown": 1}
        self.server = uvicorn.Server(uvicorn.Config(app, **how))
        self.thread = Thread(target=self.server.run, args=([self.listening],))
        self.thread.start()

    def close(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.listening.close()
        self.closing()


class Server(Place):
    """``inversion-dpo web`` in a process of its own, always on the same port."""

    def __init__(self, *arguments):
        self.arguments, self.process = [str(a) for a in arguments], None

    def start(self):
        command = [sys.executable, "-m", "inversion_dpo", "web", *self.arguments]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if found := re.search(r"open http://127.0.0.1:(\d+)/", line):
                self.port = int(found[1])
                return self
        raise AssertionError("the page did not start")

    def kill(self):
        """As a power cut does it: no chance to finish anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def serve():
    """Call with what ``Page`` takes; closed at the end of the module."""
    with ExitStack() as ends:
        yield lambda *given, **more: ends.enter_context(closing(Page(*given, **more)))


@pytest.fixture
def server():
    """Call with the arguments of ``inversion-dpo web``; killed at the end of the test."""
    started = []

    def start(*arguments):
        started.append(Server(*arguments).start())
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()
