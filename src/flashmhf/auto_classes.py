"""Makes this package's model types known to transformers' Auto classes, without importing transformers.

AutoConfig finds a stand-in for each type, which imports `flashmhf.models` when it is first used. If transformers is
imported later, the stand-ins are added as soon as the module with AutoConfig's table has run.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPES = ("flashmhf", "flashmhf_replaced")
TABLE_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Adds the stand-ins now, or when transformers is imported."""
    module = sys.modules.get(TABLE_MODULE)
    if hasattr(module, "CONFIG_MAPPING"):
        _add_stand_ins(module)
    else:
        sys.meta_path.insert(0, _WhenImported())


def _add_stand_ins(module: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type not in module.CONFIG_MAPPING:
            module.CONFIG_MAPPING.register(model_type, _stand_in(model_type, module))


def _stand_in(model_type: str, module: Any) -> type:
    class StandIn:
        """In place of the configuration class."""

        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            return cls.real()(*arguments, **options)

        @classmethod
        def from_dict(cls, *arguments: Any, **options: Any) -> Any:
            return cls.real().from_dict(*arguments, **options)

        @staticmethod
        def real() -> Any:
            importlib.import_module("flashmhf.models")
            return module.CONFIG_MAPPING[model_type]

    return StandIn


class _WhenImported:
    """A finder that leaves finding to the others, and runs once."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _ThenAdd(spec.loader)
        return spec


class _ThenAdd(Loader):
    """Another loader, which may be shared by many modules; adds the stand-ins to the module that it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add_stand_ins(module)
