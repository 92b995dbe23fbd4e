"""Compiling functions: what cannot be compiled still runs, and says so."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from shardq.compiling import COMPILER_FILES, compiler, eager, is_long, why_not

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(why_not(CPU) is not None, reason=f"there is {why_not(CPU)}")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    counters.clear()


def scaled(values, factor):
    """A function that can be compiled."""
    return values.sin() * factor + 1


def reads_a_value(values, factor):
    """A function whose path depends on a value that is known only when it runs."""
    if values.sum().item() > 0:
        return values * factor
    return values - factor


def prints(values, factor):
    """A function that does what no kernel can."""
    print("called")
    return values * factor


def graphs() -> int:
    """Number of graphs that dynamo has made since the test began."""
    return counters["stats"]["unique_graphs"]


class TestEager:
    @pytest.mark.parametrize("varying", [True, False])
    def test_function_stays_what_it_is(self, varying: bool):
        assert eager(scaled, varying) is scaled


@needs_compiler
class TestCompiler:
    def test_compiled_function_gives_what_the_plain_one_gives(self):
        said = []
        compiled = compiler(CPU, said.append)(scaled, False)
        values = torch.randn(7, 5, requires_grad=True)
        torch.testing.assert_close(compiled(values, 3.0), scaled(values, 3.0))
        [gradient] = torch.autograd.grad(compiled(values, 3.0).sum(), values)
        torch.testing.assert_close(gradient, 3 * values.cos())
        assert said == [] and graphs() == 1

    def test_varying_sizes_are_compiled_once(self):
        compiled = compiler(CPU, lambda text: None)(scaled, True)
        for size in (5, 6, 7, 8, 9):
            values = torch.randn(size, 3)
            torch.testing.assert_close(compiled(values, 2.0), scaled(values, 2.0))
        assert graphs() == 1

    def test_on_a_gpu_each_size_has_code_of_its_own(self):
        compiled = compiler(torch.device("cuda"), lambda text: None)(scaled, True)
        for size in (5, 6, 7, 5):
            compiled(torch.randn(size, 3), 2.0)  # the device is only what sizes are treated by
        assert graphs() == 3

    @pytest.mark.parametrize("function", [reads_a_value, prints], ids=lambda function: function.__name__)
    def test_function_that_cannot_be_compiled_whole_runs_as_it_is_and_says_so_once(self, function):
        said = []
        compiled = compiler(CPU, said.append)(function, False)
        for values in (torch.ones(3), -torch.ones(3), torch.ones(4)):
            assert torch.equal(compiled(values, 2.0), function(values, 2.0))
        assert len(said) == 1 and "\n" not in said[0]
        assert said[0].startswith(f"{function.__name__} cannot be compiled (") and "uncompiled" in said[0]

    def test_one_function_that_cannot_be_compiled_does_not_stop_another(self):
        said = []
        compile_it = compiler(CPU, said.append)
        broken, fine = compile_it(prints, False), compile_it(scaled, False)
        broken(torch.ones(3), 2.0)
        fine(torch.ones(3), 2.0)
        assert graphs() == 1 and len(said) == 1

    def test_error_of_the_function_itself_is_raised(self):
        said = []
        with pytest.raises(RuntimeError):
            compiler(CPU, said.append)(torch.mm, False)(torch.ones(2, 3), torch.ones(2, 3))


class TestWhyNot:
    @needs_compiler
    def test_nothing_is_wrong_where_there_is_a_compiler(self):
        assert why_not(CPU) is None

    @pytest.mark.parametrize("compiler_path", ["/nonexistent/g++"])
    def test_missing_compiler_is_named(self, compiler_path: str, tmp_path: Path):
        """In a process of its own: torch looks for the compiler once."""
        command = "import torch; from shardq.compiling import why_not; print(why_not(torch.device('cpu')))"
        environment = os.environ | {"CXX": compiler_path, "PATH": str(tmp_path)}
        child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
        assert "no C++ compiler" in child.stdout and "g++" in child.stdout, child.stderr

    @pytest.mark.parametrize("works", [True, False])
    def test_gpu_needs_triton(self, monkeypatch: pytest.MonkeyPatch, works: bool):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: works)
        reason = why_not(torch.device("cuda"))
        assert reason is None if works else "triton" in reason


UNWRITABLE = "/proc/no-home"  # also by root


class TestWhereCompiledCodeStays:
    @pytest.fixture(autouse=True)
    def _nothing_said(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """No folder is given, and a temporary one is this test's."""
        for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()

    @pytest.mark.parametrize(
        "environment, folder",
        [
            ({"HOME": "{}"}, "{}/.cache/shardq/compiled"),
            ({"HOME": UNWRITABLE, "XDG_CACHE_HOME": "{}/xdg"}, "{}/xdg/shardq/compiled"),
            ({"HOME": "{}", "TORCHINDUCTOR_CACHE_DIR": "{}/given"}, "{}/given"),
        ],
        ids=["home", "cache of the user", "given"],
    )
    def test_it_stays_where_it_is_wanted(self, monkeypatch, tmp_path, environment, folder):
        said = []
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(tmp_path))
        compiler(CPU, said.append)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == folder.format(tmp_path) and said == []

    @pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"])
    def test_it_goes_to_a_temporary_folder_where_that_cannot_be_written_which_is_said(
        self, monkeypatch, tmp_path, variable
    ):
        said = []
        monkeypatch.setenv(variable, UNWRITABLE)
        compiler(CPU, said.append)
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert folder == str(tmp_path / "temporary" / f"shardq-{os.getuid()}" / "compiled")
        [line] = said
        assert line.startswith(UNWRITABLE) and line.endswith(f" cannot hold compiled code, which goes to {folder}")

    def test_it_goes_to_a_temporary_folder_where_the_disk_lets_no_code_run(self, monkeypatch, tmp_path):
        (tmp_path / "given").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "noexec", "none", tmp_path / "given"]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted")
        try:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "given"))
            compiler(CPU, [].append)
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "temporary"))
        finally:
            subprocess.run(["umount", tmp_path / "given"], check=True)

    def test_nothing_is_compiled_where_there_is_no_folder_at_all(self, monkeypatch):
        said = []
        monkeypatch.setenv("HOME", UNWRITABLE)
        monkeypatch.setattr(tempfile, "tempdir", UNWRITABLE)
        assert compiler(CPU, said.append)(scaled, True) is scaled
        assert said == [why_not(CPU)] and said[0].startswith("no folder for compiled code")

    @needs_compiler
    def test_compiled_code_of_a_command_lies_there(self, tmp_path: Path):
        """In a process of its own: what a command imports has torch choose a folder by itself."""
        program = (
            "import torch, shardq.cli; from shardq.compiling import compiler; "
            "compiler(torch.device('cpu'), print)(lambda x: x + 1, False)(torch.ones(3))"
        )
        environment = os.environ | {"HOME": str(tmp_path)}
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert child.returncode == 0, child.stderr
        assert list((tmp_path / ".cache" / "shardq" / "compiled").rglob("*.so"))


def test_torch_compiles_in_the_files_that_tell_so():
    """A thread in one of them compiles; were they renamed, it would be taken for one that hangs."""
    installed = Path(torch.__file__).parents[1]
    assert all((installed / name.removeprefix("/")).is_file() for name in COMPILER_FILES)


@pytest.mark.parametrize("num_tokens, expected", [(100, False), (2000, True)])
def test_a_loop_over_many_tokens_is_too_long_to_compile(num_tokens: int, expected: bool):
    tokens_TD = torch.empty(num_tokens, 4, device="meta")
    assert is_long(lambda: [token_D * 2 for token_D in tokens_TD.unbind()]) is expected
