"""What goes with a run beside what git knows: files by pattern, and modules that lie elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from trainer.config.job import Job, Snapshot
from trainer.config.user_code import import_paths
from trainer.errors import JobError
from trainer.launch import elsewhere
from trainer.launch.patterns import chosen
from trainer.launch.snapshot import take_snapshot
from trainer.records import write_json
from trainer.run.folder import RunFolder
from trainer.run.tree_hash import tree_hash


def write(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that ignores what it generates; where one submits from."""
    folder = tmp_path / "source"
    write(folder, "training.py", "src/flow/__init__.py", "build/tables.py", "build/deep/more.py", "data.bin", ".env")
    write(folder, ".gitignore", text="build/\n*.bin\n.env\n")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    monkeypatch.chdir(folder)
    return folder


def snapshot(source: Path, run: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Path:
    (run / "plan").mkdir(parents=True)
    return take_snapshot(source, RunFolder(run), Job(snapshot=Snapshot([*include], [*exclude])))


def names(code: Path) -> list[str]:
    return sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file())


NAMES = ("a.py", "lib/a.py", "lib/deep/b.txt", "lib/[x].py", "build/lib/c.py", "lib/build.py")


@pytest.mark.parametrize(("pattern", "expected"), [
    ("a.py", [0, 1]), ("/a.py", [0]), ("lib/a.py", [1]), ("*.py", [0, 1, 3, 4, 5]), ("/*.py", [0]),
    ("lib", [1, 2, 3, 4, 5]), ("lib/", [1, 2, 3, 4, 5]), ("/lib/", [1, 2, 3, 5]), ("lib/**/b.txt", [2]),
    ("**/b.txt", [2]), ("lib/**", [1, 2, 3, 5]), ("build/*/c.?y", [4]), ("[ab].py", [0, 1]), ("[!a].py", [4]),
    (r"\[x\].py", [3]), ("./a.py", [0]), ("deep/b.txt", []), ("build", [4]),
])  # fmt: skip
def test_patterns_are_those_of_git(tmp_path: Path, pattern: str, expected: list[int]) -> None:
    if not expected:
        with pytest.raises(JobError, match=r"snapshot\.exclude=.*: matches none of the files"):
            chosen("snapshot.exclude", pattern, NAMES)
    else:
        assert chosen("snapshot.exclude", pattern, NAMES) == {NAMES[index] for index in expected}
    write(tmp_path, *NAMES)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    argv = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude", re.sub(r"^\./", "/", pattern)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    listed = done.stdout.split("\0")[:-1]
    assert sorted(listed) == sorted(NAMES[index] for index in expected), "git says so, too"


def test_more_files_and_fewer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = snapshot(source, tmp_path / "run", ("build/**", "*.bin", ".env"), ("more.py", "/training.py"))
    assert names(code) == [".gitignore", "build/tables.py", "data.bin", "src/flow/__init__.py"]
    assert ".env. If the code needs one" in capsys.readouterr().err, "a secret stays here, whatever is said"
    said = json.loads((tmp_path / "run/plan/code.json").read_text())
    assert said["sha256"] == tree_hash(code)


