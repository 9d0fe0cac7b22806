"""Options that say which rows a command works on."""

from dataclasses import dataclass


@dataclass
class DataConfig:
    """Where rows come from.

    Args:
        data: A JSONL or parquet file, `hub:NAME` or a folder of `datasets.save_to_disk`, or `drawn:SPLIT` for pages
            of the benchmark.
        images: Folder that image paths are relative to; the data file's own by default.
        image_key, question_key, answer_key, id_key: Names of the columns.
        data_split: Split of a `datasets` dataset.
        limit: Only so many rows, drawn at random with the seed.
        seed: Of everything that is drawn at random.
    """

    data: str = ""
    images: str | None = None
    image_key: str = "image"
    question_key: str = "question"
    answer_key: str = "answer"
    id_key: str = "id"
    data_split: str = "train"
    limit: int | None = None
    seed: int = 0
