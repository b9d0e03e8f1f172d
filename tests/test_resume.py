"""No run is lost: killed anywhere it ends as if it had not been; what belongs to another run is refused."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from pipelines import jpeg, save_dataset
from runs import altered, arguments, launch, run_here, weights
from support import ROOT, free_port, python, ranks_of, started

from ncp.common.config import read_yaml
from ncp.common.errors import UserError
from ncp.training import resume
from ncp.training.checkpoints import fault, newest
from ncp.training.resume import MAY_CHANGE
from ncp.training.settings import TrainingConfig
from ncp.training.weights import WEIGHTS


def test_runs_killed_anywhere_end_as_if_they_had_not_been():
    done = python("tests/killing.py", "--every", "71", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"(\d+) runs killed and resumed, 0 ended otherwise", done.stdout)
    assert said and int(said[1]) >= 9, done.stdout


# ---------------------------------------------------------------- the same run or another one


def test_every_shared_key_is_mathematics_or_may_change():
    """What a script adds of its own is mathematics."""
    mathematics = {
        "revision", "variant", "prediction_type", "rescale_betas_zero_snr", "dataset_split", "max_train_samples",
        "heldout_pairs", "resolution", "center_crop", "random_flip", "time_ids", "proportion_empty_prompts", "space",
        "encoder_blocks", "timestep_offset", "max_sequence_length", "secant", "secant_length", "seed",
        "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision", "allow_tf32", "rank", "lora_alpha",
        "use_ema", "ema_decay",
    }  # fmt: skip
    assert not mathematics & MAY_CHANGE
    assert mathematics | MAY_CHANGE == {f.name for f in dataclasses.fields(TrainingConfig)}


@pytest.fixture(scope="module")
def half(assets, tmp_path_factory):
    """The output folder of a DPO run of 2 steps of 4."""
    folder = tmp_path_factory.mktemp("half") / "out"
    run_here("dpo", arguments(assets, folder, "--train_batch_size", "4"))
    return folder


def test_a_key_that_an_older_checkpoint_lacks_counts_as_its_default(assets, half, tmp_path, monkeypatch):
    new = ("secant", "encoder_blocks", "prediction_type", *resume.LATER)
    monkeypatch.setattr(resume, "read_yaml", lambda path: {k: v for k, v in read_yaml(path).items() if k not in new})
    argv = arguments(assets, shutil.copytree(half, tmp_path / "out"), "--train_batch_size", "4")
    argv += ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    with pytest.raises(UserError, match=r"it has secant auto \(this run: 16\)$"):
        run_here("dpo", [*argv, "--secant", "16"])
    with pytest.raises(UserError, match=r"it has winner_preserving_mu None \(this run: 0.5\)$"):
        run_here("dpo", [*argv, "--winner_preserving_mu", "0.5"])
    run_here("dpo", argv)
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_a_falling_learning_rate_fixes_the_number_of_steps(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--train_batch_size", "4", "--lr_scheduler", "cosine")
    run_here("dpo", [*argv, "--max_train_steps", "2"])
    with pytest.raises(UserError, match=r"it has steps of lr_scheduler 2 \(this run: 3\)$"):
        run_here("dpo", [*argv, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"])


OTHER_RUNS = {
    "learning rate": (["--learning_rate", "2e-3"], "it has learning_rate 0.001 (this run: 0.002)"),
    "several": (
        ["--seed", "1", "--beta", "5", "--logging_steps", "3"],
        "it has seed 0 (this run: 1), beta 2500.0 (this run: 5.0)",
    ),
    "effective batch": (["--train_batch_size", "3"], "it has effective batch 4 (this run: 3)"),
    "EMA": (["--use_ema"], "use_ema False (this run: True)"),
    "fewer pairs": (
        ["--max_train_samples", "5"],
        "; other data, or a version that chose otherwise which pairs train and are held out)",
    ),
    "held-out pairs": (["--heldout_pairs", "2"], "heldout_pairs 0 (this run: 2), training pairs "),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_by_key(assets, half, tmp_path, case):
    extra, message = OTHER_RUNS[case]
    argv = arguments(assets, tmp_path / "out", "--train_batch_size", "4", "--max_train_steps", "4", *extra)
    with pytest.raises(UserError, match=r"checkpoint-2 belongs to another run: ") as error:
        run_here("dpo", [*argv, "--resume_from_checkpoint", str(half / "checkpoint-2")])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_objectives_weights_and_data_are_other_runs_wherever_they_lie(assets, half, tmp_path):
    resume = [
        "--train_batch_size",
        "4",
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        str(half / "checkpoint-2"),
    ]
    with pytest.raises(UserError, match=r"lam None \(this run: 2500.0\)"):
        run_here("cpo", arguments(assets, tmp_path / "o", *resume))
    with pytest.raises(UserError, match=r": it has .*beta 2500.0 \(this run: None\)"):
        run_here("sft", arguments(assets, tmp_path / "o", *resume))
    uids = [f"other{i}" for i in range(12)]
    other = save_dataset(tmp_path / "other" / "train.parquet", image_0_uid=uids).parent
    with pytest.raises(UserError, match=r"it has training pairs \w+ \(this run: "):
        run_here("dpo", arguments(assets, tmp_path / "o", *resume, "--dataset_name", str(other)))
    shutil.copytree(assets / "sd", tmp_path / "sd")
    schedule = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    written = schedule.read_text()
    schedule.write_text(json.dumps(json.loads(written) | {"beta_end": 0.02}))
    with pytest.raises(UserError, match=r"noise schedule .*beta_end 0.012, .*beta_end 0.02"):
        run_here(
            "dpo", arguments(assets, tmp_path / "o", *resume, "--pretrained_model_name_or_path", str(tmp_path / "sd"))
        )
    schedule.write_text(written)
    file = next((tmp_path / "sd" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    model = ["--pretrained_model_name_or_path", str(tmp_path / "sd")]
    with pytest.raises(UserError, match=r"it has unet \w+ \(this run: "):
        run_here("dpo", arguments(assets, tmp_path / "o", *resume, *model))


def test_a_moved_model_and_another_split_go_on_to_the_same_weights(assets, half, tmp_path):
    extra = ["--max_train_steps", "4", "--use_8bit_adam", "false", "--adam_epsilon", "1e-3", "--learning_rate", "1e-2"]
    run_here("dpo", arguments(assets, tmp_path / "whole", *extra, "--train_batch_size", "4"))
    shutil.copytree(assets / "sd", tmp_path / "moved")
    extra += ["--resume_from_checkpoint", "auto", "--pretrained_model_name_or_path", str(tmp_path / "moved")]
    first = [*extra[:-4], "--max_train_steps", "2", "--train_batch_size", "4"]
    run_here("dpo", arguments(assets, tmp_path / "part", *first))
    # Two processes, two micro-batches of one pair each, for what was one process with one of four.
    split = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "2"]
    code = "import train_ncp_dpo\nfrom ncp.common.errors import run_program\nrun_program(train_ncp_dpo.main)"
    with ranks_of(code, arguments(assets, tmp_path / "part", *extra, *split)) as ranks:
        said = [r.communicate(timeout=300) for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], said
    assert "steps: 2 to 4" in said[0][0]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "part")
    most = max(v.abs().max() for k, v in one.items() if "lora_B" in k or "lora.up" in k)
    assert all((one[k] - two[k]).abs().max() < 1e-3 * most for k in one if "lora_B" in k or "lora.up" in k)


def test_auto_starts_afresh_resumes_and_never_starts_over_a_damaged_run(assets, tmp_path):
    out = tmp_path / "out"
    argv = arguments(assets, out, "--resume_from_checkpoint", "auto", "--checkpointing_steps", "1")
    run_here("sft", argv)  # no folder
    first = weights(out)
    run_here("sft", argv)  # nothing left to do
    assert all(torch.equal(first[k], v) for k, v in weights(out).items())
    for folder in out.glob("checkpoint-*"):
        (folder / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"no valid checkpoint in .*checkpoint-2: optimizer.pt is damaged; checkpoint-1"
    ):
        run_here("sft", argv)
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    run_here("sft", argv)  # ended before its first checkpoint
    shutil.rmtree(out)
    (out / "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty"):
        run_here("sft", argv)


# ---------------------------------------------------------------- several machines


def test_two_nodes_train_and_the_loss_of_one_ends_the_other_and_the_run_goes_on(assets, tmp_path):
    """Two launchers on loopback, as on two machines; the second machine dies in step 3."""
    code = "import os, sys, train_ncp_dpo as s\nfrom ncp.common.errors import run_program\n"
    code += "original, calls = s.ncp_dpo, []\n"
    code += "def step(*a):\n    calls.append(1)\n"
    code += "    if os.environ['RANK'] == '1' and len(calls) == 3: os.kill(os.getpid(), 9)\n    return original(*a)\n"
    script = tmp_path / "dies.py"
    script.write_text(code + "s.ncp_dpo = step\nrun_program(s.main)\n")
    extra = ["--max_train_steps", "4", "--checkpointing_steps", "1", "--train_batch_size", "1", "--ddp_timeout", "20"]
    port = free_port()

    def node(rank: int, program: str, *more: str) -> AbstractContextManager[subprocess.Popen]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
        command += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port, program]
        argv = arguments(assets, tmp_path / "out", *extra, *more)
        return started([*command, *argv], ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))

    with node(0, str(script)) as first, node(1, str(script)) as second:
        said = [n.communicate(timeout=300)[1] for n in (first, second)]
    assert first.returncode and second.returncode
    assert "error: another process of this run has ended or does not answer" in said[0], said[0]
    assert newest(tmp_path / "out")[0].name == "checkpoint-2"
    again = ("train_ncp_dpo.py", "--resume_from_checkpoint", "latest")
    with node(0, *again) as first, node(1, *again) as second:
        said = [n.communicate(timeout=300) for n in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    alone = ["--max_train_steps", "4", "--train_batch_size", "2"]
    run_here("dpo", arguments(assets, tmp_path / "alone", *alone))
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "out")
    difference = max((one[k] - two[k]).abs().max() for k in one)
    assert difference < 0.05 * max(v.abs().max() for v in one.values())


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused_in_one_line(assets, tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"configured for {engine}, which is not supported; use DDP"):
        run_here("dpo", arguments(assets, tmp_path / "out"))


# ---------------------------------------------------------------- disks


def limit_file_size(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


WRITE_FAULTS = {
    "a limit on file sizes": (limit_file_size, r".*File too large.*last good checkpoint: .*checkpoint-2$"),
    "the folder is gone": (shutil.rmtree, r"No such file or directory.*there is no checkpoint yet$"),
    "the folder is a file": (
        lambda out: (shutil.rmtree(out), out.write_text("")),
        "Not a directory.*no checkpoint yet$",
    ),
}


@pytest.mark.parametrize("case", WRITE_FAULTS)
def test_a_disk_that_fails_is_said_in_one_line_and_the_last_checkpoint_stays(assets, tmp_path, case):
    """In step 3 of a run that checkpoints at 2 and 4."""
    out, (harm, message), unlimited = tmp_path / "out", WRITE_FAULTS[case], resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = altered("dpo", lambda call, losses: (harm(out) if call == 3 else None, losses)[1])
    argv = arguments(assets, out, "--max_train_steps", "9", "--checkpointing_steps", "2")
    try:
        with pytest.raises(UserError, match=f"cannot write to {out} \\({message}") as error:
            run_here("dpo", argv, **steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(error.value)
    if case == "a limit on file sizes":
        assert fault(out / "checkpoint-2") is None
        assert sorted(p.name for p in out.iterdir()) == ["checkpoint-2", "config.yaml", "environment.yaml"]
    elif case == "the folder is gone":
        assert not out.exists()


def test_a_full_and_a_read_only_disk(assets, small_disk):
    out = small_disk / "out"
    argv = arguments(assets, out, "--max_train_steps", "9", "--checkpointing_steps", "1", "--report_to", "tensorboard")
    with pytest.raises(UserError, match=r"cannot write to .*No space left .*last good checkpoint: .*checkpoint-1$"):
        run_here("dpo", argv)
    assert newest(out) == (out / "checkpoint-1", [])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"cannot write to .*Read-only file system"):
        run_here("dpo", [*argv, "--resume_from_checkpoint", "latest"])
    with pytest.raises(UserError, match=r"cannot write to .*Read-only file system"):
        run_here("dpo", [*argv, "--output_dir", str(small_disk / "new")])


# What the system says of such disks, where the first step after checkpoint-2 meets it: wherever it does, the same is to
# come of it as on the real ones above.
REFUSALS = {
    "no room for the optimizer": (Path, "write_bytes", errno.ENOSPC),
    "no room when the disk is to have it": (os, "fsync", errno.ENOSPC),
    "over the quota": (os, "fsync", errno.EDQUOT),
    "no new folder": (Path, "mkdir", errno.EROFS),
    "no new name": (os, "replace", errno.EROFS),
    "an error of the device": (os, "replace", errno.EIO),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_whatever_a_disk_refuses_is_one_line_and_the_last_checkpoint_stays(assets, tmp_path, case):
    owner, name, number = REFUSALS[case]
    out, real = tmp_path / "out", getattr(owner, name)

    def refuse(*args, **options):
        """For what is written into the output folder; an open file says where it is."""
        path = f"/proc/self/fd/{args[0]}" if name == "fsync" else args[0]
        if str(os.path.realpath(path)).startswith(str(out)):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        steps = altered(
            "dpo", lambda call, losses: (patch.setattr(owner, name, refuse) if call == 3 else None, losses)[1]
        )
        argv = arguments(assets, out, "--max_train_steps", "9", "--checkpointing_steps", "2")
        line = rf"^cannot write to {out} \({os.strerror(number)}\); last good checkpoint: {out}/checkpoint-2$"
        with pytest.raises(UserError, match=line):
            run_here("dpo", argv, **steps)
    assert newest(out) == (out / "checkpoint-2", [])
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-2", "config.yaml", "environment.yaml"]
    run_here("dpo", [*argv, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"])  # with room again


def test_a_launched_script_says_it_when_it_cannot_make_its_folder(assets, tmp_path):
    (tmp_path / "file").write_text("x")
    done = launch("train_ncp_sft.py", arguments(assets, tmp_path / "file" / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot write to" in done.stderr and "Not a directory" in done.stderr


# ---------------------------------------------------------------- kernels


def test_deterministic_runs_give_the_same_bits(assets, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for name in ("a", "b"):
        run_here("dpo", arguments(assets, tmp_path / name, "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[k], two[k]) for k in one)
    run_here("dpo", arguments(assets, tmp_path / "c"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_met_a_corrupt_image_can_go_on_without_it(assets, tmp_path):
    images = [jpeg(i) for i in range(12)]
    images[5] = images[5][:60]
    data = save_dataset(tmp_path / "data" / "train.parquet", jpg_0=images).parent
    extra = ["--dataset_name", str(data), "--max_train_steps", "6", "--checkpointing_steps", "1"]
    argv = arguments(assets, tmp_path / "out", *extra, "--resume_from_checkpoint", "auto")
    with pytest.raises(UserError, match=r"row 5, jpg_0, uid a5: unreadable image"):
        run_here("dpo", argv)
    run_here("dpo", [*argv, "--corrupt_images", "skip"])
    assert (tmp_path / "out" / WEIGHTS).is_file()
