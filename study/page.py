"""Fills the tables of docs/replication.md, with verdicts, from study/results/*.csv and study/claims.yaml.

    python -m study.page

The page's text is written by hand. Between `<!-- KIND ARGUMENTS -->` and `<!-- end -->` stands what this program puts:

    <!-- claims -->                            one row per claim: result with interval, verdict, command
    <!-- arms PLAN JUDGE [PREFIX ...] -->      one row per arm of a plan, or of those whose names begin so
    <!-- pairs PLAN JUDGE A:B ... -->          one row per pair of arms
    <!-- plot PLAN JUDGE -->                   curves, written beside the results

A claim of study/claims.yaml that is measured by a plan:

    claim: NCP-DPO over latent DPO
    plan: methods
    contrast: {ncp_dpo: 1, dpo: -1}            # weights of the arms' gains over the base; judge: overall unless given
    why: what explains the result

It holds if the 95% interval of the weighted sum of gains (over seeds and prompts) lies above 0, does not hold if it
lies below 0, and cannot be told otherwise. `of: drift` takes the held-out winner drift, over seeds, instead of gains;
`at: time` compares at equal training time. A claim that another program measures states result, verdict and command.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ncp.common.config import read_yaml
from ncp.common.errors import UserError, run_program
from ncp.common.files import write_text
from study.report import (
    RESULTS,
    ArmResults,
    arms_table,
    as_markdown,
    gain_at,
    pairs_table,
    plot_curves,
    read_results,
)
from study.statistics import hierarchical_interval, verdict, win_indicator

PAGE = Path(__file__).parent.parent / "docs/replication.md"
CLAIMS = Path(__file__).parent / "claims.yaml"
KEYS = {"claim", "plan", "judge", "contrast", "of", "at", "result", "verdict", "command", "why"}
BLOCK = re.compile(r"(<!-- (claims|arms|pairs|plot)((?: [\w:-]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_claims(path: Path = CLAIMS) -> list[dict[str, Any]]:
    """The claims in their order. Raises UserError for an unknown key, and for a claim without a plan or a result."""
    claims = read_yaml(path)["claims"]
    for claim in claims:
        if unknown := sorted(set(claim) - KEYS):
            raise UserError(f"{path}: unknown key '{unknown[0]}'; expected some of: {', '.join(sorted(KEYS))}")
        if not ({"plan", "contrast"} <= set(claim) or {"result", "verdict", "command"} <= set(claim)):
            raise UserError(f"{path}: '{claim['claim']}' needs plan and contrast, or result, verdict and command")
    return claims


def measured(claim: dict[str, Any], base: np.ndarray, arms: dict[str, ArmResults]) -> tuple[str, str]:
    """(result with interval, verdict) of a claim from the results of its plan. Raises UserError for a missing arm."""
    weights: dict[str, float] = claim["contrast"]
    if missing := sorted(set(weights) - set(arms)):
        raise UserError(f"{CLAIMS}: '{claim['claim']}': no arm {missing[0]} in the results of {claim['plan']}")
    count = min(len(arms[name].scores) for name in weights)
    parts = []
    if claim.get("of") == "drift":
        values = sum(weight * arms[name].drift[:count, None] for name, weight in weights.items())
        low, high = hierarchical_interval(np.asarray(values))
        return f"held-out winner drift {np.mean(values):+.1%} [{low:+.1%}, {high:+.1%}]", verdict(low, high, 0.0)
    where = "at equal steps"
    if claim.get("at") == "time":
        time = min(arms[name].seconds[:, -1].mean() for name in weights)
        gains = {name: gain_at(base, arms[name], time)[:count] for name in weights}
        where = f"at {time:.0f} s"
    else:
        gains = {name: arms[name].scores[:count, -1] - base for name in weights}
        if sorted(weights.values()) == [-1, 1]:
            (better,), (other,) = ([n for n, w in weights.items() if w == sign] for sign in (1, -1))
            wins = win_indicator(arms[other].scores[:count, -1], arms[better].scores[:count, -1])
            low, high = hierarchical_interval(wins)
            parts.append(f"win-rate {wins.mean():.0%} [{low:.0%}, {high:.0%}]")
    values = sum(weight * gains[name] for name, weight in weights.items())
    low, high = hierarchical_interval(np.asarray(values))
    parts.insert(0, f"gain {np.mean(values):+.3f} [{low:+.3f}, {high:+.3f}] {where}")
    return "; ".join(parts), verdict(low, high, 0.0)


def claims_table(claims: list[dict[str, Any]], results: Path = RESULTS) -> list[list[str]]:
    rows = [["claim", "result", "verdict", "why", "command"]]
    for claim in claims:
        if "plan" in claim:
            judge = claim.get("judge", "overall")
            result, conclusion = measured(claim, *read_results(results / f"{claim['plan']}.csv", judge))
            command = f"python -m study.run study/plans/{claim['plan']}.yaml"
        else:
            result, conclusion, command = claim["result"], claim["verdict"], claim["command"]
        rows.append([claim["claim"], result, conclusion, claim.get("why", ""), f"`{command}`" if command else ""])
    return rows


def filled(page: str, claims: list[dict[str, Any]], plot: Callable[..., object] = plot_curves) -> str:
    """The page with its blocks filled. Plots are written by `plot`."""

    def block(match: re.Match[str]) -> str:
        head, kind, words, end = match.groups()
        if kind == "claims":
            return f"{head}\n{as_markdown(claims_table(claims))}\n\n{end}"
        plan, judge, *names = words.split()
        base, arms = read_results(RESULTS / f"{plan}.csv", judge)
        if kind == "arms":
            shown = {name: arm for name, arm in arms.items() if not names or name.startswith(tuple(names))}
            content = as_markdown(arms_table(base, shown))
        elif kind == "pairs":
            content = as_markdown(pairs_table(base, arms, [(a, b) for a, b in (n.split(":") for n in names)]))
        else:
            plot(base, arms, judge, RESULTS / f"{plan}-{judge}.png")
            content = f"![gain in {judge} against steps and seconds](../study/results/{plan}-{judge}.png)"
        return f"{head}\n{content}\n\n{end}"

    return BLOCK.sub(block, page)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, read_claims()))
    print(f"wrote {PAGE.relative_to(PAGE.parent.parent)}")


if __name__ == "__main__":
    run_program(main)
