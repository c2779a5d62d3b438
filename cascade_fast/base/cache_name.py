"""The key/value cache's name in transformers: ``cache`` from 5.24 on, ``past_key_values`` before.

The one place that knows. Asking a new release by the old name warns, and ``generate`` passes the new one.
"""

from importlib.metadata import version
from typing import Any

from packaging.version import Version

# By version, as the classes that would tell are not imported this early (see auto_classes.py).
CACHE_NAME = "cache" if Version(version("transformers")) >= Version("5.24.0.dev0") else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as the keyword argument of a model's forward pass, or of its output."""
    return {CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, CACHE_NAME)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a caller has given under one of its names, or None. Raises ValueError where both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache, past_key_values: are two names of one argument; give one of them")
    return past_key_values if cache is None else cache
