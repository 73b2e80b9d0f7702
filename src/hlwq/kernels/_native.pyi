"""What native.cpp offers: tensors as addresses of contiguous memory, all work done without the interpreter's lock.

Nothing is checked but `bits`: `hlwq.kernels.cpu` knows the shapes. Group sizes are GROUP_SIZES of that module, if not
said otherwise. Codebooks must have been set.
"""

def use(level: str, /) -> None:
    """Use the kernels of an instruction set from now on: `portable`, `avx2` or `avx512`.

    Raises:
        ValueError: there is no such level, or this processor lacks it.
    """

def level() -> str:
    """The level that is used."""

def available_levels() -> list[str]:
    """The levels that this processor has, the best one, which is used at first, last."""

def has_openmp() -> bool:
    """Whether `multiply_row` can use torch's OpenMP threads."""

def set_codebook(bits: int, centroids: int, boundaries: int, /) -> None:
    """Copy a codebook: float32 (2^bits,) and (2^bits − 1,), as `hlwq.lloyd.Codebook` has them. The first one stays."""

def rotate_groups(source: int, target: int, groups: int, size: int, /) -> None:
    """Rotate float32 (groups, size). Source and target may be the same."""

def measure_groups(weights: int, norms: int, groups: int, size: int, /) -> None:
    """Write the norms, float32 (groups,), of float32 (groups, size)."""

def refine_groups(weights: int, norms: int, refined: int, groups: int, size: int, bits: int, /) -> None:
    """Write the norms of least squared error, for the codes that weights have with the norms that are given."""

def round_groups(weights: int, norms: int, codes: int, groups: int, size: int, bits: int, /) -> None:
    """Write the nearest codes, uint8 (groups, size)."""

def decode_rows(
    codes: int,
    scales: int,
    target: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    width: int,
    rotated: bool,
    /,
) -> None:
    """Write scale · centroid[code], float32 (rows, columns), with the groups rotated or not.

    Args:
        codes: `width` bits apart, which is `bits` or 8.
        scales: float32 (rows, columns / group_size).
        target: where to.
        rows: how many.
        columns: how many, a multiple of 8.
        group_size: any, if groups are not rotated.
        bits: 2 to 8.
        width: `bits` for packed codes, 8 for one in a byte.
        rotated: whether groups are rotated.
    """

def multiply_rows(
    inputs: int,
    input_rows: int,
    packed: int,
    norms: int,
    outputs: int,
    first: int,
    last: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    /,
) -> None:
    """Multiply rotated inputs by the rows `first` to `last` of a packed matrix.

    Args:
        inputs: float32 (input_rows, columns), rotated.
        input_rows: how many.
        packed: (rows, columns·bits/8).
        norms: float16 (rows, columns / group_size).
        outputs: float32 (input_rows, rows), of which the columns `first` to `last` are written.
        first: row of the matrix.
        last: the row after the last.
        rows: of the matrix.
        columns: of the matrix, a multiple of 8.
        group_size: any.
        bits: 2 to 8.
    """

def multiply_row(
    inputs: int,
    half: bool,
    packed: int,
    norms: int,
    outputs: int,
    first: int,
    last: int,
    groups: int,
    group_size: int,
    bits: int,
    busy: int,
    threads: int,
    /,
) -> None:
    """Multiply one row of inputs, which are not rotated, by the rows `first` to `last` of a packed matrix.

    Args:
        inputs: (groups·group_size,).
        half: whether inputs and outputs are bfloat16, else float32.
        packed: (rows, groups·group_size·bits/8).
        norms: float16 (rows, groups).
        outputs: (rows,), of which those from `first` to `last` are written.
        first: row of the matrix. If `busy` is more than 1, it is 0.
        last: the row after the last.
        groups: in a row, 1024 at most.
        group_size: 32, 64, 128 or 256.
        bits: 2 to 8.
        busy: how many threads of torch's OpenMP share the rows, or 1 for none.
        threads: how many of them are called.
    """

def pack(codes: int, packed: int, octets: int, bits: int, /) -> None:
    """Pack uint8 (octets, 8) into uint8 (octets, bits); 1 to 8 bits."""

def unpack(packed: int, codes: int, octets: int, bits: int, /) -> None:
    """Undo `pack`."""
