"""GPTQModel's side of `calibrated.py`, which runs this script in an environment with GPTQModel."""

import json
import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig


def main() -> None:
    source, tokens, out, report = sys.argv[1:]
    samples = json.loads(Path(tokens).read_text())
    dataset = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]
    config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False, foem=FOEMConfig(alpha=0, beta=0.2))
    model = GPTQModel.load(source, config)
    model.quantize(dataset)
    model.save(out)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    Path(report).write_text(json.dumps({"peak_memory": int(peak.split()[1]) * 1024}))


if __name__ == "__main__":
    main()
