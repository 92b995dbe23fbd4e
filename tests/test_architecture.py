"""The law of the package, checked from its own source: who may import what, and how large things may grow."""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shardq"

# Lowest first: a module imports its own layer or what stands before it.
LAYERS = ["errors", "spelling", "shipped", "files", "background", "devices", "torch_internals", "compiling", "logs",
          "liveness", "matrix", "quant", "formats", "model", "calib", "cache", "optimize", "parallel", "config",
          "summaries", "recipe", "arguments", "help", "checks", "rundir", "training", "export", "commands", "verbs",
          "api", "cli",
          "__init__"]  # fmt: skip
SIBLINGS = (
    {"model", "calib", "cache", "optimize"},
    {"training", "export"},
)  # only what stands above joins two of a set
HOMES = {  # third-party package -> the only places that may know it
    "torch.distributed": ("parallel/", "liveness/"),
    "transformers": ("model/", "calib/tokenizer.py"),
    "safetensors": ("formats/",),
    "datasets": ("calib/",),
    "rich": ("logs.py",),
    "compressed_tensors": ("formats/compressed_tensors.py",),
    "torch.onnx": ("model/graph.py",),
    "onnx_ir": ("model/graph.py", "formats/onnx_graph.py", "export/onnx_graphs.py"),
    "gguf": ("formats/gguf_tensors.py", "formats/gguf_tokenizer.py", "export/gguf_file.py"),
    "deepspeed": ("parallel/zero.py",),
    "psutil": ("devices.py",),
    "torch._dynamo": ("compiling.py",),
    "torch._inductor": ("compiling.py",),
    "torch.fx": ("model/graph.py",),
    "transformers.conversion_mapping": ("model/transformers_internals.py",),
    "transformers.core_model_loading": ("model/transformers_internals.py",),
}
PRIVATE_HOMES = ("torch_internals.py", "compiling.py", "model/transformers_internals.py", *HOMES["deepspeed"])
PYTHONS_OWN = {"_exit", "_current_frames", "_replace"}  # documented, for all their underscore
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 300, 60, 8

Sources = dict[str, str]  # path within the package -> text
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_sources(package: Path) -> Sources:
    """Every module of the package."""
    return {file.relative_to(package).as_posix(): file.read_text() for file in sorted(package.rglob("*.py"))}


@cache
def walked(text: str) -> list[ast.AST]:
    """All syntax nodes of a module, itself the first; each text is parsed once, however many checks read it."""
    return list(ast.walk(ast.parse(text)))


def nodes(sources: Sources, *kinds: type) -> Iterator[tuple[str, ast.AST]]:
    """Syntax nodes of some kinds, with the file each stands in."""
    for path, text in sources.items():
        yield from ((path, node) for node in walked(text) if isinstance(node, kinds))


