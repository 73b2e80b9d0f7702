from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from math import sqrt
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hlwq import compiled, hadamard, kernels, packing
from hlwq.bases import Hadamard
from hlwq.errors import HlwqWarning, RequestError
from hlwq.grids import LloydGrid, Parameters, sum_by_halves
from hlwq.kernels import reference
from hlwq.lloyd import codebook
from hlwq.matrix import QuantizedMatrix
from hlwq.solvers import Nearest

WIDTHS = range(2, 9)
SHAPES = [(37, 8, 72), (5, 16, 144), (6, 32, 96), (50, 64, 576), (33, 128, 256), (3, 256, 768)]
"""Rows, group size, columns."""
LEVELS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is compiled."""
    monkeypatch.setattr(compiled, "_cpu_module", lambda: None)


@pytest.fixture
def cpu() -> ModuleType:
    kernels = compiled.cpu_kernels(torch.empty(0))
    if kernels is None:
        compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        if os.environ.get("HLWQ_KERNELS") != "off" and shutil.which(compiler):
            pytest.fail(f"{compiler} is here, but hlwq has no compiled kernels: see `pip install -v -e .`")
        pytest.skip("there is no C++ compiler, or HLWQ_KERNELS=off: hlwq has no compiled kernels")
    return kernels


@pytest.fixture(params=LEVELS)
def at_level(cpu: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The kernels for each instruction set."""
    if request.param not in cpu._native.available_levels():
        pytest.skip(f"this processor has no {request.param}")
    before = cpu._native.level()
    cpu._native.use(request.param)
    yield cpu
    cpu._native.use(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_matrix(bits: int, rows: int, group_size: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, packed codes and norms, of which one is 0 and one is the smallest that there is."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    norms = torch.rand(rows, columns // group_size, generator=generator).to(torch.float16)
    norms[1, 0], norms[2, 0] = 0, 2**-24
    return codes, packing._pack(codes, bits), norms


def dense(codes: Tensor, norms: Tensor, bits: int) -> Tensor:
    """The matrix by its definition, in float64."""
    size = codes.shape[1] // norms.shape[1]
    levels = codebook(bits).centroids.double()[codes.int()].unflatten(-1, (-1, size))
    matrix = levels * norms.double().unsqueeze(-1) / sqrt(size) @ hadamard.hadamard_matrix(size).double()
    return matrix.flatten(-2)


def assert_product(outputs: Tensor, inputs: Tensor, matrix: Tensor, epsilon: float) -> None:
    """Each output is off by at most `epsilon` times what it would be if nothing in its sum cancelled."""
    assert (outputs.dtype, outputs.shape) == (inputs.dtype, (*inputs.shape[:-1], len(matrix)))
    error = (outputs.double() - inputs.double() @ matrix.T).abs()
    assert (error <= epsilon * inputs.double().norm(dim=-1, keepdim=True) * matrix.norm(dim=-1) + 1e-12).all()


EPSILON = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_decoded_matrix_has_the_bits_of_the_plain_decode(
    bits: int, shape: tuple[int, int, int], at_level: ModuleType
) -> None:
    codes, packed, norms = packed_matrix(bits, *shape)
    levels = reference._look_up(packed, norms, bits)
    weights = hadamard._rotate_blocks(levels, shape[1])
    assert torch.equal(reference.look_up(packed, norms, bits), levels)
    for source, width in ((packed, bits), (codes, 8)):
        for rotated, expected in ((True, weights), (False, levels)):
            target = torch.empty(codes.shape)
            at_level.decode(source, norms, bits, width, rotated, target)
            assert torch.equal(target, expected)
    matrix = QuantizedMatrix(codes, Parameters(norms.float()), LloydGrid(bits, shape[1]), Hadamard(shape[1]))
    assert torch.equal(matrix.dequantize(), weights)
    assert torch.equal(matrix.dequantize(torch.bfloat16), weights.bfloat16())
    torch.testing.assert_close(weights.double(), dense(codes, norms, bits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_are_those_with_the_dense_matrix(bits: int, shape: tuple[int, int, int], at_level: ModuleType) -> None:
    codes, packed, norms = packed_matrix(bits, *shape)
    matrix = dense(codes, norms, bits)
    for batch in (1, 3, 16, 300):
        for dtype in DTYPES:
            inputs = random(batch, shape[2]).to(dtype)
            assert_product(kernels.matmul(inputs, packed, norms, bits), inputs, matrix, EPSILON[dtype])


def test_groups_of_any_size_are_looked_up(at_level: ModuleType) -> None:
    for group_size in (4, 24, 96, 512):
        _, packed, norms = packed_matrix(5, 3, group_size, 3 * 512)
        assert torch.equal(reference.look_up(packed, norms, 5), reference._look_up(packed, norms, 5))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_have_the_same_bits_on_all_processors_with_fused_operations(
    bits: int, batch: int, cpu: ModuleType
) -> None:
    fused = [level for level in cpu._native.available_levels() if level != "portable"]
    before = cpu._native.level()
    for shape in SHAPES:
        _, packed, norms = packed_matrix(bits, *shape)
        inputs, products = random(batch, shape[2]), []
        for level in fused:
            cpu._native.use(level)
            products.append(kernels.matmul(inputs, packed, norms, bits))
        cpu._native.use(before)
        assert all(torch.equal(products[0], each) for each in products)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.usefixtures("plain")
def test_products_in_plain_torch(bits: int) -> None:
    codes, packed, norms = packed_matrix(bits, *SHAPES[3])
    assert compiled.cpu_kernels(packed) is None
    for batch in (1, 300):
        for dtype in DTYPES:
            inputs = random(batch, codes.shape[1]).to(dtype)
            outputs = kernels.matmul(inputs, packed, norms, bits)
            assert_product(outputs, inputs, dense(codes, norms, bits), EPSILON[dtype])


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_of_any_layout_and_number(bits: int, cpu: ModuleType) -> None:
    codes, packed, norms = packed_matrix(bits, *SHAPES[3])
    matrix = dense(codes, norms, bits)
    for inputs in (
        random(576, 5).T,
        random(2, 3, 1152)[..., ::2],
        random(576),
        random(2, 1, 2, 576),
        random(0, 576),
        random(1, 576).expand(40, 576),
    ):
        assert_product(kernels.matmul(inputs, packed, norms, bits), inputs, matrix, 1e-6)
    inputs = random(4, 576)
    assert torch.equal(
        kernels.matmul(inputs, packed.T.contiguous().T, norms.T.contiguous().T, bits),
        kernels.matmul(inputs, packed, norms, bits),
    )


def test_rows_of_many_groups(cpu: ModuleType) -> None:
    for groups in (300, 1024, 1030):
        codes, packed, norms = packed_matrix(4, 5, 32, 32 * groups)
        inputs = random(1, 32 * groups)
        assert_product(kernels.matmul(inputs, packed, norms, 4), inputs, dense(codes, norms, 4), 1e-6)


def test_a_matrix_large_enough_for_threads(cpu: ModuleType) -> None:
    codes, packed, norms = packed_matrix(4, 1030, 128, 1024)
    assert codes.numel() > 2 * cpu.THREAD_WEIGHTS
    matrix, before = dense(codes, norms, 4), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for batch in (1, 7):
            inputs = random(batch, 1024)
            assert_product(kernels.matmul(inputs, packed, norms, 4), inputs, matrix, 1e-6)
        errors: list[BaseException] = []

        def multiply(seed: int) -> None:
            inputs = random(1, 1024, seed=seed)
            try:
                assert_product(kernels.matmul(inputs, packed, norms, 4), inputs, matrix, 1e-6)
            except AssertionError as error:
                errors.append(error)

        callers = [threading.Thread(target=multiply, args=(seed,)) for seed in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not errors
    finally:
        torch.set_num_threads(before)


def before_a_wall(tensor: Tensor) -> Tensor:
    """A copy that ends where memory does: what lies behind it cannot be read or written."""
    size = tensor.numel() * tensor.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(start + usable, mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=usable - size, count=size)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.skipif(os.name != "posix", reason="mprotect is POSIX")
@pytest.mark.parametrize("shape", [*SHAPES, (4, 64, 64)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_nothing_behind_the_end_of_a_tensor_is_touched(
    bits: int, shape: tuple[int, int, int], at_level: ModuleType
) -> None:
    _, size, columns = shape
    codes, packed, norms = (before_a_wall(each) for each in packed_matrix(bits, *shape))
    inputs, target = before_a_wall(random(3, columns)), before_a_wall(torch.empty(codes.shape))
    for some in (inputs, inputs[2:], before_a_wall(inputs[:1].bfloat16())):
        kernels.matmul(some, packed, norms, bits)
    for source, width in ((packed, bits), (codes, 8)):
        at_level.decode(source, norms, bits, width, True, target)
    groups, scales = target.view(-1, size), before_a_wall(norms.float().view(-1, 1))
    at_level.rotate_blocks(inputs, size)
    at_level.fit_norms(groups, bits, True)
    at_level.nearest_codes(groups, scales, bits)
    assert torch.equal(at_level.pack(codes, bits), packed)
    assert torch.equal(at_level.unpack(packed, bits), codes)


def test_an_error_in_a_thread_is_raised(cpu: ModuleType) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail_in_the_second_half(part: slice) -> None:
        if part.start:
            raise ValueError("here")

    try:
        with pytest.raises(ValueError, match="here"):
            cpu.in_threads(fail_in_the_second_half, 2, 2 * cpu.THREAD_WEIGHTS)
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_call_keeps_what_its_threads_still_use(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, alive, threads = threading.Event(), [], torch.get_num_threads()

    def work(part: slice) -> None:
        if part.start == 0:
            raise KeyboardInterrupt
        interrupted.wait()
        alive.append(used() is not None)

    tensor = torch.zeros(1)
    used = weakref.ref(tensor)
    pool = ThreadPoolExecutor(1)
    monkeypatch.setattr(cpu, "_pool", lambda process: pool)
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            cpu.in_threads(work, 2, 2 * cpu.THREAD_WEIGHTS, tensor)
        del tensor
        interrupted.set()
        pool.shutdown()
        assert alive == [True]
        assert used() is None
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_inputs_flow() -> None:
    codes, packed, norms = packed_matrix(4, *SHAPES[3])
    inputs = random(3, 576).requires_grad_()
    kernels.matmul(inputs, packed, norms, 4).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad[1].double(), dense(codes, norms, 4).sum(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_an_embedding_decodes_the_rows_asked_for(bits: int, dtype: torch.dtype) -> None:
    codes, packed, norms = packed_matrix(bits, *SHAPES[3])
    rows = dense(codes, norms, bits)
    for ids in (torch.tensor([[3, 1, 3], [49, 0, 2]]), torch.tensor(7), torch.empty(0, 4, dtype=torch.int64)):
        found = kernels.embedding(ids, packed, norms, bits, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), rows[ids], rtol=EPSILON[dtype], atol=1e-6)


def test_embeddings_are_float32_unless_told() -> None:
    _, packed, norms = packed_matrix(4, *SHAPES[3])
    assert kernels.embedding(torch.tensor([1]), packed, norms, 4).dtype == torch.float32


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_the_rotation_has_the_bits_of_the_plain_one(size: int, at_level: ModuleType) -> None:
    for values in (random(70, 1024) * 1e3, random(1024, 6).T, torch.zeros(0, 512), random(2, 3, 256)):
        assert torch.equal(at_level.rotate_blocks(values, size), hadamard._rotate_blocks(values, size))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", WIDTHS)
def test_norms_and_codes_have_the_bits_of_the_plain_ones(bits: int, size: int, at_level: ModuleType) -> None:
    grid = LloydGrid(bits, size)
    groups = torch.cat(
        [random(700, size) * 0.02, random(9, size) ** 9, torch.zeros(1, size), torch.full((2, size), 3.0)]
    )
    groups = groups.unflatten(0, (2, -1))
    norm, best = grid._norms(groups)
    for least_squares in (True, False):
        expected = replace(grid, least_squares=least_squares)._norms(groups)
        for ours, other in zip(at_level.fit_norms(groups, bits, least_squares), expected, strict=True):
            assert torch.equal(ours, other)
    for each in (norm, best):
        assert torch.equal(at_level.nearest_codes(groups, each, bits), grid._round(groups, Parameters(each)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_on_and_beside_boundaries_get_the_codes_of_the_plain_rounding(bits: int, at_level: ModuleType) -> None:
    edges = codebook(bits).boundaries
    beside = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-torch.inf, torch.inf)]
    values = torch.cat([edges, *beside, torch.tensor([-1e30, 1e30, -0.0, 0.0, torch.inf, -torch.inf, torch.nan])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 16)).view(-1, 16)
    norms = torch.full((len(values), 1), 4.0)  # √16, so that the values themselves are rounded
    assert torch.equal(
        at_level.nearest_codes(values, norms, bits), LloydGrid(bits, 16)._round(values, Parameters(norms))
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_has_the_bits_of_the_plain_one(bits: int, cpu: ModuleType) -> None:
    generator = torch.Generator().manual_seed(bits)
    for shape in ((8,), (3, 5, 24), (0, 16), (24, 40)):
        codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator)
        packed = packing._pack(codes, bits)
        assert torch.equal(cpu.pack(codes, bits), packed)
        assert torch.equal(cpu.unpack(packed, bits), codes)


def test_quantizing_gives_the_same_bits_with_and_without_a_compiler(
    cpu: ModuleType, request: pytest.FixtureRequest
) -> None:
    weights = random(40, 576) * 0.02
    fast = Nearest().solve(weights, LloydGrid(5, 64), Hadamard(64))
    decoded, packed = fast.dequantize(), packing.pack(fast.codes, 5)
    request.getfixturevalue("plain")
    slow = Nearest().solve(weights, LloydGrid(5, 64), Hadamard(64))
    assert torch.equal(slow.codes, fast.codes)
    assert torch.equal(slow.parameters.scale, fast.parameters.scale)
    assert torch.equal(slow.dequantize(), decoded)
    assert torch.equal(packing.pack(slow.codes, 5), packed)


@pytest.mark.parametrize("length", [1, 2, 7, 96, 128])
def test_sums_by_halves_are_sums(length: int) -> None:
    values = random(5, length)
    torch.testing.assert_close(sum_by_halves(values), values.sum(-1, keepdim=True))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_triton_kernel_in_its_interpreter(bits: int) -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (it exists for Linux only)")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles")
    from hlwq.kernels import triton

    for rows, group_size, columns in ((19, 8, 72), (5, 64, 192)):
        codes, packed, norms = packed_matrix(bits, rows, group_size, columns)
        for batch, dtype in ((1, torch.bfloat16), (3, torch.float32)):
            inputs = random(batch, columns).to(dtype)
            outputs = triton.matmul(inputs, packed, norms, bits).to(dtype)
            assert_product(outputs, inputs, dense(codes, norms, bits), EPSILON[dtype])


@pytest.mark.parametrize("inference", [True, False])
def test_several_threads_give_what_one_does(cpu: ModuleType, inference: bool) -> None:
    codes, packed, norms = packed_matrix(5, 1024, 64, 1024)
    inputs, weights = random(3, 1024), random(1024, 1024, seed=1)
    row = inputs[:1].to(torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                matrix = Nearest().solve(weights, LloydGrid(5, 64), Hadamard(64))
                products = [kernels.matmul(each, packed, norms, 5) for each in (inputs, row, row.float())]
                found.append(
                    [
                        *products,
                        reference.look_up(packed, norms, 5),
                        matrix.codes,
                        matrix.dequantize(torch.bfloat16),
                        packing.pack(codes, 5),
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


def test_tensors_that_do_not_fit_are_refused(cpu: ModuleType) -> None:
    _, packed, norms = packed_matrix(4, *SHAPES[3])
    inputs = random(1, 576)
    for wrong in (
        (random(2, 288), packed, norms, 4),
        (inputs, packed, norms, 5),
        (inputs, packed, norms.float(), 4),
        (inputs, packed.int(), norms, 4),
        (inputs, packed, norms[:, :7], 4),
        (inputs, packed, norms[:-1], 4),
        (inputs, packed.to("meta"), norms, 4),
        (inputs, packed, norms.to("meta"), 4),
    ):
        with pytest.raises(ValueError, match=r"fit|are on"):
            kernels.matmul(*wrong)
    for columns, groups in ((4, 1), (12, 3), (32, 0)):  # half an octet of codes; no groups
        shapes = (5, columns // 2), (5, groups)
        codes, scales = torch.zeros(shapes[0], dtype=torch.uint8), torch.ones(shapes[1], dtype=torch.float16)
        for batch in (1, 2):
            with pytest.raises(ValueError, match="fit"):
                kernels.matmul(random(batch, columns), codes, scales, 4)


@pytest.mark.parametrize(
    ("row_bytes", "groups", "bits", "dtype"),
    [
        (0, 1, 4, torch.uint8),
        (4, 16, 4, torch.uint8),
        (32, 5, 4, torch.uint8),
        (32, 0, 4, torch.uint8),
        (3, 1, 5, torch.uint8),
        (8, 1, 4, torch.int32),
    ],
)
def test_codes_and_norms_that_do_not_fit_are_refused(
    row_bytes: int, groups: int, bits: int, dtype: torch.dtype, cpu: ModuleType
) -> None:
    packed, norms = torch.zeros(3, row_bytes, dtype=dtype), torch.ones(3, groups, dtype=torch.float16)
    with pytest.raises(ValueError, match="fit"):
        kernels.embedding(torch.tensor([0, 2]), packed, norms, bits)


def test_tensors_that_the_kernels_do_not_know_are_left_to_plain_code(cpu: ModuleType) -> None:
    grid, groups = LloydGrid(4, 64), random(300, 64)
    for weights in (groups.bfloat16(), groups.double(), random(3, 100)):
        assert torch.equal(replace(grid, storage=()).fit(weights).scale, grid._norms(weights)[1])
    half = Parameters(groups.norm(dim=-1, keepdim=True).half())
    for weights, parameters in ((groups.bfloat16(), half), (groups, half), (groups, Parameters(torch.ones(1, 1)))):
        assert torch.equal(grid.round(weights, parameters), grid._round(weights, parameters))
    codes = torch.arange(8)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(packing.pack(codes.to(dtype), 4), packing.pack(codes.to(torch.uint8), 4))
        assert torch.equal(packing.unpack(codes.to(dtype), 4), packing.unpack(codes.to(torch.uint8), 4))


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_compiled_and_exported_models_call_the_kernels(batch: int) -> None:
    _, packed, norms = packed_matrix(4, *SHAPES[3])

    class Layer(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return kernels.matmul(inputs, packed, norms, 4)

    inputs = random(batch, 576).to(torch.bfloat16)
    expected = kernels.matmul(inputs, packed, norms, 4)
    with torch.inference_mode():
        assert torch.equal(torch.compile(Layer(), backend="eager", fullgraph=True)(inputs), expected)
    assert torch.equal(torch.export.export(Layer(), (inputs,)).module()(inputs), expected)


def test_kernels_that_were_not_compiled_are_done_without_and_missed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hlwq.kernels._native", None)
    monkeypatch.delenv("HLWQ_KERNELS", raising=False)
    compiled._cpu_module.cache_clear()
    try:
        with pytest.warns(HlwqWarning, match="without its compiled kernels") as warned:
            assert [compiled.cpu_kernels(torch.empty(0)) for _ in range(2)] == [None, None]
        assert len(warned) == 1
    finally:
        compiled._cpu_module.cache_clear()


PRINT_LEVEL = """
import torch
from hlwq.compiled import cpu_kernels

kernels = cpu_kernels(torch.empty(0))
print(kernels and kernels._native.level())
"""


@pytest.mark.parametrize("level", ["portable", "off", "best"])
def test_the_environment_chooses_the_level(level: str, cpu: ModuleType) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HLWQ_KERNELS"}
    if level != "best":
        environment["HLWQ_KERNELS"] = level
    run = subprocess.run([sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True)
    expected = {"portable": "portable", "off": "None", "best": cpu._native.available_levels()[-1]}
    assert (run.stdout.strip(), run.stderr) == (expected[level], "")


def test_a_level_that_is_not_there_is_refused(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLWQ_KERNELS", "mmx")
    compiled._cpu_module.cache_clear()
    try:
        with pytest.raises(RequestError, match="HLWQ_KERNELS is mmx, not one of off, portable"):
            compiled.cpu_kernels(torch.empty(0))
    finally:
        compiled._cpu_module.cache_clear()
    for level in ("mmx", 2):
        with pytest.raises(ValueError, match=str(level)):
            cpu._native.use(level)


def test_a_triton_that_cannot_be_imported_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "hlwq.kernels.triton", None)
    compiled._triton_module.cache_clear()
    try:
        with pytest.warns(HlwqWarning, match="cannot be used"):
            assert compiled._triton_module() is None
    finally:
        compiled._triton_module.cache_clear()


@pytest.mark.parametrize("rows", [3, 40])
def test_without_openmp_one_row_is_multiplied_by_threads_of_our_own(
    cpu: ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed, norms = packed_matrix(3, rows, 128, 256)
    inputs = random(1, 256).to(torch.bfloat16)
    expected = kernels.matmul(inputs, packed, norms, 3)
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "OPENMP", False)
    monkeypatch.setattr(cpu, "IDLE_THREAD_WEIGHTS", 1)
    monkeypatch.setattr(cpu, "THREAD_WEIGHTS", 512)
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernels.matmul(inputs, packed, norms, 3), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_norm_that_is_no_number_gives_none(at_level: ModuleType, batch: int) -> None:
    _, packed, norms = packed_matrix(4, *SHAPES[3])
    norms.view(torch.int16)[0, 0], norms.view(torch.int16)[1, 0] = -1, 0x7FFF
    outputs = kernels.matmul(random(batch, 576).to(torch.bfloat16), packed, norms, 4)
    assert outputs[:, :2].isnan().all()
    assert not outputs[:, 2:].isnan().any()


@pytest.mark.parametrize("batch", [1, 4])
def test_norms_may_be_any_float16(at_level: ModuleType, batch: int) -> None:
    norms = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(-1, 1)
    packed = torch.full((len(norms), 16), 0xFF, dtype=torch.uint8)  # the largest level, everywhere
    inputs = torch.zeros(batch, 32)
    inputs[:, 0] = 1  # its rotation is the same everywhere
    expected = codebook(4).centroids[-1] * norms.float().T.expand(batch, -1)
    outputs = kernels.matmul(inputs, packed, norms, 4)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bfloat16_products_are_those_in_float32_rounded_once(bits: int, at_level: ModuleType) -> None:
    for shape in SHAPES:
        _, packed, norms = packed_matrix(bits, *shape)
        inputs = random(1, shape[2]).bfloat16()
        exact = kernels.matmul(inputs.float(), packed, norms, bits)
        assert torch.equal(kernels.matmul(inputs, packed, norms, bits), exact.bfloat16())


def test_gradients_flow_through_compiled_models() -> None:
    _, packed, norms = packed_matrix(4, *SHAPES[3])
    gradients = []
    for multiply in (kernels.matmul, torch.compile(kernels.matmul, backend="aot_eager")):
        inputs = random(3, 576).requires_grad_()
        multiply(inputs, packed, norms, 4).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)
