"""HLWQ inside other libraries.

After `import hlwq`, `AutoModelForCausalLM.from_pretrained` knows HLWQ checkpoints. To register them takes transformers'
quantizers, which take as long to import as all of hlwq, and most commands need neither. So nothing of transformers is
imported here: when it imports its own table of quantizers, HLWQ is added to it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

from hlwq.errors import HlwqWarning, reason

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register HLWQ checkpoints: now if transformers has its table of quantizers, else as soon as it does."""
    if TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as Python does, but has it loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register()


def _register() -> None:
    try:
        import hlwq.integrations.compressed_tensors
        import hlwq.integrations.transformers  # noqa: F401 - importing registers
    except Exception as error:  # whatever an unknown version lacks: transformers itself must go on working
        warnings.warn(
            f"transformers will not load HLWQ checkpoints ({type(error).__name__}: {reason(error)}). "
            "hlwq needs transformers 5.16 or later.",
            HlwqWarning,
            stacklevel=2,
        )
