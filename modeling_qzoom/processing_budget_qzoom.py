"""The budget of a processor's coarse view: of everything that sets it, what was given last wins."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from .backbones_qzoom import spec_for_model_type
from .errors_qzoom import InputError, UnsupportedError
from .processing_keywords_qzoom import option
from .processing_settings_qzoom import setting
from .processing_sizes_qzoom import area_size, budget_size, check_budget, configured_size, token_side
from .zoom_options_qzoom import python_number


class ProcessorBudgetMixin(ProcessorMixin):
    """`min_tokens` and `max_tokens` of `QZoomProcessor`."""

    backbone_model_type: str

    def _set_budget(self, min_tokens: int | None, max_tokens: int | None) -> None:
        check_budget(min_tokens, max_tokens)
        if min_tokens is None and max_tokens is None:
            self._budget, self._size_before = (None, None), None
            return
        self._refuse_budget_of_fixed_grid()
        self._budget = python_number(min_tokens), python_number(max_tokens)
        self._size_before = configured_size(self.image_processor)

    def _current_budget(self) -> tuple[int | None, int | None]:
        """The token budget, unless the image processor was given another size since."""
        if self._size_before is not None and self._size_before != configured_size(self.image_processor):
            return None, None
        return self._budget

    @property
    def min_tokens(self) -> int | None:
        """Least merged visual tokens an image; None for what the image processor's size says."""
        return self._current_budget()[0]

    @min_tokens.setter
    def min_tokens(self, value: int | None) -> None:
        check_budget(value, None)
        most = self.max_tokens
        self._set_budget(value, most if value is None or most is None else max(value, most))

    @property
    def max_tokens(self) -> int | None:
        """Most merged visual tokens an image; None for what the image processor's size says."""
        return self._current_budget()[1]

    @max_tokens.setter
    def max_tokens(self, value: int | None) -> None:
        check_budget(None, value)
        least = self.min_tokens
        self._set_budget(least if value is None or least is None else min(value, least), value)

    def to_dict(self) -> dict[str, Any]:
        """All settings, as they are saved."""
        return {**super().to_dict(), "min_tokens": self.min_tokens, "max_tokens": self.max_tokens}

    def _refuse_budget_of_fixed_grid(self) -> None:
        if not spec_for_model_type(self.backbone_model_type).grid.has_budget:
            raise UnsupportedError(
                f"{self.backbone_model_type} sees every image on one fixed token grid (576 tokens for LLaVA-1.5), so "
                "min_tokens and max_tokens do not apply to it."
            )

    def _coarse_size(
        self, min_tokens: int | None = None, max_tokens: int | None = None, keywords: dict[str, Any] | None = None
    ) -> dict[str, int] | None:
        """What a call's coarse view is resized to, as the image processor's `size`; None with a fixed token grid."""
        size_of_call = option(keywords or {}, "images_kwargs", "size")
        has_budget = min_tokens is not None or max_tokens is not None
        if size_of_call is not None and has_budget:
            raise InputError("size and min_tokens/max_tokens both set the budget of the coarse view: give one.")
        if has_budget:
            self._refuse_budget_of_fixed_grid()
            if not setting(keywords or {}, self.image_processor, "do_resize"):
                raise InputError("min_tokens and max_tokens would have no effect without do_resize=True.")
        if not spec_for_model_type(self.backbone_model_type).grid.has_budget:
            return None
        if size_of_call is not None:
            size = area_size(size_of_call, self.image_processor, "size")
            if size["shortest_edge"] > size["longest_edge"]:
                raise InputError(f"size: shortest_edge is larger than longest_edge in {size_of_call!r}.")
            return size
        area = token_side(self.image_processor) ** 2
        return budget_size(
            configured_size(self.image_processor), area, (self._current_budget(), (min_tokens, max_tokens))
        )
