"""Nothing survives what started it; what a launcher says is taken seriously; nothing of Unix is needed to start."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import BROWSER
from pipelines import SIDE
from runs import arguments, launch
from support import ROOT, alive, descendants, python, run, started, torchrun, wait_for

from ncp.common import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descendants are read from /proc")


def kill_and_see(parent: subprocess.Popen, stop: bool = False) -> None:
    """Kills a process; then all that it has started must end. stop: even what can do nothing for it, being stopped."""
    family = descendants(parent.pid)
    assert family
    for pid in family if stop else ():
        os.kill(pid, signal.SIGSTOP)
    os.kill(parent.pid, signal.SIGKILL)
    try:
        assert wait_for(lambda: not alive(family), 60), f"still there: {alive(family)}"
    finally:
        for pid in alive(family):
            os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------- children


SLEEP = "import time; time.sleep(3600)"
TIED = f"import subprocess, sys; from ncp.common.processes import tied; c = [sys.executable, '-c', '{SLEEP}']\n"
TIED += "p = subprocess.Popen(tied(c)); print(p.pid, flush=True); {}"


@pytest.mark.parametrize("end", [f"{SLEEP}", "raise ValueError", "__import__('os')._exit(0)"])
def test_a_tied_command_ends_with_its_parent_however_that_ends(end):
    with started([sys.executable, "-c", TIED.format(end)], PYTHONPATH=str(ROOT)) as parent:
        child = int(parent.stdout.readline())
        if end == SLEEP:
            assert wait_for(lambda: alive({child}))
            os.kill(parent.pid, signal.SIGKILL)
        assert wait_for(lambda: not alive({child}))


def test_a_tied_command_whose_parent_is_gone_already_does_not_start(tmp_path):
    gone = python("-c", "import os; print(os.getpid())")
    command = processes.tied([sys.executable, "-c", f"open('{tmp_path / 'ran'}', 'w')"])
    command[command.index(str(os.getpid()))] = gone.stdout.strip()
    assert subprocess.run(command).returncode == 1 and not (tmp_path / "ran").exists()


def test_a_tied_command_gives_its_status_and_its_words():
    done = run([sys.executable, "-c", "import sys; print(sys.argv); sys.exit(7)", "a b", ""])  # which ties it
    assert done.returncode == 7 and done.stdout == "['-c', 'a b', '']\n"


def test_a_failing_test_ends_the_group_that_it_started():
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
    code += "print(p.pid, flush=True); p.wait()"
    with pytest.raises(subprocess.TimeoutExpired), started([sys.executable, "-c", code]) as process:
        grandchild = int(process.stdout.readline())
        process.communicate(timeout=0.1)
    assert wait_for(lambda: not alive({grandchild}))


def test_a_benchmarks_workers_end_with_it():
    code = "import sys, time; sys.path.insert(0, 'benchmarks'); import step\n"
    code += "w = step.Worker('cached', 'tiny', sys.argv[1:]); print('built', flush=True); time.sleep(3600)"
    argv = ["--config", "configs/tiny_ncp_dpo.yaml", "--mixed_precision", "no"]
    with started([sys.executable, "-c", code, *argv]) as parent:
        assert parent.stdout.readline() == "built\n"
        kill_and_see(parent, stop=True)


def test_loader_workers_end_with_a_killed_run(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "99999", "--checkpointing_steps", "1")
    with started([sys.executable, "train_ncp_sft.py", *argv, "--dataloader_num_workers", "2"]) as run:
        assert wait_for(lambda: (tmp_path / "out" / "checkpoint-1").is_dir())
        kill_and_see(run, stop=True)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_ranks_end_with_a_killed_launcher_as_by_a_signal(assets, tmp_path, launcher):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "99999", "--checkpointing_steps", "1")
    prefix = {
        "torchrun": torchrun(2),
        "accelerate": ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"],
    }
    command = [sys.executable, *prefix[launcher], "train_ncp_sft.py", *argv, "--checkpoints_total_limit", "1"]
    with started(command, ACCELERATE_USE_CPU="true") as agent:
        assert wait_for(lambda: list((tmp_path / "out").glob("checkpoint-*"))), agent.stderr.read()
        kill_and_see(agent)
        said = agent.stderr.read()
    if launcher == "accelerate":  # of two ranks the second signal may meet one that is on its way out
        assert "stopped by SIGTERM at step" in said, said


def test_a_run_outlives_the_shell_that_started_it(tmp_path):
    code = "import sys, time; from ncp.common.errors import run_program; "
    code += "run_program(lambda: (time.sleep(4), open(sys.argv[1], 'w')))"
    command = f'{sys.executable} -c "{code}" {tmp_path / "done"} >/dev/null 2>&1 &'
    subprocess.run(["sh", "-c", command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert not (tmp_path / "done").exists() and wait_for((tmp_path / "done").exists)


def test_a_browser_ends_with_the_process_that_started_it(browser):
    code = "import time; from playwright.sync_api import sync_playwright\nwith sync_playwright() as p:\n"
    code += f"    b = p.chromium.launch(executable_path={BROWSER!r}, args=['--no-sandbox', '--disable-gpu'])\n"
    code += "    print('open', flush=True); time.sleep(3600)"
    with started([sys.executable, "-c", code]) as parent:
        assert parent.stdout.readline() == "open\n"
        kill_and_see(parent)


# ---------------------------------------------------------------- launchers


def test_a_launcher_whose_processes_accelerate_does_not_join_is_refused(assets, tmp_path):
    """torchrun on a machine without a GPU: two processes, each of which would believe that it is alone."""
    argv = arguments(assets, tmp_path / "out", "--cache_dir", str(tmp_path / "cache"))
    environment = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false"}
    done = launch("train_ncp_dpo.py", argv, *torchrun(2), **environment)
    line = "error: the launcher says WORLD_SIZE 2, but accelerate sees 1 process: set ACCELERATE_USE_CPU=true, which"
    assert done.returncode and done.stderr.count(line) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_that_starts_one_process_for_several_is_refused(assets, tmp_path):
    two = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = launch("train_ncp_cpo.py", arguments(assets, tmp_path / "out"), *two)
    assert done.returncode and "error: accelerate launch was told of several processes" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "seen", "said"),
    [
        ({}, 1, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 1, None),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 4, None),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 1, "WORLD_SIZE 4, but accelerate sees 1 process: set ACCELERATE_USE"),
        ({"WORLD_SIZE": "4"}, 1, "set LOCAL_RANK too"),
        ({"MASTER_ADDR": "host"}, 1, None),  # which a shell may have, without a launcher
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "host"}, 1, "told of several processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "host", "WORLD_SIZE": "2"}, 2, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "host"}, 2, None),  # mpirun
    ],
)
def test_what_a_launcher_says(monkeypatch, environment, seen, said):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = processes.launcher_mismatch(seen)
    assert found is None if said is None else said in found and "\n" not in found


# ---------------------------------------------------------------- other systems


# Libraries first: they know their way around. Then this project, and a run, as on Windows but for the file system.
BARE = """
import os, signal, sys, types
import accelerate.commands.launch, bitsandbytes, datasets, diffusers, matplotlib.pyplot, pyarrow.parquet, torch, tqdm
import huggingface_hub, peft, PIL.Image, tensorboard, torch.utils.tensorboard, transformers, yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
import multiprocessing.popen_fork, multiprocessing.util, subprocess
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD"):
    delattr(signal, name)
for name in ("getuid", "fork", "wait4", "killpg", "setsid", "getpgid", "posix_fadvise"):
    delattr(os, name)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=lambda *a: None)
import importlib
from pathlib import Path
for file in [f for room in ("ncp", "filtering", "evaluation") for f in Path(room).rglob("*.py")]:
    importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
import cache_latents, evaluate, filter_pickapic, train_ncp_cpo, train_ncp_dpo, train_ncp_sft
print("imported", flush=True)
from ncp.common.errors import run_program
from ncp.training import meter
sys.platform = "win32"
meter.peak_memory_gib = lambda device: 1.0  # psutil's figure of Windows
run_program(train_ncp_dpo.main)
"""


def test_programs_start_and_train_without_what_only_unix_has(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "1", "--resolution", str(SIDE))
    done = python("-c", BARE, *argv)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
