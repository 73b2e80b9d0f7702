"""Modules whose weights stay packed: linear layers, embeddings, and output heads tied to an embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from hlwq.errors import UnsupportedError
from hlwq.expert_cache import ExpertCache
from hlwq.formats import Scheme
from hlwq.formats.hlwq import decode
from hlwq.kernels import embedding, matmul
from hlwq.packed_experts import ExpertShape, Rows, rows_in, run_experts


class _NoWeight(UnsupportedError, AttributeError):
    """Says that a matrix is packed, and to `hasattr` that there is no `weight`."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} has no weight, it is packed. Decode the model first: model = model.dequantize().")


class _WithoutWeight(nn.Module):
    """Answers those who ask for the `weight` of a packed module."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise _NoWeight(type(self).__name__)
        return super().__getattr__(name)


class _Packed(_WithoutWeight):
    """A matrix (rows, columns) as `hlwq.formats.hlwq` stores it.

    Attributes:
        weight_packed: uint8 (rows, columns·bits/8). A parameter, since those are what device maps offload. The norms
            are a buffer: a model's dtype is taken to be that of its first floating parameter.
        weight_norms: float16 (rows, columns / group size), whatever dtype the model is cast to.
        bits: width of a code.
    """

    weight_packed: nn.Parameter
    weight_norms: Tensor

    def __init__(self, rows: int, columns: int, scheme: Scheme, device: torch.device | str | None) -> None:
        super().__init__()
        self.bits = scheme.bits
        packed = torch.empty(rows, columns * scheme.bits // 8, dtype=torch.uint8, device=device)
        norms = torch.empty(rows, columns // scheme.group_size, dtype=torch.float16, device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("weight_norms", norms)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        norms = self.weight_norms
        nn.Module._apply(self, fn, recurse)
        if self.weight_norms.dtype != norms.dtype:  # another dtype would lose bits, and the file's is the one meant
            self.weight_norms = norms.to(self.weight_norms.device)
        return self

    def multiply(self, inputs: Tensor) -> Tensor:
        """Inputs (…, columns) times the matrix: (…, rows), in the dtype of the inputs."""
        # Not as attributes: finding one of a module takes as long as a hundred of its weights.
        packed, norms = self._parameters.get("weight_packed"), self._buffers.get("weight_norms")
        if packed is None or norms is None:  # a replica of DataParallel's
            packed, norms = self.weight_packed, self.weight_norms
        return matmul(inputs, packed, norms, self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix that the codes stand for."""
        return self.weight_packed.shape[0], self.weight_packed.shape[1] * 8 // self.bits

    def extra_repr(self) -> str:
        """What is printed between the parentheses."""
        rows, columns = self.shape
        return f"{rows}, {columns}, bits={self.bits}, group_size={columns // self.weight_norms.shape[1]}"

    def decoded(self, dtype: torch.dtype) -> nn.Parameter:
        """The matrix that the codes stand for."""
        return nn.Parameter(decode(self.weight_packed, self.weight_norms, self.bits).to(dtype))


class HLWQLinear(_Packed):
    """A linear layer with a packed matrix, which is never decoded as a whole."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Leave the codes empty.

        Args:
            in_features: columns of the matrix.
            out_features: its rows.
            scheme: bits and group size.
            bias: (out_features,), or None.
            device: where the codes are.
        """
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, in_features) to (…, out_features), in the dtype of the inputs."""
        outputs = self.multiply(inputs)
        bias = self._parameters["bias"] if self._parameters else self.bias
        return outputs if bias is None else outputs + bias.to(outputs.dtype)

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """The layer with decoded weights, in this dtype as its bias is."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.decoded(dtype)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), self.bias.requires_grad)
        return linear


