"""Pages that are served, and a real browser to look at them with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.integration.mlflow_server import free_port

START_SECONDS = 180
WAIT_SECONDS = 60
MODES = ("light", "dark")


class PageServer:
    """A program of ours that serves a page on this machine; it may reach nothing else."""

    def __init__(self, folder: Path, words: list[str], port: int, forbidden: str = "nothing") -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        guard = [sys.executable, str(ROOT / "tests/integration/serve/only_local.py"), str(folder), forbidden]
        variables = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GRADIO_SERVER_PORT": str(port),
            "PYTHONPATH": "" if forbidden != "nothing" else str(ROOT),
            "TMPDIR": str(folder),
        }
        with (folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                guard + words, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(self.url, timeout=20):
                    return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log
                time.sleep(0.2)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def tried(self) -> str:
        """Addresses on other machines that it wanted to reach."""
        path = self.folder / "tried.txt"
        return path.read_text() if path.exists() else ""

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def start_demo(folder: Path, *words: str) -> PageServer:
    port = free_port()
    return PageServer(folder, ["-m", "serve", "demo", *words, "--port", str(port)], port)


class Browser:
    """Chromium without a window."""

    def __init__(self, downloads: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("no chromium and chromium-driver: scripts/setup.sh installs them")
        selenium = pytest.importorskip("selenium", reason="selenium is not installed")
        del selenium
        from selenium import webdriver

        self.downloads = downloads
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
            options.add_argument(f"--{word}")
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(executable_path=driver)
        )

    def open(self, url: str, width: int = 1280, mode: str = "light") -> None:
        command = self.driver.execute_cdp_cmd
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        command("Emulation.setDeviceMetricsOverride", size)
        command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": mode}]})
        self.driver.get(url)
        self.find("#photo input[type=file]")

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def find(self, selector: str) -> Any:
        return self.wait(lambda: self.all(selector), selector)[0]

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def wait(self, condition: Callable[[], Any], what: str = "") -> Any:
        """What `condition` gives, as soon as it is true; parts of a page may be replaced while it looks."""
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{what or 'it'} did not come; the page says: {self.texts('body')}")

    def tab(self, name: str) -> None:
        self.wait(lambda: [e for e in self.all("button[role=tab]") if e.text == name], name)[0].click()

    def upload(self, selector: str, *files: Path) -> None:
        self.find(f"{selector} input[type=file]").send_keys("\n".join(map(str, files)))

    def script(self, text: str) -> Any:
        return self.driver.execute_script(text)

    def requests(self) -> list[str]:
        """Addresses of all that was asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self.driver.quit()
