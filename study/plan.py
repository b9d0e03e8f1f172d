"""A plan: which arms are trained with which seeds, and on which prompts they are judged.

    about: what the plan is to show
    data: {rule: absolute_winners}              # keys of filter_pickapic.py, for all arms
    prompts: heldout                            # heldout scenes, or search: training scenes with other noise
    max_prompts: 88
    evaluation: {}                              # keys of evaluate.py over configs/eval_tiny.yaml
    seeds: [101, 102, 103, 104, 105]
    steps: [35, 70, 110]                        # what is drawn of each run: these checkpoints, the last one the result
    common: {lr_warmup_steps: 5}                # keys of the training scripts, for all arms
    arms:
      ncp_dpo: {config: study/configs/dpo.yaml, learning_rate: 1.0e-3}
      dpo: {config: study/configs/dpo.yaml, learning_rate: 1.0e-3, space: latent, beta: 2500}
      unfiltered: {config: study/configs/dpo.yaml, learning_rate: 1.0e-3, data: {rule: no_ties}}

An arm is a training config with changed keys. The config's name selects the training script, unless the arm names a
`program`. `steps` and `data` may differ by arm.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ncp.common.config import read_yaml
from ncp.common.errors import UserError

SCRIPTS = ("dpo", "cpo", "sft")
KEYS = {"about", "data", "prompts", "max_prompts", "evaluation", "seeds", "steps", "common", "arms"}


@dataclass
class Arm:
    """A training config with changed keys. steps: the checkpoints that are drawn; the run ends at the last."""

    name: str
    config: Path
    steps: list[int]
    data: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    program: str | None = None

    @property
    def digest(self) -> str:
        """Of all that decides the arm's training but the seed."""
        content = [self.config.read_text(encoding="utf-8"), self.script, self.steps[-1], self.data, self.changes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def script(self) -> str:
        return self.program or f"train_ncp_{self.config.stem.rpartition('_')[2]}.py"


@dataclass
class Plan:
    name: str
    about: str
    prompts: str
    max_prompts: int
    evaluation: dict[str, Any]
    seeds: list[int]
    arms: list[Arm]
    output_dir: Path

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """The folder of a run, shared by arms and plans that train the same."""
        return self.output_dir / "runs" / f"{arm.digest}-{seed}"

    def data_folder(self, arm: Arm) -> Path:
        """The folder of the filtered dataset, shared by arms and plans with the same filter keys."""
        return self.output_dir / "data" / "-".join(f"{k}={v}" for k, v in sorted(arm.data.items()))


def read_plan(path: Path, output_dir: Path = Path("output/study")) -> Plan:
    """Reads a plan. Raises UserError for an unknown or a missing key, and for an arm without a training config."""
    content = read_yaml(path)
    if unknown := sorted(set(content) - KEYS):
        raise UserError(f"{path}: unknown key '{unknown[0]}'; expected some of: {', '.join(sorted(KEYS))}")
    for key in ("about", "seeds", "steps", "arms"):
        if not content.get(key):
            raise UserError(f"{path}: '{key}' is missing or empty")
    if (prompts := content.get("prompts", "heldout")) not in ("heldout", "search"):
        raise UserError(f"{path}: prompts is {prompts!r}; expected heldout or search")
    arms = []
    for name, given in content["arms"].items():
        keys = content.get("common", {}) | given
        config = Path(keys.pop("config", ""))
        if not config.is_file() or config.stem.rpartition("_")[2] not in SCRIPTS:
            raise UserError(f"{path}: arm '{name}' needs config: one of study/configs/{{{','.join(SCRIPTS)}}}.yaml")
        data = keys.pop("data", content.get("data", {"rule": "absolute_winners"}))
        steps, program = sorted(keys.pop("steps", content["steps"])), keys.pop("program", None)
        arms.append(Arm(name, config, steps, data, keys, program))
    count, evaluation = content.get("max_prompts", 88), content.get("evaluation", {})
    return Plan(path.stem, content["about"], prompts, count, evaluation, content["seeds"], arms, output_dir)
