"""The package as somebody gets it who has no repository: built, checked, installed into an environment of its own, used."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import onym

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # which may lead to the repository
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


def test_wheel_and_sdist_hold_what_the_package_needs(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    assert wheel.name.startswith(f"onym-{onym.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    for file in ("onym/py.typed", "onym/format/manifest.schema.json", "onym/format/header.schema.json"):
        assert file in names
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/onym").rglob("*.py")}
    assert modules <= set(names)
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/README.md") for name in archive.getnames())
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=built)


def test_the_wheel_works_without_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    place = tmp_path / "venv/bin"
    run(place / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert "usage: onym COMMAND" in run(place / "onym", "--help", cwd=tmp_path)
    shape = ("--preset", "nano", "--n-layers", 2, "--emb-dim", 32, "--n-heads", 2, "--context-length", 32, "--vocab-size", 300)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} lamps were lit, and {n} rivers ran.\n\n" for n in range(3000)))
    options = ("--data", text, "--steps", 20, "--batch-size", 4, "--compile", "off", "--name", "first")
    environment = ("env", f"ONYM_CACHE_DIR={tmp_path / 'cache'}")
    out = run(*environment, place / "onym", "train", *options, *shape, cwd=tmp_path)
    assert "bitwise identical" in out
    assert "20" in run(place / "onym", "inspect", "runs/first", cwd=tmp_path)
    told = run(
        place / "python", "-c", "import onym; print(onym.__file__, onym.load_model('runs/first').config.n_layers)", cwd=tmp_path
    )
    assert told.startswith(str(tmp_path))
    assert told.split()[-1] == "2"
