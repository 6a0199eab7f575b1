"""Names: the tables, "package.module:attribute", and how objects are named."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.errors import JobError
from hpctrain.job import registry

NAMES = [(kind, name) for kind, table in registry.TABLES.items() for name in table]


class Outer:
    class Inner:
        pass


def module_function() -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; modules imported from it and its entry in sys.path are removed afterwards."""
    before = dict(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p) != tmp_path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(kind: str, name: str) -> str:
    with pytest.raises(JobError) as caught:
        registry.resolve(kind, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_registered_name_exists(kind: str, name: str) -> None:
    if name == "Muon":
        pytest.importorskip("torch.optim._muon", reason="Muon came with torch 2.9")
    assert callable(registry.resolve(kind, name))


def test_torchs_optimizers_are_known_with_their_learning_rates() -> None:
    import torch

    for name, thing in vars(torch.optim).items():
        if isinstance(thing, type) and thing is not torch.optim.Optimizer:
            assert name in registry.OPTIMIZERS or name in registry.REFUSED_OPTIMIZERS, name
            if name in registry.LEARNING_RATES and name != "SGD":
                assert inspect.signature(thing).parameters["lr"].default == registry.LEARNING_RATES[name], name


def test_unknown_names_get_a_suggestion_and_the_list() -> None:
    assert refusal("model", "lenet") == (
        'model "lenet": unknown model (did you mean lenet5?); use one of mlp, lenet5, resnet18, convnet, '
        'transformer, vgg16, captioner, detector, or "package.module:attribute"'
    )
    assert "did you mean" not in refusal("model", "rnn")
    assert "(did you mean Adam?)" in refusal("optimizer", "adam")
    assert "not of the form" in refusal("loss", "a:b:c")
    assert "not of the form" in refusal("loss", "a b:c")
    assert "was an object of the program" in refusal("model", "<lambda in train.py:12>")
    assert "\\x1b" in refusal("model", "\x1b[31m\n")
    assert len(refusal("model", "x" * 10_000)) < 400


@pytest.mark.parametrize("name", ["LBFGS", "torch.optim:LBFGS", "torch.optim.lbfgs:LBFGS", "SparseAdam"])
def test_optimizers_that_cannot_work_are_refused_with_the_reason(name: str) -> None:
    assert "cannot be used: it" in refusal("optimizer", name)


def test_path_is_followed_into_classes() -> None:
    assert registry.resolve("model", f"{__name__}:Outer.Inner") is Outer.Inner


def test_current_directory_is_appended_to_sys_path(folder: Path) -> None:
    Path("own_net.py").write_text("def net():\n    import own_neighbour\n    return own_neighbour.VALUE\n")
    Path("own_neighbour.py").write_text("VALUE = 5\n")
    before = list(sys.path)
    assert registry.resolve("model", "own_net:net")() == 5
    assert sys.path == [*before, str(folder)]
    registry.resolve("model", "own_net:net")
    assert sys.path == [*before, str(folder)]


def test_sys_path_is_restored_after_other_imports_and_failures(folder: Path) -> None:
    before = list(sys.path)
    assert registry.resolve("loss", "json:dumps")
    refusal("model", "no_such_module_here:f")
    assert sys.path == before


def test_missing_modules_and_attributes_are_refused(folder: Path) -> None:
    Path("own_models.py").write_text("def small_net(): pass\n")
    text = refusal("model", "own_model:net")
    assert text.startswith('model "own_model:net": there is no module own_model, neither in ') and str(folder) in text
    assert "there is no module own_models.deeper" in refusal("model", "own_models.deeper:net")
    assert refusal("model", "own_models:smal_net") == (
        'model "own_models:smal_net": own_models has no smal_net (did you mean small_net?)'
    )


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1 / 0", "failed at own_broken.py:1: ZeroDivisionError: division by zero"),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise RuntimeError", "RuntimeError: no message"),
    ],
)
def test_module_that_raises_on_import(folder: Path, code: str, sentence: str) -> None:
    Path("own_broken.py").write_text(code + "\n")
    text = refusal("strategy", "own_broken:Mine")
    assert text.startswith('strategy "own_broken:Mine": importing own_broken failed') and sentence in text


def test_removed_current_directory_gives_no_traceback(folder: Path) -> None:
    gone = folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert "there is no module" in refusal("model", "no_such_module_here:f")


def test_names_of_objects_resolve_to_the_objects() -> None:
    import torch

    for kind, thing, name in [
        ("optimizer", torch.optim.Adam, "Adam"),
        ("loss", torch.nn.functional.mse_loss, "mse"),
        ("model", Outer.Inner, f"{__name__}:Outer.Inner"),
        ("model", module_function, f"{__name__}:module_function"),
    ]:
        assert registry.describe(kind, thing) == name
        assert registry.resolve(kind, name) is thing


def test_objects_that_cannot_be_imported_are_described_by_location() -> None:
    def local() -> None:
        pass

    @functools.wraps(module_function)
    def wrapped() -> None:  # claims to be module_function, but is not
        pass

    line = local.__code__.co_firstlineno
    assert registry.describe("model", local) == f"<local in test_registry.py:{line}>"
    assert registry.describe("model", lambda: 0).startswith("<lambda in test_registry.py:")
    assert registry.describe("model", wrapped).startswith("<module_function in test_registry.py:")
    assert registry.describe("model", Outer()).startswith("<Outer object in test_registry.py:")
    assert registry.describe("dataset", (Outer(), None)) == "<tuple of Outer, NoneType>"
    assert registry.describe("loss", functools.partial(max)).startswith("<partial object")
    for thing in (local, lambda: 0, Outer(), (1, 2)):
        assert "was an object" in refusal("model", registry.describe("model", thing))


def test_objects_of_the_main_program_are_not_importable(tmp_path: Path) -> None:
    script = tmp_path / "train_me.py"
    script.write_text("from hpctrain.job import registry\nclass Net: pass\nprint(registry.describe('model', Net))\n")
    where = dict(os.environ, PYTHONPATH=str(Path(registry.__file__).parents[1]))
    for command in ([str(script)], ["-m", "train_me"]):
        out = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60, env=where, cwd=tmp_path
        )
        assert out.stdout.strip() == "<Net in train_me.py:2>", out.stderr


def test_reading_a_job_imports_neither_torch_nor_mpi_nor_hdf5() -> None:
    code = (
        "import sys\nfrom hpctrain.job import Job\nfrom hpctrain.job.explain import explain\n"
        "Job(model='lenet5', optimizer='Adam', strategy='parameter_server').dump(); explain()\n"
        "print([m for m in ('torch', 'mpi4py', 'h5py', 'pandas', 'sklearn') if m in sys.modules])"
    )
    where = dict(os.environ, PYTHONPATH=str(Path(registry.__file__).parents[1]))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=where)
    assert out.stdout.strip() == "[]", out.stderr
