"""What a run says of its surroundings: versions, devices, commit; beside its config, whatever it ran on."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from runs import SCRIPTS, arguments, run_here

import ncp
from ncp.common import environment as module
from ncp.common.config import read_yaml
from ncp.common.environment import environment


@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_script_writes_it_beside_the_config(assets, tmp_path, kind):
    out = tmp_path / "out"
    argv = arguments(assets, out, "--max_train_steps", "1")
    run_here(kind, argv)
    written = read_yaml(out / "environment.yaml")
    assert (out / "config.yaml").is_file() and written == environment()
    assert written["ncp"] == ncp.__version__ and written["python"] == platform.python_version()
    for library in ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes"):
        assert written[library] == version(library)
    assert {"commit", "platform", "cuda", "gpus", "cpu"} <= written.keys()


def test_a_resumed_run_writes_what_it_runs_on_now(assets, tmp_path):
    out = tmp_path / "out"
    run_here("sft", arguments(assets, out, "--max_train_steps", "1"))
    (out / "environment.yaml").write_text("python: 2.7\n")
    run_here("sft", arguments(assets, out, "--resume_from_checkpoint", "latest"))
    assert read_yaml(out / "environment.yaml") == environment()


def test_what_is_not_there_is_null(monkeypatch):
    monkeypatch.setattr(module, "LIBRARIES", ("torch", "no-such-library"))
    found = environment()
    assert found["torch"] and found["no-such-library"] is None
    assert (found["cuda"] is None) == (found["gpus"] == [])


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.invalid"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    if shutil.which("git") is None:
        pytest.skip("no git")
    package = tmp_path / "ncp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(ncp, "__file__", str(package / "__init__.py"))
    assert environment()["commit"] is None  # no checkout
    git("init", "--quiet")
    git("add", "ncp")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is not what is asked for")
    commit = git("rev-parse", "HEAD").strip()
    assert environment()["commit"] == commit and len(commit) == 40
    Path(package / "__init__.py").write_text("changed = True")
    assert environment()["commit"] == f"{commit}+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None  # no git
