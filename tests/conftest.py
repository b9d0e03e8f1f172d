"""Shared fixtures; and what this machine cannot run is left out, and named in the last lines.

Tests of pages need a real browser; where there is none, the rest runs.
"""

import os
import shutil
from pathlib import Path

import pytest

# Before torch is imported. The tensors are tiny: threads that spin while they wait cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LEFT_OUT: dict[str, None] = {}  # ids of tests, in order


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, driven by playwright; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, because CI runs as root.
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder of random pipelines, `sd`, `sd-v` (v-prediction) and `xl`, and `data`: 12 pairs. Not to be changed.

    Made in half a second, once in each process of the suite. `runs.arguments` trains on it.
    """
    from pipelines import save_dataset, save_pipeline  # slow imports, which many tests do without

    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    save_pipeline(folder / "sd-v", prediction_type="v_prediction")
    save_pipeline(folder / "xl", xl=True)
    save_dataset(folder / "data" / "train.parquet")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto` (make test): one for each core that this process may use. Each takes up to 2 GB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def pytest_collection_modifyitems(items):
    left_out = [] if BROWSER else [item for item in items if "browser" in item.fixturenames]
    LEFT_OUT.update(dict.fromkeys(item.nodeid for item in left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # in a worker of pytest-xdist: the main process has collected nothing
        session.config.workeroutput["left_out"] = list(LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LEFT_OUT.update(dict.fromkeys(getattr(node, "workeroutput", {}).get("left_out", [])))


def pytest_terminal_summary(terminalreporter):
    for name in LEFT_OUT:
        terminalreporter.write_line(f"LEFT OUT, no Chromium found (apt-get install chromium): {name}")
