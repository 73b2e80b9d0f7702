from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlwq import CheckpointError, HlwqError, RequestError, ResourceError, UnsupportedError
from hlwq.containers import DTYPES, Part, Reader, TensorSpec, Writer, spec_of
from hlwq.containers.stacks import parts_of
from hlwq.files import read_json

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARGUMENTS: dict[str, Any] = {"recipe": "rtn", "stages": [{"bits": 4}], "revision": None}


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, DTYPE_NAMES[each.dtype], tuple(each.shape)) for name, each in tensors.items()]


def mixed_tensors() -> dict[str, Tensor]:
    """Odd lengths in every dtype, so that any order but the right one misaligns; a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [each for each in DTYPES.values() if each.itemsize == 1]
    dtypes += [each for each in DTYPES.values() if each.itemsize > 1]
    tensors = {
        f"odd.{index}": torch.randint(0, 2, (3, 2 * index + 1), generator=generator).to(dtype)
        for index, dtype in enumerate(dtypes)
    }
    return {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4, dtype=torch.bfloat16), **tensors}


def float_tensors(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layers.{i}.weight": torch.randn(10 + i, 8, generator=generator).bfloat16() for i in range(count)}


def write_all(out: Path, tensors: dict[str, Tensor], order: list[str] | None = None, **options: Any) -> None:
    writer = Writer(out, specs_of(tensors), ARGUMENTS, **options)
    for name in order or list(tensors):
        writer.write(name, tensors[name])
    writer.commit("all", tensors, {})
    writer.finish({}, {"config.json": {}})
    writer.publish()


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_safetensors_reads_what_we_write_in_every_dtype(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_all(tmp_path / "out", tensors)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_every_tensor_is_aligned_and_none_overlap(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_all(tmp_path / "out", tensors)
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(content) - 8 - length
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_our_reader_reads_what_our_writer_wrote(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_all(tmp_path / "out", tensors, shard_bytes=100)
    reader = Reader(tmp_path / "out")
    assert {spec.name: spec for spec in specs_of(tensors)} == reader.tensors
    assert_same_tensors({name: reader.read(name) for name in reader.tensors}, tensors)


def test_transposed_tensors_are_written_in_row_major_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    write_all(tmp_path / "out", {"weight": tensor})
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], tensor)


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_bytes_do_not_depend_on_the_order_of_the_work(tmp_path: Path, shard_bytes: int) -> None:
    tensors = float_tensors()
    write_all(tmp_path / "forwards", tensors, shard_bytes=shard_bytes)
    write_all(tmp_path / "backwards", tensors, list(reversed(tensors)), shard_bytes=shard_bytes)
    assert bytes_of(tmp_path / "forwards") == bytes_of(tmp_path / "backwards")


def test_shards_have_an_index_and_the_same_tensors(tmp_path: Path) -> None:
    tensors = {**float_tensors(), "large": torch.ones(100, 8, dtype=torch.bfloat16)}
    write_all(tmp_path / "one", tensors)
    write_all(tmp_path / "many", tensors, shard_bytes=500)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    shards = {file.name: load_file(file) for file in files}
    sizes = [sum(each.nbytes for each in shard.values()) for shard in shards.values()]
    assert all(size <= 500 or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    together = {name: each for shard in shards.values() for name, each in shard.items()}
    assert_same_tensors(together, load_file(tmp_path / "one" / "model.safetensors"))


def interrupted(out: Path, tensors: dict[str, Tensor], committed: int, written: int = 0) -> Path:
    """Start a run and drop it after so many committed units and so many tensors more. Returns the journal."""
    writer = Writer(out, specs_of(tensors), ARGUMENTS, shard_bytes=500)
    for position, (name, tensor) in enumerate(tensors.items()):
        if position < committed + written:
            writer.write(name, tensor)
        if position < committed:
            writer.commit(name, [name], {"error": position})
    return writer.partial / "journal.jsonl"


def resume(out: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Finish a run as the pipeline does. Returns the units that were still to do."""
    writer = Writer(out, specs_of(tensors), ARGUMENTS, shard_bytes=500)
    todo = [name for name in tensors if writer.committed(name) is None]
    for name in todo:
        writer.write(name, tensors[name])
        writer.commit(name, [name], {"error": list(tensors).index(name)})
    assert [writer.committed(name) for name in tensors] == [{"error": i} for i in range(len(tensors))]
    writer.finish({}, {"config.json": {}})
    writer.publish()
    return todo