def imports(sources: Sources) -> Iterator[tuple[str, str]]:
    """Every (file, dotted name) that is imported absolutely."""
    for path, node in nodes(sources, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((path, alias.name) for alias in node.names)
        elif node.level == 0:
            yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(path: str) -> str:
    """Layer of a file, `__init__` for the package's own."""
    return path.removesuffix(".py").split("/")[0]


def upward_imports(sources: Sources) -> list[str]:
    """Imports of a higher layer, and of a layer that has no place in the order."""
    faults = []
    for path, name in imports(sources):
        if not name.startswith("shardq.") or name == "shardq.__version__":
            continue
        own, other = layer_of(path), name.split(".")[1]
        if own not in LAYERS or other not in LAYERS or LAYERS.index(other) > LAYERS.index(own):
            faults.append(f"{path}: imports {name}")
    return faults


def sibling_imports(sources: Sources) -> list[str]:
    """Imports between layers that must not know each other."""
    return [
        f"{path}: imports its sibling {name}"
        for path, name in imports(sources)
        for siblings in SIBLINGS
        if name.startswith("shardq.") and layer_of(path) in siblings
        if name.split(".")[1] in siblings - {layer_of(path)}
    ]


def strayed_packages(sources: Sources) -> list[str]:
    """Third-party packages imported outside their homes."""
    used = [*imports(sources), *torch_attributes(sources)]
    return [
        f"{path}: uses {name}, at home in {', '.join(homes)}"
        for path, name in used
        for package, homes in HOMES.items()
        if f"{name}.".startswith(f"{package}.") and not path.startswith(homes)
    ]


def torch_attributes(sources: Sources) -> Iterator[tuple[str, str]]:
    """Uses of torch's parts, such as `torch.distributed`, that a plain `import torch` allows."""
    for path, node in nodes(sources, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield path, f"torch.{node.attr}"


def strayed_privates(sources: Sources) -> list[str]:
    """Private parts of other objects and modules that are used outside the homes for them."""
    used = [(path, name) for path, name in imports(sources) if any(is_private(part) for part in name.split("."))]
    for path, node in nodes(sources, ast.Attribute):
        if is_private(node.attr) and node.attr not in PYTHONS_OWN and not is_own(node.value):
            used.append((path, node.attr))
    return [f"{path}: uses the private {name}" for path, name in used if path not in PRIVATE_HOMES]


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def is_own(owner: ast.expr) -> bool:
    """Whether an object is the one, or the class, that the code belongs to."""
    if isinstance(owner, ast.Call):
        owner = owner.func
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")


def relative_imports(sources: Sources) -> list[str]:
    """Imports that start with a dot."""
    return [f"{path}:{node.lineno}: relative import" for path, node in nodes(sources, ast.ImportFrom) if node.level]


def import_cycles(sources: Sources) -> list[str]:
    """A cycle of modules, if there is one."""
    modules = {path: "shardq." + path.removesuffix(".py").replace("/", ".") for path in sources}
    modules = {path: name.removesuffix(".__init__") for path, name in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules.values()}
    for path, name in imports(sources):
        target = name if name in graph else name.rpartition(".")[0]
        if target in graph and name != "shardq.__version__":  # which stands there before anything is imported
            graph[modules[path]].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"import cycle: {' -> '.join(error.args[1])}"]
    return []


def global_statements(sources: Sources) -> list[str]:
    """State shared through module variables."""
    return [f"{path}:{node.lineno}: global" for path, node in nodes(sources, ast.Global)]


def long_files(sources: Sources) -> list[str]:
    """Files that do more than one job."""
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_FILE_LINES]


