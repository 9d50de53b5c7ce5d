"""Build the API reference in `docs/` with pdoc; a warning is an error."""

from __future__ import annotations

import sys
import typing
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pdoc
import pdoc.render

import distill

OUTPUT = Path("docs")


def show_modules(package: str = "distill") -> None:
    """Import all modules, and list those of each package in its `__all__`, beside which pdoc would show none."""
    module = import_module(package)
    children = [child for child in iter_modules(module.__path__, f"{package}.") if not child.name.endswith("__main__")]
    if hasattr(module, "__all__"):
        names = [child.name.rpartition(".")[2] for child in children]
        module.__all__ = [*names, *(name for name in module.__all__ if name not in names)]
    for child in children:
        if child.ispkg:
            show_modules(child.name)
        else:
            import_module(child.name)


def resolve_names() -> None:
    """Import what `distill` imports on demand only."""
    for name in distill.__all__:
        vars(distill)[name] = getattr(distill, name)


def resolve_types() -> None:
    """Resolve the types of the fields of named tuples, which pdoc would look for in another module."""
    for module in [module for name, module in sys.modules.items() if name.startswith("distill.")]:
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, tuple) and hasattr(item, "_fields"):
                item.__new__.__annotations__ = typing.get_type_hints(item)


def main() -> None:
    """Build all pages."""
    resolve_names()
    show_modules()
    resolve_types()
    pdoc.render.configure(docformat="google", footer_text=f"distill {distill.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("distill", output_directory=OUTPUT)
    print(OUTPUT / "index.html")


if __name__ == "__main__":
    main()
