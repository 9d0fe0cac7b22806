"""Configurations of the training stages: one dataclass a stage. `config.py` reads them from files."""

from dataclasses import dataclass, field
from typing import Any


Heads = dict[int, list[int]]
"""Attention heads by decoder layer, both counted from 0."""


@dataclass
class ModelConfig:
    """What every stage says about the model.

    Args:
        model: Folder or Hub name of a Q-Zoom checkpoint, or of a plain VLM, which then gets fresh branches.
        revision: Its revision on the Hub.
        branch_layer: K, for a plain VLM.
        branch_depth: T, for a plain VLM.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16". Trained weights are float32 in any case.
        attn_implementation: "sdpa", "flash_attention_2", …; the library's choice by default.
        load_in_4bit: Load the frozen backbone in 4 bit (nf4); the branches stay as they are.
        min_tokens, max_tokens: Coarse budget in merged visual tokens; the checkpoint's by default.
        prompt_suffix: Appended to every question, such as a request for a short answer.
        system_prompt: System turn before it.
        max_new_tokens: Longest answer the model may give.
    """

    model: str = ""
    revision: str | None = None
    branch_layer: int | None = None
    branch_depth: int = 3
    dtype: str = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = None
    prompt_suffix: str = ""
    system_prompt: str | None = None
    max_new_tokens: int = 128


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


@dataclass
class LabelConfig(ModelConfig, DataConfig):
    """Stages that run the model over rows and write shards.

    Args:
        output: Folder of the shards; what it holds already is kept and not made again.
        batch_size: Rows per forward pass.
        shard_size: Rows per shard; a stop loses at most the shard at work.
    """

    output: str = ""
    batch_size: int = 8
    shard_size: int = 256


@dataclass
class FindHeadsConfig(ModelConfig):
    """`find-heads`: which attention heads look at what a question asks about.

    Args:
        output: YAML file that `label-regions` reads as its configuration's `heads`.
        pages: Drawn pages.
        seed: Of the pages.
        batch_size: Pages per forward pass.
        grounding_count: Heads to keep.
        sink_count: Sink heads to keep at most.
        sink_share: A head is a sink when it puts at least this share of its image attention on a few cells that
            nothing asks about.
        query_tokens: "response" (the paper: the tokens of the answer) or "before" (the places that predict them).
    """

    output: str = ""
    pages: int = 64
    seed: int = 0
    batch_size: int = 8
    grounding_count: int = 4
    sink_count: int = 2
    sink_share: float = 0.5
    query_tokens: str = "response"


@dataclass
class LabelRegionsConfig(LabelConfig):
    """`label-regions`: where the model looks while it answers (paper III-C2).

    Args:
        heads: File of `find-heads`, instead of the two tables.
        grounding_heads: Heads whose response-to-image attention makes the map.
        sink_heads: Heads whose attention marks sinks.
        query_tokens: As in `find-heads`; a heads file brings its own.
    """

    heads: str | None = None
    grounding_heads: Heads = field(default_factory=dict)
    sink_heads: Heads = field(default_factory=dict)
    query_tokens: str = "response"


@dataclass
class TrainConfig(ModelConfig):
    """Stages that train.

    Args:
        labels: Folder of the labels, as the labelling stage wrote them.
        output: Folder of the finished checkpoint; Trainer's own checkpoints lie in its `trainer`.
        output_format: "full", or "addon" (branches and adapters only; the only one for a 4-bit backbone).
        other_backbone: Accept labels that were made by another backbone, such as the same one in 16 bit.
        seed: Of drawing, shuffling and initialisation.
        trainer: Arguments of `transformers.TrainingArguments` that win over the stage's defaults.
    """

    labels: str = ""
    output: str = ""
    output_format: str = "full"
    other_backbone: bool = False
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class TriStateConfig:
    """Thresholds that turn a raw map into labels when it is loaded (paper III-C2; defaults of the authors' code).

    Args:
        foreground: Cells above this share of the map's maximum are foreground (paper: 0.2).
        background: Cells below this share are background, outside the foreground's box.
        dilation: Cells by which the foreground's box grows on every side.
        largest_box: A box that covers this share of the grid says nothing: no labels.
        faintest_peak: A map whose maximum is lower says nothing: no labels.
        sink: Cells whose sink attention reaches this are never foreground.
        remove_sinks: Use the map of the sink heads; False is the ablation.
        tri_state: False makes every cell that is not foreground background; the ablation.
        pool: Bring the map to the grid of the coarse view before thresholds apply.
    """

    foreground: float = 0.25
    background: float = 0.05
    dilation: int = 1
    largest_box: float = 0.5
    faintest_peak: float = 5e-3
    sink: float = 0.01
    remove_sinks: bool = True
    tri_state: bool = True
    pool: bool = True