def long_functions(sources: Sources) -> list[str]:
    """Functions that cannot be read at one glance."""
    return [
        f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path, node in nodes(sources, ast.FunctionDef, ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def wide_functions(sources: Sources) -> list[str]:
    """Functions that ask for more than a caller can keep apart."""
    return [
        f"{path}: {node.name} takes {num_arguments(node)} arguments"
        for path, node in nodes(sources, ast.FunctionDef, ast.AsyncFunctionDef)
        if num_arguments(node) > MAX_ARGUMENTS
    ]


def num_arguments(function: Function) -> int:
    """Named arguments of a function, but for autograd's `ctx`, which no caller gives."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg != "ctx" for argument in given)


def broad_excepts(sources: Sources) -> list[str]:
    """Handlers that swallow what nobody thought of; one that ends by raising it, or another that it causes, is none."""
    return [
        f"{path}:{node.lineno}: broad except"
        for path, node in nodes(sources, ast.ExceptHandler)
        if is_broad(node.type) and not raises_again(node)
    ]


def is_broad(caught: ast.expr | None) -> bool:
    """Whether an except clause catches everything."""
    caught_types = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))
        for kind in caught_types
    )


def raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether a handler ends in a bare `raise`, or in one `from` what it has caught."""
    last = handler.body[-1]
    if not isinstance(last, ast.Raise):
        return False
    return last.exc is None or isinstance(last.cause, ast.Name) and last.cause.id == handler.name


def missing_docstrings(sources: Sources) -> list[str]:
    """Modules, and public classes, functions and methods, that do not say what they are for.

    What a protocol's method does is said once, by the protocol: methods of its name elsewhere need not say it again. A
    method that an ancestor has, too, is for what the ancestor's says.
    """
    faults, promised = [], protocol_methods(sources)
    classes = {node.name: node for _, node in nodes(sources, ast.ClassDef)}
    for path, text in sources.items():
        tree = walked(text)[0]
        if not ast.get_docstring(tree):
            faults.append(f"{path}: no docstring")
        for scope, node in public(tree):
            inherited = {method.name for ancestor in ancestors(scope, classes) for method in ancestor.body
                         if isinstance(method, Function)}  # fmt: skip
            said = isinstance(scope, ast.ClassDef) and node.name in promised | inherited and not is_protocol(scope)
            if not said and not ast.get_docstring(node):
                faults.append(f"{path}: {node.name} has no docstring")
    return faults


def protocol_methods(sources: Sources) -> set[str]:
    """Names of the methods that the package's protocols declare."""
    protocols = (node for _, node in nodes(sources, ast.ClassDef) if is_protocol(node))
    return {method.name for protocol in protocols for method in protocol.body if isinstance(method, Function)}


def is_protocol(node: ast.ClassDef) -> bool:
    """Whether a class declares what others implement."""
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def public(scope: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.Module | ast.ClassDef, Function | ast.ClassDef]]:
    """Public definitions of a module and of its public classes, each after the scope that it stands in."""
    for node in scope.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield scope, node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def ancestors(scope: ast.Module | ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Classes of the package that a class is built on."""
    for base in getattr(scope, "bases", []):
        if isinstance(base, ast.Name) and base.id in classes:
            yield classes[base.id]
            yield from ancestors(classes[base.id], classes)


CHECKS = [upward_imports, sibling_imports, strayed_packages, strayed_privates, relative_imports, import_cycles,
          global_statements, long_files, long_functions, wide_functions, broad_excepts, missing_docstrings]  # fmt: skip


@cache
def found_now(check: Callable[[Sources], list[str]]) -> list[str]:
    """What a check finds in the package as it is."""
    return check(read_sources(PACKAGE))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_keeps_the_law(check: Callable[[Sources], list[str]]):
    assert len(read_sources(PACKAGE)) > 30, "the package was not found"
    assert found_now(check) == []


LONG_FUNCTION = "def _long():\n" + "    pass\n" * MAX_FUNCTION_LINES
WIDE_FUNCTION = "def _wide(a, b, c, d, e, /, f, g, *, h, i):\n    pass\n"
PLANTED = [
    (
        upward_imports,
        "quant/grid.py",
        "import shardq.commands.quantize",
        "quant/grid.py: imports shardq.commands.quantize",
    ),
    (upward_imports, "files.py", "from shardq.logs import Events", "files.py: imports shardq.logs.Events"),
    (upward_imports, "optimize/loss.py", "from shardq.parallel import ranks", "imports shardq.parallel.ranks"),
    (upward_imports, "extra.py", "from shardq import errors", "extra.py: imports shardq.errors"),
    (sibling_imports, "optimize/loss.py", "from shardq.cache import store", "optimize/loss.py: imports its sibling"),
    (strayed_packages, "optimize/loss.py", "import torch.distributed as dist", "optimize/loss.py: uses torch.distr"),
    (strayed_packages, "optimize/loss.py", "from torch import distributed", "optimize/loss.py: uses torch.distr"),
    (strayed_packages, "optimize/loss.py", "x = torch.distributed.ReduceOp", "optimize/loss.py: uses torch.distr"),
    (strayed_packages, "calib/tokens.py", "from transformers import AutoConfig", "uses transformers.AutoConfig"),
    (strayed_packages, "cache/store.py", "import safetensors.torch", "cache/store.py: uses safetensors.torch"),
    (strayed_packages, "commands/quantize.py", "import datasets", "commands/quantize.py: uses datasets"),
    (strayed_packages, "cli.py", "from rich.console import Console", "cli.py: uses rich.console.Console"),
    (strayed_packages, "logs.py", "import psutil", "logs.py: uses psutil"),
    (strayed_packages, "logs.py", "from torch._inductor.exc import CppCompileError", "logs.py: uses torch._inductor"),
    (strayed_packages, "commands/quantize.py", "x = torch._dynamo.reset", "commands/quantize.py: uses torch._dynamo"),
    (strayed_privates, "files.py", "import torch._utils", "files.py: uses the private torch._utils"),
    (strayed_privates, "files.py", "from torch.utils._pytree import tree_map", "uses the private torch.utils._pytree"),
    (strayed_privates, "files.py", "x = model.config._attn_implementation", "uses the private _attn_implementation"),
    (strayed_privates, "cache/store.py", "from shardq.files import _own", "uses the private shardq.files._own"),
    (relative_imports, "quant/grid.py", "from . import packing", "relative import"),
    (import_cycles, "quant/grid.py", "from shardq.quant import quantized", "shardq.quant.grid"),
    (global_statements, "files.py", "def _count():\n    global counter\n", "global"),
    (long_files, "files.py", "#\n" * MAX_FILE_LINES, "files.py: "),
    (long_functions, "files.py", LONG_FUNCTION, "_long has 61 lines"),
    (wide_functions, "files.py", WIDE_FUNCTION, "_wide takes 9 arguments"),
    (broad_excepts, "files.py", "try:\n    pass\nexcept Exception:\n    pass\n", "broad except"),
    (broad_excepts, "files.py", "try:\n    pass\nexcept (OSError, BaseException):\n    pass\n", "broad except"),
    (broad_excepts, "files.py", "try:\n    pass\nexcept:\n    pass\n", "broad except"),
    (
        broad_excepts,
        "files.py",
        "try:\n    pass\nexcept Exception as e:\n    raise TypeError from None\n",
        "broad except",
    ),
    (missing_docstrings, "files.py", "def bare():\n    pass\n", "files.py: bare has no docstring"),
    (missing_docstrings, "files.py", "class Bare:\n    pass\n", "files.py: Bare has no docstring"),
    (missing_docstrings, "files.py", 'class C:\n    """C."""\n    def bare(self): pass\n', "bare has no docstring"),
    (missing_docstrings, "extra.py", "x = 1\n", "extra.py: no docstring"),
    (
        missing_docstrings,
        "cache/store.py",
        'class P(Protocol):\n    """P."""\n    def load(self): pass\n',
        "load has no",
    ),
]


@pytest.mark.parametrize(
    ("check", "path", "fault", "report"), PLANTED, ids=[f"{row[0].__name__}-{n}" for n, row in enumerate(PLANTED)]
)
def test_planted_fault_is_found(check: Callable, path: str, fault: str, report: str):
    sources = read_sources(PACKAGE)
    sources[path] = sources.get(path, "") + "\n" + fault
    new = [found for found in check(sources) if found not in found_now(check)]
    assert len(new) == 1 and report in new[0]


@pytest.mark.parametrize(
    "handler",
    [
        "except OSError:\n    pass\n",
        "except BaseException:\n    undo()\n    raise\n",
        "except Exception as error:\n    raise TypeError from error\n",
    ],
)
def test_narrow_handler_and_clean_up_are_allowed(handler: str):
    assert broad_excepts({"files.py": f"try:\n    pass\n{handler}"}) == []


def test_protocol_says_for_all_that_implement_it():
    protocol = '"""M."""\nclass P(Protocol):\n    """P."""\n    def load(self):\n        """Read it."""\n'
    assert missing_docstrings({"files.py": protocol + 'class Disk:\n    """D."""\n    def load(self): pass\n'}) == []
