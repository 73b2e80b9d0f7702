"""SHA-256 of each recipe's files in each format, on the bundled model: a check that a change leaves the bytes alone.

    python tools/checkpoint_hashes.py > hashes.txt

The bytes of calibrated recipes depend on the processor and on the number of threads. Compare hashes from one machine;
the script computes with one thread.
"""

from __future__ import annotations

import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

import hlwq
from hlwq.calibration import Calibration
from hlwq.demo import bundled_model
from hlwq.recipes import RECIPES

CALIBRATION = Calibration(("embedded",), samples=8, sequence_length=256)
VARIANTS: dict[str, list[dict[str, object]]] = {
    "rtn": [
        {},
        {"bits": 8},
        {"symmetric": False},
        {"symmetric": True},
        {"symmetric": True, "scale_method": "absmax"},
        {"group_size": 32},
    ],
    "hlwq": [{}, {"bits": 3, "group_size": 64}, {"calibrate": True}],
    "gptq": [{}, {"desc_act": True}, {"gptaq_alpha": 0.25}],
}
"""Options that a recipe is run with; without an entry it runs with none. A format's refusal is printed as `refused`."""


def main() -> None:
    torch.set_num_threads(1)
    for name, recipe in RECIPES.items():
        for options in VARIANTS.get(name, [{}]):
            for format_name in recipe.formats:
                calibrated = recipe.calibrated or options.get("calibrate")
                label = " ".join([name, format_name, *(f"{key}={value}" for key, value in options.items())])
                print(label, _hashes(name, format_name, options, CALIBRATION if calibrated else None), flush=True)


def _hashes(name: str, format_name: str, options: dict[str, object], calibration: Calibration | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            hlwq.quantize(bundled_model(), out, name, format=format_name, calibration=calibration, **options)
        except hlwq.HlwqError as error:
            return f"refused ({type(error).__name__})" if "-v" in sys.argv else "refused"
        files = [*sorted(out.glob("*.safetensors")), out / "config.json"]
        return " ".join(sha256(file.read_bytes()).hexdigest()[:16] for file in files)


if __name__ == "__main__":
    main()