def test_without_git_patterns_bring_data_along(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write(source, "weights.pt")
    assert "data.bin" in names(snapshot(source, tmp_path / "run", ("*.bin",)))
    assert "weights.pt is not copied" in capsys.readouterr().err
    snapshot(source, tmp_path / "run-2", ("*.bin", "*.pt"))
    assert "snapshot.include" not in capsys.readouterr().err


@pytest.mark.parametrize(("include", "exclude", "problem"), [
    (("nothing*",), (), r"snapshot\.include='nothing\*': matches no file"),
    ((), ("build/",), r"snapshot\.exclude='build/': matches none"),
    (("!a",), (), "is not a pattern"), (("../a",), (), "is not a pattern"),
    ((), ("/",), "is not a pattern"),
])  # fmt: skip
def test_a_pattern_for_nothing(
    source: Path, tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(JobError, match=problem):
        snapshot(source, tmp_path / "run", include, exclude)


def finder(folder: Path, module: str, path: Path) -> None:
    """A finder as packages with a layout of their own get one when they are installed editable."""
    write(folder, f"editable_of_{module}.py", text=f"""
import importlib.util, sys
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == {module!r}:
            return importlib.util.spec_from_file_location(name, {str(path / "__init__.py")!r})
""")  # fmt: skip


def test_modules_from_elsewhere_go_along(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a path, by a finder, in the repository, as a file, as a package without __init__; and what those import."""
    library = tmp_path / "library"
    write(library, "stems/__init__.py", text="import leaves\nfrom . import cells\n")
    write(library, "stems/cells.py", "leaves.py", "space/part/__init__.py", "unused.py", "stems/.env")
    write(library, "compiled/__init__.py", "compiled/fast.so", "src/flow/old.py", "stems/weights.pt")
    for part in range(elsewhere.LIMIT_MB + 1):
        write(library, f"large/part{part}.py", text="#" * (1 << 20))
    write(source, "libs/roots/lib/roots/__init__.py", text="DEEP = 1\n")
    write(tmp_path / "other", "place/__init__.py")
    finder(tmp_path / "finders", "placed", tmp_path / "other/place")
    for folder in (library, library / "src", source / "libs/roots/lib", tmp_path / "finders"):
        monkeypatch.syspath_prepend(folder)
    import editable_of_placed  # type: ignore[import-not-found]

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, editable_of_placed.Finder])
    imports = "import stems.cells as s, space.part\nfrom roots import DEEP\ntry:\n    import compiled, large, nowhere\n"
    write(source, "training.py", text=imports + "except ImportError: pass\nimport json, torch, flow, muster, placed\n")
    code = snapshot(source, tmp_path / "run")
    packages = code / ".muster/packages"
    assert names(packages) == ["leaves.py", "placed/__init__.py", "space/part/__init__.py", "stems/__init__.py",
                               "stems/cells.py"]  # fmt: skip
    assert os.readlink(packages / "roots") == "../../libs/roots/lib/roots"
    said = capsys.readouterr().err
    for name in ("compiled", "large"):
        assert f"the module {name}, which your code imports from {library / name}, is not copied, because" in said
    assert f"weights.pt is not copied for the nodes: {library}/stems is not in git" in said
    assert "unused" not in said and said.count("goes along as a copy") == 5
    write_json(tmp_path / "run/plan/source.json", {"working_directory": str(source), "job_folder": str(source)})
    assert import_paths(RunFolder(tmp_path / "run").job) == [code, code / "src", packages]


def test_a_copy_knows_its_version_by_whatever_name_it_was_installed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pip install -e` leaves it there, with setuptools: the names of the modules beside that of the package."""
    info = tmp_path / "installed/stem_tools-1.2.dist-info"
    write(info, "METADATA", text="Metadata-Version: 2.1\nName: stem-tools\nVersion: 1.2\n")
    write(info, "top_level.txt", text="stems\n")
    write(tmp_path / "library", "stems/__init__.py", "leaves.py")
    for folder in (tmp_path / "installed", tmp_path / "library"):
        monkeypatch.syspath_prepend(folder)
    write(source, "training.py", text="x = 1; import stems\ntry: import leaves\nexcept ImportError: pass\n")
    packages = snapshot(source, tmp_path / "run") / ".muster/packages"
    assert names(packages) == ["leaves.py", "stem_tools-1.2.dist-info/METADATA", "stems/__init__.py"]
    (found,) = importlib.metadata.distributions(name="stem-tools", path=[str(packages)])
    assert found.version == "1.2"


def test_copies_are_read_once_for_all_that_they_import(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each name again: with hundreds of files that took minutes."""
    write(source, "training.py", text="import stems\n")
    write(tmp_path / "library", "stems/__init__.py", text="".join(f"import nowhere{n}\n" for n in range(50)))
    monkeypatch.syspath_prepend(tmp_path / "library")
    read, imports = [], elsewhere._imports
    monkeypatch.setattr(elsewhere, "_imports", lambda folder: read.append(folder) or imports(folder))
    assert names(snapshot(source, tmp_path / "run") / ".muster/packages") == ["stems/__init__.py"]
    assert len(read) == 2


def test_what_is_installed_stays_there() -> None:
    import yaml

    for module in (json, yaml, pytest):
        assert elsewhere._is_installed(Path(module.__file__ or ""))
    assert not elsewhere._is_installed(Path(sysconfig.get_path("purelib")).parents[3] / "src/x.py")
