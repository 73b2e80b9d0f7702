"""`hlwq.json`: how a checkpoint was made, with which errors, and the checksums of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hlwq.files import is_file, read_json
from hlwq.formats.reading import entry

MANIFEST = "hlwq.json"
"""The name of the file, which `hlwq.pipeline` writes."""


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """What `hlwq.json` says of a directory, or None where there is none.

    Returns:
        The file's object, in which `origin`, `recipe`, `stages`, `calibration`, `modules`, `sha256` and `versions` are
        there, and of the types that hlwq writes.

    Raises:
        CheckpointError: it is damaged, or not what hlwq writes.
    """
    file = directory / MANIFEST
    if not is_file(file):
        return None
    found, where = read_json(file), str(file)
    origin = entry(found, "origin", dict, where, {})
    made_by = entry(origin, "made_by", dict, f"{where}: origin", {})
    calibration = entry(found, "calibration", dict, where, {})
    modules = entry(found, "modules", dict, where, {})
    manifest = {
        **found,
        "origin": {
            **origin,
            "source": entry(origin, "source", str, f"{where}: origin", ""),
            "card": entry(origin, "card", dict, f"{where}: origin", {}),
        },
        "recipe": entry(found, "recipe", str, where),
        "stages": entry(found, "stages", list, where, []),
        "calibration": calibration or None,
        "modules": modules,
        "sha256": entry(found, "sha256", dict, where, {}),
        "versions": entry(found, "versions", dict, where, {}),
    }
    if made_by:
        entry(made_by, "recipe", str, f"{where}: origin.made_by")
    if calibration:
        for key in ("samples", "sequence_length", "seed"):
            entry(calibration, key, int, f"{where}: calibration")
        entry(calibration, "tokens_sha256", str, f"{where}: calibration")
        sources = entry(calibration, "sources", list, f"{where}: calibration")
        for number, source in enumerate(sources):
            entry({"source": source}, "source", dict, f"{where}: calibration.sources[{number}]")
            entry(source, "source", str, f"{where}: calibration.sources[{number}]")
    for module in modules:
        errors = entry(modules, module, dict, f"{where}: modules")
        for key in ("relative_squared_error", "relative_output_error"):
            entry(errors, key, float, f"{where}: modules: {module}", 0.0)
    for name in manifest["sha256"]:
        entry(manifest["sha256"], name, str, f"{where}: sha256")
    return manifest
