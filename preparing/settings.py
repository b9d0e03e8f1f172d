"""The options of prepare_preferences.py."""

from __future__ import annotations

from dataclasses import dataclass

from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError

FORMATS = ("hpdv2", "hpdv3", "chosen_rejected", "rapidata", "imagereward", "table")
QUESTIONS = {  # the questions of each format; the first is the default
    "rapidata": ("preference", "alignment", "coherence"),
    "imagereward": ("rank", "overall_rating", "image_text_alignment_rating", "fidelity_rating"),
}


@dataclass
class PrepareConfig:
    """What to read, what counts as a win, where to write."""

    format: str = option(
        choices=FORMATS,
        group="data",
        doc="columns to expect: a published dataset's; prompt, chosen, rejected; or (table) what the keys below name",
    )
    dataset_name: str = option(doc="local .parquet, .json, .jsonl or .csv file, or a folder of parquet files")
    output_dir: str = option(
        doc="folder to write train-*.parquet and manifest.json to; new, empty, or of the same run, which then continues"
    )
    dataset_split: str = option(
        "train", doc="split to read of a folder: the files named for it (all are train if no file is named for any)"
    )
    images: str | None = option(
        None, doc="folder that the paths of images start from; null: the folder in which the dataset is"
    )
    bad_images: str = option(
        "error",
        choices=("error", "skip"),
        doc="at an image that is missing or no JPEG, PNG or WEBP: stop, or leave its pairs out and count them",
    )
    rows_per_file: int = option(1500, low=1, doc="rows per output file; 1500 of Pick-a-Pic are about 500 MB")
    question: str | None = option(
        None,
        group="preference",
        doc="what was asked. rapidata: preference, alignment or coherence. imagereward: rank, overall_rating, "
        "image_text_alignment_rating or fidelity_rating. null: the first of these",
    )
    min_share: float = option(
        0.5,
        low=0.5,
        high=1,
        doc="share that a winner needs, beside more than one half, where shares of judges are known; less is a tie",
    )
    prompt_column: str = option("prompt", group="columns of a table", doc="column with the prompt")
    image_columns: list[str] = option(
        ["image_0", "image_1"], doc="the two columns with the images: bytes, or paths from the folder images"
    )
    preference_columns: list[str] = option(
        ["preference"],
        doc="one column with the share of image 0 (from 0 to 1) or a word of preference_words; or two with a score of "
        "each image of at least 0, such as votes",
    )
    preference_words: list[str] = option(
        [], doc="words for: the first image, the second, and (if there are any) a tie; none: the column holds numbers"
    )
    model_columns: list[str] = option([], doc="two columns with the models that made the images; none: not known")
    created_at_column: str | None = option(
        None, doc="column with the time of the judgement, ISO text or a timestamp; null: 1970-01-01 for all"
    )

    def check(self) -> None:
        """Raises UserError for keys that contradict each other."""
        allowed = QUESTIONS.get(self.format, ())
        if self.question is not None and self.question not in allowed:
            known = f"expected one of: {', '.join(allowed)}" if allowed else f"format {self.format} has one question"
            raise UserError(f"question is '{self.question}'; {known}")
        for key, columns, counts in (
            ("image_columns", self.image_columns, (2,)),
            ("preference_columns", self.preference_columns, (1, 2)),
            ("preference_words", self.preference_words, (0, 2, 3)),
            ("model_columns", self.model_columns, (0, 2)),
        ):
            one_item_each(key, columns)
            if len(columns) not in counts or len(set(columns)) < len(columns):
                wanted = " or ".join(map(str, counts))
                raise UserError(f"{key} is {columns}; expected {wanted} different ones")
        if self.preference_words and len(self.preference_columns) == 2:
            raise UserError("preference_words belongs to a single column; preference_columns names two")

    @property
    def asked(self) -> str | None:
        """The configured question, or the format's default."""
        return self.question or next(iter(QUESTIONS.get(self.format, ())), None)
