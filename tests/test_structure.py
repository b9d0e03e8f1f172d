"""Imports go down only, files are short, and the three training scripts are one file but for the objective."""

import ast
import graphlib
import inspect
import itertools
from pathlib import Path

import pytest
from support import ROOT

import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft

PROGRAMS = (
    "train_ncp_dpo",
    "train_ncp_cpo",
    "train_ncp_sft",
    "prepare_preferences",
    "filter_pickapic",
    "cache_latents",
    "export_lora",
    "evaluate",
)
# Floors, from the ground up. A module belongs to the first prefix that fits it.
FLOORS = (
    ("ncp.common",),
    ("ncp.ddpm", "ncp.flow", "ncp.encoder", "ncp.losses"),
    ("ncp.training",),
    ("preparing", "filtering", "evaluation"),
    PROGRAMS,
    ("tiny", "benchmarks", "study"),  # which use the programs
)
# What the evaluation knows of the embedded default: its prompts and its judge, which import nothing above them.
GROUND = ("tiny", "tiny.world", "tiny.oracle")
LINES = 350
SUBSTITUTIONS = {  # of `main`: the objective's name, the images of a sample, the figures on the progress bar
    "dpo": ("DPO", "ncp_dpo", "images_per_sample=2", '"loss", "accuracy", "margin", "winner_drift"'),
    "cpo": ("CPO", "ncp_cpo", "images_per_sample=2", '"loss", "accuracy", "margin", "policy_w"'),
    "sft": ("SFT", "ncp_sft", "images_per_sample=1", '"loss", "grad_norm"'),
}


def modules() -> dict[str, Path]:
    """Name to file of every module of the project but the tests."""
    rooms = ("ncp", "preparing", "filtering", "evaluation", "tiny", "benchmarks", "study")
    files = [*ROOT.glob("*.py"), *(f for room in rooms
                                   for f in (ROOT / room).rglob("*.py"))]  # fmt: skip
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports, wherever in it and for whatever reason."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found if name in known}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) - {name} for name, file in known.items()}


def floor(name: str) -> int:
    if name == "ncp" or name in GROUND:
        return -1
    for number, prefixes in enumerate(FLOORS):
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            return number
    raise AssertionError(f"{name} is on no floor")


def test_there_is_no_circle_of_imports(graph):
    assert len(graph) > 50 and "ncp.training.models" in graph["ncp.training.run"]
    packages = {name for name, file in modules().items() if file.name == "__init__.py"}
    list(graphlib.TopologicalSorter({k: v - packages for k, v in graph.items()}).static_order())


def test_imports_go_down_only(graph):
    upward = [f"{name} imports {other}" for name in graph for other in graph[name] if floor(other) > floor(name)]
    assert not upward
    # The neighbours on one floor do not know each other.
    for room, other in itertools.permutations(("preparing", "filtering", "evaluation"), 2):
        assert not [n for n in graph if n.startswith(room) and any(o.startswith(other) for o in graph[n])]


def test_the_method_imports_nothing_of_the_project_but_itself(graph):
    method = {"ncp.ddpm", "ncp.flow", "ncp.encoder", "ncp.losses"}
    assert all(graph[name] <= method for name in method)


def test_no_file_is_long():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in modules().values()}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def test_the_three_mains_are_equal_but_for_the_objective():
    mains = {}
    for kind, script in {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}.items():
        text = inspect.getsource(script.main)
        assert len(text.splitlines()) <= 40
        for word in SUBSTITUTIONS[kind]:
            assert word in text
            text = text.replace(word, "...")
        mains[kind] = text
    assert mains["dpo"] == mains["cpo"] == mains["sft"]


def test_tests_share_through_modules_that_are_no_tests():
    files = sorted((ROOT / "tests").glob("*.py"))
    assert len(files) > 50
    trees = {file.name: ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    taken = {name: [n.module for n in tree if isinstance(n, ast.ImportFrom)] for name, tree in trees.items()}
    assert {name for name, modules in taken.items() if any(str(m).startswith("test_") for m in modules)} == set()
