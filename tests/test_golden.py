"""Golden trajectories: the first steps of each script on the embedded default, in float32, as they were once measured.

Each file in tests/golden holds losses, margins and gradient norms, and the environment that they were made in. A change
that moves them is either a mistake or a change of the mathematics: then they are made anew, and the changelog says why.

    PYTHONPATH=. python tests/test_golden.py    # makes them anew
"""

import json
import tempfile
from pathlib import Path

import pytest
from runs import SCRIPTS, call

from ncp.common.environment import environment
from ncp.training.run import Run

GOLDEN = Path(__file__).parent / "golden"
STEPS = 4
FIGURES = ("loss", "policy_w", "margin", "winner_drift", "grad_norm")
# Kernels of other processors round otherwise. Between AVX2 and AVX-512 losses and gradients agree to a thousandth.
# A margin is 3e5 times a small difference of losses, and winner_drift is such a difference over a loss: they agree to
# 4e-4 and 5e-5. The bounds leave room for twice to five times that.
RELATIVE = 2e-3
ABSOLUTE = {"margin": 2e-3, "winner_drift": 2.5e-4}


def trajectory(kind: str, folder: Path) -> list[dict[str, float]]:
    """The figures of each step of a run."""
    settings = {
        "learning_rate": 1e-4 if kind == "sft" else 3e-4,
        "dataset_name": "tiny/data",
        "output_dir": folder / kind,
        "max_train_steps": STEPS,
        "lr_warmup_steps": 1,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "effective_batch_size": 8,
        "heldout_pairs": 0,
        "validation_prompts": "[]",
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
    }
    argv = ["--config", f"study/configs/{kind}.yaml", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]
    found: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_track", lambda run, figures, step: found.append({"step": step, **figures}))
        call(SCRIPTS[kind].main, argv)
    return [{name: step[name] for name in ("step", *FIGURES) if name in step} for step in found]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_first_steps_are_as_they_were(kind, tmp_path):
    golden = json.loads((GOLDEN / f"{kind}.json").read_text())["steps"]
    found = trajectory(kind, tmp_path)
    assert len(found) == STEPS and found[-1]["policy_w"] != found[0]["policy_w"]
    for then, now in zip(golden, found, strict=True):
        assert now.keys() == then.keys()
        for name, value in then.items():
            close = pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE.get(name, 1e-12))
            assert now[name] == close, f"{name} at step {then['step']}"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for kind in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            content = {"environment": environment(), "steps": trajectory(kind, Path(folder))}
        (GOLDEN / f"{kind}.json").write_text(json.dumps(content, indent=1) + "\n")
