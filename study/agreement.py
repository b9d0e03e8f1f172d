"""Does the filter remove noise or taste? Measures how often kept and removed judgements agree with the oracle.

    python -m study.agreement

For each rule there are two groups: the decisive rows that it keeps, and those that it removes, by reason. For each
group the table has the share of rows whose winner has the higher `overall` score of tiny/oracle.py, with the 95%
interval of Clopper and Pearson. 50% is noise. Each annotator has different weights for appeal and alignment, so even an
annotator without errors does not reach 100%.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scipy.stats import binomtest

from filtering.rules import decide
from filtering.settings import RULES, FilterConfig
from filtering.source import open_shards, read_metadata
from ncp.common.errors import run_program
from study.report import as_markdown
from tiny import oracle
from tiny.preferences import DATA


def winners_margin() -> np.ndarray:
    """The winner's score minus the loser's, per row in file order; NaN for a tie or a row without a label."""
    columns = ["caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]
    margins: list[float] = []
    scores: dict[str, float] = {}
    for file in sorted(DATA.glob("train-*.parquet")):
        for row in pq.read_table(file, columns=columns).to_pylist():
            pair = []
            for side in (0, 1):
                key = row[f"image_{side}_uid"]
                if key not in scores:
                    picture = np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB"), np.float32) / 255
                    scores[key] = float(oracle.score([picture], [row["caption"]])["overall"][0])
                pair.append(scores[key])
            decisive = row["has_label"] and {row["label_0"], row["label_1"]} == {0.0, 1.0}
            margins.append((pair[0] - pair[1]) * (1 if row["label_0"] == 1 else -1) if decisive else np.nan)
    return np.array(margins)


def agreement(margins: np.ndarray) -> list[str]:
    """[rows, share above 0 with its interval, mean margin] of the decisive rows."""
    margins = margins[~np.isnan(margins)]
    if not len(margins):
        return ["0", "–", "–"]
    right = int((margins > 0).sum())
    low, high = binomtest(right, len(margins)).proportion_ci()
    return [f"{len(margins):,}", f"{right / len(margins):.1%} [{low:.1%}, {high:.1%}]", f"{margins.mean():+.3f}"]


# Rules, and what else can be asked for with the paper's.
SETTINGS: list[dict[str, Any]] = [
    *({"rule": rule} for rule in RULES[:3]),
    {"rule": "absolute_winners", "min_wins": 2},
    {"rule": "absolute_winners", "pairs_per_winner": "all"},
]


def main() -> None:
    margins = winners_margin()
    rows = [["rule", "rows", "decisive", "winner scores more", "mean margin"]]
    for settings in SETTINGS:
        config = FilterConfig(dataset_name=str(DATA), output_dir="-", **settings)
        shards, _ = open_shards(config)
        decision = decide(read_metadata(shards, config), config)
        name = ", ".join([settings["rule"], *(f"{k}: {v}" for k, v in settings.items() if k != "rule")])
        rows.append([name, "kept", *agreement(margins[decision.why == 0])])
        rows.append(["", "removed", *agreement(margins[decision.why != 0])])
        for number, (reason, count) in enumerate(decision.dropped.items(), 1):
            if count and reason not in ("tie", "unlabeled"):
                rows.append(["", reason, *agreement(margins[decision.why == number])])
    print(as_markdown(rows))


if __name__ == "__main__":
    run_program(main)
