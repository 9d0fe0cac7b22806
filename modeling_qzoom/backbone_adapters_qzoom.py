"""What peft does to a call of `generate` for single rows: an adapter by row, activated LoRA, learned prompts.

peft hands the first two to its layers through forward hooks that hold one entry per row of the batch that decodes. The
zooming prefill runs other rows and other lengths, so it gives the layers the entries of the rows that it runs. peft
keeps such hooks on the layers for as long as a call lasts; calls of one model with and without them cannot run in two
threads, with or without zooming.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .errors_qzoom import UnsupportedError


_NAMES, _OFFSETS = "adapter_names", "alora_offsets"


def _row_hooks(module: nn.Module) -> dict[int, dict[str, Any]]:
    """peft's hooks on a layer that hold entries by row: their keywords by id."""
    return {
        key: hook.keywords
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, partial) and {_NAMES, _OFFSETS} & set(hook.keywords)
    }


def _give(module: nn.Module, args: tuple, kwargs: dict[str, Any], **values: Any) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, **values}


@dataclass
class RowAdapters:
    """The entries of a batch's distinct rows.

    Attributes:
        layers: the layers that receive them.
        names: adapter by row, None without `adapter_names`.
        offsets: by row, how many columns from the right end an activated LoRA begins (None: nowhere); None without
            one.
    """

    layers: list[nn.Module]
    names: list[str] | None
    offsets: list[int | None] | None

    @contextmanager
    def run(self, rows: Sequence[int], inserted_at: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
        """Inside, the layers run these rows.

        Args:
            rows: indices of distinct rows, in the order in which they are run.
            inserted_at: per row, how many columns of the prompt follow an inserted block, and its length.
        """
        values: dict[str, Any] = {}
        if self.names is not None:
            values[_NAMES] = [self.names[row] for row in rows]
        if self.offsets is not None:
            offsets = [self.offsets[row] for row in rows]
            if inserted_at is not None:
                offsets = [
                    offset if offset is None or offset <= after else offset + block
                    for offset, (after, block) in zip(offsets, inserted_at)
                ]
            values[_OFFSETS] = offsets
        handles = []
        try:
            for layer in self.layers:
                handles.append(layer.register_forward_pre_hook(partial(_give, **values), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def run_rows(
    adapters: RowAdapters | None, rows: Sequence[int], inserted_at: Sequence[tuple[int, int]] | None = None
) -> Iterator[None]:
    """`adapters.run`, or nothing where a call has none."""
    if adapters is None:
        yield
    else:
        with adapters.run(rows, inserted_at):
            yield


def row_adapters(model: PreTrainedModel, rows: int, repeats: int) -> RowAdapters | None:
    """What peft gives this call's layers by row; None if nothing.

    Args:
        rows: distinct rows of the batch.
        repeats: how often `generate` repeats each (beams, return sequences).

    Raises:
        UnsupportedError: entries for another number of rows, or for layers that do not run rows of the batch.
    """
    layers = {name: module for name, module in model.named_modules() if _row_hooks(module)}
    if not layers:
        return None
    values: dict[str, Any] = {}
    for module in layers.values():
        for keywords in _row_hooks(module).values():  # a later hook wins, as in peft
            values |= keywords
    for name in (_NAMES, _OFFSETS):
        given = values.get(name)
        if given is not None and len(given) != rows * repeats:
            raise UnsupportedError(
                f"{name} of peft has {len(given)} entries, but {rows * repeats} rows are generated ({rows} prompts, "
                f"{repeats} of each). peft repeats them for num_beams passed to generate itself, and for nothing else."
            )
    text = {id(part) for part in model.vlm.get_decoder().modules()} | {id(part) for part in model.zoom.modules()}
    for head in (model.get_input_embeddings(), model.get_output_embeddings()):
        text |= set() if head is None else {id(part) for part in head.modules()}
    visual = sorted(name for name, module in layers.items() if id(module) not in text)
    if visual:
        raise UnsupportedError(
            f"adapter_names and activated LoRA choose by row of the batch, which the vision tower does not run: "
            f"{visual[0]} has an adapter. Leave it out of the adapter's target_modules."
        )
    offsets = values.get(_OFFSETS)
    scorer = {id(part) for part in model.zoom.region.scorer.modules()}
    if offsets is not None and any(id(module) in scorer for module in layers.values()):
        raise UnsupportedError(
            "an activated LoRA on the region branch's scorer cannot tell where it begins, because the scorer sees "
            "single tokens. Leave zoom out of the adapter's target_modules."
        )
    names = values.get(_NAMES)
    return RowAdapters(
        list(layers.values()),
        None if names is None else list(names[::repeats]),
        None if offsets is None else list(offsets[::repeats]),
    )


@contextmanager
def no_adapters_left(model: nn.Module) -> Iterator[None]:
    """Where a call ends in an error within, takes away the hooks by row that peft then leaves on its layers.

    No later call would run with them.
    """
    try:
        yield
    except BaseException:
        for module in model.modules():
            for key in _row_hooks(module):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def refuse_learned_prompt(model: PreTrainedModel) -> None:
    """Refuses peft's prompt learning in a call that may zoom.

    Raises:
        UnsupportedError: a learned prompt would stand in front, which the prefill does not see.
    """
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    if owner is model:
        return
    kind = getattr(getattr(owner, "active_peft_config", None), "peft_type", type(owner).__name__)
    raise UnsupportedError(
        f"a learned prompt ({getattr(kind, 'value', kind)}) cannot go with zooming: it is put in front of the prompt "
        "one forward pass at a time, and the zooming prefill runs parts of one. Adapt the model with LoRA instead. "
        "With zoom='never' the plain model decides about it."
    )
