"""Run in PolarQuant's own environment: quantize a model with it, and save the weights that its functions decode.

    python polarquant_weights.py MODEL OPTIONS.json OUT.safetensors

The options are those of PolarQuantizer and quantize_model, and `to`: where the checkpoint goes. With `stream` the codes
are stored again as bit-packed files have them: `counted` with (out, blocks, block, codes) for `meta`, as the author's
converter reads them, `plain` with (bits, padded width), as the package's loader does.
"""

import json
import math
import sys
from pathlib import Path

import torch
from polarengine_vllm import hf_integration, polar_model
from polarengine_vllm.kv_cache.cache import BitPacker
from polarengine_vllm.loader import PolarWeightLoader, load_polar_config
from polarengine_vllm.packing import unpack_codes_half_block
from polarengine_vllm.quantizer import PolarQuantizer, build_hadamard
from safetensors.torch import load_file, save_file


def decode(codes, norms, levels, block):
    """What `_dequant_weight` computes before it rounds to bfloat16."""
    values = levels[codes.long()].view(len(codes), -1, block) @ build_hadamard(block)
    return (values * norms.float().unsqueeze(2)).reshape(len(codes), -1)


def main(model: str, options_file: str, out: str) -> None:
    options = json.loads(Path(options_file).read_text())
    to, pack = Path(options["to"]), options.get("pack", True)
    block = options.get("block_size", 128)
    quantizer = PolarQuantizer(block, options.get("bit_assignment"))
    quantizer.quantize_model(model, str(to), pack_int4=pack, pack_q5=pack)
    config = load_polar_config(str(to))
    weights, streams = {}, {}
    with PolarWeightLoader(str(to), config) as loader:
        for module in loader.get_all_layer_names():
            tensors, meta = loader.load_layer_weights(module), config["layers"][module]
            codes = unpack_codes_half_block(tensors["codes"], block) if meta["packed"] else tensors["codes"]
            levels, bits = tensors["ct_scaled"], meta["bits"]
            key, norms, columns = module.replace(".", "__"), tensors["norms"], meta["in_features"]
            if options.get("stream") == "counted":
                levels = hf_integration._get_centroids(bits) / math.sqrt(block)
                flat, total = hf_integration._bitpack_5(codes.reshape(-1))
                assert torch.equal(hf_integration._unpack_5bit(flat, total), codes.reshape(-1).to(torch.uint8))
                shape = torch.tensor([len(codes), norms.shape[1], block, total])
                # Published files have `.weight` in the key or not, depending on the program that wrote them.
                key += "__weight" if "mlp" in module else ""
                streams |= {f"{key}__packed": flat, f"{key}__norms": norms, f"{key}__meta": shape}
            elif options.get("stream") == "plain":
                stream = BitPacker.pack(codes, bits)
                shape = torch.tensor([bits, codes.shape[1]])
                streams |= {f"{key}__packed": stream, f"{key}__norms": norms, f"{key}__meta": shape}
            weights[f"{module}.weight"] = decode(codes, norms, levels, block)[:, :columns].contiguous()
    if streams:
        names = (".codes", ".norms", ".ct_scaled")
        shards = [load_file(file) for file in to.glob("*.safetensors")]
        kept = {name: part for shard in shards for name, part in shard.items() if not name.endswith(names)}
        for file in [*to.glob("*.safetensors"), to / "model.safetensors.index.json"]:
            file.unlink()
        save_file(streams, to / "codes.safetensors")
        save_file(kept, to / "bf16.safetensors")
    if options.get("stream") == "plain":
        loaded = polar_model._dequant_packed_format(str(to), config, torch.float32)
        for name, weight in weights.items():
            assert torch.allclose(loaded[name], weight, rtol=2**-8, atol=1e-9), name
    if options.get("forget"):
        (to / "polar_config.json").unlink()
    save_file(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
