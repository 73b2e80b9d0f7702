"""What users call: `quantize`, `plan_for` and `convert`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hlwq.allocation import choose, unmeasured, widths_told
from hlwq.calibration import Calibration
from hlwq.containers import Reader, partial_of, refuse_unless_empty
from hlwq.decoded import DecodedCheckpoint, open_dense
from hlwq.errors import HlwqWarning, RequestError, UnsupportedError
from hlwq.families import describe
from hlwq.files import expanded, is_folder, locked, resolve_output
from hlwq.formats import format_named
from hlwq.manifest import read_manifest
from hlwq.measured import measured_bits
from hlwq.options import options_of, several
from hlwq.pipeline import QuantizeResult, run_plan
from hlwq.plan import Plan, make_plan, plan_decoding, usual_modules
from hlwq.provenance import origin_of
from hlwq.recipes import Recipe, changed, recipe_named
from hlwq.request import Request, Selection
from hlwq.side_files import left_behind, side_files
from hlwq.solvers import SOLVERS
from hlwq.sources import locate
from hlwq.work import Progress


def plan_for(request: Request) -> tuple[Reader, Plan]:
    """Open a source and plan what `quantize` would do with this request, reading no weights.

    Raises:
        HlwqError: see `locate`, `open_dense`, `Request.changed_recipe` and `make_plan`.
    """
    reader = open_dense(locate(request.source, request.revision))
    return reader, _planned(reader, request)


def _planned(reader: Reader, request: Request, bits: Mapping[str, int] | None = None) -> Plan:
    """The plan of a request; `bits` are those of each matrix as measured, where there is a budget."""
    recipe = request.changed_recipe()
    plan = make_plan(reader, recipe, request.format, request.selection)
    if budget := request.budget:
        if plan.layout.has_experts:
            raise UnsupportedError(
                "What each matrix's own width would cost is not measured for mixtures of experts. Use whole `bits`.",
                argument="bits" if budget.bits else "size",
            )
        chosen = bits or choose(plan, budget, unmeasured(plan))
        plan = make_plan(reader, recipe, request.format, request.selection, bits=chosen)
        plan = replace(plan, budget=budget, remarks=(*plan.remarks, widths_told(plan, measured=bits is not None)))
    if request.recipe is None:
        told = f"recipe {recipe.name}, since none was named; `recipe='rtn'` takes seconds"
        plan = replace(plan, remarks=(told, *plan.remarks))
    return _with_side_files(plan, reader.path)


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Recipe | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantize a checkpoint into a new directory.

    Args:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        out: the directory to make; absent or empty. It appears when it is complete and checked.
        recipe: a name of `RECIPES`, or a `Recipe` of your own; by default `best`.
        progress: told how far the work is.
        options: the fields of `Request`, `Selection` and `Calibration` (`format`, `device`, `exclude`, `samples`, …;
            `calibration` is a `Calibration`, or the texts as they are), and changes of the recipe (`bits`,
            `group_size`, `calibrate`, `basis`, `damping`, …).

    Raises:
        TypeError: an option is unknown.
        HlwqError: the request cannot be met; the message says why and what to do.
    """
    return run_request(Request.of(source, recipe, **options), Path(out), progress)


def run_request(request: Request, out: Path, progress: Progress | None = None) -> QuantizeResult:
    """Do what a request asks for; see `quantize`."""
    place = _free(out)
    reader, plan = plan_for(request)
    selection = request.selection
    origin = {
        **origin_of(request.source, reader.path),
        "include_embeddings": selection.include_embeddings,
        "include": list(selection.include),
        "exclude": list(selection.exclude),
    }
    started = time.monotonic()
    if plan.budget:
        calibration = request.calibration or Calibration()
        bits, origin["budget"] = measured_bits(reader, plan, plan.budget, calibration, request.device, progress)
        plan = replace(_planned(reader, request, bits), budget=None)  # it is spent
    measuring = time.monotonic() - started
    result = run_plan(
        reader,
        plan,
        place,
        origin=origin,
        calibration=request.calibration if plan.recipe.calibrated else None,
        device=request.device,
        shard_bytes=request.shard_bytes,
        progress=progress,
    )
    return replace(result, out=expanded(out), seconds=measuring + result.seconds)


