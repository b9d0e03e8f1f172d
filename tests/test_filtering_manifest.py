"""The mark of an unfinished folder. What the manifest says is tested in test_filter_pickapic.py."""

from __future__ import annotations

import json

from filtering import manifest


def test_machines_that_start_together_all_mark_the_folder(tmp_path, monkeypatch):
    put_in_place = manifest.put_in_place

    def after_another(temporary, path):
        monkeypatch.setattr(manifest, "put_in_place", put_in_place)
        manifest.mark_unfinished(tmp_path, {"rule": "x_y"}, "2/2")
        put_in_place(temporary, path)

    monkeypatch.setattr(manifest, "put_in_place", after_another)
    manifest.mark_unfinished(tmp_path, {"rule": "x_y"}, "1/2")
    (mark,) = tmp_path.iterdir()
    assert mark.name == manifest.UNFINISHED and json.loads(mark.read_text()) == {"rule": "x_y"}