@pytest.mark.parametrize(("committed", "written"), [(0, 0), (0, 1), (3, 0), (3, 2), (6, 0)])
def test_a_resumed_run_does_what_was_not_committed_and_gives_the_same_bytes(
    committed: int, written: int, tmp_path: Path
) -> None:
    tensors = float_tensors()
    write_all(tmp_path / "whole", tensors, shard_bytes=500)
    interrupted(tmp_path / "out", tensors, committed, written)
    assert not (tmp_path / "out").exists()
    assert resume(tmp_path / "out", tensors) == list(tensors)[committed:]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_resumed_run_must_write_what_was_not_committed(tmp_path: Path) -> None:
    tensors = float_tensors()
    interrupted(tmp_path / "out", tensors, 3, 1)
    writer = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, shard_bytes=500)
    with pytest.raises(ValueError, match=r"\['layers\.3\.weight', 'layers\.4\.weight', 'layers\.5\.weight'\]"):
        writer.finish({}, {})


def test_a_journal_line_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    tensors = float_tensors()
    journal = interrupted(tmp_path / "out", tensors, 3)
    journal.write_bytes(journal.read_bytes()[:-5])
    assert resume(tmp_path / "out", tensors) == list(tensors)[2:]


def test_a_run_can_be_killed_again_after_a_journal_line_was_cut_short(tmp_path: Path) -> None:
    tensors = float_tensors()
    journal = interrupted(tmp_path / "out", tensors, 3)
    journal.write_bytes(journal.read_bytes()[:-5])
    writer = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, shard_bytes=500)
    writer.write("layers.2.weight", tensors["layers.2.weight"])
    writer.commit("layers.2.weight", ["layers.2.weight"], {"error": 2})
    assert resume(tmp_path / "out", tensors) == list(tensors)[3:]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": "hlwq"}, 'recipe was "rtn", now it is "hlwq"'),
        ({"stages": [{"bits": 8}]}, r"stages\[0\].bits was 4, now it is 8"),
        ({"revision": "main"}, 'revision was not set, now it is "main"'),
        ({"shard_bytes": 5}, "shard_bytes was not set, now it is 5"),
    ],
)
def test_resuming_with_other_arguments_is_refused_and_says_what_differs(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tensors = float_tensors()
    journal = interrupted(tmp_path / "out", tensors, 2)
    before = bytes_of(journal.parent)
    with pytest.raises(RequestError, match=said):
        Writer(tmp_path / "out", specs_of(tensors), {**ARGUMENTS, **changed}, shard_bytes=500)
    assert bytes_of(journal.parent) == before


def test_arguments_are_compared_as_json_keeps_them(tmp_path: Path) -> None:
    tensors = float_tensors()
    for _ in range(2):
        Writer(tmp_path / "out", specs_of(tensors), {"kept": ("a", "b")})
    assert read_json(tmp_path / "out.partial" / "arguments.json") == {"kept": ["a", "b"]}


def test_what_a_run_left_before_it_began_is_replaced(tmp_path: Path) -> None:
    tensors = float_tensors()
    write_all(tmp_path / "whole", tensors)
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "model" / "model.safetensors").write_bytes(b"half a header")
    (tmp_path / "out.partial" / "arguments.json.tmp").write_text("{")
    write_all(tmp_path / "out", tensors)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_partial_directory_that_no_run_left_is_refused_and_left_alone(tmp_path: Path) -> None:
    tensors = float_tensors()
    write_all(tmp_path / "out.partial", tensors, shard_bytes=500)
    before = bytes_of(tmp_path / "out.partial")
    with pytest.raises(RequestError, match=r"out\.partial holds .*, but no record of a run"):
        Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, shard_bytes=500)
    assert bytes_of(tmp_path / "out.partial") == before


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("directory", "file"):
        with pytest.raises(RequestError, match=f"{name} is not empty"):
            Writer(tmp_path / name, specs_of(float_tensors()), ARGUMENTS)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["directory", "file", "mine"]


def test_an_empty_output_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_all(tmp_path / "out", float_tensors())
    assert set(bytes_of(tmp_path / "out")) == {"config.json", "model.safetensors"}


def test_the_output_appears_only_when_published_and_without_the_runs_own_files(tmp_path: Path) -> None:
    tensors = float_tensors()
    side = tmp_path / "tokenizer.json"
    side.write_bytes(b'{"odd":\r\n "bytes \xff"}')
    writer = Writer(tmp_path / "deep" / "out", specs_of(tensors), ARGUMENTS)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.commit("all", tensors, {})
    writer.finish({side.name: side}, {"config.json": {"größe": 1}})
    assert not (tmp_path / "deep" / "out").exists()
    writer.publish()
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["out"]
    files = bytes_of(tmp_path / "deep" / "out")
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert files["tokenizer.json"] == side.read_bytes()
    assert json.loads(files["config.json"]) == {"größe": 1}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"GB free, but the output needs 100000000\.00 GB"):
        Writer(tmp_path / "out", [TensorSpec("huge", "BF16", (10**9, 5 * 10**7))], ARGUMENTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.ones(10, 8), torch.ones(8, 10, dtype=torch.bfloat16)])
