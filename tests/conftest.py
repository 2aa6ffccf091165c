"""What tests share: no test asks the network for weights, and browser tests get the machine's Chromium or are left out."""

import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The path of a Chromium; without one the browser tests are skipped, with a line that says how to add it."""
    for name in CHROMIUMS:
        if path := shutil.which(name):
            return Path(path)
    pytest.skip("browser tests are left out: no Chromium here. To add it: apt-get install chromium (macOS: brew install --cask chromium)")
