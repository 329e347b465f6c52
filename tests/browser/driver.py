"""A JupyterLab of the test's own, and a headless Chromium that looks at it.

Both are processes of the test: started in sessions of their own, ended with it, every wait bounded. The server listens
on loopback, keeps its files in a temporary directory, and asks nobody for news; the browser's requests are recorded, so
that a test can say that none left the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import nbformat
import psutil
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

T = TypeVar("T")

WAIT_S = 60.0
POLL_S = 0.05
# What an element that is just being drawn or replaced answers.
NOT_YET = (ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--window-size=1400,1000",
)

# Pairs of texts that are both visible and share a piece of the screen; texts above each other on purpose are not text.
OVERLAPS = """
const shown = [...document.querySelectorAll(".gs-view :is(text, h2, h3, dt, dd, time, b, .gs-tag, .gs-text, .gs-chip,"
    + " .gs-group-name, .gs-lead, .gs-term, .gs-commit, .gs-replica-name, .gs-lag, .gs-groups-head > *,"
    + " .gs-facts, .gs-most, .gs-status, .gs-tile-words span, .gs-legend > span, .gs-ask > span, .gs-button)")]
  .filter((e) => e.textContent && e.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
  .map((e) => [e, e.getBoundingClientRect()])
  .filter(([e, b]) => {
    if (b.width < 1) return false;
    const box = e.closest(".gs-detail-body, .gs-events-list, .gs-groups-list")?.getBoundingClientRect();
    return !box || (b.top >= box.top - 1 && b.bottom <= box.bottom + 1);
  });
const found = [];
shown.forEach(([e, a], i) => shown.slice(i + 1).forEach(([f, b]) => {
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (x > 1.5 && y > 3 && !e.contains(f) && !f.contains(e)) found.push(`${e.textContent} / ${f.textContent}`);
}));
return found;
"""

SMALLEST = """
return Math.min(...[...document.querySelectorAll(".gs-view *")]
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
  .map((e) => parseFloat(getComputedStyle(e).fontSize)));
"""

OUTSIDE = """
const frame = document.querySelector(".gs-frame").getBoundingClientRect();
return [...document.querySelectorAll(".gs-view :is(.gs-chip, .gs-tile, section, .gs-stage, .gs-ask, .gs-ask *)")]
  .filter((e) => { const b = e.getBoundingClientRect(); return b.left < frame.left - 1 || b.right > frame.right + 1; })
  .map((e) => e.className);
"""


def wait_for(what: str, condition: Callable[[], T], timeout_s: float = WAIT_S) -> T:
    """Poll until the condition is true and return its value; an element that was just replaced is asked for again."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(*NOT_YET):
            if value := condition():
                return value
        assert time.monotonic() < deadline_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(POLL_S)


def missing() -> str | None:
    """Why no browser test can run here, or ``None``."""
    if not _chromium():
        return "there is no chromium: apt-get install chromium chromium-driver"
    if not shutil.which("chromedriver"):
        return "there is no chromedriver: apt-get install chromium-driver"
    return None


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile. ``SE_OFFLINE``: selenium must not fetch a driver."""
    os.environ["SE_OFFLINE"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = _chromium() or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(shutil.which("chromedriver"), log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(WAIT_S)
        driver.set_script_timeout(WAIT_S)
        yield driver
    finally:
        driver.quit()


def requests_of(driver: webdriver.Chrome) -> list[str]:
    """The addresses asked for since the last call."""
    urls = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            urls.append(message["params"]["url"])
    return urls


def foreign(urls: list[str]) -> list[str]:
    """Those that leave the machine."""
    local = ("127.0.0.1", "localhost", "::1")
    return [
        url
        for url in urls
        if urlsplit(url).scheme not in ("data", "blob", "about", "chrome") and urlsplit(url).hostname not in local
    ]


def errors_of(driver: webdriver.Chrome) -> list[str]:
    """What the console calls severe, since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


class Lab:
    """A running JupyterLab: ``url``, ``token``, ``root`` (the directory it serves)."""

    def __init__(self, base: Path) -> None:
        self.root = base / "root"
        self.root.mkdir(parents=True)
        self.token = secrets.token_hex(16)
        self._runtime = base / "runtime"
        self._log = base / "lab.log"
        settings = base / "settings"
        quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
        environment = {
            **os.environ,
            "HOME": str(base),
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_CONFIG_DIR": str(base / "config"),
            "JUPYTER_DATA_DIR": str(base / "data"),
            "JUPYTER_RUNTIME_DIR": str(self._runtime),
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces"),
            "IPYTHONDIR": str(base / "ipython"),
        }
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            *("--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={self.root}"),
            *("--LabApp.extension_manager=readonly", "--expose-app-in-browser"),
        ]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self.url = wait_for("JupyterLab to tell its address", self._address)
            wait_for("JupyterLab to answer", lambda: self.api("status"))
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str | None:
        assert self.process.poll() is None, f"JupyterLab ended:\n{self._log.read_text()[-2000:]}"
        for path in self._runtime.glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):
                return str(json.loads(path.read_text())["url"])
        return None

    def api(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Call Jupyter's REST interface; ``None`` while the server does not listen."""
        request = urllib.request.Request(
            f"{self.url}api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
            data=None if body is None else json.dumps(body).encode(),
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=WAIT_S) as response:
                text = response.read()
                return json.loads(text) if text else True
        except ConnectionError:
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):
                return None
            raise

    def write(self, name: str, cells: list[str]) -> None:
        """Put a notebook of code cells into the served directory."""
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / name)

    def copy(self, notebooks: Path) -> None:
        """Serve a directory's notebooks as if nobody had run them: a cell that gets its number has just ended."""
        for path in sorted(notebooks.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, self.root / path.name)

    def kernel_of(self, notebook: str) -> str:
        """The id of the kernel that runs a notebook."""
        return next(str(s["kernel"]["id"]) for s in self.api("sessions") if s["path"] == notebook)

    def end_kernel(self, kernel: str) -> None:
        """Shut a kernel down; one that is gone already is fine, one that is just being restarted is asked again."""

        def ended() -> bool:
            try:
                self.api(f"kernels/{kernel}", "DELETE")
            except urllib.error.HTTPError as error:
                return error.code == 404
            return True

        wait_for(f"kernel {kernel} to end", ended)

    def processes_of(self, kernel: str) -> list[psutil.Process]:
        """A kernel's process, and after it all that it started, however deep."""
        for process in psutil.Process(self.process.pid).children():
            if any(kernel in word for word in process.cmdline()):
                return [process, *process.children(recursive=True)]
        raise AssertionError(f"there is no process of kernel {kernel}")

    def stop(self) -> None:
        """End the server and everything of its session; kernels end with it."""
        family = [self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Page:
    """One notebook, open in the browser."""

    def __init__(self, driver: webdriver.Chrome, lab: Lab, name: str) -> None:
        self.driver, self.lab, self.name = driver, lab, name
        driver.get(f"{lab.url}lab/tree/{quote(name)}?reset&token={lab.token}")
        wait_for("the notebook's cells", self.cells)
        self.wait_idle()

    def cells(self) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell")

    def wait_idle(self, timeout_s: float = WAIT_S) -> None:
        """Until the kernel is connected and runs no cell."""
        # The page shows "idle" before the kernel is connected; a cell that is run then is not run at all.
        kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
        ask = f"const k = {kernel}; return k?.connectionStatus === 'connected' && k.status === 'idle'"
        wait_for("an idle kernel", lambda: self.script(ask), timeout_s)

    def run(self, index: int) -> None:
        """Click into a cell and press shift-enter; does not wait for its end."""

        def click() -> bool:
            return self.click(self.cells()[index].find_element(By.CSS_SELECTOR, ".cm-content"))

        wait_for(f"a click into cell {index}", click)
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()

    def run_to_end(self, index: int, timeout_s: float = WAIT_S) -> None:
        """Run a cell and wait until it has its number."""
        before = self.prompt(index)
        self.run(index)

        def ended() -> bool:
            now = self.prompt(index)
            return now not in (before, "[*]:", "[ ]:")

        wait_for(f"cell {index} to end", ended, timeout_s)

    def prompt(self, index: int) -> str:
        return str(self.cells()[index].find_element(By.CSS_SELECTOR, ".jp-InputPrompt").text)

    def errors(self) -> list[str]:
        """What cells raised, as far as it is still shown."""
        query = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
        return [output.text for output in self.find(query)]

    def output(self, index: int) -> str:
        """The text of a cell's outputs; errors are in it."""
        return "\n".join(o.text for o in self.cells()[index].find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output"))

    def command(self, label: str) -> None:
        """Run one of JupyterLab's commands by its id."""
        self.driver.execute_script("return window.jupyterapp.commands.execute(arguments[0])", label)

    def find(self, query: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, query)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def click(self, element: Any) -> bool:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        return True
