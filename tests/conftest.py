"""Shared fixtures; and what this machine cannot run is left out, and named in the last lines.

Tests of pages need a real browser, tests of a full disk one that may be mounted; where there is none, the rest runs.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

# Before torch is imported. The tensors are tiny: threads that spin while they wait cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NO_BROWSER = "no Chromium found (apt-get install chromium)"
NO_MOUNT = "no file system may be mounted (root on Linux may)"
LEFT_OUT: dict[str, str] = {}  # reasons by ids of tests, in order


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
    """A folder of random pipelines and `data`, 12 pairs. Not to be changed.

    `sd`, `sd-v` (v-prediction), `xl`, `sd3` without T5, and `sd3-t5` with it.

    Made in half a second, once in each process of the suite. `runs.arguments` trains on it.
    """
    from pipelines import save_dataset, save_pipeline, save_sd3_pipeline  # slow imports, which many tests do without

    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    save_pipeline(folder / "sd-v", prediction_type="v_prediction")
    save_pipeline(folder / "xl", xl=True)
    save_sd3_pipeline(folder / "sd3")
    save_sd3_pipeline(folder / "sd3-t5", t5=True)
    save_dataset(folder / "data" / "train.parquet")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(mount(folder), check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(folder: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]


def may_mount() -> bool:
    if shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(mount(Path(folder)), capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto` (make test): one for each core that this process may use. Each takes up to 2 GB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def pytest_collection_modifyitems(items):
    with_fixture = {name: [i for i in items if name in i.fixturenames] for name in ("browser", "small_disk")}
    reasons = {} if BROWSER else dict.fromkeys(with_fixture["browser"], NO_BROWSER)
    if with_fixture["small_disk"] and not may_mount():
        reasons |= dict.fromkeys(with_fixture["small_disk"], NO_MOUNT)
    LEFT_OUT.update({item.nodeid: reason for item, reason in reasons.items()})
    items[:] = [item for item in items if item not in reasons]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # in a worker of pytest-xdist: the main process has collected nothing
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter):
    for name, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"LEFT OUT, {reason}: {name}")
