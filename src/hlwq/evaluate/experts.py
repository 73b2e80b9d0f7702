"""Which experts the tokens of a text go to, and what caches of them would hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from hlwq.decoded import DecodedCheckpoint
from hlwq.errors import CheckpointError, RequestError, UnsupportedError
from hlwq.evaluate.model import check_tokens, load_for_evaluation
from hlwq.evaluate.perplexity import read_text, windows_of
from hlwq.expert_policies import POLICIES, Belady, Policy, hit_rate
from hlwq.families import describe
from hlwq.files import check_file, write_whole
from hlwq.sources import locate
from hlwq.transformers_models import encode, load_tokenizer, quiet_transformers

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of the experts of a layer: the capacities that are looked at unless told otherwise."""
TRACE, BOUND = "experts", "belady"
"""The tensor in a file of uses, and the policy that no other beats."""


@dataclass(frozen=True)
class LayerBalance:
    """How the tokens of a text spread over the experts of a layer.

    Attributes:
        layer: its number.
        busiest: the share of uses that its busiest expert has; 1/experts if all are alike.
        entropy: of the uses, relative to that of all alike: 1 at most.
        unused: experts that no token goes to.
    """

    layer: int
    busiest: float
    entropy: float
    unused: int


@dataclass(frozen=True)
class HitRates:
    """What caches of a capacity have there, as the share of all uses, in the mean over layers.

    Attributes:
        capacity: experts of each layer that fit.
        nbytes: what they take in all layers, as the checkpoint stores them; None where that is not known.
        rates: by policy; `belady` is the bound.
    """

    capacity: int
    nbytes: int | None
    rates: dict[str, float]


