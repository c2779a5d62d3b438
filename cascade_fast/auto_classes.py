"""Makes transformers' Auto classes know the cascade after ``import cascade_fast``, without importing transformers.

transformers has no plug-ins: a class must be registered with the Auto classes, which live in modules that take
seconds to import. So the registration waits: a finder on ``sys.meta_path`` sees these modules being imported, lets
them load as always, and then imports ours, which register themselves.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AFTER = {
    "transformers.models.auto.configuration_auto": "cascade_fast.model.configuration",
    "transformers.models.auto.modeling_auto": "cascade_fast.model.modeling",
}


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # whoever looks at the module later finds nothing of ours
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader, AFTER[fullname])
                return spec
        return None


def register() -> None:
    """Registers the cascade now with Auto classes that are imported already, and later with those that are not."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs, ours in AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