class HLWQExperts(nn.Module):
    """The experts of a layer, packed: each one's codes and norms in a row of one tensor, as files hold them.

    Attributes:
        packed: uint8 (experts, bytes of an expert); None where a cache holds some. A parameter, since those are what
            device maps offload.
        gating: the module that transformers had in this place, without its matrices: what joins gate and up.
        cache: what holds the experts, and the layer's name in it; None where all are here.
        following: the experts of the next layer and their router, if they are read ahead.
    """

    packed: nn.Parameter | None
    gating: Any

    def __init__(self, dense: nn.Module, scheme: Scheme, cache: tuple[ExpertCache, str] | None = None) -> None:
        """Leave the codes empty, and take the matrices from the module that is replaced.

        Args:
            dense: transformers' module of experts, with `gate_up_proj` and `down_proj`.
            scheme: bits and group size.
            cache: what holds the experts, and the layer's name in it.
        """
        super().__init__()
        self.count, rows, hidden = dense.get_parameter("gate_up_proj").shape
        self.shape, self.cache = ExpertShape(hidden, rows // 2, scheme), cache
        self.following: tuple[HLWQExperts, nn.Module] | None = None  # inside a tuple they are no submodules
        del dense.gate_up_proj, dense.down_proj
        self.__dict__["gating"] = dense  # no child, whose matrices transformers would look for
        packed = torch.empty(self.count, self.shape.nbytes, dtype=torch.uint8, device="meta")
        self.register_parameter("packed", None if cache else nn.Parameter(packed, requires_grad=False))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts make of tokens, weighted and summed.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: the experts of each token, (tokens, k).
            top_k_weights: their weights, (tokens, k).
        """
        if self.cache is None:
            rows: Rows = partial(rows_in, self.get_parameter("packed"))
        else:
            cache, layer = self.cache
            rows = partial(cache.rows, layer)
        gate = self.gating._apply_gate
        outputs = run_experts(hidden_states, top_k_index, top_k_weights, self.shape, gate, rows)
        if self.following and len(hidden_states) == 1:  # the tokens of a prompt go to most experts
            _read_ahead(*self.following, hidden_states[0], top_k_index.shape[1])
        return outputs

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """Transformers' module with decoded matrices, in this dtype."""
        packed = self.get_parameter("packed")
        decoded = [
            torch.stack([self.shape.decoded(expert, place).to(dtype) for expert in packed]) for place in range(3)
        ]
        self.gating.gate_up_proj = nn.Parameter(torch.cat(decoded[:2], 1), requires_grad=False)
        self.gating.down_proj = nn.Parameter(decoded[2], requires_grad=False)
        dense: nn.Module = self.gating
        return dense

    def extra_repr(self) -> str:
        """What is printed between the parentheses."""
        shape, scheme = self.shape, self.shape.scheme
        kept = f", kept={self.cache[0].capacity}" if self.cache else ""
        return f"{self.count}, {shape.hidden}, {shape.inner}, bits={scheme.bits}, group_size={scheme.group_size}{kept}"


def _read_ahead(following: HLWQExperts, router: nn.Module, token: Tensor, each: int) -> None:
    """Begin to read what a layer will need, by its router and what the layer before it was given."""
    weight = router.get_parameter("weight")  # routers differ in what else they are given
    if following.cache is not None and not weight.is_meta:
        cache, layer = following.cache
        scores = weight @ token.to(weight)
        cache.expect(layer, scores.topk(each).indices.tolist(), weight.device)


class HLWQEmbedding(_Packed):
    """An embedding with a packed matrix, of which only the rows asked for are decoded."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        """Leave the codes empty.

        Args:
            num_embeddings: rows of the matrix.
            embedding_dim: its columns.
            scheme: bits and group size.
            dtype: dtype of the rows that `forward` returns, until the model is cast to another.
            device: where the codes are.
            scale: what the rows are multiplied by when they are looked up, in their dtype, as Gemma does; a head that
                is tied to the embedding is not.
        """
        super().__init__(num_embeddings, embedding_dim, scheme, device)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids (…) to rows (…, embedding_dim); for the head that is tied to it, see `HLWQTiedHead.forward`.

        Raises:
            IndexError: an id is negative or too large. On a GPU and compiled, negative ones are not
                looked for.
        """
        if inputs.is_floating_point():
            return self.multiply(inputs.to(self.weight_packed.device))
        on_cpu = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and inputs.numel() and inputs.min() < 0:  # which would count from the end
            raise IndexError(f"token id {int(inputs.min())} is negative")
        rows = embedding(inputs, self.weight_packed, self.weight_norms, self.bits, self._like.dtype)
        return rows if self.scale == 1.0 else _scaled(rows, self.scale)

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """The embedding with decoded weights."""
        if self.scale == 1.0:
            embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        else:
            embedding = _ScaledEmbedding(self.num_embeddings, self.embedding_dim, self.scale)
        embedding.weight = self.decoded(dtype)
        return embedding


class _ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied when they are looked up."""

    def __init__(self, rows: int, columns: int, scale: float) -> None:
        super().__init__(rows, columns, device="meta")
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return _scaled(super().forward(input), self.scale)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """Rows times a scale that is rounded to their dtype first, as models that scale their embeddings do."""
    return rows * torch.tensor(scale, dtype=rows.dtype)


class HLWQTiedHead(_WithoutWeight):
    """An output head that multiplies by the codes of an embedding, and has none of its own."""

    def __init__(self, embedding: HLWQEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # inside a tuple it is no submodule, whose tensors would be saved twice

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, embedding_dim) to (…, num_embeddings), on the device of the inputs wherever the embedding is."""
        (embedding,) = self._embedding
        # Its `forward` is what accelerate wraps, to fetch codes that are offloaded; hooks on calls are not for a head.
        return embedding.forward(inputs).to(inputs.device)

    def dequantize(self) -> nn.Linear:
        """A linear layer whose weight is still to be tied."""
        (embedding,) = self._embedding
        return nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
