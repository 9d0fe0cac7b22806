"""`read_page`: from the inputs of a prompt to a page."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors_qzoom import InputError, UnsupportedError
from .generation_refusals_qzoom import check_padding
from .prompt_checks_qzoom import check_ids, check_prompt
from .prompt_qzoom import POSITION_INPUTS, encode_images, prompt_positions
from .rows_qzoom import Positions
from .source_images_qzoom import SourceInput
from .zoom_model_qzoom import ZoomModel
from .zoom_model_state_qzoom import ModelState
from .zoom_options_qzoom import ZoomOptions, resolve_options
from .zoom_page_matching_qzoom import Prompts, digest
from .zoom_page_reading_qzoom import read_completely, read_pages
from .zoom_pages_qzoom import Beginning, Page


_VIDEO = "read_page: the prompt holds a video; only images can be read ahead."


@torch.no_grad()
def _page_of_prompt(
    model: ZoomModel, options: ZoomOptions, input_ids: Any, attention_mask: Tensor | None, vision: dict[str, Any]
) -> Page:
    """Reads a prompt up to the end of its last image.

    Args:
        options: which tokens the branches' layers update.
        input_ids, attention_mask: (1, N).
        vision: the VLM's visual inputs by name.

    Raises:
        InputError: not one prompt with an image, or inputs that do not fit each other.
        UnsupportedError: a prompt with a video.
    """
    check_ids(input_ids, getattr(model.get_input_embeddings(), "num_embeddings", None))
    if len(input_ids) != 1:
        raise InputError(f"read_page reads one prompt, got {len(input_ids)} rows; call it once for every page.")
    spans = check_prompt(model.config, input_ids, attention_mask, vision)
    check_padding(attention_mask)
    prompts = Prompts.of(model.config, input_ids, attention_mask, spans, vision)
    if prompts.videos:
        raise UnsupportedError(_VIDEO)
    if not spans[0] or prompts.pixels is None:
        raise InputError("read_page: the prompt holds no image, so there is no page to read.")
    columns = slice(prompts.first(0), prompts.cut(0, len(spans[0])))
    if not bool(prompts.valid[0, columns].all()):
        raise InputError("read_page: the attention mask hides tokens in front of the last image's end.")
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    given = {name: vision[name] for name in POSITION_INPUTS if name in vision}
    positions = Positions.of(prompt_positions(model.vlm, model.config.backbone, input_ids, valid, **given))
    images = encode_images(model.vlm, vision["pixel_values"], vision.get("image_grid_thw"))
    beginning = Beginning(input_ids[0, columns].clone(), positions.row(0)[:, columns].clone(), images)
    page = read_completely(model, read_pages(model, [beginning])[0], options.gate_branch, options.region_branch)
    dtype = page.hidden.dtype
    digests = tuple(digest(pixels, span.grid, dtype) for pixels, span in zip(prompts.pixels, spans[0]))
    return replace(page, digests=digests, read_by=ModelState.of(model))


class QZoomPageMixin:
    """`read_page`, for a model that can zoom."""

    def read_page(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        source_images: SourceInput | None = None,
        source_boxes: Any = None,
        gate_branch: str | None = None,
        region_branch: str | None = None,
        **others: Any,
    ) -> Page:
        """Reads the beginning of a prompt, up to the end of its last image, for any number of questions about it.

        Calls of `generate` that begin with the same tokens and images continue from it with `page=`. It holds what
        layers and branches make of it, none of which depends on the question: `page.nbytes` bytes, which nothing else
        holds. Weights that change afterwards make it useless, and `generate` says so.

        Args:
            input_ids, attention_mask: (1, N); what stands behind the last image does not count.
            pixel_values, image_grid_thw, mm_token_type_ids: as for `generate`.
            source_images, source_boxes: ignored, so that whatever a processor returned can be passed.
            gate_branch, region_branch: as for `generate`, whose calls read another kind again, each time.
            **others: refused.

        Raises:
            InputError: not one prompt with an image, inputs that do not fit each other, or one that has no place here.
            UnsupportedError: a prompt with a video.
        """
        if others.get("pixel_values_videos") is not None:
            raise UnsupportedError(_VIDEO)
        if others:
            raise InputError(
                f"read_page takes no {', '.join(sorted(others))}; options of zooming belong to `generate`."
            )
        kinds = {"gate_branch": gate_branch, "region_branch": region_branch}
        configs = [] if self.generation_config is None else [self.generation_config]
        options = resolve_options(kinds, configs, self.config, mrope=self.config.backbone.mrope)
        vision = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        vision = {name: value for name, value in vision.items() if value is not None}
        return _page_of_prompt(self, options, input_ids, attention_mask, vision)
