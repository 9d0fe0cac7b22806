"""One object per supported family: what its tiny model, tokenizer, processor and inputs look like."""

from .family import Family
from .llava import LLAVA
from .qwen2_5_vl import QWEN2_5_VL
from .qwen3_vl import QWEN3_VL


# by model_type; a row of the library's table of backbones without an entry here fails a test
FAMILY: dict[str, Family] = {family.name: family for family in (QWEN2_5_VL, QWEN3_VL, LLAVA)}
