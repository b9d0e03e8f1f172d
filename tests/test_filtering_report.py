"""report.html: its counts against games by hand, its samples, bad images, and the page in a browser."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from filter_data import STORY, config, filtered, games, jpeg, row, table, write_shards
from support import python

from filtering.findings import Findings, gather, sample
from filtering.rules import decide

ROOT = Path(__file__).parents[1]


def gathered(rows: list[dict], **options: object) -> Findings:
    return gather(table(rows), decide(table(rows), config(**options)))


def report(tmp: Path, rows: list[dict], *arguments: object) -> str:
    filtered(write_shards(tmp / "in", rows), tmp / "out", *arguments)
    return (tmp / "out/report.html").read_text(encoding="utf-8")


def test_counts_on_one_story():
    # a beats b, c, b; b loses to a twice, beats c and d; c loses three times; d ties e, beats c, loses to b;
    # f beats g, loses to h.
    rows = games(STORY)
    found = gathered(rows)
    expected = {(3, 0): 1, (2, 2): 1, (0, 3): 1, (1, 1): 2, (0, 0): 1, (0, 1): 1, (1, 0): 1}  # a; b; c; d, f; e; g; h
    assert {tuple(cell): found.records[tuple(cell)] for cell in np.argwhere(found.records).tolist()} == expected
    assert found.contradictory_images == 3  # b, d, f
    # All decisive games but a>c have one of them; a>b and h>f are kept.
    assert found.contradictory_games == (5, 2)
    assert found.both_ways == 0
    assert found.games == [(0, 0)] * 4 + [(1, 1)] + [(0, 0)] * 3  # one prompt of nine games, a pair of which is left
    assert gathered(rows, rule="no_ties").contradictory_games == (0, 7)


def test_a_pair_judged_both_ways_is_one_however_often():
    rows = games("a>b b>a a>b c>d c>d")
    assert gathered(rows).both_ways == 1
    notes = [pair.note for pair in gathered(rows).removed]
    assert len(notes) == 3 and all("also judged the other way round" in note for note in notes)
    # Under another caption they are other images.
    assert gathered([row("a>b", 1, caption="cat"), row("b>a", 2, caption="dog")]).both_ways == 0


def test_games_of_a_prompt_fall_into_their_bins():
    sizes = [1, 2, 3, 4, 5, 8, 9, 64, 65, 200]
    rows = [row(f"{i}>z", 1000 * k + i, caption=str(k)) for k, n in enumerate(sizes) for i in range(n)]
    rows += [row("a=b", 10**6, caption="ties only")]
    assert gathered(rows).games == [(2, 1), (1, 1), (2, 2), (2, 2), (1, 1), (0, 0), (1, 1), (2, 2)]


def test_counts_cap_at_six():
    wins = [row(f"a>{i}", i) for i in range(9)]
    losses = [row(f"z<{i}", 100 + i) for i in range(6)]
    records = gathered(wins + losses).records
    assert records[6, 0] == 1 and records[0, 6] == 1 and records.sum() == 9 + 2


def test_a_sample_depends_on_each_id_alone():
    ids = np.random.default_rng(0).permutation(10_000) - 5000
    chosen = set(ids[sample(ids, 20)].tolist())
    assert len(chosen) == 20
    assert set(np.sort(ids)[sample(np.sort(ids), 20)].tolist()) == chosen
    # Leaving out ids that were not chosen changes nothing; neighbours are not chosen together.
    fewer = np.array([i for i in ids if i in chosen or i % 3])
    assert set(fewer[sample(fewer, 20)].tolist()) == chosen
    assert np.ptp(list(chosen)) > 5000


def test_each_sheet_shows_its_own(tmp_path):
    rng = random.Random(0)
    rows = [row(f"{rng.choice('abcd')}>{rng.choice('efgh')}", i, caption=f"clean {i}") for i in range(40)]
    rows += [row("c>d", 100 + i, caption="muddle") for i in range(20)] + [row("d>e", 200, caption="muddle")]
    page = report(tmp_path, rows, "--rule", "contradiction_free")
    removed, kept = page.split("<h2>Kept")
    assert removed.count("<article>") == 12 and kept.count("<article>") == 24
    assert removed.count(">muddle<") == 12 and kept.count(">clean ") == 24
    assert page.count("<img ") == 72 and page.count('<figure class="won">') == 36


def test_winner_label_and_record_stand_at_the_right_image(tmp_path):
    page = report(tmp_path, games("a<b c<b b=d"), "--rule", "no_ties")
    cards = [re.sub("<img[^>]*image (.)[^>]*>", r"[\1]", card) for card in page.split("<article>")[1:]]
    assert len(cards) == 2
    for loser, card in zip("ac", sorted(cards), strict=True):
        left, right = card.split("</figure>")[:2]
        assert f"[{loser}]" in left and 'class="lost"' in left and "label 0" in left and "0 wins, 1 loss<" in left
        assert "[b]" in right and 'class="won"' in right and "label 1" in right and "2 wins, 0 losses, 1 tie<" in right


def test_a_made_up_pair_is_shown_with_its_own_images(tmp_path):
    # z is image 0 of the first row, x image 1 of the last: x > z is written with x first.
    page = report(tmp_path, games("z<y x>b y<x"), "--rule", "x_y_xz")
    (card,) = [c for c in page.split("<article>")[1:] if "made up" in c]
    assert re.findall(r"<figure class=\"(\w+)\"><img alt=\"image (\w)\"", card) == [("won", "x"), ("lost", "z")]
    assert "ranking -4" in card and "2 wins, 0 losses" in card and "0 wins, 1 loss" in card


def test_text_of_users_is_only_text(tmp_path):
    attack = "<script>alert('x')</script><img src=https://example.invalid/x> \"quoted\" & more"
    uid = '"><img src=x onerror=alert(1)>'
    page = report(tmp_path, [row("a>b", 1, caption=attack, image_0_uid=uid, best_image_uid=uid)])
    assert "<script" not in page and "onerror=alert(1)>" not in page and "<img src=https" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page


def test_a_bad_image_is_a_labelled_box(tmp_path):
    whole = jpeg("cat", "a")
    bad = {"jpg_0": b"no picture", "jpg_1": None}
    page = report(tmp_path, [row("a>b", 1) | bad, row("a>c", 2, jpg_0=whole[:-200], caption="dog")])
    assert len(re.findall("<div class=box>cannot be decoded:<br>a</div>", page)) == 2
    assert "<div class=box>not there:<br>b</div>" in page
    assert page.count("<img ") == 1


def test_images_of_removed_games_that_cannot_be_read_do_not_stop_the_filter(tmp_path):
    rows = [row("a>b", 1), row("b>c", 2), row("d>e", 3, caption="dog")]
    source = write_shards(tmp_path / "in", rows, group=1)
    (file,) = (source / "data").iterdir()
    content = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(1).column(9)
    assert column.path_in_schema == "jpg_0"
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    # b>c is removed, and lies in the damaged row group.
    assert filtered(source, tmp_path / "out")["pairs"]["total"] == 2
    removed, kept = (tmp_path / "out/report.html").read_text().split("<h2>Kept")
    assert "not there:<br>b<" in removed and "not there:<br>c<" in removed and kept.count("<img ") == 4


def test_without_images_the_cards_show_uids(tmp_path):
    page = report(tmp_path, games(STORY), "--metadata_only")
    assert "<img" not in page and "<div class=box>h</div>" in page and page.count("<article>") == 5 + 2


def test_nothing_is_loaded_from_elsewhere_and_it_fits_a_phone(tmp_path, browser):
    rows = filtered(ROOT / "tiny/data", tmp_path / "out")["rows"]
    asked, errors = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("request", lambda request: asked.append(request.url[:20]))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "out/report.html").as_uri())
    assert not errors and [url for url in asked if not url.startswith("data:")] == [page.url[:20]]
    widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
    assert widths == [64] * 72
    bars = page.locator("table.funnel").first.locator("td.bar")
    drawn = bars.evaluate_all("cells => cells.map(c => [...c.children].map(bar => bar.getBoundingClientRect().width))")
    # Input, each reason that applies, kept: what is left shrinks to the kept rows.
    reasons = [count for count in rows["dropped"].values() if count]
    assert len(drawn) == len(reasons) + 2 > 4 and drawn[0][0] > 200
    for (_, gone), count in zip(drawn[1:-1], reasons, strict=True):
        assert abs(gone / drawn[0][0] - count / rows["input"]) < 0.01
    assert all(abs(left + gone - before) < 1 for (left, gone), (before, _) in zip(drawn[1:-1], drawn, strict=False))
    assert abs(drawn[-1][0] / drawn[0][0] - rows["kept"] / rows["input"]) < 0.01
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_benchmark_runs_and_its_engines_agree(tmp_path):
    command = ["benchmarks/filter.py", "--folder", tmp_path, "--json", tmp_path / "figures.json"]
    size = ["--rows", 2000, "--copy_rows", 20, "--rounds", 1]
    done = python(*command, *size)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    pairs = {name: engine["pairs"] for name, engine in figures["decision"].items()}
    assert len(pairs) == 3 and len(set(pairs.values())) == 1 and pairs["pyarrow"] > 50
    assert set(figures["copy"]) == {"9% kept", "9%, shuffled", "all", "all, shuffled"}
    done = python(*command, "--copy_rows", 10**9)
    assert done.returncode == 1 and re.fullmatch(r"error: .* GB free, .* are needed; lower --copy_rows\n", done.stderr)