def test_a_tensor_other_than_the_one_announced_is_a_bug(tensor: Tensor, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", specs_of(float_tensors()), ARGUMENTS)
    with pytest.raises(ValueError, match=r"layers\.0\.weight: planned BF16"):
        writer.write("layers.0.weight", tensor)


def test_finishing_without_an_announced_tensor_is_a_bug(tmp_path: Path) -> None:
    tensors = float_tensors(2)
    writer = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS)
    writer.write("layers.0.weight", tensors["layers.0.weight"])
    with pytest.raises(ValueError, match=r"not written: \['layers\.1\.weight'\]"):
        writer.finish({}, {})


# Stacks: tensors that hold those of all experts


def experts_of(count: int = 4) -> dict[str, Tensor]:
    """Matrices of experts, each by the name that it has alone."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for index in range(count):
        for name, shape in (("gate_proj", (6, 8)), ("up_proj", (6, 8)), ("down_proj", (8, 6))):
            values = torch.randn(shape, generator=generator).bfloat16()
            tensors[f"layers.0.mlp.experts.{index}.{name}.weight"] = values
    return tensors


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as transformers' modules hold them."""

    def of_all(name: str) -> Tensor:
        return torch.stack([values for each, values in tensors.items() if each.endswith(f"{name}.weight")])

    gate_up = torch.cat([of_all("gate_proj"), of_all("up_proj")], 1)
    return {"layers.0.mlp.experts.gate_up_proj": gate_up, "layers.0.mlp.experts.down_proj": of_all("down_proj")}


def parts_in(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Part]:
    return [part for spec in specs_of(tensors) for part in parts_of(spec, config)]


def test_experts_of_a_stack_are_read_alone(tmp_path: Path) -> None:
    tensors = experts_of()
    write_all(tmp_path / "out", stacked(tensors))
    reader = Reader(tmp_path / "out")
    assert reader.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert reader.tensors[name] == spec_of(name, expected)
        assert torch.equal(reader.read(name), expected)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_stack_written_expert_by_expert_is_the_one_written_whole(backwards: bool, tmp_path: Path) -> None:
    tensors = experts_of()
    write_all(tmp_path / "whole", stacked(tensors))
    writer = Writer(tmp_path / "parts", specs_of(tensors), ARGUMENTS, parts=parts_in(stacked(tensors), {}))
    for name in reversed(tensors) if backwards else tensors:
        writer.write(name, tensors[name])
    writer.commit("all", tensors, {})
    writer.finish({}, {"config.json": {}})
    assert set(writer.digests()) == set(tensors)
    writer.publish()
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_stack_that_lacks_an_expert_is_a_bug(tmp_path: Path) -> None:
    tensors = experts_of()
    writer = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, parts=parts_in(stacked(tensors), {}))
    lacking = "layers.0.mlp.experts.2.up_proj.weight"
    for name in tensors.keys() - {lacking}:
        writer.write(name, tensors[name])
    with pytest.raises(ValueError, match=r"not written: \['layers\.0\.mlp\.experts\.2\.up_proj\.weight'\]"):
        writer.finish({}, {})


def test_bytes_of_an_expert_are_described_by_the_configuration(tmp_path: Path) -> None:
    codes, norms = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4), torch.randn(2, 3, 2).half()
    packed = torch.cat([codes.reshape(2, -1), norms.reshape(2, -1).view(torch.uint8)], 1)
    described = [["up_proj.weight_packed", "U8", [3, 4]], ["up_proj.weight_norms", "F16", [3, 2]]]
    config = {"quantization_config": {"experts": described}}
    write_all(tmp_path / "out", {"mlp.experts.packed": packed})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    reader = Reader(tmp_path / "out")
    assert torch.equal(reader.read("mlp.experts.1.up_proj.weight_packed"), codes[1])
    assert torch.equal(reader.read("mlp.experts.1.up_proj.weight_norms"), norms[1])
    odd = [["up_proj.weight_packed", "U8", [3]], ["up_proj.weight_norms", "F16", [3, 2]]]
    shapes = ([3, 5], [-1, -24], [0, 24], ["x"])
    others = [[["up_proj.weight_packed", "U8", shape]] for shape in shapes]
    for wrong in (None, "x", [["up_proj.weight_packed", "U8"]], [["up_proj.weight_packed", "U9", [24]]], odd, *others):
        (tmp_path / "out" / "config.json").write_text(json.dumps({"quantization_config": {"experts": wrong}}))
        with pytest.raises(CheckpointError, match=r"quantization_config\.experts"):
            Reader(tmp_path / "out")


