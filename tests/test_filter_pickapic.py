"""filter_pickapic.py: each rule on hand-made games and against a slow reference, then the script launched for real."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import python

import filter_pickapic as fp
import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp import data
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.errors import run_program as run

ROOT = Path(__file__).parents[1]
SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


# ---------------------------------------------------------------- games by hand


def jpeg(caption: str, uid: str) -> bytes:
    """A small real JPEG whose bytes depend on the image's identity alone."""
    colour = tuple(hashlib.sha256(f"{caption}|{uid}".encode()).digest()[:3])
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def row(game: str, ranking_id: int, caption: str = "cat", time: int | None = None, **changes: object) -> dict:
    """A row from 'a>b' (a is image 0 and wins), 'a<b' (image 1 wins) or 'a=b' (a tie), judged at `time` seconds."""
    sign = next(s for s in "<>=" if s in game)
    a, b = game.split(sign)
    label = {">": 1.0, "<": 0.0, "=": 0.5}[sign]
    made = {
        "are_different": a != b,
        "best_image_uid": {">": a, "<": b, "=": ""}[sign],
        "caption": caption,
        "created_at": np.datetime64("2023-01-01", "ns") + np.timedelta64(ranking_id if time is None else time, "s"),
        "has_label": True,
        "image_0_uid": a,
        "image_0_url": f"https://example.invalid/{a}",
        "image_1_uid": b,
        "image_1_url": f"https://example.invalid/{b}",
        "jpg_0": jpeg(caption, a),
        "jpg_1": jpeg(caption, b),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": f"model of {a}",
        "model_1": f"model of {b}",
        "ranking_id": ranking_id,
        "user_id": 7,
        "num_example_per_prompt": 1,
        "__index_level_0__": ranking_id,
    }
    return made | changes


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def games(text: str, **changes: object) -> list[dict]:
    """Rows of 'a>b b>c …', judged in this order: ranking ids and seconds 1, 2, …"""
    return [row(game, i, **changes) for i, game in enumerate(text.split(), 1)]


def config(**changes: object) -> fp.Config:
    return fp.Config(**({"dataset_name": "none", "output_dir": "none"} | changes))


def pairs(rows: list[dict], **options: object) -> list[str]:
    """The decision as 'winner>loser', in output order, a made-up pair with a '*'."""
    made = fp.decide(table(rows), config(**options))

    def uid(index: int, wins: bool) -> str:
        side = 0 if bool(made.first_wins[index]) == wins else 1
        return rows[index][f"image_{side}_uid"]

    found = zip(made.row, made.loser_row, strict=True)
    return [f"{uid(r, True)}>{uid(q, False)}{'*' if r != q else ''}" for r, q in found]


def dropped(rows: list[dict], **options: object) -> dict[str, int]:
    """The reasons that apply, after a check that kept and dropped rows add up to the input."""
    made = fp.decide(table(rows), config(**options))
    kept = int((~made.made_up).sum())
    assert kept + sum(made.dropped.values()) == len(rows)
    assert kept == int((made.why == 0).sum())
    return {reason: count for reason, count in made.dropped.items() if count}


# a beats b and c; b loses to a but beats c and d; d ties e; f beats g, h beats f.
STORY = "a>b b>c a>c d=e b<a c<d f>g h>f b>d"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # All but d=e.
        ("no_ties", "a>b b>c a>c a>b d>c f>g h>f b>d"),
        # Both winner and loser: b (beats c, loses to a), d (beats c, loses to b), f (beats g, loses to h).
        # Without any of them only the third game is left.
        ("contradiction_free", "a>c"),
        # Never beaten and never tied: a (b, c, b) and h (f). a's latest win is game 5, over b.
        ("absolute_winners", "a>b h>f"),
        # x needs two wins: a. y = b.
        ("x_y", "a>b"),
        # y = b's latest win is game 9, over d; a>d was never judged.
        ("x_y_xz", "a>b a>d*"),
        ("x_y_yz", "a>b b>d"),
    ],
)
def test_rule_on_one_story(rule, expected):
    assert pairs(games(STORY), rule=rule) == expected.split()


def test_all_pairs_of_each_winner():
    assert pairs(games(STORY), pairs_per_winner="all") == ["a>b", "a>c", "a>b", "h>f"]


def test_min_wins():
    # a has 3 wins, h has 1.
    assert pairs(games(STORY), min_wins=2) == ["a>b"]
    assert pairs(games(STORY), min_wins=3, rule="x_y") == ["a>b"]
    assert pairs(games(STORY), min_wins=4) == []
    # For x_y a min_wins of 1 still means 2: h stays out.
    assert pairs(games(STORY), min_wins=1, rule="x_y") == ["a>b"]


def test_a_tie_or_a_loss_ends_an_absolute_winner():
    assert pairs(games("a>b a=c")) == []
    assert pairs(games("a>b c=a")) == []
    assert pairs(games("a>b c>a")) == ["c>a"]


def test_the_same_uid_under_another_caption_is_another_image():
    rows = [row("a>b", 1, caption="cat"), row("b>a", 2, caption="dog")]
    assert pairs(rows) == ["a>b", "b>a"]
    rows[1]["caption"] = "cat"
    assert pairs(rows, rule="contradiction_free") == []


def test_equal_times_are_broken_by_the_larger_ranking_id():
    assert pairs([row("a>c", 9, time=5), row("a>b", 3, time=5)]) == ["a>c"]
    assert pairs([row("a>c", 9, time=4), row("a>b", 3, time=5)]) == ["a>b"]


