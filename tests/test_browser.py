"""Notebooks as a reader meets them: JupyterLab in headless Chromium runs all cells, and every control redraws its picture.

What it takes: settings that keep Lab quiet and all cells in the page; waiting for the page's own connection to the kernel before the
run; reading a picture's address before the key is pressed. Screenshots of failures are kept in tests/out.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

FOLDER = Path(__file__).parents[1] / "notebooks"
OUT = Path(__file__).parent / "out"
TOKEN = "a-reader"
WORDS = "a blue star at night"
SECONDS = 1000  # in milliseconds, for Playwright
PATIENCE = 600 * SECONDS  # for all cells of a notebook on a busy machine
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
RUN_ALL = """async () => {
    window.ran = false
    const app = window.jupyterapp
    const panel = app.shell.currentWidget
    await panel.context.ready
    await panel.sessionContext.ready
    await panel.sessionContext.session.kernel.info
    await app.commands.execute('notebook:clear-all-cell-outputs')
    app.commands.execute('notebook:run-all-cells').then(() => { window.ran = true })
}"""
COUNTS = "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.filter(c => c.cell_type == 'code').map(c => c.execution_count)"


@pytest.fixture(scope="module")
def lab(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab over copies of the notebooks."""
    home = tmp_path_factory.mktemp("lab")
    for path in FOLDER.glob("*.ipynb"):
        shutil.copy(path, home)
    for name, settings in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    variables = {
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"],
            cwd=home, env=os.environ | {name: str(home / folder) for name, folder in variables.items()},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, f"{address}/api?token={TOKEN}", home / "lab.log")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the server's own group, its kernels among it
        server.wait(timeout=30)


def wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def page(chromium: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        failed = request.session.testsfailed
        yield page
        if request.session.testsfailed > failed:
            OUT.mkdir(exist_ok=True)
            page.screenshot(path=OUT / f"{request.node.name}.png")
        browser.close()


def run_all(page: Page, lab: str, name: str) -> None:
    page.goto(f"{lab}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120 * SECONDS)
    page.evaluate(RUN_ALL)
    page.wait_for_function("() => window.ran", timeout=PATIENCE)
    errors = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.all_inner_texts() == []
    counts = page.evaluate(COUNTS)
    assert counts == list(range(1, len(counts) + 1))


def moved(slider: Locator) -> str:
    """Move a slider by one with the keyboard; what it then says."""
    readout, handle = slider.locator(".widget-readout"), slider.locator(".noUi-handle")
    before = readout.inner_text()
    handle.scroll_into_view_if_needed()
    handle.focus()
    at_the_top = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.press("ArrowLeft" if at_the_top else "ArrowRight")
    expect(readout).not_to_have_text(before, timeout=30 * SECONDS)
    return f"{slider.locator('.widget-label').inner_text()} {float(readout.inner_text()):g}"


def typed(line: Locator) -> str:
    """Write into a line of text; what it then says."""
    line.locator("input").fill(WORDS)
    line.locator("input").press("Enter")
    return f"{line.locator('.widget-label').inner_text()} {WORDS!r}"


def follows(explorer: Locator, control: Locator, use: Callable[[Locator], str]) -> None:
    """Use a control; the picture changes, and the note says that this is what it shows."""
    picture = explorer.locator("img.widget-image")
    before = picture.get_attribute("src") or ""
    said = use(control)
    expect(explorer.locator(".widget-label", has_text="shown:")).to_contain_text(said, timeout=PATIENCE)
    expect(picture, f"{said}: the picture should change").not_to_have_attribute("src", before)


def explore(explorer: Locator) -> None:
    """Every slider and every line of text redraws the picture, and Reset goes back."""
    first = explorer.locator(".widget-label", has_text="shown:").inner_text()
    for slider in explorer.locator(".widget-hslider").all():
        follows(explorer, slider, moved)
    for line in explorer.locator(".widget-text").all():
        follows(explorer, line, typed)
    explorer.get_by_role("button", name="Reset").click()
    expect(explorer.locator(".widget-label", has_text="shown:")).to_have_text(first, timeout=PATIENCE)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_all_cells_run_and_every_control_redraws_its_picture(page: Page, lab: str, name: str) -> None:
    run_all(page, lab, name)
    explorers = page.locator(".minisd3-explorer").all()
    assert explorers, "every notebook has something to explore"
    for explorer in explorers:
        explore(explorer)