@dataclass
class TrainRegionsConfig(TrainConfig):
    """`train-regions` (stage 1, and 2.5 as a re-fit).

    Args:
        rule: Thresholds of the labels.
        only_right: Leave out maps of answers that are not the annotated one: whoever answers wrongly may have looked
            elsewhere. Needs rows with answers; the paper uses none.
        reset: Start from copies of the backbone's layers; False continues (stage 2.5).
        questions_per_image: Most questions about one image in one sequence.
    """

    rule: TriStateConfig = field(default_factory=TriStateConfig)
    only_right: bool = False
    reset: bool = True
    questions_per_image: int = 4


@dataclass
class JudgeConfig:
    """Who says whether an answer is right.

    Args:
        kind: "exact", "anls", "relaxed", "contains" (either answer holds the other), "endpoint" (an LLM behind an
            OpenAI-compatible endpoint) or "self" (the VLM as a judge of text).
        threshold: Least ANLS that counts as right.
        base_url: The endpoint.
        llm: Name of the model there.
        api_key_variable: Environment variable that holds the key.
        concurrency: Requests at a time.
    """

    kind: str = "exact"
    threshold: float = 0.5
    base_url: str | None = None
    llm: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8


@dataclass
class MineFusionConfig(LabelConfig):
    """`mine-fusion` (stage 2 data): where the plain model is right and the zoomed one is wrong (paper III-D).

    Args:
        judge: Who decides.
    """

    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class TrainFusionConfig(TrainConfig):
    """`train-fusion` (stage 2): the decoder learns to answer from both views as the plain model did.

    Args:
        method: "lora" or "full" (decoder layers and output embedding).
        lora: Arguments of `peft.LoraConfig`.
        merge: Merge the adapter into the backbone at the end; by default where `output_format` is "full".
        random_box_share: Share of samples whose box is replaced by a random one.
        random_box_side: Range of a random box's sides as shares of the image's.
        anchor_share: Share of samples that are rows both ways got right, against forgetting.
    """

    method: str = "lora"
    lora: dict[str, Any] = field(default_factory=dict)
    merge: bool | None = None
    random_box_share: float = 0.0
    random_box_side: list[float] = field(default_factory=lambda: [0.1, 0.6])
    anchor_share: float = 0.0


@dataclass
class LabelGatesConfig(LabelConfig):
    """`label-gates` (stage 3 data): answers on a ladder of resolutions (paper III-B1).

    Args:
        ladder: Budgets in tokens, ascending.
        judge: Compares answers with each other and with the annotation.
    """

    ladder: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind="contains"))


@dataclass
class TrainGateConfig(TrainConfig):
    """`train-gate` (stage 3).

    Args:
        labeling: "consistent" (the paper's rule) or "naive" (wrong at the coarse budget needs zoom; the ablation).
        reset: Start from copies of the backbone's layers.
        easy_share: Most easy rows per row with a transition.
        draw_high: Share of draws of a transition row at one of its two highest wrong rungs; the rest show a right one.
        skip_top: Highest rungs that are never drawn with a label 0.
    """

    labeling: str = "consistent"
    reset: bool = True
    easy_share: float = 1.0
    draw_high: float = 0.9
    skip_top: int = 2


@dataclass
class CalibrateConfig(ModelConfig, DataConfig):
    """`calibrate`: thresholds, budgets and presets from held-out rows.

    Args:
        output: Folder of the checkpoint with its presets; the model's own folder by default.
        lose_at_most: Accuracy that "fast" may lose against zooming always.
        cost_at_most: Mean prefill FLOPs that "fast" may cost, as a multiple of the plain model's at the coarse budget.
        crop_max_tokens: Crop budgets to try, ascending.
        region_thresholds: Thresholds to try, by mode.
        largest_area: Mean share of the image that boxes may cover; thresholds that make larger ones are not tried.
        judge: Who decides whether an answer is right.
        batch_size: Rows per call of `generate`.
        report: JSON file for every point tried; none by default.
    """

    output: str | None = None
    lose_at_most: float = 0.01
    cost_at_most: float | None = None
    crop_max_tokens: list[int] = field(default_factory=list)
    region_thresholds: dict[str, list[float]] = field(
        default_factory=lambda: {
            "absolute": [0.03, 0.05, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3],
            "peak": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        }
    )
    largest_area: float = 1.0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    batch_size: int = 8
    report: str | None = None
