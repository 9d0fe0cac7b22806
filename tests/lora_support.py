"""Which tests of LoRA can run: transformers takes no peft that is older than it asks for."""

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


REASON = f"transformers {transformers.__version__} takes peft {MIN_PEFT_VERSION} or newer, here is {peft.__version__}"
needs_lora = pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=REASON)
