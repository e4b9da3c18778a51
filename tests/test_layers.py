"""Who may import whom. The table of ARCHITECTURE.md, held by reading the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ulysses_triton"

# Row by row from the bottom: a file imports from its own row and the rows above it in this list. A new file gets its
# place here first.
LAYERS: dict[str, tuple[str, ...]] = {
    "kernels": (
        "kernels._blocks",
        "kernels._cache",
        "kernels._config",
        "kernels._documents",
        "kernels._dropout",
        "kernels._mask",
        "kernels._options",
        "kernels._predicate",
        "kernels._reference_attend",
        "kernels._rope_norm",
        "kernels._rows",
        "kernels._scores",
        "kernels._table",
        "kernels._views",
        "kernels.attend_backward",
        "kernels.attend_forward",
        "kernels.pack",
        "kernels.poison",
        "kernels.reference",
        "kernels.signals",
        "kernels.unpack",
    ),
    "values": (
        "chunk_cache",
        "cost",
        "cuts",
        "errors",
        "masks",
        "messages",
        "placement",
        "planner.*",
        "schedule",
        "spec",
        "timeline",
        "timeline_svg",
    ),
    "exchange": (
        "exchange",
        "exchange.base",
        "exchange.cuda",
        "exchange.nccl",
        "exchange.nccl_library",
        "exchange.one_sided",
        "exchange.pool",
        "exchange.shared_pool",
        "exchange.shm",
        "exchange.store",
        "exchange.symm",
        "exchange.symm_pool",
        "exchange.torch_dist",
        "exchange.two_hop",
        "exchange.unix_socket",
        "exchange.virtual",
        "exchange.watchdog",
        "exchange.within",
    ),
    "engine": (
        "agreement",
        "call",
        "carriers",
        "executor",
        "group",
        "halves",
        "layout",
        "local",
        "memo",
        "nodes",
        "op",
        "pieces",
        "projection",
        "tracing",
    ),
    "face": (
        "",  # __init__
        "__main__",
        "api",
        "balance",
        "cache",
        "cache_layer",
        "callables",
        "case",
        "chunk_tuner",
        "cli",
        "doctor",
        "doctor_checks",
        "doctor_facts",
        "doctor_ranks",
        "doctor_stages",
        "machine",
        "packed",
        "plan_command",
        "reorder",
        "shard",
        "timeline_command",
        "trial",
        "trial_options",
        "truth",
        "tuner",
        "tuning",
        "verify",
        "integrations.*",
        "training.*",
    ),
}
WITHOUT_TORCH = (
    "cost",
    "cuts",
    "errors",
    "messages",
    "placement",
    "planner.hardware",
    "planner.layer",
    "planner.memory",
    "planner.models",
    "planner.rows",
    "planner.setup",
    "schedule",
    "spec",
    "timeline",
    "timeline_svg",
)  # pure Python, but for types
OPTIONAL = {"accelerate", "cupy", "datasets", "kernels", "liger_kernel", "matplotlib", "tqdm", "transformers"}


@dataclass(frozen=True)
class Import:
    target: str  # "torch.distributed", or "ulysses_triton.errors" for one of ours
    line: int
    at_import: bool  # it runs when the file is imported: not inside a function
    for_types: bool  # under `if TYPE_CHECKING:`


def module_name(path: Path) -> str:
    """The name inside the package: `exchange/base.py` is "exchange.base", the package's own `__init__.py` ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    top, packages = list(ROOT.glob("*.py")), [p for p in ROOT.iterdir() if p.is_dir()]
    files = top + [f for p in packages for f in p.rglob("*.py")]  # rglob from above would not follow the links
    return {module_name(f): f for f in sorted(files)}


def absolute(name: str) -> str:
    return f"ulysses_triton.{name}".rstrip(".")


