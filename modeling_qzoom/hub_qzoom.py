"""The arguments of `from_pretrained` that say where and how to look for files."""

from collections.abc import Mapping
from typing import Any


_NAMES = ("revision", "token", "cache_dir", "local_files_only", "proxies", "force_download")


def hub_keywords(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where and how to look, as far as they are given.

    Args:
        kwargs: arguments of `from_pretrained`.
        more: further names to keep, such as "subfolder".
    """
    return {name: kwargs[name] for name in (*_NAMES, *more) if kwargs.get(name) is not None}
