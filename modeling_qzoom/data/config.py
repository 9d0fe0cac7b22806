"""Options that say which rows a command works on."""

from dataclasses import dataclass

from .options import option


@dataclass
class DataConfig:
    """Where rows come from."""

    data: str = option(
        "",
        "JSONL or parquet file, hub:NAME or a folder of datasets.save_to_disk, or drawn:SPLIT for pages of the "
        "benchmark, drawn:SPLIT/varied for those of the extra 'pages', drawn:SPLIT/letters for codes with letters",
    )
    images: str | None = option(None, "folder that image paths are relative to; the data file's own by default")
    image_key: str = option("image", "name of the column of images")
    question_key: str = option("question", "name of the column of questions")
    answer_key: str = option("answer", "name of the column of accepted answers")
    id_key: str = option("id", "name of the column of ids")
    data_split: str = option("train", "split of a datasets dataset")
    limit: int | None = option(None, "number of rows to take, drawn at random with the seed; all by default")
    seed: int = option(0, "seed of everything that is drawn at random")
