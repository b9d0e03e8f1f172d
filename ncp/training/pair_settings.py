"""The keys of the scripts that train on winners and losers, beside those of every training script."""

from __future__ import annotations

from dataclasses import dataclass

from ncp.common.config import option
from ncp.training.settings import TrainingConfig


@dataclass(kw_only=True)
class PairConfig(TrainingConfig):
    winner_preserving_mu: float | None = option(
        None,
        low=0,
        high=1,
        group="against collapse",
        doc="scale down each loser's gradient so far that a step does not raise its winner's loss, to first order "
        "(Diffusion-SDPO). A larger mu scales it down further; at 1 it is 0 wherever it works against the winner. "
        "null: never",
    )
    soft_labels: bool = option(
        False,
        doc="train towards the share of the annotators who prefer the winner, the dataset's column share_0, instead of "
        "towards certainty; a row without a share counts as unanimous",
    )
