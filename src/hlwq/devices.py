"""Where to compute."""

from __future__ import annotations

import torch

from hlwq.errors import HlwqError


def torch_device(name: str) -> torch.device:
    """The device of that name: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        HlwqError: it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HlwqError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]} Use --device cpu."
        ) from None
    return device
