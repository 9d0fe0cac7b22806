"""QZoomProcessor: the backbone's own processor, and beside its output the source images that zooming needs."""

import copy
import inspect
from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature
from transformers.models.auto.video_processing_auto import (
    VIDEO_PROCESSOR_MAPPING_NAMES,
    video_processor_class_from_name,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import _get_template_variables

from .backbone_grids_qzoom import NativeGrid
from .backbones_qzoom import spec_for_model_type
from .errors_qzoom import InputError, UnsupportedError
from .messages_qzoom import one_line
from .processing_budget_qzoom import ProcessorBudgetMixin
from .processing_images_qzoom import (
    check_views,
    covered_rectangle,
    images_by_row,
    load_rgb,
    match_placeholders,
    place_images,
    source_tensor,
)
from .processing_keywords_qzoom import (
    accepted_keywords,
    backbone_keywords,
    check_keywords,
    default_tensors,
    option,
    split_template_keywords,
)
from .processing_loading_qzoom import ProcessorLoadingMixin
from .processing_prompts_qzoom import refuse_empty_rows, refuse_touching_images
from .processing_settings_qzoom import check_image_keywords, check_image_processor, fixed_view, setting
from .processing_sizes_qzoom import token_side
from .processing_tokenizer_qzoom import TOKENIZING, guarded
from .source_images_qzoom import SourceImages


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


class QZoomProcessor(ProcessorLoadingMixin, ProcessorBudgetMixin):
    """Turns chats and images into what `QZoomForConditionalGeneration.generate` takes.

    The work is done by the backbone's own processor. This one adds the source images, sets the budget of the coarse
    view in tokens, and reads images of every kind with errors that name the offending one. It needs no torchvision
    unless there are videos. Rows are padded on the left, as `generate` needs them; the tokenizer given is set so. A
    training collator's call may say padding_side="right", which `forward` takes.

    One processor may serve several threads at a time: a call does not see the options of another.

    Args:
        image_processor: the backbone's image processor.
        tokenizer: the backbone's tokenizer.
        chat_template: Jinja text; the tokenizer's by default.
        backbone_model_type: `model_type` of the backbone, a row of `backbones_qzoom.BACKBONES`.
        backbone_processor_kwargs: further arguments of the backbone's processor, such as LLaVA's `patch_size`.
        min_tokens, max_tokens: budget of the coarse view in merged visual tokens an image; None leaves that bound as
            the image processor is configured. Of all ways to set it (here, as attributes, `image_processor.size`,
            `from_pretrained`, a call) the last one wins, and pushes the other bound where the two cross.
        max_source_pixels: largest accepted width × height of an image, against decompression bombs; None for none.
        video_config: settings of the backbone's video processor; its defaults if None.

    Raises:
        InputError: a bad budget, or an image processor that lacks what the backbone needs.
        UnsupportedError: unknown `backbone_model_type`, or a budget for a backbone with a fixed token grid.
    """

    # ragged lists must not be stacked when an output is converted again
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "source_images"]

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
        self.max_source_pixels = max_source_pixels
        self.video_config = video_config
        self.tokenizer.padding_side = "left"
        spec = spec_for_model_type(backbone_model_type)
        lacking = [name for name in spec.grid.extra_processor_arguments if name not in self.backbone_processor_kwargs]
        if lacking:
            raise InputError(
                f"{backbone_model_type} needs {', '.join(lacking)} in backbone_processor_kwargs, as its "
                "processor_config.json holds them."
            )
        if spec.grid.has_budget and not hasattr(image_processor, "merge_size"):
            raise InputError(
                f"{type(image_processor).__name__} has no merge_size: it is not an image processor of "
                f"{backbone_model_type}."
            )
        self._set_budget(min_tokens, max_tokens)

    # Building the backbone's processor costs microseconds, so it is made anew for every use: there is no copy that
    # could fall behind `tokenizer` or `image_processor`, nothing to guard between threads, nothing extra to pickle.

    @property
    def backbone_processor(self) -> ProcessorMixin:
        """The backbone's own processor, without videos."""
        return self._build_backbone_processor(self.image_processor, self.tokenizer)

    def _build_backbone_processor(
        self, image_processor: Any, tokenizer: Any, video_processor: Any = None
    ) -> ProcessorMixin:
        spec = spec_for_model_type(self.backbone_model_type)
        processor_class = getattr(transformers, spec.processor_class)
        if video_processor is None:
            processor_class, videos = _without_videos(processor_class), {}
        else:
            videos = {"video_processor": video_processor}
        with TOKENIZING:  # constructors may tokenize
            return processor_class(
                image_processor=image_processor,
                tokenizer=tokenizer,
                chat_template=self.chat_template,
                **videos,
                **self.backbone_processor_kwargs,
            )

    def _isolated_backbone_processor(self, accepted: dict[str, set[str]], video_processor: Any) -> ProcessorMixin:
        """The backbone's processor for one call, whose options no other call sees."""
        image_processor = self.image_processor
        if any(getattr(image_processor, name, None) is not None for name in ("min_pixels", "max_pixels")):
            image_processor = copy.copy(image_processor)  # these are in the size of the call
            image_processor.min_pixels = image_processor.max_pixels = None
        images = {*accepted["images_kwargs"], "min_pixels", "max_pixels"}
        tokenizer = guarded(self.tokenizer, images - accepted["text_kwargs"])
        return self._build_backbone_processor(image_processor, tokenizer, video_processor)

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
            raise UnsupportedError(f"{self.backbone_model_type} takes no videos.")
        raise ImportError("Videos need torchvision, which is not installed: pip install torchvision. Images do not.")

    def __getattr__(self, name: str) -> Any:
        # only reached for what this class lacks: image_token, image_token_id, replace_image_token, ...
        if name.startswith("_") or name in inspect.signature(type(self).__init__).parameters:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(self.backbone_processor, name)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return."""
        has_boxes = not spec_for_model_type(self.backbone_model_type).grid.has_budget
        boxes = ["source_boxes"] if has_boxes else []
        return [*dict.fromkeys(self.backbone_processor.model_input_names), "source_images", *boxes]

    def _accepted_keywords(self) -> dict[str, set[str]]:
        takes_videos = self.backbone_model_type in VIDEO_PROCESSOR_MAPPING_NAMES
        return accepted_keywords(self.backbone_processor, self._video_processor_class(), takes_videos=takes_videos)

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
                `return_tensors` is "pt" and `padding` True unless the call or the tokenizer's saved settings say
                otherwise.

        Returns:
            What the backbone's processor returns, and where there are images
            - `source_images`: `SourceImages`, a list with a (3, H, W) uint8 tensor per image, in order of appearance;
            - `source_boxes` (fixed token grids only): (num_images, 4) int64, the rectangle of source pixels that the
              grid covers, x0, y0, x1, y1, end exclusive.

        Raises:
            InputError: keywords that are unknown or would have no effect, no or empty prompts, a number of images that
                does not fit the placeholders, or an image that cannot be used.
            UnsupportedError: audio, or videos for a backbone that takes none.
            ImportError: videos without torchvision.
        """
        if audio is not None:
            raise UnsupportedError("QZoomProcessor takes no audio.")
        keywords = {name: value for name, value in kwargs.items() if value is not None or not name.endswith("_kwargs")}
        accepted = self._accepted_keywords()
        check_keywords(keywords, accepted)
        check_image_keywords(keywords, self.image_processor, videos is not None)
        prompts = [text] if isinstance(text, str) else text if text is None else list(text)
        if prompts is not None and not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("text must be a string or a list of strings.")
        if prompts is not None and not prompts:
            raise InputError("text holds no prompts; leave it out to prepare images alone.")
        size = self._coarse_size(min_tokens, max_tokens, keywords)
        if option(keywords, "images_kwargs", "size") is not None:
            size = None  # stays where the caller put it
        processor = self._isolated_backbone_processor(
            accepted, None if videos is None else self._build_video_processor()
        )
        flat, per_row = images_by_row(images)
        # text that was marked as user input holds placeholders that do not count; the backbone's own check knows them
        if not option(keywords, "text_kwargs", "sanitize_control_tokens", False):
            per_row = match_placeholders(prompts, per_row, len(flat), processor.image_token)
        spec = spec_for_model_type(self.backbone_model_type)
        if spec.image_start_token is not None:
            refuse_touching_images(prompts or [], processor)
        sources = self._load_sources(flat, per_row, keywords)
        saved = self.tokenizer.init_kwargs
        try:
            encoded = processor(
                images=sources or None, text=prompts, videos=videos, **backbone_keywords(keywords, size, saved)
            )
        except StrictDataclassError as error:  # keywords of a wrong type
            raise InputError(f"QZoomProcessor: {one_line(error)}") from None
        refuse_empty_rows(encoded)
        keep = dict.fromkeys([*(encoded.skip_tensor_conversion or ()), "source_images"])
        output = BatchFeature(dict(encoded), skip_tensor_conversion=list(keep))
        if sources:
            output["source_images"] = SourceImages(source_tensor(source) for source in sources)
            if not spec.grid.has_budget:
                settings = self._fixed_view(keywords)
                boxes = [covered_rectangle(*source.size, settings) for source in sources]
                output["source_boxes"] = torch.tensor(boxes)
        return output

    def _fixed_view(self, keywords: dict[str, Any]) -> dict[str, Any]:
        return fixed_view(keywords, self.image_processor, self.backbone_processor_kwargs["patch_size"])

    def _load_sources(
        self, images: list[Any], row_counts: list[int] | None, keywords: dict[str, Any]
    ) -> list[Image.Image]:
        """The images as upright RGB, checked to fit the way in which this call makes the coarse view."""
        if not images:
            return []
        check_image_processor(self.image_processor)
        is_fixed = not spec_for_model_type(self.backbone_model_type).grid.has_budget
        settings = self._fixed_view(keywords) if is_fixed else None
        do_resize = setting(keywords, self.image_processor, "do_resize")
        data_format = option(keywords, "images_kwargs", "input_data_format")
        ratio = NativeGrid.max_aspect_ratio if do_resize and not is_fixed else None
        slots = place_images(images, row_counts)
        sources = [load_rgb(slot, self.max_source_pixels, data_format, ratio) for slot in slots]
        if settings is not None:
            patch = self.backbone_processor_kwargs["patch_size"]
            check_views([source.size for source in sources], settings, patch, self.max_source_pixels)
        elif not do_resize:
            side = token_side(self.image_processor)
            for slot, source in zip(slots, sources, strict=True):
                if source.width % side or source.height % side:
                    raise InputError(
                        f"{slot} has {source.width} × {source.height} pixels; with do_resize=False both sides must be "
                        f"multiples of {side}, the side of a token."
                    )
        return sources

    def apply_chat_template(self, conversation: list[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """Renders one chat or a list of chats and, with `tokenize=True, return_dict=True`, processes it in one go.

        Takes what every processor of transformers takes; the processor's own keywords (`max_tokens=...`) may stand
        beside them or in `processor_kwargs`. Other names are the template's variables, whether it reads them or not.
        `return_tensors` is "pt" by default.

        Raises:
            InputError: an empty chat, a keyword of `generate`, a misspelt one of the processor; else as `__call__`.
        """
        if not len(conversation):
            raise InputError("the chat holds no message.")
        stored = self.chat_template
        template = chat_template or stored
        if isinstance(stored, dict):
            template = stored.get(chat_template or "default", chat_template)
        named = inspect.signature(ProcessorMixin.apply_chat_template).parameters
        free = {name: kwargs.pop(name) for name in [*kwargs] if name not in named}
        variables, ours = split_template_keywords(free, _get_template_variables(template), self._accepted_keywords())
        processor_kwargs = {**(kwargs.pop("processor_kwargs", None) or {}), **ours}
        if "return_tensors" not in processor_kwargs:
            kwargs.setdefault("return_tensors", default_tensors(self.tokenizer.init_kwargs))
        return super().apply_chat_template(
            conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs, **variables
        )

    def _get_num_multimodal_tokens(
        self, image_sizes: list[Any] | None = None, video_sizes: list[Any] | None = None, **kwargs: Any
    ) -> Any:
        """Tokens and patches of images of given (height, width), for servers that plan ahead."""
        size = self._coarse_size()
        if size is not None:
            kwargs = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], **kwargs}
        if video_sizes is None:
            return self.backbone_processor._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        videos = self._build_video_processor()
        processor = self._build_backbone_processor(self.image_processor, self.tokenizer, videos)
        return processor._get_num_multimodal_tokens(image_sizes=image_sizes, video_sizes=video_sizes, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: Any, **kwargs: Any) -> list[str]:
        """Decodes generated ids, (B, N) or (N,), as the backbone's processor does."""
        return self.backbone_processor.post_process_image_text_to_text(generated_outputs, **kwargs)
