"""The rules: each on games by hand, and against a slow and obvious implementation on games at random."""

from __future__ import annotations

import random

import pytest
from filter_data import STORY, config, games, random_rows, row, slow, table

from filtering.rules import decide
from filtering.settings import RULES


def pairs(rows: list[dict], **options: object) -> list[str]:
    """The decision as 'winner>loser', in output order, a made-up pair with a '*'."""
    made = decide(table(rows), config(**options))

    def uid(index: int, wins: bool) -> str:
        side = 0 if bool(made.first_wins[index]) == wins else 1
        return rows[index][f"image_{side}_uid"]

    found = zip(made.row, made.loser_row, strict=True)
    return [f"{uid(r, True)}>{uid(q, False)}{'*' if r != q else ''}" for r, q in found]


def dropped(rows: list[dict], **options: object) -> dict[str, int]:
    """The reasons that apply, after a check that kept and dropped rows add up to the input."""
    made = decide(table(rows), config(**options))
    kept = int((~made.made_up).sum())
    assert kept + sum(made.dropped.values()) == len(rows)
    assert kept == int((made.why == 0).sum())
    return {reason: count for reason, count in made.dropped.items() if count}


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
        assert decide(table(rows + more), config(best_image_uid=option)).contradicting == 1
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
    # Half a second, and a little more: a>b, at second 1, is before both.
    assert pairs(rows, created_from="2023-01-01T00:00:01.500000") == pairs(rows[1:]) == ["c>a", "b>d"]
    assert pairs(rows, created_before="2023-01-01T00:00:01.600000") == ["a>b"]
    assert pairs(rows, models=["model of a", "model of b"]) == ["a>b"]
    assert dropped(rows, models=["model of a", "model of b"]) == {"other_model": 2}
    more = [*rows, row("e>f", 4, caption="dog")]
    assert pairs(more, min_games_per_prompt=3) == ["c>a"]
    assert dropped(more, min_games_per_prompt=3)["too_few_games_for_prompt"] == 1


@pytest.mark.parametrize("rule", RULES)
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
            made = decide(table(rows), config(**options))
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
