"""A tokenizer whose calls do not see each other's padding and truncation.

A fast tokenizer keeps the padding and truncation of the call in hand on an object that all threads share.
"""

import copy
import os
import threading
from collections.abc import Iterable
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase


# one for all tokenizers, because several processors may share one; a call holds it for as long as it tokenizes
TOKENIZING = threading.RLock()

if hasattr(os, "register_at_fork"):
    # a child that was forked while another thread tokenizes would wait forever
    os.register_at_fork(
        before=TOKENIZING.acquire, after_in_parent=TOKENIZING.release, after_in_child=TOKENIZING.release
    )


@cache
def _guarded_class(tokenizer_class: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with TOKENIZING:
            return tokenizer_class.__call__(self, *args, **kwargs)

    return type(tokenizer_class.__name__, (tokenizer_class,), {"__call__": __call__})


def guarded(tokenizer: PreTrainedTokenizerBase, foreign_settings: Iterable[str]) -> Any:
    """A shallow copy that shares everything with the tokenizer and tokenizes for one thread at a time.

    Args:
        foreign_settings: names to leave out of the settings that the tokenizer was loaded with. `from_pretrained` of a
            processor hands its keywords to all parts, and a processor's call prefers what it finds at the tokenizer.
    """
    twin: Any = copy.copy(tokenizer)
    twin.__class__ = _guarded_class(tokenizer.__class__)
    foreign = set(foreign_settings)
    twin.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name not in foreign}
    return twin