def test_mini_sets():
    # x = a (2 wins), y = c (latest); c's latest win is over d: z = d. a>d was judged: the row is used, not made up.
    assert pairs(games("c>d a>d a>c"), rule="x_y_xz") == ["a>d", "a>c"]
    # y has no win: no z.
    assert pairs(games("a>b a>c"), rule="x_y_xz") == ["a>c"]
    assert pairs(games("a>b a>c"), rule="x_y_yz") == ["a>c"]
    # Two winners over the same y: y > z is written once.
    assert pairs(games("y>z a>b a>y c>b c>y"), rule="x_y_yz") == ["y>z", "a>y", "c>y"]
    # A tie of y does not keep it from being a loser; its own win counts.
    assert pairs(games("y>z y=q a>b a>y"), rule="x_y_xz") == ["a>y", "a>z*"]


def test_reasons_of_the_rules():
    # Nine games: the tie; a's other two wins; wins of b (2), d, f, which were beaten.
    assert dropped(games(STORY)) == {"tie": 1, "not_an_absolute_winner": 4, "not_the_winners_latest": 2}
    assert dropped(games(STORY), min_wins=2) == {
        "tie": 1,
        "not_an_absolute_winner": 4,
        "too_few_wins": 1,
        "not_the_winners_latest": 2,
    }
    assert dropped(games(STORY), rule="contradiction_free") == {"tie": 1, "contradictory": 7}
    assert dropped(games(STORY), rule="no_ties") == {"tie": 1}
    # b>d is kept as y>z, though b is no absolute winner.
    assert dropped(games(STORY), rule="x_y_yz")["not_an_absolute_winner"] == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"best_image_uid": "b"}, "contradictory_best_image_uid"),
        ({"best_image_uid": "stranger"}, "contradictory_best_image_uid"),
        ({"best_image_uid": "tie"}, "contradictory_best_image_uid"),
        ({"best_image_uid": None}, None),
        ({"best_image_uid": ""}, None),
        ({"best_image_uid": "None"}, None),
        ({"caption": None}, "missing_caption"),
        ({"caption": " "}, "missing_caption"),
        ({"image_0_uid": None}, "missing_uid"),
        ({"image_1_uid": ""}, "missing_uid"),
        ({"ranking_id": None}, "missing_ranking_id"),
        ({"created_at": None}, "missing_created_at"),
        ({"has_label": False}, "unlabeled"),
        ({"has_label": None}, "unlabeled"),
        ({"has_label": False, "label_0": None, "label_1": None}, "unlabeled"),
        ({"label_0": None}, "malformed_labels"),
        ({"label_0": 1.0, "label_1": 1.0}, "malformed_labels"),
        ({"label_0": 0.5, "label_1": 0.0}, "malformed_labels"),
        ({"label_0": 0.0, "label_1": 0.0}, "malformed_labels"),
        ({"image_1_uid": "a"}, "same_image"),
    ],
)
def test_malformed_rows_are_counted_and_play_no_part(changes, reason):
    # The changed row would have b beaten by a; the good one has b beat c. If a>b does not count, b is unbeaten.
    rows = [row("a>b", 1) | changes, row("b>c", 2)]
    assert dropped(rows, rule="no_ties") == ({reason: 1} if reason else {})
    assert pairs(rows) == (["b>c"] if reason else ["a>b"])


def test_best_image_uid_is_checked_before_wins_are_counted_or_ignored():
    # a>b says that b was best. If it counts, b is beaten and a is unbeaten; if not, b is unbeaten.
    rows = [row("a>b", 1, best_image_uid="b"), row("b>c", 2)]
    assert pairs(rows) == ["b>c"] and pairs(rows, best_image_uid="ignore") == ["a>b"]
    assert dropped(rows, best_image_uid="ignore") == {"not_an_absolute_winner": 1}
    # A tie, a row that is dropped for something else, and an empty one are not counted.
    more = [row("d=e", 3, best_image_uid="e"), row("d>f", 4, best_image_uid="f", has_label=False)]
    more += [row("d>g", 5, best_image_uid="")]
    for option in ("check", "ignore"):
        assert fp.decide(table(rows + more), config(best_image_uid=option)).contradicting == 1
    # Rows of one id that differ in this column alone are one judgement where it plays no part.
    twice = [row("a>b", 1), row("a>b", 1, best_image_uid="")]
    assert dropped(twice) == {"duplicate_ranking_id": 2}
    assert dropped(twice, best_image_uid="ignore") == {"duplicate_row": 1}


def test_best_image_uid_of_a_tie_does_not_matter():
    for best in ("a", "b", "tie", "", None):
        assert dropped([row("a=b", 1, best_image_uid=best), row("c>d", 2)], rule="no_ties") == {"tie": 1}


def test_duplicated_ranking_ids():
    same = [row("a>b", 1), row("a>b", 1, __index_level_0__=99), row("c>d", 2)]
    assert dropped(same, rule="no_ties") == {"duplicate_row": 1}
    assert pairs(same, rule="no_ties") == ["a>b", "c>d"]
    # One of three differs: which is right is unknown, so none is used.
    for changes in ({"caption": "dog"}, {"label_0": None}, {"has_label": False}, {"best_image_uid": ""}):
        other = [row("a>b", 1), row("c>d", 2), row("a>b", 1), row("a>b", 1, **changes)]
        assert dropped(other, rule="no_ties") == {"duplicate_ranking_id": 3}
        assert pairs(other, rule="no_ties") == ["c>d"]