@dataclass(frozen=True)
class ExpertUse:
    """Which experts were used.

    Attributes:
        layers: the numbers of the layers that have experts.
        experts: of each.
        uses: int16 (layers, tokens, experts of each token).
        expert_bytes: what an expert takes on disk, in the mean; None where that is not known.
    """

    layers: tuple[int, ...]
    experts: int
    uses: Tensor
    expert_bytes: int | None = None

    def save(self, file: Path) -> None:
        """Write the uses as safetensors."""
        from safetensors.torch import save

        described = {"layers": " ".join(map(str, self.layers)), "experts": str(self.experts)}
        if self.expert_bytes is not None:
            described["expert_bytes"] = str(self.expert_bytes)
        write_whole(file, save({TRACE: self.uses.contiguous()}, described))

    @staticmethod
    def read(file: Path) -> ExpertUse:
        """What `save` wrote.

        Raises:
            CheckpointError: it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        check_file(file)
        try:
            with safe_open(file, "pt") as opened:
                described, uses = opened.metadata(), opened.get_tensor(TRACE)
            nbytes = described.get("expert_bytes")
            layers, experts = tuple(map(int, described["layers"].split())), int(described["experts"])
            if uses.dtype != torch.int16 or uses.ndim != 3 or not uses.numel() or len(uses) != len(layers):
                raise ValueError
            if uses.min() < 0 or uses.max() >= experts:
                raise ValueError
            return ExpertUse(layers, experts, uses, None if nbytes is None else int(nbytes))
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise CheckpointError(
                f"{file} holds no uses of experts, as `trace` leaves them. Record them anew.", path=file
            ) from None

    def balance(self) -> list[LayerBalance]:
        """How the tokens spread, layer by layer."""
        rows = []
        for layer, uses in zip(self.layers, self.uses, strict=True):
            shares = torch.bincount(uses.flatten().long(), minlength=self.experts) / uses.numel()
            entropy = float(torch.special.entr(shares).sum() / torch.tensor(float(self.experts)).log())
            rows.append(LayerBalance(layer, float(shares.max()), entropy, int((shares == 0).sum())))
        return rows

    def replay(
        self, capacities: Sequence[int] = (), progress: Callable[[int, int, str], None] | None = None
    ) -> list[HitRates]:
        """What caches would have there, one for each layer, empty at first, token by token.

        Args:
            capacities: experts of a layer that fit; by default some fractions of them.
            progress: told how far the work is.

        Raises:
            RequestError: a capacity does not hold the experts of a token, or all experts fit.
        """
        least = self.uses.shape[2]
        usual = {max(least, round(self.experts * fraction)) for fraction in FRACTIONS} - {self.experts}
        capacities = sorted(set(capacities) or usual)
        for capacity in capacities or [0]:
            if not least <= capacity < self.experts:
                message = (
                    f"`capacities` {capacity} must hold the {least} experts of a token, and not all {self.experts}."
                )
                raise RequestError(message, argument="capacities")
        found = {capacity: dict.fromkeys((*POLICIES, BOUND), 0.0) for capacity in capacities}
        steps, done = len(self.layers) * len(capacities) * (len(POLICIES) + 1), 0
        for layer, uses in zip(self.layers, self.uses, strict=True):
            tokens = uses.tolist()
            policies: dict[str, Callable[[], Policy]] = {**POLICIES, BOUND: partial(Belady, tokens)}
            for (name, policy), capacity in product(policies.items(), capacities):
                if progress:
                    progress(done, steps, f"replaying layer {layer}, {name}, {capacity} of {self.experts}")
                found[capacity][name] += hit_rate(tokens, policy(), capacity) / len(self.layers)
                done += 1
        memory = None if self.expert_bytes is None else self.expert_bytes * len(self.layers)
        return [HitRates(each, None if memory is None else memory * each, found[each]) for each in capacities]


def expert_use(
    model: str | Path,
    text: str | Path,
    *,
    context: int = 2048,
    limit: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExpertUse:
    """Record which experts the tokens of a text go to, in chunks of `context` tokens one after another.

    Args:
        model: a directory of any format, a hub id or a `.gguf` file.
        text: a UTF-8 file.
        context: tokens of a chunk.
        limit: most chunks, from the start.
        device: where the model runs; by default a GPU if there is one.
        progress: told how far the work is.

    Raises:
        UnsupportedError: the model has no experts.
        RequestError: an argument is out of range, or the text is shorter than one chunk.
        HlwqError: the model or the text cannot be read.
    """
    path = locate(model)
    checkpoint = DecodedCheckpoint(path)
    layout = describe(checkpoint.config, checkpoint.tensors)
    places = {index: layer.experts()[0] for index, layer in enumerate(layout.layers) if layer.experts()}
    if not places:
        raise UnsupportedError(f"{model} has no experts: it is a dense {layout.family.name} model.", path=path)
    matrices = [(index, m) for index in places for m in layout.layers[index].matrices() if m.experts]
    of_experts = {(index, m.expert) for index, m in matrices}
    counts = {sum(place == index for place, _ in of_experts) for index in places}
    if len(counts) > 1:
        raise UnsupportedError(
            f"{model}: its layers have different numbers of experts, which is not looked at.", path=path
        )
    with quiet_transformers():
        ids = encode(load_tokenizer(path), read_text(text))
    chunks = windows_of(ids, context, context, limit)
    check_tokens(path, ids, context)
    if progress:
        progress(0, 1, "loading the model")
    loaded, _ = load_for_evaluation(path, device)
    decoder, handles = loaded.get_decoder(), []
    seen: dict[int, list[Tensor]] = {index: [] for index in places}
    for index, name in places.items():
        module = decoder.layers[index].get_submodule(layout.family.in_modules(name))
        handles.append(
            module.register_forward_pre_hook(
                lambda _, given, index=index: seen[index].append(given[1].to("cpu", torch.int16))
            )
        )
    with quiet_transformers(), torch.inference_mode():
        for done, chunk in enumerate(chunks):
            if progress:
                progress(done, len(chunks), "running the model")
            decoder(input_ids=torch.tensor([chunk], device=loaded.device), use_cache=False)
    for handle in handles:
        handle.remove()
    uses = torch.stack([torch.cat(each) for each in seen.values()])
    nbytes = sum(checkpoint.stored_bytes(f"{layout.layer_prefix(index)}{m.name}.weight") for index, m in matrices)
    return ExpertUse(tuple(places), counts.pop(), uses, nbytes // len(of_experts))
