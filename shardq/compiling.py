"""Fused kernels from plain functions: `torch.compile` where a compiler is present, the function itself where not.

The only module that uses torch's private compiler packages, `_dynamo`, `_inductor` and `_triton`, and counts operations
with its private `_python_dispatch`; checked with torch 2.13. The functions that need them import them: that takes
seconds and 150 MB.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import TypeVar

import torch

from shardq.files import can_be_written, temporary_folder

Function = TypeVar("Function", bound=Callable)
Compile = Callable[[Function, bool], Function]
"""Takes a function and whether its sizes vary; gives the function to call in its place."""

RECOMPILE_LIMIT = 64
MOST_OPERATIONS = 1000  # a decoder block has 100 to 500 where it has no loop over tokens
COMPILER_FILES = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/compile_fx.py")
"""Files in which a thread stands while it compiles."""


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here; None if it can."""
    if _kernel_folder() is None:
        return f"no folder for compiled code: neither {_wanted_folder()} nor a temporary one can hold it"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "no working triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler (install g++ or clang)"
    return None


def _wanted_folder() -> Path:
    """The folder that keeps compiled kernels for later processes: the environment's, or one in the user's cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # If torch's compiler is imported first, it writes its own choice, a temporary folder, into the environment.
    if given is not None and given != default_cache_dir():
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shardq", "compiled")


def _kernel_folder() -> Path | None:
    """The wanted folder, or a temporary one if it cannot be written or code cannot run from it, or None."""
    wanted = _wanted_folder()  # not absolute where the system has no home folder
    if wanted.is_absolute() and can_be_written(wanted) and _code_can_run(wanted):
        return wanted
    folder = temporary_folder("compiled")
    return folder if folder and _code_can_run(folder) else None


def _code_can_run(folder: Path) -> bool:
    return not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)


def is_long(work: Callable[[], object]) -> bool:
    """Whether some work on the meta device is of so many operations that it takes too long to compile.

    Each operation in a loop over tokens is compiled by itself: 3400 took 2 minutes (measured, forward and backward).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
            self.count += 1
            if self.count > MOST_OPERATIONS:
                raise _TooMany
            return operation(*args, **(kwargs or {}))

    try:
        with Counter(), torch.no_grad():
            work()
    except _TooMany:
        return True
    return False


class _TooMany(BaseException):
    """Ends a count; a BaseException, so that no handler of the counted code catches it."""


def eager(function: Function, varying: bool) -> Function:
    """Leave a function as it is."""
    return function


def uncompiled_copy(function: Function) -> Function:
    """A copy of a function that shares no compiled code with it.

    Torch reuses compiled code for arguments that look alike, even if their modules have other hooks.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, argdefs=function.__defaults__)


def compiler(device: torch.device, say: Callable[[str], None]) -> Compile:
    """A compiler of whole functions, without graph breaks, for a device.

    Where sizes vary, a CPU uses one kernel for all sizes, which is as fast and compiled once; a GPU one for each size,
    which is up to 17 times as fast (measured: the gradient of groups of 128). A function that cannot be compiled whole
    runs uncompiled, and `say` gets a line once; it also gets a line if the wanted folder cannot be used.
    """
    folder = _kernel_folder()
    if folder is None:
        say(why_not(device))
        return eager
    if folder != _wanted_folder():
        say(f"{_wanted_folder()} cannot hold compiled code, which goes to {folder}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config
    from torch._inductor.exc import CppCompileError

    # Set for the whole process: torch.compile of torch 2.11 takes no such argument.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    if config.cpp.vec_isa_ok is None:
        # The processor reports its instruction sets. Torch would also test whether its headers compile for them, in
        # four tests of 2 s each; a compiler that knows their C++20 compiles them.
        config.cpp.vec_isa_ok = True

    def compiled(function: Function, varying: bool) -> Function:
        shares_code = varying and device.type == "cpu"
        chosen = [torch.compile(function, fullgraph=True, dynamic=shares_code)]

        def call(*args):
            try:
                return chosen[-1](*args)
            except (TorchDynamoException, CppCompileError) as error:
                if len(chosen) > 1:
                    raise
                reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                say(f"{function.__name__} cannot be compiled ({reason}); it runs uncompiled, which is slower")
                chosen.append(function)
                return function(*args)

        return call

    return compiled