def test_selection_options_come_before_the_rule():
    rows = games("a>b c>a b>d")  # at seconds 1, 2, 3 of 2023
    assert pairs(rows) == ["c>a"]
    assert pairs(rows, created_before="2023-01-01T00:00:02") == ["a>b"]  # without c>a, a is unbeaten
    assert pairs(rows, created_from="2023-01-01T00:00:03") == ["b>d"]
    assert pairs(rows, created_from="2023-01-01T01:00:03+01:00") == ["b>d"]
    assert pairs(rows, models=["model of a", "model of b"]) == ["a>b"]
    assert dropped(rows, models=["model of a", "model of b"]) == {"other_model": 2}
    more = [*rows, row("e>f", 4, caption="dog")]
    assert pairs(more, min_games_per_prompt=3) == ["c>a"]
    assert dropped(more, min_games_per_prompt=3)["too_few_games_for_prompt"] == 1


# ---------------------------------------------------------------- against a slow, obvious implementation


def slow(rows: list[dict], rule: str, min_wins: int, keep: str, best: str = "check") -> list[tuple]:
    """(caption, winner, loser, ranking_id or None if made up), sorted: the rules word for word, in loops over games."""
    valid = []
    for r in rows:
        twins = [q for q in rows if q["ranking_id"] == r["ranking_id"]]
        decision = [[q[c] for c in fp.DECISION if c != "best_image_uid" or best == "check"] for q in twins]
        if any(d != decision[0] for d in decision) or twins[0] is not r:
            continue
        if not r["caption"] or not r["image_0_uid"] or not r["image_1_uid"] or not r["has_label"]:
            continue
        labels = (r["label_0"], r["label_1"])
        if labels not in [(1, 0), (0, 1), (0.5, 0.5)] or r["image_0_uid"] == r["image_1_uid"]:
            continue
        winner = {1: r["image_0_uid"], 0: r["image_1_uid"]}.get(labels[0])
        if best == "check" and winner and r["best_image_uid"] not in (winner, "", None):
            continue
        valid.append(r)

    ties = [r for r in valid if r["label_0"] == 0.5]
    wins = sorted((r for r in valid if r["label_0"] != 0.5), key=lambda r: (r["created_at"], r["ranking_id"]))

    def winner(r):
        return (r["caption"], r["image_0_uid"] if r["label_0"] == 1 else r["image_1_uid"])

    def loser(r):
        return (r["caption"], r["image_1_uid"] if r["label_0"] == 1 else r["image_0_uid"])

    def won_by(image):
        return [r for r in wins if winner(r) == image]

    def absolute(image, least):
        tied = any(image in ((r["caption"], r["image_0_uid"]), (r["caption"], r["image_1_uid"])) for r in ties)
        return len(won_by(image)) >= least and not any(loser(r) == image for r in wins) and not tied

    def real(r):
        return (r["caption"], winner(r)[1], loser(r)[1], r["ranking_id"])

    if rule == "no_ties":
        return sorted(map(real, wins))
    if rule == "contradiction_free":
        both = {winner(r) for r in wins} & {loser(r) for r in wins}
        return sorted(real(r) for r in wins if winner(r) not in both and loser(r) not in both)
    if rule == "absolute_winners":
        chosen = [r for r in wins if absolute(winner(r), min_wins)]
        return sorted(real(r) for r in chosen if keep == "all" or won_by(winner(r))[-1] is r)
    found = set()
    for x in {winner(r) for r in wins}:
        if not absolute(x, max(2, min_wins)):
            continue
        latest = won_by(x)[-1]
        found.add(real(latest))
        if rule == "x_y" or not won_by(loser(latest)):
            continue
        y_latest = won_by(loser(latest))[-1]
        if rule == "x_y_yz":
            found.add(real(y_latest))
        else:
            z = loser(y_latest)
            judged = [r for r in won_by(x) if loser(r) == z]
            found.add(real(judged[-1]) if judged else (x[0], x[1], z[1], None))
    return sorted(found, key=str)


def random_rows(rng: random.Random) -> list[dict]:
    """Up to 60 games among 6 images of 3 captions, with a few of every kind of malformed row."""
    rows = []
    for i in range(rng.randint(5, 60)):
        a, b = rng.sample("abcdef", 2)
        made = row(a + rng.choice("<<>>=") + b, i + 1, rng.choice(["cat", "dog", "eel"]), time=rng.randint(0, 9))
        if rng.random() < 0.1:
            made |= rng.choice(
                [
                    {"best_image_uid": b},
                    {"best_image_uid": None},
                    {"caption": None},
                    {"image_0_uid": b},
                    {"has_label": False},
                    {"label_0": 0.25},
                    {"ranking_id": max(1, i)},
                ]
            )
        rows.append(made)
        if rng.random() < 0.05:
            rows.append(dict(made))
    return rows


@pytest.mark.parametrize("rule", fp.RULES)
def test_every_rule_equals_the_slow_implementation(rule):
    rng, sizes = random.Random(0), set()
    for _ in range(60):
        rows = random_rows(rng)
        least, keep, best = rng.choice([1, 2, 3]), rng.choice(["latest", "all"]), rng.choice(["check", "ignore"])
        expected = slow(rows, rule, least, keep, best)
        sizes.add(len(expected))
        digests = set()
        for _ in range(2):
            rng.shuffle(rows)
            options = {"rule": rule, "min_wins": least, "pairs_per_winner": keep, "best_image_uid": best}
            made = fp.decide(table(rows), config(**options))
            found = []
            for r, q in zip(made.row, made.loser_row, strict=True):
                x, z = (0 if made.first_wins[r] else 1), (1 if made.first_wins[q] else 0)
                ranking_id = rows[r]["ranking_id"] if r == q else None
                found.append((rows[r]["caption"], rows[r][f"image_{x}_uid"], rows[q][f"image_{z}_uid"], ranking_id))
            assert sorted(found, key=str) == sorted(expected, key=str)
            assert sum(made.dropped.values()) + int((~made.made_up).sum()) == len(rows)
            digests.add(made.digest)
        assert len(digests) == 1
    assert len(sizes) > 3  # the random games were worth the trouble


