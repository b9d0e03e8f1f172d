"""The options of prepare_preferences.py."""

from __future__ import annotations

from dataclasses import dataclass

from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError

FORMATS = ("hpdv2", "hpdv3", "chosen_rejected", "rapidata", "imagereward", "table")
QUESTIONS = {  # what a format lets one ask; the first is its default
    "rapidata": ("preference", "alignment", "coherence"),
    "imagereward": ("rank", "overall_rating", "image_text_alignment_rating", "fidelity_rating"),
}


@dataclass
class PrepareConfig:
    """What to read, what counts as a win, where to write."""

    format: str = option(choices=FORMATS, doc="Which dataset's columns to expect; table: named by the options below")
    dataset_name: str = option(doc="Local .parquet, .json, .jsonl or .csv file, or a folder of parquet files")
    output_dir: str = option(doc="Folder to write; new, empty, or from the same run")
    dataset_split: str = option("train", doc="Split of a folder of parquet files; files named for it if there are any")
    images: str | None = option(
        None, doc="Folder that the paths of images in the dataset start from; null: where the dataset lies"
    )
    question: str | None = option(
        None,
        doc="What the judges were asked, or by which figure they ranked. rapidata: preference, alignment, coherence; "
        "imagereward: rank, overall_rating, image_text_alignment_rating, fidelity_rating; null: the first of these",
    )
    min_share: float = option(
        0.5,
        low=0.5,
        high=1,
        doc="Where shares of judges are known, the winner's must be above one half and at least this; less is a tie",
    )
    bad_images: str = option(
        "error",
        choices=("error", "skip"),
        doc="Stop at an image that is missing or no JPEG, PNG or WEBP, or skip it",
    )
    prompt_column: str = option("prompt", doc="Column of table with the prompt")
    image_columns: list[str] = option(
        ["image_0", "image_1"], doc="Two columns of table with the images: bytes, or paths from the folder images"
    )
    preference_columns: list[str] = option(
        ["preference"],
        doc="Column of table with the share of image 0 (a number from 0 to 1) or a word of preference_words, or two "
        "columns with a score of each image, such as votes, none below 0",
    )
    preference_words: list[str] = option(
        [],
        doc="What the column says for the first image, the second, and a tie if there are any; []: numbers",
    )
    model_columns: list[str] = option([], doc="Two columns of table with the models that made the images; []: none")
    created_at_column: str | None = option(
        None, doc="Column of table with the time of the judgement, ISO or a timestamp; null: 1970-01-01 for all"
    )
    rows_per_file: int = option(1500, low=1, doc="Rows per output file: 1500 are about 500 MB of Pick-a-Pic")

    def check(self) -> None:
        """Rules that span keys. Raises UserError."""
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
        """The question, or the format's default one."""
        return self.question or next(iter(QUESTIONS.get(self.format, ())), None)
