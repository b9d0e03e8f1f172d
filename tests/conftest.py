"""Tests of pages need a real browser; where there is none, the rest runs, and the last lines say what was left out."""

import os
import shutil

import pytest

# Before torch is imported. The tensors are tiny: threads that spin while they wait cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LEFT_OUT = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, driven by playwright; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, because CI runs as root.
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


def pytest_collection_modifyitems(config, items):
    left_out = [] if BROWSER else [item for item in items if "browser" in item.fixturenames]
    config.stash[LEFT_OUT] = left_out
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter, config):
    for item in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(f"LEFT OUT, no Chromium found (apt-get install chromium): {item.nodeid}")