def convert(
    directory: str | Path,
    out: str | Path,
    format: str,
    *,
    exclude: str | Sequence[str] = (),
    device: str | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> QuantizeResult:
    """Turn a quantized directory into another format, without the model it was made from.

    To `dense` the codes are only decoded. To other formats they are decoded and rounded again (recipe `rtn`), with the
    result of the chain HLWQ → INT4; relative errors are then against the decoded weights.

    Args:
        directory: what `quantize` wrote, or a PolarQuant or early HLWQ directory; any format can be decoded.
        out: the directory to make; absent or empty.
        format: `gptq`, `mlx`, `compressed-tensors` or `dense`.
        exclude: regular expressions of modules to write decoded.
        device: where to compute; by default a GPU if there is one.
        progress: told how far the work is.
        changes: options of the codes in the new file: `bits`, `group_size`, `symmetric`, `scale_method`.

    Raises:
        TypeError: an option is unknown.
        HlwqError: the directory cannot be read, or the format cannot be made from it.
    """
    place = _free(Path(out))
    path = expanded(directory)
    if not is_folder(path):
        raise RequestError(f"{directory} is not a directory.", argument="directory", path=path)
    format_named(format)
    decoded = DecodedCheckpoint(path)
    selection = Selection(exclude=several(exclude))
    _check_conversion(directory, decoded.format.name, format, changes, selection)
    recipe = changed(recipe_named("rtn"), changes)
    if format == "dense":
        plan = plan_decoding(decoded)
    else:
        plan = make_plan(decoded, recipe, format, selection, modules=_modules_to_round(decoded))
        warnings.warn(
            f"the weights of {path.resolve().name} are rounded a second time, and errors are told against them as they "
            "are. Quantize the original if you have it.",
            HlwqWarning,
            stacklevel=2,
        )
    origin = {**origin_of(path, path), "made_by": read_manifest(path)}
    result = run_plan(decoded, _with_side_files(plan, path), place, origin=origin, device=device, progress=progress)
    return replace(result, out=expanded(out))


def _with_side_files(plan: Plan, directory: Path) -> Plan:
    """A plan that says which files will not be copied. Raises CheckpointError if one that should be cannot be."""
    side_files(directory)
    if not (left := left_behind(directory)):
        return plan
    names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    remark = f"not copied: {names}. Only tokenizers, templates, processors, generation settings and licences are."
    return replace(plan, remarks=(*plan.remarks, remark))


def _free(out: Path) -> Path:
    """The place of an output, which nothing occupies and no other run is making, so far. Raises HlwqError else."""
    place = resolve_output(out)
    if place.exists():
        with locked(partial_of(place)):
            refuse_unless_empty(place)
    return place


def _check_conversion(
    directory: str | Path, present: str, wanted: str, changes: dict[str, Any], selection: Selection
) -> None:
    """Raise RequestError unless a directory of one format can become one of another with these changes."""
    given = [name for name, value in changes.items() if value is not None]
    solving = {"calibrate", *(name for kind in SOLVERS.values() for name in options_of(kind))}
    if present == "dense":
        raise RequestError(f"{directory} is not quantized. Use `hlwq quantize`.", argument="directory")
    if wanted == present:
        raise RequestError(f"{directory} is in format {wanted} already.", argument="format")
    if wanted == "hlwq":
        raise RequestError("To make an HLWQ checkpoint, quantize the original with recipe hlwq.", argument="format")
    if wanted == "dense" and (given := given or ["exclude"] * bool(selection.exclude)):
        raise RequestError(f"`{given[0]}` changes nothing: to format dense, codes are only decoded.", argument=given[0])
    if calibrating := solving.intersection(given):
        message = f"`{min(calibrating)}` is for quantizing, and a conversion only rounds. Quantize the original."
        raise RequestError(message)


def _modules_to_round(decoded: DecodedCheckpoint) -> list[str]:
    """The modules stored as codes; of a PolarQuant directory, which has gates of the recurrence too, the usual ones."""
    modules = decoded.quantized_modules()
    if decoded.format.name != "polar":
        return modules
    layout = describe(decoded.config, decoded.tensors)
    wanted = {*usual_modules(layout), layout.embedding, layout.output_head}
    return [module for module in modules if module in wanted]
