"""The package is what pyproject.toml says, and costs nothing to import."""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
# Folders whose package has another name.
FOLDERS = {"pytorch": "torch"}
NO_PACKAGES = {"tests", "benchmarks", "docs", "build", "dist"}


def test_every_folder_with_an_init_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"sparsec"}
    for init in ROOT.glob("[!.]*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[0] not in NO_PACKAGES:
            found.add(".".join(("sparsec", FOLDERS.get(parts[0], parts[0]), *parts[1:])))
    assert sorted(listed) == sorted(found)


def test_the_links_for_tools_are_the_package() -> None:
    """`.typing/sparsec` looks like the installed package."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    links = {link.name: link.resolve() for link in (ROOT / ".typing" / "sparsec").iterdir()}
    back = {name: folder for folder, name in FOLDERS.items()}
    names = {name.split(".")[1] for name in listed if "." in name} | {"__init__.py", "py.typed"}
    assert links == {name: ROOT.resolve() / back.get(name, name) for name in names}


def test_the_root_holds_one_module_only() -> None:
    """Any other would land in the wheel."""
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_importing_is_cheap() -> None:
    code = "import sys, sparsec; print([m for m in ('tvm', 'numpy', 'onnx', 'onnxruntime') if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / ".typing", capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import sparsec

    for name in sparsec.__all__:
        assert getattr(sparsec, name) is not None
