"""The list of source images: a list for everybody, and moved between devices like the tensors beside it."""

import copy
import io
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import BatchFeature

from modeling_qzoom.source_images_qzoom import SourceImages
from tests.families import FAMILY
from tests.processing_fixtures import PROCESSORS, chat, noise, process, qwen_processor
from tests.tiny import tiny_model


META = torch.device("meta")  # a second device that every machine has


def some_sources() -> SourceImages:
    return process(qwen_processor(), [chat(noise(60, 90), "a"), chat(noise(84, 56), "b")])["source_images"]


@pytest.mark.parametrize("family", list(PROCESSORS))
def test_the_usual_line_moves_every_input(family):
    budget = FAMILY[family].budget(4, 24)
    inputs = process(PROCESSORS[family](**budget), [chat(noise(120, 90, 3), "what?")])
    moved = {name: value.to("cpu") for name, value in inputs.items()}
    model = tiny_model(family)
    expected = model.generate(**inputs, zoom="always", max_new_tokens=3)
    assert torch.equal(model.generate(**moved, zoom="always", max_new_tokens=3), expected)


@pytest.mark.parametrize(
    "move",
    [
        lambda sources: sources.to("meta"),
        lambda sources: sources.to(META, torch.float16),
        lambda sources: sources.to(device=META, dtype=torch.bfloat16, non_blocking=True),
        lambda sources: sources.to(torch.zeros(1, device=META)),
        lambda sources: BatchFeature({"source_images": sources}).to(META, dtype=torch.bfloat16)["source_images"],
        lambda sources: send_to_device({"source_images": sources}, META)["source_images"],
        lambda sources: send_to_device([sources], "meta", non_blocking=True)[0],
        lambda sources: sources[:5].to(META),
        lambda sources: (sources[:1] + sources[1:]).to(META),
        lambda sources: sources.copy().to(META),
    ],
)
def test_moving(move):
    sources = some_sources()
    moved = move(sources)
    assert isinstance(moved, SourceImages) and isinstance(moved, list) and len(moved) == 2
    assert all(source.device == META and source.dtype == torch.uint8 for source in moved)
    assert [source.shape for source in moved] == [source.shape for source in sources] == [(3, 90, 60), (3, 56, 84)]
    assert all(source.device.type == "cpu" for source in sources)


def test_a_dtype_alone_changes_nothing():
    sources = some_sources()
    for same in (sources.to(torch.float16), sources.to(dtype=torch.bfloat16), sources.cpu()):
        assert all(torch.equal(*pair) and pair[0].dtype == torch.uint8 for pair in zip(same, sources, strict=True))


def test_rows_of_images_move_too():
    sources = some_sources()
    rows = SourceImages([[sources[0]], [], (sources[1],), None]).to(META)
    assert [type(row) for row in rows] == [list, list, tuple, type(None)] and rows[2][0].device == META


class Recorder(torch.Tensor):
    """Says what would be done with it on a machine with a GPU."""

    def cuda(self, device=None, non_blocking=False):
        return f"cuda {device} {non_blocking}"

    def pin_memory(self):
        return "pinned"


def test_cuda_and_pinned_memory():
    sources = SourceImages([torch.zeros(3, 2, 2).as_subclass(Recorder), [torch.zeros(3, 4, 2).as_subclass(Recorder)]])
    assert sources.cuda() == ["cuda None False", ["cuda None False"]]
    assert sources.cuda(1, non_blocking=True) == ["cuda 1 True", ["cuda 1 True"]]
    assert sources.pin_memory() == pin_memory({"images": sources})["images"] == ["pinned", ["pinned"]]
    assert isinstance(sources.cuda(), SourceImages) and isinstance(sources.pin_memory(), SourceImages)


def test_it_is_a_list():
    sources = some_sources()
    first, second = sources
    assert sources[-1] is second and list(reversed(sources)) == [second, first]
    sources.append(first)
    assert len(sources) == 3 and sources[2] is first and [*sources] == sources
    file = io.BytesIO()
    torch.save({"images": sources}, file)
    file.seek(0)
    for again in (
        copy.copy(sources),
        copy.deepcopy(sources),
        pickle.loads(pickle.dumps(sources)),
        torch.load(file, weights_only=False)["images"],
        next(iter(DataLoader([sources], collate_fn=lambda rows: rows[0], num_workers=1))),
    ):
        assert isinstance(again, SourceImages)
        assert all(torch.equal(*pair) for pair in zip(again, sources, strict=True))


def test_processors_name_what_stays_a_list():
    processor = qwen_processor()
    assert "source_images" in processor.skip_tensor_conversion
    assert set(processor.skip_tensor_conversion) > set(processor.backbone_processor.skip_tensor_conversion)
    inputs = processor(images=[noise(60, 90), noise(84, 56)], text=["<|image_pad|>"] * 2)
    assert isinstance(inputs.convert_to_tensors("pt")["source_images"], SourceImages)
