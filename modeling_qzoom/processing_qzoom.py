"""QZoomProcessor: the backbone's own processor, and beside its output the source images that zooming needs."""

import inspect
import json
import os
import re
from functools import cache
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.models.auto.video_processing_auto import (
    VIDEO_PROCESSOR_MAPPING_NAMES,
    video_processor_class_from_name,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available

from .backbones_qzoom import BACKBONES, spec_for_model_type
from .keywords_qzoom import (
    GENERATE_KEYWORDS,
    OWN_KEYWORDS,
    accepted_keywords,
    backbone_keywords,
    budget_size,
    check_keywords,
    option,
)
from .options_qzoom import python_number
from .sources_qzoom import covered_rectangle, images_by_row, load_rgb, match_placeholders, place_images, source_tensor


_VIDEO_CONFIG_FILE = "video_preprocessor_config.json"
_MAX_ASPECT_RATIO = 200  # of the resize of Qwen's image processors
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@cache
def _without_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor without its `video_processor`, which cannot exist where torchvision is missing."""
    if "video_processor" not in processor_class.get_attributes():
        return processor_class

    # transformers reads the sub-processors off this signature
    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        processor_class.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    return type(processor_class.__name__, (processor_class,), {"__init__": __init__})


def _extra_arguments(processor_class: type[ProcessorMixin]) -> list[str]:
    """Names of a backbone processor's own constructor arguments, such as LLaVA's `patch_size`."""
    common = {"self", "chat_template", "kwargs", *processor_class.get_attributes()}
    return [name for name in inspect.signature(processor_class.__init__).parameters if name not in common]


def _saved_video_config(name: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any] | None:
    """The video settings that older repositories keep in a file of their own."""
    if os.path.isfile(name):
        return None
    hub = {key: kwargs[key] for key in _HUB_KEYWORDS if kwargs.get(key) is not None}
    path = cached_file(
        name,
        _VIDEO_CONFIG_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class QZoomProcessor(ProcessorMixin):
    """Turns chats and images into what `QZoomForConditionalGeneration.generate` takes.

    The work is done by the backbone's own processor. This one adds the source images, sets the budget of the coarse
    view in tokens, and reads images of every kind with errors that name the offending one. It needs no torchvision
    unless there are videos. Rows are always padded on the left; the tokenizer given is set so.

    Args:
        image_processor: the backbone's image processor.
        tokenizer: the backbone's tokenizer.
        chat_template: Jinja text; the tokenizer's by default.
        backbone_model_type: `model_type` of the backbone, a row of `backbones_qzoom.BACKBONES`.
        backbone_processor_kwargs: further arguments of the backbone's processor, such as LLaVA's `patch_size`.
        min_tokens, max_tokens: budget of the coarse view in merged visual tokens an image; None leaves that bound as
            the image processor is configured. A call may override it.
        max_source_pixels: largest accepted width × height of an image, against decompression bombs; None for none.
        video_config: settings of the backbone's video processor; its defaults if None.

    Raises:
        ValueError: unknown `backbone_model_type`, a bad budget, a budget for a backbone with a fixed token grid, or an
            image processor that lacks what the backbone needs.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        backbone_model_type: str = "qwen2_5_vl",
        backbone_processor_kwargs: dict[str, Any] | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        max_source_pixels: int | None = 178_956_970,
        video_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None)
        )
        self.backbone_model_type = backbone_model_type
        self.backbone_processor_kwargs = dict(backbone_processor_kwargs or {})
        self.min_tokens = python_number(min_tokens)
        self.max_tokens = python_number(max_tokens)
        self.max_source_pixels = max_source_pixels
        self.video_config = video_config
        self.tokenizer.padding_side = "left"
        spec = spec_for_model_type(backbone_model_type)
        if spec.square_crop and self.backbone_processor_kwargs.get("patch_size") is None:
            raise ValueError(
                f"{backbone_model_type} needs patch_size, num_additional_image_tokens and "
                "vision_feature_select_strategy in backbone_processor_kwargs, as its processor_config.json holds them."
            )
        if not spec.square_crop and not hasattr(image_processor, "merge_size"):
            raise ValueError(
                f"{type(image_processor).__name__} has no merge_size: it is not an image processor of "
                f"{backbone_model_type}."
            )
        self._coarse_size(None, None)  # checks the budget

    @classmethod
    def from_backbone(
        cls,
        processor_or_name: ProcessorMixin | str | os.PathLike,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        *,
        max_source_pixels: int | None = 178_956_970,
        **kwargs: Any,
    ) -> "QZoomProcessor":
        """Wraps a plain VLM's processor.

        Args:
            processor_or_name: the processor (its parts are shared, not copied), or the folder or Hub name of a plain
                VLM; the latter works without torchvision.
            min_tokens, max_tokens, max_source_pixels: as of the class.
            kwargs: for the `from_pretrained` of the parts (`revision`, `cache_dir`, `token`, ...).

        Raises:
            ValueError: not a supported backbone's processor.
        """
        own = {"min_tokens": min_tokens, "max_tokens": max_tokens, "max_source_pixels": max_source_pixels}
        if not isinstance(processor_or_name, (str, os.PathLike)):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} only apply when the processor is loaded by its name.")
            return cls._from_processor(processor_or_name, **own)
        name = processor_or_name
        saved, _ = ProcessorMixin.get_processor_dict(name, **kwargs)
        try:
            config, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        except OSError:  # a folder with a processor and no model
            config = {}
        model_type = config.get("model_type") or cls._model_type_of(saved.get("processor_class"))
        processor_class = getattr(transformers, spec_for_model_type(model_type).processor_class)
        return cls(
            AutoImageProcessor.from_pretrained(name, **kwargs),
            AutoTokenizer.from_pretrained(name, **kwargs),
            chat_template=saved.get("chat_template"),
            backbone_model_type=model_type,
            backbone_processor_kwargs={key: saved[key] for key in _extra_arguments(processor_class) if key in saved},
            video_config=saved.get("video_processor") or _saved_video_config(name, **kwargs),
            **own,
        )

    @classmethod
    def _from_processor(cls, processor: ProcessorMixin, **own: Any) -> "QZoomProcessor":
        model_type = cls._model_type_of(type(processor).__name__)
        videos = getattr(processor, "video_processor", None)
        extra = _extra_arguments(getattr(transformers, spec_for_model_type(model_type).processor_class))
        return cls(
            processor.image_processor,
            processor.tokenizer,
            chat_template=processor.chat_template,
            backbone_model_type=model_type,
            backbone_processor_kwargs={key: getattr(processor, key) for key in extra if hasattr(processor, key)},
            video_config=None if videos is None else videos.to_dict(),
            **own,
        )

    @staticmethod
    def _model_type_of(processor_class: str | None) -> str:
        rows = {spec.processor_class: model_type for model_type, spec in BACKBONES.items()}
        if processor_class not in rows:
            raise ValueError(
                f"{processor_class} is not the processor of a supported backbone; expected one of {sorted(rows)}."
            )
        return rows[processor_class]

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved settings; a stock video processor's settings beside them become `video_config`."""
        saved, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if saved.get("video_config") is None:
            video = saved.get("video_processor") or _saved_video_config(pretrained_model_name_or_path, **kwargs)
            saved["video_config"] = video
        return saved, unused

    # Building the backbone's processor costs microseconds, so it is made anew for every use: there is no copy that
    # could fall behind `tokenizer` or `image_processor`, nothing to guard between threads, nothing extra to pickle.

    @property
    def backbone_processor(self) -> ProcessorMixin:
        """The backbone's own processor, without videos."""
        return self._build_backbone_processor()

    def _build_backbone_processor(self, video_processor: Any = None) -> ProcessorMixin:
        spec = spec_for_model_type(self.backbone_model_type)
        processor_class = getattr(transformers, spec.processor_class)
        if video_processor is None:
            processor_class, videos = _without_videos(processor_class), {}
        else:
            videos = {"video_processor": video_processor}
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            **videos,
            **self.backbone_processor_kwargs,
        )

    def _video_processor_class(self) -> Any:
        """None where torchvision is missing or the backbone takes no videos."""
        by_backend = VIDEO_PROCESSOR_MAPPING_NAMES.get(self.backbone_model_type)
        if by_backend is None or not is_torchvision_available():
            return None
        saved = (self.video_config or {}).get("video_processor_type")
        return video_processor_class_from_name(saved or by_backend["torchvision"])

    def _build_video_processor(self) -> Any:
        video_class = self._video_processor_class()
        if video_class is not None:
            return video_class.from_dict(self.video_config or {})
        if self.backbone_model_type not in VIDEO_PROCESSOR_MAPPING_NAMES:
            raise ValueError(f"{self.backbone_model_type} takes no videos.")
        raise ImportError("Videos need torchvision, which is not installed: pip install torchvision. Images do not.")

    def __getattr__(self, name: str) -> Any:
        # only reached for what this class lacks: image_token, image_token_id, replace_image_token, ...
        if name.startswith("_") or name in inspect.signature(type(self).__init__).parameters:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(self.backbone_processor, name)

    @property
    def model_input_names(self) -> list[str]:
        has_boxes = spec_for_model_type(self.backbone_model_type).square_crop
        boxes = ["source_boxes"] if has_boxes else []
        return [*dict.fromkeys(self.backbone_processor.model_input_names), "source_images", *boxes]

    def _coarse_size(self, min_tokens: int | None, max_tokens: int | None) -> dict[str, int] | None:
        """The budget as the image processor's `size` (areas in pixels); None for what it is configured with."""
        budgets = ((self.min_tokens, self.max_tokens), (min_tokens, max_tokens))
        if all(bound is None for budget in budgets for bound in budget):
            return None
        if spec_for_model_type(self.backbone_model_type).square_crop:
            raise ValueError(
                f"{self.backbone_model_type} sees every image on one fixed token grid (576 tokens for LLaVA-1.5), so "
                "min_tokens and max_tokens do not apply to it."
            )
        return budget_size(self.image_processor, budgets)

    def _check_keywords(self, keywords: dict[str, Any]) -> None:
        check_keywords(keywords, accepted_keywords(self.backbone_processor, self._video_processor_class()))

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenizes prompts and prepares the coarse view of their images.

        Args:
            images: one image, a list in order of appearance, or one list per prompt. An image is a PIL image, an
                array or tensor, a path, a URL, base64 text or encoded bytes.
            text: prompts with one placeholder (`image_token`) an image.
            videos: as the backbone's processor takes them; needs torchvision.
            audio: not supported.
            min_tokens, max_tokens: budget of the coarse view for this call.
            kwargs: keywords of the backbone's processor, flat or in `text_kwargs`, `images_kwargs`, `videos_kwargs`.
                `return_tensors` is "pt" and `padding` True unless told otherwise.

        Returns:
            What the backbone's processor returns, and where there are images
            - `source_images`: list with a (3, H, W) uint8 tensor per image, in order of appearance;
            - `source_boxes` (fixed token grids only): (num_images, 4) int64, the rectangle of source pixels that the
              grid covers, x0, y0, x1, y1, end exclusive.

        Raises:
            ValueError: unknown keywords, right padding, a number of images that does not fit the placeholders, or an
                image that cannot be used.
            ImportError: videos without torchvision.
        """
        if audio is not None:
            raise ValueError("QZoomProcessor takes no audio.")
        keywords = {name: value for name, value in kwargs.items() if value is not None or not name.endswith("_kwargs")}
        self._check_keywords(keywords)
        prompts = [text] if isinstance(text, str) else text if text is None else list(text)
        if prompts is not None and not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("text must be a string or a list of strings.")
        size = self._coarse_size(min_tokens, max_tokens)
        if option(keywords, "images_kwargs", "size") is not None:
            if min_tokens is not None or max_tokens is not None:
                raise ValueError("size and min_tokens/max_tokens both set the budget of the coarse view: give one.")
            size = None
        processor = self._build_backbone_processor(None if videos is None else self._build_video_processor())
        flat, per_row = images_by_row(images)
        # text that was marked as user input holds placeholders that do not count; the backbone's own check knows them
        if not option(keywords, "text_kwargs", "sanitize_control_tokens", False):
            per_row = match_placeholders(prompts, per_row, len(flat), processor.image_token)
        data_format = option(keywords, "images_kwargs", "input_data_format")
        ratio = self._max_aspect_ratio(keywords)
        sources = [
            load_rgb(slot, self.max_source_pixels, data_format=data_format, max_aspect_ratio=ratio)
            for slot in place_images(flat, per_row)
        ]
        encoded = processor(images=sources or None, text=prompts, videos=videos, **backbone_keywords(keywords, size))
        # ragged lists must not be stacked when the output is converted again
        keep = [*(encoded.skip_tensor_conversion or ()), "source_images"]
        output = BatchFeature(dict(encoded), skip_tensor_conversion=keep)
        if sources:
            output["source_images"] = [source_tensor(source) for source in sources]
            if spec_for_model_type(self.backbone_model_type).square_crop:
                output["source_boxes"] = self._source_boxes(sources, keywords)
        return output

    def _max_aspect_ratio(self, keywords: dict[str, Any]) -> float | None:
        """What the image processor's resize refuses to go beyond; None where it takes every shape."""
        do_resize = option(keywords, "images_kwargs", "do_resize", getattr(self.image_processor, "do_resize", True))
        is_limited = do_resize and not spec_for_model_type(self.backbone_model_type).square_crop
        return _MAX_ASPECT_RATIO if is_limited else None

    def _source_boxes(self, sources: list[Image.Image], keywords: dict[str, Any]) -> torch.Tensor:
        """(num_images, 4) int64: what the fixed token grid covers of each source."""
        names = ("do_pad", "do_resize", "size", "do_center_crop", "crop_size")
        configured = {name: getattr(self.image_processor, name, None) for name in names}
        settings = {name: option(keywords, "images_kwargs", name, configured[name]) for name in names}
        if settings["do_pad"] and not hasattr(self.image_processor, "pad_to_square"):
            raise ValueError(f"do_pad of {type(self.image_processor).__name__} is not a padding to a square.")
        return torch.tensor([covered_rectangle(*source.size, settings) for source in sources])

    def apply_chat_template(self, conversation: list[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """Renders one chat or a list of chats and, with `tokenize=True, return_dict=True`, processes it in one go.

        Takes what every processor of transformers takes; the processor's own keywords (`max_tokens=...`) may stand
        beside them or in `processor_kwargs`. `return_tensors` is "pt" by default.

        Raises:
            ValueError: a keyword that neither the template nor the processor knows; else as `__call__`.
        """
        named = inspect.signature(ProcessorMixin.apply_chat_template).parameters
        stored = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template]
        variables = set(re.findall(r"\w+", " ".join(filter(None, [chat_template, *stored]))))
        free = [
            name for name in kwargs if name not in named and name not in variables - GENERATE_KEYWORDS - OWN_KEYWORDS
        ]
        ours = {name: kwargs.pop(name) for name in free}
        self._check_keywords({name: value for name, value in ours.items() if name not in OWN_KEYWORDS})
        processor_kwargs = {**(kwargs.pop("processor_kwargs", None) or {}), **ours}
        if "return_tensors" not in processor_kwargs:
            kwargs.setdefault("return_tensors", "pt")
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[Any] | None = None, video_sizes: list[Any] | None = None, **kwargs: Any
    ) -> Any:
        """Tokens and patches of images of given (height, width), for servers that plan ahead."""
        size = self._coarse_size(None, None)
        if size is not None:
            kwargs = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], **kwargs}
        if video_sizes is None:
            return self.backbone_processor._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        processor = self._build_backbone_processor(self._build_video_processor())
        return processor._get_num_multimodal_tokens(image_sizes=image_sizes, video_sizes=video_sizes, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: Any, **kwargs: Any) -> list[str]:
        """Decodes generated ids, (B, N) or (N,), as the backbone's processor does."""
        return self.backbone_processor.post_process_image_text_to_text(generated_outputs, **kwargs)
