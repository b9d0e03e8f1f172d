"""The Markdown of gpu.py's results."""

from __future__ import annotations

from typing import Any

# Targets on an H200, whose large matrix products reach 790 TFLOP/s. Another card's scale with its own rate.
H200_FLOPS_PER_S = 790e12
PAIRS_PER_S = {"sdxl": 6.5, "sd15": 50.0}
TIMES = 1.7  # the straightforward arrangement at least so much slower, and larger
ONE_PAIR_GIB = 16.0


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def steps(result: dict[str, Any]) -> str:
    """A row for each arm of step.py."""
    figures = result["figures"]
    phases = list(next(iter(figures["arms"].values()))["phases_s"])
    head = ["arm", "pairs", "s/step", "pairs/s", "TFLOP/s", "of matmul", "GiB", "time per pair / last", *phases]
    text = f"{figures['flops_per_pair'] / 1e12:.2f} TFLOP per pair; matrix product "
    text += f"{figures['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s\n\n" + row(*head) + "|---" * len(head) + "|\n"
    for name, arm in figures["arms"].items():
        text += row(
            f"`{name}`",
            arm["pairs"],
            f"{arm['step_s']:.3f}",
            f"{arm['pairs_per_s']:.2f}",
            f"{arm['flops_per_s'] / 1e12:.0f}",
            f"{arm['share_of_matmul']:.0%}",
            f"{arm['peak_memory_gib']:.1f}",
            f"{arm['ratio_to_last']:.2f}",
            *(f"{arm['phases_s'][phase]:.3f}" for phase in phases),
        )
    return text


def kernels(result: dict[str, Any]) -> str:
    """Number of kernels and share of each kind."""
    text = ""
    for name, arm in result["figures"]["arms"].items():
        total = sum(arm["seconds_by_kind"].values())
        idle = "" if arm["idle"] is None else f", idle {arm['idle']:.0%} of the step"
        text += f"`{name}`: {arm['kernels']} kernels in {arm['step_s']:.3f} s{idle}\n\n"
        text += row("kind", "share of the kernels' time") + "|---|---|\n"
        text += "".join(row(kind, f"{s / total:.0%}") for kind, s in arm["seconds_by_kind"].items())
        text += "\n" + row("longest kernel", "ms") + "|---|---|\n"
        text += "".join(row(f"`{kernel[:70]}`", f"{1e3 * s:.2f}") for kernel, s in arm["longest"][:8])
    return text


def tests(result: dict[str, Any]) -> str:
    """pytest's last line, and the tests that failed."""
    lines = result["output"].strip().splitlines()
    failed = [f"- {line}\n" for line in lines if line.startswith(("FAILED", "ERROR"))]
    return f"{lines[-1].strip('= ')}\n" + "".join(failed[:40])


def output(result: dict[str, Any]) -> str:
    """The tables in what the part printed; without any, its last line."""
    lines = result["output"].strip().splitlines()
    tables = [line + "\n" for line in lines if line.startswith("|")]
    return "".join(tables) or f"{lines[-1]}\n"


def targets(parts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(target, reached, met) for what was measured."""
    found = []

    def judge(target: str, value: float, bound: float, low: bool = True) -> None:
        found.append((target, f"{value:.2f}", "yes" if (value >= bound if low else value <= bound) else "**no**"))

    for model, rate in PAIRS_PER_S.items():
        figures = parts.get(model, {}).get("figures")
        if not figures:
            continue
        share = min(1.0, figures["matmul_flops_per_s"] / H200_FLOPS_PER_S)
        best = max(arm["pairs_per_s"] for arm in figures["arms"].values())
        judge(f"{model}: pairs/s, at least {rate:g} x {share:.2f} (this card's matrix product)", best, rate * share)
        arms = {name.partition(":")[0]: arm for name, arm in figures["arms"].items()}
        ours = next((arm for name, arm in arms.items() if name.startswith("recomputed")), None)
        if ours and "straightforward" in arms:
            theirs = arms["straightforward"]
            slower = ours["pairs_per_s"] / theirs["pairs_per_s"]
            judge(f"{model}: straightforward at least {TIMES} times slower", slower, TIMES)
            larger = theirs["peak_memory_gib"] / ours["peak_memory_gib"]
            judge(f"{model}: straightforward at least {TIMES} times larger", larger, TIMES)
    for model in PAIRS_PER_S:
        for setting in parts.get(f"memory-{model}", {}).get("figures") or []:
            name = f"{model}, {setting['setting']}".replace("'", "")
            judge(f"measured / estimate within 10%: {name}", setting["ratio"], 0.9)
            if setting["ratio"] > 1.1:
                found[-1] = (*found[-1][:2], "**no**")
            if model == "sdxl" and setting["setting"]["train_batch_size"] == 1:
                judge(
                    f"SDXL, one pair: GiB, at most {ONE_PAIR_GIB:g}", setting["measured_gib"], ONE_PAIR_GIB, low=False
                )
    return found


def report(found: dict[str, Any]) -> str:
    """The whole page, up to the part that ended last."""
    where = found["environment"]
    device = ", ".join(where.get("gpus") or []) or where.get("cpu")
    text = f"## Measured on {device}\n\n`bash benchmarks/gpu.sh {' '.join(found['extra'])}`".replace(" `", "`")
    text += f"; torch {where.get('torch', '?')}, CUDA {where.get('cuda')}, commit {where.get('commit')}.\n\n"
    if reached := targets(found["parts"]):
        text += row("target", "reached", "met") + "|---|---|---|\n" + "".join(row(*line) for line in reached) + "\n"
    for name, part in found["parts"].items():
        text += f"### {name}\n\n{part['status']}, {part['seconds']:.0f} s\n\n{part['shown']}\n"
    return text