def test_experts_of_an_interrupted_unit_are_written_anew(tmp_path: Path) -> None:
    tensors = experts_of()
    parts = parts_in(stacked(tensors), {})
    first, *others = tensors
    interrupted = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, parts=parts)
    interrupted.write(first, tensors[first])
    interrupted.commit("first", [first], {})
    interrupted.write(others[0], tensors[others[0]])
    writer = Writer(tmp_path / "out", specs_of(tensors), ARGUMENTS, parts=parts)
    for name in others[1:]:
        writer.write(name, tensors[name])
    with pytest.raises(ValueError, match="not written"):
        writer.finish({}, {})
    writer.write(others[0], tensors[others[0]])
    writer.commit("others", others, {})
    writer.finish({}, {"config.json": {}})
    writer.publish()
    write_all(tmp_path / "whole", stacked(tensors))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def sharded_checkpoint(path: Path) -> Path:
    make_checkpoint(path, "llama")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = dict(zip(SHARDS, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True))
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, path / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def overwrite(name: str, content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_text(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def pickle_only(path: Path) -> None:
    for name in (*SHARDS, INDEX):
        (path / name).unlink()
    torch.save({}, path / "pytorch_model.bin")


def name_a_tensor_that_is_nowhere(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lost.weight"] = SHARDS[1]
    (path / INDEX).write_text(json.dumps(index))


def add_unsupported_dtype(path: Path) -> None:
    save_file({"odd": torch.zeros(8, dtype=torch.complex64)}, path / SHARDS[0])


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing shard": (remove(SHARDS[1]), SHARDS[1], "is missing"),
    "shard cut in its data": (truncate(SHARDS[1], 0.9), SHARDS[1], "damaged or truncated"),
    "shard cut in its header": (truncate(SHARDS[0], 0.001), SHARDS[0], "damaged or truncated"),
    "empty shard": (truncate(SHARDS[0], 0), SHARDS[0], "damaged or truncated"),
    "shard that is something else": (overwrite(SHARDS[0], "<html>404</html>"), SHARDS[0], "damaged or truncated"),
    "unsupported dtype": (add_unsupported_dtype, SHARDS[0], "dtype C64"),
    "pickled only": (pickle_only, "pytorch_model.bin", "pickled"),
    "tensor in the index but in no file": (name_a_tensor_that_is_nowhere, SHARDS[1], r"tensor lost\.weight is missing"),
    "config that is not JSON": (overwrite("config.json", "{"), "config.json", "not valid JSON"),
    "config that is no object": (overwrite("config.json", "[]"), "config.json", "JSON object"),
    "empty config": (truncate("config.json", 0), "config.json", "not valid JSON"),
    "no config": (remove("config.json"), "config.json", "is missing"),
    "index that is not JSON": (overwrite(INDEX, "nonsense"), INDEX, "not valid JSON"),
    "index without a map": (overwrite(INDEX, '{"metadata": {}}'), INDEX, "weight_map"),
    "index whose map is no object": (overwrite(INDEX, '{"weight_map": []}'), INDEX, "weight_map"),
}


@pytest.mark.parametrize(("damage", "file", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_the_file(
    damage: Callable[[Path], None], file: str, said: str, tmp_path: Path
) -> None:
    path = sharded_checkpoint(tmp_path / "model")
    damage(path)
    with pytest.raises(HlwqError, match=said) as caught:
        Reader(path)
    assert type(caught.value) is (UnsupportedError if said in ("pickled", "dtype C64") else CheckpointError)
    assert caught.value.path == path / file
    assert str(path / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        Reader(tmp_path)


def test_shards_read_as_one_checkpoint(tmp_path: Path) -> None:
    whole, parts = Reader(make_checkpoint(tmp_path / "one", "llama")), Reader(sharded_checkpoint(tmp_path / "two"))
    assert whole.tensors == parts.tensors
    assert_same_tensors(
        {name: parts.read(name) for name in parts.tensors}, load_file(tmp_path / "one" / "model.safetensors")
    )


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    path = sharded_checkpoint(tmp_path / "model")
    save_file({"adapter": torch.ones(2)}, path / "adapter.safetensors")
    assert "adapter" not in Reader(path).tensors


def test_reading_a_tensor_that_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor lost\.weight is missing"):
        Reader(make_checkpoint(tmp_path / "model", "llama")).read("lost.weight")