# ---------------------------------------------------------------- the script


def write_shards(folder: Path, rows: list[dict], shards: int = 1, group: int = 3, prefix: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    cut = [i * len(rows) // shards for i in range(shards + 1)]
    for i in range(shards):
        path = folder / "data" / f"{prefix}-{i:05d}-of-{shards:05d}.parquet"
        pq.write_table(table(rows[cut[i] : cut[i + 1]]), path, row_group_size=group)
    return folder


def launch(*arguments: object) -> subprocess.CompletedProcess:
    return python("filter_pickapic.py", *arguments, HF_HUB_OFFLINE="1")


def filtered(source: Path, output: Path, *arguments: object) -> dict:
    """Runs the filter in this process; the manifest."""
    fp.main(["--dataset_name", str(source), "--output_dir", str(output), *map(str, arguments)])
    return json.loads((output / "manifest.json").read_text())


def read_output(folder: Path) -> list[dict]:
    return [r for path in sorted((folder / "data").glob("*.parquet")) for r in pq.read_table(path).to_pylist()]


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): fp.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def many_rows() -> list[dict]:
    rng = random.Random(1)
    return [
        row(
            rng.choice(["a>b", "a>c", "b<c", "d>b", "d=e", "e>f", "f<d", "c>e"]),
            i,
            caption=f"prompt {rng.randint(0, 30)}",
            time=rng.randint(0, 1000),
        )
        for i in range(300)
    ]


def test_launched_for_real(tmp_path, many_rows):
    source = write_shards(tmp_path / "in", many_rows, shards=3)
    write_shards(tmp_path / "in", [row("q>r", 1000, caption="held out")], prefix="validation")
    done = launch("--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    rows, counts = read_output(tmp_path / "out"), manifest["rows"]
    assert counts["input"] == 300 == counts["kept"] + sum(counts["dropped"].values())
    assert manifest["pairs"]["total"] == len(rows) == len(slow(many_rows, "absolute_winners", 1, "latest"))
    assert manifest["pairs"]["unique_prompts"] == len({r["caption"] for r in rows})
    assert manifest["pairs"]["images"] == len({r[f"image_{i}_uid"] for r in rows for i in (0, 1)})
    assert [r["file"] for r in manifest["inputs"]] == [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    assert len(manifest["outputs"]) == -(-len(rows) // 20) > 1
    for output in manifest["outputs"]:
        path = tmp_path / "out" / output["file"]
        assert (path.stat().st_size, fp.sha256(path)) == (output["size"], output["sha256"])
        assert pq.read_schema(path).remove_metadata() == SCHEMA
    # The written rows are the input's, every column of them, in order of time.
    original = {r["ranking_id"]: r for r in table(many_rows).to_pylist()}
    assert rows == [original[r["ranking_id"]] for r in rows]
    assert [(r["created_at"], r["ranking_id"]) for r in rows] == sorted(
        (r["created_at"], r["ranking_id"]) for r in rows
    )
    assert not [name for name in files(tmp_path / "out") if Path(name).name.startswith(".")]

    again = launch("--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = launch(
        "--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20, "--rule", "no_ties"
    )
    assert other.returncode == 2 and "another run" in other.stderr and "options" in other.stderr


def test_datasets_reads_the_output_folder(tmp_path, many_rows):
    datasets = pytest.importorskip("datasets")
    filtered(write_shards(tmp_path / "in", many_rows), tmp_path / "out", "--rows_per_file", 20)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["ranking_id"][:] == [r["ranking_id"] for r in read_output(tmp_path / "out")]
    Image.open(io.BytesIO(loaded[0]["jpg_0"])).load()


@pytest.mark.parametrize("rule", fp.RULES)
def test_output_does_not_depend_on_order_or_number_of_shards(tmp_path, many_rows, rule):
    outputs = []
    for i, shards in enumerate((1, 2, 7)):
        random.Random(i).shuffle(many_rows)
        filtered(write_shards(tmp_path / f"in{i}", many_rows, shards), tmp_path / f"out{i}", "--rule", rule)
        hashes = files(tmp_path / f"out{i}")
        hashes.pop("manifest.json")  # it names the input files
        report = (tmp_path / f"out{i}/report.html").read_text()
        hashes["report.html"] = report.replace(str(tmp_path / f"in{i}"), "the dataset")
        outputs.append(hashes)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0]


def test_a_made_up_row_takes_its_images_from_the_rows_that_hold_them(tmp_path):
    # y>z as image 1 and 0, x>y likewise, each in a row group of its own: z's picture is in the first.
    rows = games("z<y x>b y<x", caption="prompt")
    source = write_shards(tmp_path / "in", rows, shards=3, group=1)
    manifest = filtered(source, tmp_path / "out", "--rule", "x_y_xz")
    assert manifest["pairs"] | {"sha256": ""} == {
        "total": 2,
        "made_up": 1,
        "unique_prompts": 1,
        "images": 3,
        "sha256": "",
    }
    assert manifest["rows"]["kept"] == 1
    real, made_up = read_output(tmp_path / "out")
    assert real == table(rows).to_pylist()[2]
    assert made_up == real | {
        "best_image_uid": "x",
        "image_0_uid": "x",
        "image_0_url": "https://example.invalid/x",
        "image_1_uid": "z",
        "image_1_url": "https://example.invalid/z",
        "jpg_0": jpeg("prompt", "x"),
        "jpg_1": jpeg("prompt", "z"),
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "model of x",
        "model_1": "model of z",
        "ranking_id": -4,  # ~3
        "user_id": None,
    }
    # Filtering the output again finds nothing malformed in it.
    assert filtered(tmp_path / "out", tmp_path / "again", "--rule", "no_ties")["rows"]["kept"] == 2


def test_images_that_wait_on_disk_come_back_the_same(tmp_path, many_rows):
    random.Random(5).shuffle(many_rows)
    shards, _ = fp.open_shards(config(dataset_name=str(write_shards(tmp_path / "in", many_rows, shards=2))))
    rows = np.random.default_rng(0).permutation(300).repeat(2)
    sides = np.tile([0, 1], 300)
    expected = [many_rows[r][f"jpg_{s}"] for r, s in zip(rows, sides, strict=True)]
    for hold in (0, 5000, 10**9):
        images = fp.images_in_order(shards, rows, sides, tmp_path, config(), hold)
        assert [image[0].as_py() for image in images] == expected


@pytest.mark.parametrize(
    ("order", "spilled"),
    [
        # Every image is due when it is read.
        ("sorted", 0),
        # 1 0 3 2 ...: the two images of one row wait, in memory, for those of the next.
        ("swapped", 0),
        # In a row group of 4 rows the first three rows' 6 images come early, and 2 find room in memory. Each file of
        # 150 rows has 37 such groups and one of 2 rows, whose 2 early images find room: 2 * 37 * 4.
        ("reversed", 296),
    ],
)
def test_images_wait_on_disk_only_if_memory_is_short(tmp_path, monkeypatch, order, spilled):
    written = []

    class Spill(io.BytesIO):
        def write(self, content):
            written.append(content)
            return super().write(content)

    monkeypatch.setattr(fp.tempfile, "TemporaryFile", lambda dir: Spill())
    rows = [row("a>b", i, jpg_0=b"%04d" % (2 * i), jpg_1=b"%04d" % (2 * i + 1)) for i in range(300)]
    # The second half lies in the first file: row groups must be read in the order in which they are due.
    source = write_shards(tmp_path / "in", rows[150:] + rows[:150], shards=2, group=4)
    shards, _ = fp.open_shards(config(dataset_name=str(source)))
    due = {"sorted": np.arange(300), "swapped": np.arange(300) ^ 1, "reversed": np.arange(300)[::-1]}[order]
    positions = (due + 150) % 300
    room_for_two = 2 * 4
    images = fp.images_in_order(shards, positions.repeat(2), np.tile([0, 1], 300), tmp_path, config(), room_for_two)
    found = [image[0].as_py() for image in images]
    assert found == [b"%04d" % (2 * i + side) for i in due for side in (0, 1)]
    assert len(written) == spilled


def test_repeated_images_are_stored_once_per_row_group(tmp_path):
    noise = random.Random(0)
    blob = {uid: noise.randbytes(10_000) for uid in "abc"}
    rows = [row(game, i, jpg_0=blob[game[0]], jpg_1=blob[game[2]]) for i, game in enumerate(["a>b", "a>c"] * 40)]
    manifest = filtered(write_shards(tmp_path / "in", rows), tmp_path / "out", "--rule", "no_ties")
    # 80 rows hold 1.6 MB of images, of which a (as image 0), b and c are different: 30 kB.
    assert 30_000 < manifest["outputs"][0]["size"] < 60_000
    assert [(r["jpg_0"], r["jpg_1"]) for r in read_output(tmp_path / "out")] == [(r["jpg_0"], r["jpg_1"]) for r in rows]


def test_decision_reads_no_image_and_copy_skips_unused_row_groups(tmp_path, monkeypatch):
    rows = games("a>b c=d e=f a>c")
    source = write_shards(tmp_path / "in", rows, group=1)
    seen = []
    for name in ("read", "iter_batches"):
        original = getattr(pq.ParquetFile, name)

        def spy(self, *args, _original=original, **kwargs):
            seen.append((kwargs["columns"], kwargs.get("row_groups")))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(pq.ParquetFile, name, spy)
    filtered(source, tmp_path / "out")
    with_images = [groups for columns, groups in seen if set(columns) & {"jpg_0", "jpg_1"}]
    assert with_images == [[3], [0]]  # the input's for the copy, then the output's for the report
    assert seen[0] == (list(fp.DECISION), None)


def test_metadata_only(tmp_path):
    rows = games("a>b c=d e=f a>c")
    manifest = filtered(write_shards(tmp_path / "in", rows, shards=2, group=1), tmp_path / "out", "--metadata_only")
    assert [i["row_groups_with_pairs"] for i in manifest["inputs"]] == [[], [1]]
    (kept,) = read_output(tmp_path / "out")
    assert kept == {k: v for k, v in table(rows).to_pylist()[3].items() if not k.startswith("jpg")}
    # A dataset without image columns is enough for it, and only for it.
    pq.write_table(table(rows).drop_columns(["jpg_0", "jpg_1"]), tmp_path / "bare.parquet")
    assert filtered(tmp_path / "bare.parquet", tmp_path / "out2", "--metadata_only")["pairs"] == manifest["pairs"]
    with pytest.raises(UserError, match="column jpg_0, jpg_1 is missing; --metadata_only needs no images"):
        filtered(tmp_path / "bare.parquet", tmp_path / "out3")


def test_best_image_uid_is_reported_and_not_needed_where_it_is_ignored(tmp_path, capsys):
    rows = [row("a>b", 1, best_image_uid="b"), row("c>d", 2, caption="dog")]
    source = write_shards(tmp_path / "in", rows)
    checked = filtered(source, tmp_path / "checked")
    assert checked["rows"]["dropped"]["contradictory_best_image_uid"] == 1 and checked["pairs"]["total"] == 1
    assert "- contradictory best image uid" in capsys.readouterr().out
    ignored = filtered(source, tmp_path / "ignored", "--best_image_uid", "ignore")
    assert "contradictory_best_image_uid" not in ignored["rows"]["dropped"] and ignored["pairs"]["total"] == 2
    assert re.search(r"! used despite best image uid +1\n", capsys.readouterr().out)
    for manifest in (checked, ignored):
        assert manifest["rows"]["contradictory_best_image_uid"] == 1
        assert manifest["rows"]["input"] == 2 == manifest["rows"]["kept"] + sum(manifest["rows"]["dropped"].values())
    report = {name: (tmp_path / name / "report.html").read_text() for name in ("checked", "ignored")}
    said = "Games whose best_image_uid is not that of the image that the labels prefer: 1; they were "
    assert said + "dropped before wins were counted" in report["checked"]
    assert said + "used as the labels say" in report["ignored"]

    bare = tmp_path / "bare.parquet"
    pq.write_table(table(rows).drop_columns(["best_image_uid"]), bare)
    assert filtered(bare, tmp_path / "bare", "--best_image_uid", "ignore")["pairs"] == ignored["pairs"]
    with pytest.raises(UserError, match="column best_image_uid is missing"):
        filtered(bare, tmp_path / "bare2")


def test_parts_of_several_machines_make_the_same_files(tmp_path, many_rows, capsys):
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    filtered(source, tmp_path / "whole", "--rows_per_file", 5)
    for part in ("2/3", "1/3"):
        fp.main(
            [
                "--dataset_name",
                str(source),
                "--output_dir",
                str(tmp_path / "parts"),
                "--rows_per_file=5",
                "--shard",
                part,
            ]
        )
    assert "still to come" in capsys.readouterr().out and not (tmp_path / "parts/manifest.json").exists()
    filtered(source, tmp_path / "parts", "--rows_per_file", 5)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [list(fp.part_of(f"{i}/3", 7)) for i in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5, 6]]


def test_an_interrupted_run_leaves_whole_files_only_and_continues(tmp_path, many_rows, monkeypatch):
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    filtered(source, tmp_path / "whole", "--rows_per_file", 5)
    original, calls = pq.ParquetWriter.write_table, []

    def fail_on_the_third(self, piece):
        calls.append(1)
        if len(calls) == 3:
            original(self, piece)
            raise KeyboardInterrupt
        original(self, piece)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        filtered(source, tmp_path / "out", "--rows_per_file", 5)
    names = files(tmp_path / "out")
    assert len([n for n in names if n.endswith(".parquet")]) == 2 and "manifest.json" not in names
    assert all(names[n] == files(tmp_path / "whole")[n] for n in names if n.endswith(".parquet"))
    with pytest.raises(UserError, match="another run"):
        filtered(source, tmp_path / "out", "--rule", "no_ties")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/data").iterdir()}
    third = sorted(files(tmp_path / "whole"))[2]
    (tmp_path / "out" / third).with_name(f".{Path(third).name}.tmp").write_text("left by a killed run")
    filtered(source, tmp_path / "out", "--rows_per_file", 5)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == time for p, time in written.items())  # not written a second time


def test_a_changed_or_missing_output_file_is_noticed(tmp_path, many_rows):
    source = write_shards(tmp_path / "in", many_rows)
    manifest = filtered(source, tmp_path / "out")
    (tmp_path / "out" / manifest["outputs"][0]["file"]).unlink()
    with pytest.raises(UserError, match="has changed"):
        filtered(source, tmp_path / "out")


def test_a_full_disk_is_one_line(tmp_path, many_rows, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fp.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*No space left"):
        filtered(write_shards(tmp_path / "in", many_rows), tmp_path / "out")
    assert not list((tmp_path / "out/data").iterdir())


# Names of parquet files, and what they give for a split: the chosen ones, or parts of the refusal.
SPLIT_FILES = {
    "shards, validation aside": ("train-00000-of-00002 train-00001-of-00002 validation-00000-of-1", "train", [0, 1]),
    "data folder, others aside": ("data/train-0 data/train-1 data/test-0 x", "train", [0, 1]),
    "folders": ("default/train/0000 default/test/0000", "train", [0]),
    "no split named": ("a b/c b/.c .cache/d", "train", [0, 1]),
    "words inside words": ("portraits latest medieval constraint-0 device", "train", [0, 1, 2, 3, 4]),
    "dataset's name first": ("pickapic-train-0 pickapic-validation-0", "train", [0]),
    "dataset's name first, the other": ("pickapic-train-0 pickapic-validation-0", "validation", [1]),
    "number first": ("0000.train 0001.train 0000.validation_unique", "train", [0, 1]),
    "underscores": ("pickapic_v2_train_00000_of_00002 pickapic_v2_test_unique_00000_of_00001", "train", [0]),
    "test_unique is no test": ("test-0 test_unique-0", "test", [0]),
    "test_unique": ("test-0 test_unique-0 train-0", "test_unique", [1]),
    "capitals": ("Train/0 Validation/0", "train", [0]),
    "capitals asked for": ("Train/0 Validation/0", "Validation", [1]),
    "numbers behind": ("train0 train1 val0", "train", [0, 1]),
    "sets": ("trainset testset", "train", [0]),
    "other words for it": ("training-0 dev-0 eval-0", "train", [0]),
    "other words asked for": ("training-0 dev-0 eval-0", "val", [1]),
    "the same twice": ("training/train-0 val/validation-0", "train", [0]),
    "partial folder of the hub": ("default/partial-train/0000 default/partial-test/0000", "train", [0]),
    "a split of its own name": ("unlabeled-0 train-0", "unlabeled", [0]),
    "two others at once": ("train-0 test-validation-0", "train", [0]),
    "two at once": ("train-0 train-val-0", "train", "unclear which ... (train: train-0.parquet; train and validat"),
    "folder against file": ("train/validation-0 train/train-0", "train", "train and validation: train/validation-0."),
    "some without a word": ("train-0 0001 0002", "train", "unclear which ... (no split in the name: 0001.parquet, 00"),
    "validation beside the nameless": ("0000 0001 validation-0", "train", "unclear which ... validation: validation-0"),
    "many are not all listed": ("train-0 a b c d e f", "train", "a.parquet, b.parquet, c.parquet and 3 more"),
    "no such split": ("test-0 test_unique-0", "train", "no parquet files for split 'train' ... (test: test-0.parquet"),
    "no split but train": ("a", "test", "no parquet files for split 'test'"),
    "nothing": ("", "train", "no parquet files in"),
    "only hidden files": (".cache/train-0", "train", "no parquet files in"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_files_of_split(case):
    text, split, expected = SPLIT_FILES[case]
    names = [f"{name}.parquet" for name in text.split()]
    for order in (names, names[::-1]):
        if isinstance(expected, list):
            assert fp.files_of_split(order, split, "d") == sorted(names[i] for i in expected)
        else:
            with pytest.raises(UserError) as refused:
                fp.files_of_split(order, split, "d")
            assert all(part in str(refused.value) for part in expected.split(" ... "))
            assert "\n" not in str(refused.value)
            if "unclear" in str(refused.value):
                assert "give a file or a folder of one split, or set dataset_split" in str(refused.value)


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_both_programs_and_the_hub_read_the_same_files(case, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text, split, expected = SPLIT_FILES[case]
    names = [f"{name}.parquet" for name in text.split()]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([row(f"a{i}>b{i}", i)]), tmp_path / "in" / name)
    (tmp_path / "in").mkdir(exist_ok=True)

    class Api:
        def dataset_info(self, name, revision, files_metadata):
            files = [type("File", (), {"rfilename": n, "size": 1}) for n in ["README.md", *names]]
            return type("Info", (), {"sha": "c0ffee", "siblings": files})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(tmp_path / "in")]
    training = parse(train_ncp_sft.Config, [*argv, "--dataset_split", split, "--cache_dir", str(tmp_path / "cache")])
    local, hub = (config(dataset_name=d, dataset_split=split) for d in (str(tmp_path / "in"), "someone/pairs"))

    def trained() -> list[str]:
        pairs = data.open_pairs(training)
        assert sorted(pairs.name(i)["winner"] for i in range(len(pairs))) == [f"a{i}" for i in sorted(expected)]
        return [file.relative_to(tmp_path / "in").as_posix() for file in pairs.files]

    for read in (
        lambda: [shard.name for shard in fp.open_shards(local)[0]],
        lambda: [name for name, _, _ in fp.list_files(hub)[0]],
        trained,
    ):
        if isinstance(expected, list):
            assert read() == sorted(names[i] for i in expected)
        else:
            with pytest.raises(UserError) as refused:
                read()
            assert all(part in str(refused.value) for part in expected.split(" ... "))


def test_hub_dataset(tmp_path, many_rows, monkeypatch):
    """The hub's two client classes are stood in for by local files; what they are asked for is what is checked."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    paths = sorted((source / "data").glob("*.parquet"))
    asked = []

    class Api:
        def dataset_info(self, name, revision, files_metadata):
            asked.append((name, revision, files_metadata))
            found = [type("File", (), {"rfilename": f"data/{p.name}", "size": p.stat().st_size}) for p in paths]
            return type("Info", (), {"sha": "c0ffee", "siblings": found})

    class FileSystem:
        def open(self, path, mode, cache_type):
            assert path.startswith("datasets/someone/pairs@c0ffee/data/") and (mode, cache_type) == ("rb", "none")
            return open(source / "data" / Path(path).name, mode)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    fp.main(["--dataset_name=someone/pairs", "--revision=v2", f"--output_dir={tmp_path / 'hub'}"])
    filtered(source, tmp_path / "local")
    assert asked == [("someone/pairs", "v2", True)]
    assert json.loads((tmp_path / "hub/manifest.json").read_text())["commit"] == "c0ffee"
    assert read_output(tmp_path / "hub") == read_output(tmp_path / "local")


@pytest.mark.parametrize("name", ["filter_pickapic", "tiny_filter"])
def test_shipped_configs_name_every_key_with_its_default(name):
    path = ROOT / "configs" / f"{name}.yaml"
    made = dataclasses.asdict(parse(fp.Config, ["--config", str(path)]))
    keys = [line.split(":")[0] for line in path.read_text().splitlines() if line and line[0].isalpha()]
    assert sorted(keys) == sorted(made)
    own = {"dataset_name", "output_dir"} | ({"rows_per_file"} if name == "tiny_filter" else set())
    assert {k: v for k, v in made.items() if k not in own} == {
        k: v for k, v in dataclasses.asdict(config()).items() if k not in own
    }


def test_every_training_config_reads_what_a_filter_config_writes():
    filters = [parse(fp.Config, ["--config", str(p)]) for p in (ROOT / "configs").glob("*.yaml") if "filter" in p.stem]
    written = {f.output_dir for f in filters}
    scripts, read = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}, {}
    for path in (ROOT / "configs").glob("*.yaml"):
        if (kind := path.stem.rpartition("_")[2]) in scripts:
            read[path.stem] = parse(scripts[kind].Config, ["--config", str(path)]).dataset_name
    raw = {f.dataset_name for f in filters}  # which the large runs read
    assert len(read) > 10 and all(folder in (raw if "_full_" in n else written) for n, folder in read.items()), read
    # And what the README has it write.
    assert all(folder in written for folder in re.findall(r"--output_dir (data/\S+)", (ROOT / "README.md").read_text()))


# ---------------------------------------------------------------- bad input


def bad_inputs(tmp: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments, and a part of the one line that they must give."""
    good = write_shards(tmp / "good", games("a>b a=c d>e"), shards=2)
    whole = (good / "data/train-00001-of-00002.parquet").read_bytes()

    def spoiled(name: str, content: bytes) -> Path:
        folder = write_shards(tmp / name, games("a>b a=c d>e"), shards=2)
        (folder / "data/train-00001-of-00002.parquet").write_bytes(content)
        return folder

    def reshaped(name: str, change) -> Path:
        folder = write_shards(tmp / name, games("a>b a=c d>e"), shards=2)
        path = folder / "data/train-00001-of-00002.parquet"
        pq.write_table(change(pq.read_table(path)), path)
        return folder

    def typed(name: str, column: str) -> Path:
        rows = table(games("a>b"))
        field = rows.schema.get_field_index(column)
        pq.write_table(rows.set_column(field, column, pa.array([["x"]])), tmp / f"{name}.parquet")
        return tmp / f"{name}.parquet"

    def invalid(path: Path) -> Path:
        made = table(games("a>b"))
        buffers = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
        caption = pa.Array.from_buffers(pa.string(), 1, buffers)
        pq.write_table(made.set_column(made.schema.get_field_index("caption"), "caption", caption), path)
        return path

    mixed = write_shards(tmp / "mixed", games("a>b"))
    write_shards(mixed, games("a>b"), prefix="more")
    (tmp / "taken").mkdir()
    (tmp / "taken/notes.txt").write_text("mine")
    (tmp / "foreign").mkdir()
    (tmp / "foreign/manifest.json").write_text("[]")
    (tmp / "empty").mkdir()
    pq.write_table(table([]), tmp / "rowless.parquet")
    second = "train-00001-of-00002.parquet"
    return {
        "missing folder": ([tmp / "nowhere"], "no such file or folder"),
        "missing file": (["data/nothing.parquet"], "no such file or folder"),
        "hub offline": (["someone/nothing"], "'someone/nothing' is no local path, and the hub gave no such dataset"),
        "empty folder": ([tmp / "empty"], "no parquet files in"),
        "missing split": ([good, "--dataset_split", "test"], "no parquet files for split 'test'"),
        "not parquet": ([spoiled("text", b"hello " * 100)], f"{second}: not a readable parquet file"),
        "empty file": ([spoiled("zero", b"")], f"{second}: not a readable parquet file"),
        "truncated": ([spoiled("cut", whole[:-100])], f"{second}: not a readable parquet file"),
        "damaged inside": (
            [spoiled("damaged", whole[:4] + b"\xff" * 3000 + whole[3004:])],
            f"{second}: not a readable",
        ),
        "missing column": (
            [reshaped("narrow", lambda t: t.drop_columns(["label_1"]))],
            f"{second}: column label_1 is missing",
        ),
        "other schema": (
            [reshaped("wide", lambda t: t.append_column("extra", t["user_id"]))],
            f"{second}: schema differs",
        ),
        "wrong type": ([typed("typed", "label_0")], "typed.parquet: column label_0 is list"),
        "no rows": ([tmp / "rowless.parquet"], "leaves no pair of 0 rows"),
        "nothing left": (
            [good, "--min_wins", 9],
            "leaves no pair of 3 rows (1 tie, 1 not_an_absolute_winner, 1 too_few_wins)",
        ),
        "no UTF-8": ([invalid(tmp / "invalid.parquet")], "invalid.parquet: a caption or uid is not valid UTF-8"),
        "unclear split": ([mixed], "unclear which are the parquet files for split 'train' in"),
        "unknown rule": ([good, "--rule", "y_x"], "expected one of: no_ties"),
        "bad date": ([good, "--created_from", "soon"], "created_from is 'soon'"),
        "bad part": ([good, "--shard", "3/2"], "shard is '3/2'"),
        "unknown key": ([good, "--min_win", 2], "did you mean --min_wins?"),
        "folder taken": ([good, "--output_dir", tmp / "taken"], "holds something else"),
        "foreign manifest": ([good, "--output_dir", tmp / "foreign"], "is not this script's"),
        "output is a file": ([good, "--output_dir", tmp / "rowless.parquet"], "is a file"),
        "output inside the input": ([good, "--output_dir", good / "out"], "lies inside the dataset"),
    }


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    for name, (arguments, expected) in bad_inputs(tmp_path).items():
        before = files(tmp_path)
        arguments = ["--output_dir", tmp_path / "out", "--dataset_name", *arguments]
        if name in ("truncated", "hub offline"):
            done = launch(*arguments)
            status, lines = done.returncode, done.stderr.strip().splitlines()
        else:  # what the script does, without waiting for a process
            with pytest.raises(SystemExit) as stopped:
                run(lambda arguments=arguments: fp.main([str(a) for a in arguments]))
            status, lines = stopped.value.code, capsys.readouterr().err.strip().splitlines()
        assert status == 2, (name, lines)
        assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], (name, lines)
        assert files(tmp_path) == before and not (tmp_path / "out").exists(), name