def imports(name: str, path: Path) -> Iterator[Import]:
    """All imports of a file, also those inside functions, with relative names resolved."""

    def names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        package = absolute(name).split(".") if path.name == "__init__.py" else absolute(name).split(".")[:-1]
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join(base + ([node.module] if node.module else []))
        for alias in node.names:  # `from . import errors` names a module, `from .errors import X` a thing in one
            inner = f"{source}.{alias.name}"
            yield inner if inner.removeprefix("ulysses_triton.") in modules() else source

    def visit(node: ast.AST, at_import: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from (Import(target, child.lineno, at_import, for_types) for target in names(child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from visit(child, False, for_types)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                types_only = ast.Module(child.body, [])
                yield from visit(types_only, at_import, True)
                yield from visit(ast.Module(child.orelse, []), at_import, for_types)
            else:
                yield from visit(child, at_import, for_types)

    return visit(ast.parse(path.read_text()), True, False)


def layer_of(name: str) -> str | None:
    for layer, members in LAYERS.items():
        for member in members:
            if name == member or (member.endswith(".*") and f"{name}.".startswith(member[:-1])):
                return layer
    return None


def within(name: str) -> bool:
    return name == "ulysses_triton" or name.startswith("ulysses_triton.")


def file_ids(name: str) -> str:
    return name or "__init__"


every_file = pytest.mark.parametrize("name", modules(), ids=file_ids)


@every_file
def test_the_table_knows_the_file(name: str) -> None:
    assert layer_of(name), f"{modules()[name]} has no place in LAYERS: give it one, and name it in ARCHITECTURE.md"


@every_file
def test_imports_only_from_its_own_row_and_those_above(name: str) -> None:
    order = list(LAYERS)
    mine = layer_of(name) or "face"
    for item in imports(name, modules()[name]):
        if not within(item.target):
            continue
        inner = item.target.removeprefix("ulysses_triton").removeprefix(".")
        theirs = layer_of(inner)
        if inner == "kernels":
            theirs = "kernels"
        assert theirs, f"{absolute(name)}:{item.line} imports {item.target}, which is nowhere in LAYERS"
        assert order.index(theirs) <= order.index(mine), (
            f"{absolute(name)}:{item.line} ({mine}) imports {item.target} ({theirs}), a row below it in the table"
        )


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("kernels.")])
def test_kernels_know_neither_ranks_nor_autograd(name: str) -> None:
    path = modules()[name]
    for item in imports(name, path):
        assert not item.target.startswith(("torch.distributed", "torch.autograd")), f"{path}:{item.line}: {item.target}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ("torch.distributed", "torch.autograd"), f"{path}:{node.lineno} uses {text}"


@pytest.mark.parametrize("name", [n for n in WITHOUT_TORCH if n in modules()])
def test_decisions_need_no_torch(name: str) -> None:
    for item in imports(name, modules()[name]):
        root = item.target.split(".")[0]
        assert item.for_types or root not in ("torch", "triton", "numpy"), (
            f"{absolute(name)}:{item.line}: {item.target}"
        )
        assert item.for_types or not item.target.startswith("ulysses_triton.kernels"), (
            f"{absolute(name)}:{item.line} imports {item.target}, and with it torch"
        )


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith("training")], ids=file_ids)
def test_optional_packages_are_imported_where_they_are_needed(name: str) -> None:
    for item in imports(name, modules()[name]):
        if item.at_import and not item.for_types:
            assert item.target.split(".")[0] not in OPTIONAL, f"{absolute(name)}:{item.line}: {item.target}"


def test_no_file_imports_itself_through_others() -> None:
    """Also within a row there is an order: no cycles among what runs at import."""
    edges = {
        absolute(name): {
            i.target
            for i in imports(name, path)
            if i.at_import and not i.for_types and within(i.target) and i.target != absolute(name)
        }
        for name, path in modules().items()
    }
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(edges.get(name, ())):
                follow(target, (*trail, name))
            done.add(name)

    for name in edges:
        follow(name, ())


def test_kernels_is_no_importable_top_level_package() -> None:
    """A top-level `kernels` with an `__init__.py` would shadow Hugging Face's package of that name."""
    folder = ROOT / "kernels"
    assert not (folder / "__init__.py").exists()
    assert folder.resolve().parent == ROOT.parent.resolve()
    for link in ("kernels", "autotune_cache"):
        assert (ROOT / link).is_symlink() and not (ROOT / link).readlink().is_absolute()
