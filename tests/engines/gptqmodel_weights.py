"""Run in GPTQModel's own environment: load a directory and save the weights that GPTQModel decodes.

python gptqmodel_weights.py DIRECTORY OUT.safetensors
"""

import sys

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import save_file


def main(directory: str, out: str) -> None:
    model = GPTQModel.load(directory, device="cpu", backend=BACKEND.TORCH)
    weights = {}
    for name, module in model.model.named_modules():
        if isinstance(module, BaseQuantLinear):
            # (in, out) in GPTQModel, as in the file
            weights[name] = module.dequantize_weight().T.contiguous()
    save_file(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
