"""Tensors that took long to compute and are kept between runs, in the cache of Hugging Face's libraries."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlwq.files import cache_folder


def cached_tensor(kind: str, key: str, make: Callable[[], Tensor], *, keep: int) -> Tensor:
    """A tensor from the cache, or made and put there; a cache that cannot be read or written does no harm.

    Args:
        kind: folder of such tensors.
        key: name of this one: a hash of all that it depends on.
        make: makes it, on the CPU.
        keep: tensors that the folder may hold; the least recently used are removed.
    """
    folder = cache_folder() / kind
    file = folder / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # or it is an older version's
        found = load_file(file)["tensor"]
        with suppress(OSError):  # the cache may be another user's
            os.utime(file)
        return found
    tensor = make()
    partial = file.with_suffix(f".{os.getpid()}.partial")  # another process may write the same
    with suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"tensor": tensor}, partial)
        partial.replace(file)
        for old in sorted(folder.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)[:-keep]:
            old.unlink()  # which another process may have done
    with suppress(OSError):
        partial.unlink(missing_ok=True)  # what a full disk left
    return tensor
