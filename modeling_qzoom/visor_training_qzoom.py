"""A language pass of `forward` under a configuration of VISOR: what is trained is what `generate` computes."""

from typing import Any

from torch import Tensor

from .errors_qzoom import InputError, UnsupportedError
from .training_losses_qzoom import IGNORED
from .visor_configurations_qzoom import layer_kinds
from .visor_plans_qzoom import frozen_tokens, layer_plans
from .zoom_coarse_qzoom import coarse_view, run_view
from .zoom_model_qzoom import ZoomModel


def check_sparse_call(name: Any, has_targets: bool, has_sources: bool) -> None:
    """Refuses what a pass under a configuration would not obey.

    Raises:
        InputError: no name.
        UnsupportedError: together with branch targets, or with crops.
    """
    if not isinstance(name, str):
        raise InputError(f"vision must be the name of one configuration for the whole batch, got {name!r}.")
    if has_targets:
        raise UnsupportedError("branches are trained on the plain layers below K: leave vision out beside targets.")
    if has_sources:
        raise UnsupportedError(
            f"vision={name!r} trains on the coarse view alone: leave source_images and zoom_boxes out."
        )


def sparse_language_pass(
    model: ZoomModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    visual: dict[str, Any],
    labels: Tensor | None,
    name: str,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Language loss, where there are labels, and (B, N, vocabulary) logits; arguments as in `forward`.

    Logits of tokens that a layer leaves out are those of their last states, and no label may ask for them.
    """
    decoder = model.vlm.get_decoder()
    view = coarse_view(model, input_ids, attention_mask, visual)
    frozen = frozen_tokens(model.config, input_ids, view.valid)
    if labels is not None:  # what predicts an answer answers, whatever it is
        frozen[:, :-1] &= (labels[:, 1:] == IGNORED).to(frozen.device)
    plans = layer_plans(layer_kinds(model.config.visor, name) or "S" * len(decoder.layers), view.valid, frozen)
    hidden = run_view(model, view, 0, len(decoder.layers), plans)
    logits = model.get_output_embeddings()(decoder.norm(hidden))
    if labels is None:
        return None, logits
    loss = model.vlm.loss_function(
        logits=logits,
        labels=labels,
        vocab_size=model.config.get_text_config().vocab_size,
        num_items_in_batch=num_items_in_batch,
    )
    return loss, logits
