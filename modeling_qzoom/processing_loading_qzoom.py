"""How a QZoomProcessor comes about: from a plain VLM's processor, or from a saved folder with other settings."""

import inspect
import json
import os
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from .backbones_qzoom import BACKBONES, spec_for_model_type
from .errors_qzoom import InputError
from .hub_qzoom import hub_keywords
from .processing_keywords_qzoom import OWN_KEYWORDS, check_given_at_loading
from .processing_sizes_qzoom import check_budget, token_side, uncross
from .zoom_options_qzoom import python_number


_VIDEO_CONFIG_FILE = "video_preprocessor_config.json"


def extra_arguments(processor_class: type[ProcessorMixin]) -> list[str]:
    """Names of a backbone processor's own constructor arguments, such as LLaVA's `patch_size`."""
    common = {"self", "chat_template", "kwargs", *processor_class.get_attributes()}
    return [name for name in inspect.signature(processor_class.__init__).parameters if name not in common]


def _saved_video_config(name: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any] | None:
    """The video settings that older repositories keep in a file of their own."""
    if os.path.isfile(name):
        return None
    path = cached_file(
        name,
        _VIDEO_CONFIG_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_keywords(kwargs, "subfolder"),
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _given_areas(given: dict[str, Any]) -> list[str]:
    """Which keywords of `from_pretrained` set the budget of the coarse view by its area.

    Raises:
        InputError: the budget is given in tokens too, or the name of one of our settings is misspelt.
    """
    check_given_at_loading(set(given))
    areas = [name for name in ("size", "min_pixels", "max_pixels") if given.get(name) is not None]
    tokens = [name for name in sorted(OWN_KEYWORDS) if given.get(name) is not None]
    if areas and tokens:
        raise InputError(f"{', '.join(areas + tokens)} all set the budget of the coarse view: give it in one way.")
    return areas


def _merged_budget(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The token budget after loading: a bound given alone pushes the saved other one where they cross."""
    low, high = (python_number({**saved, **given}.get(name)) for name in ("min_tokens", "max_tokens"))
    if isinstance(low, int) and isinstance(high, int) and low > high and len(given) == 1:
        low = high = python_number(next(iter(given.values())))
    return {"min_tokens": low, "max_tokens": high}


def _resize_image_processor(image_processor: Any, saved: dict[str, Any], given: list[str]) -> None:
    """Moves the saved token bounds that the given areas leave alone into the image processor's size."""
    check_budget(saved.get("min_tokens"), saved.get("max_tokens"))
    size = {edge: image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")}
    token_area = token_side(image_processor) ** 2
    for edge, bound, area in (
        ("shortest_edge", "min_tokens", "min_pixels"),
        ("longest_edge", "max_tokens", "max_pixels"),
    ):
        if area not in given and saved.get(bound) is not None:
            size[edge] = saved[bound] * token_area
    if len(given) == 1:
        size = uncross(size, "shortest_edge" if given == ["min_pixels"] else "longest_edge")
    image_processor.size = type(image_processor.size)(**size)


class ProcessorLoadingMixin(ProcessorMixin):
    """The class methods of `QZoomProcessor`."""

    @classmethod
    def from_backbone(
        cls,
        processor_or_name: ProcessorMixin | str | os.PathLike,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        *,
        max_source_pixels: int | None = 178_956_970,
        **kwargs: Any,
    ) -> Any:
        """Wraps a plain VLM's processor.

        Args:
            processor_or_name: the processor (its parts are shared, not copied), or the folder or Hub name of a plain
                VLM; the latter works without torchvision.
            min_tokens, max_tokens, max_source_pixels: settings of the processor, as the class takes them.
            kwargs: arguments of `from_pretrained` for the parts (`revision`, `cache_dir`, `token`, ...).

        Raises:
            InputError: not a supported backbone's processor.
        """
        own = {"min_tokens": min_tokens, "max_tokens": max_tokens, "max_source_pixels": max_source_pixels}
        _given_areas({**kwargs, **own})
        if not isinstance(processor_or_name, (str, os.PathLike)):
            if kwargs:
                raise InputError(f"{sorted(kwargs)} only apply when the processor is loaded by its name.")
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
            backbone_processor_kwargs={key: saved[key] for key in extra_arguments(processor_class) if key in saved},
            video_config=saved.get("video_processor") or _saved_video_config(name, **kwargs),
            **own,
        )

    @classmethod
    def _from_processor(cls, processor: ProcessorMixin, **own: Any) -> Any:
        model_type = cls._model_type_of(type(processor).__name__)
        videos = getattr(processor, "video_processor", None)
        extra = extra_arguments(getattr(transformers, spec_for_model_type(model_type).processor_class))
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
            raise InputError(
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

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of loaded parts and saved settings; of a budget, what is given in `kwargs` wins.

        Raises:
            InputError: a budget given in two ways, a misspelt name, or what the class refuses.
        """
        areas, image_processor = _given_areas(kwargs), args[0]
        given = {name: kwargs[name] for name in OWN_KEYWORDS if name in kwargs}
        budget = _merged_budget(processor_dict, given)
        if areas and hasattr(image_processor, "merge_size"):
            if "size" not in areas:
                _resize_image_processor(image_processor, processor_dict, areas)
            budget = dict.fromkeys(budget)
        return super().from_args_and_dict(args, processor_dict, **{**kwargs, **budget})
