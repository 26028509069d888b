"""What a release is: sdist and wheel, their contents, versions that agree; no network."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string

import pytest
import yaml
from child import ENVIRONMENT, ROOT
from PIL import Image

import agentsd

pytest.importorskip("build")


def run(*command: object, cwd, **environment: str) -> str:
    command = (sys.executable, *map(str, command))
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with an sdist and the wheel that is made from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "agentsd", source / "agentsd", ignore=shutil.ignore_patterns("__pycache__"))
    # They are no part of it, and must not get into the wheel.
    for name in ("apps", "eval", "examples", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.npz"))
    run("-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


def test_both_hold_the_whole_package_and_the_wheel_nothing_else(built, wheel):
    package = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "agentsd").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and (file.suffix != ".md" or "demo_model" in file.parts)
    }
    assert {"agentsd/py.typed", "agentsd/demo_model/unet/diffusion_pytorch_model.safetensors"} < package
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"agentsd-{agentsd.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == package
    assert f"{info}licenses/LICENSE" in names
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_an_index_would_take_them(built):
    pytest.importorskip("twine")
    out = run("-m", "twine", "check", "--strict", *built.iterdir(), cwd=built, NO_COLOR="1", COLUMNS="200")
    assert out.count("PASSED") == 2


def test_metadata_says_version_licence_and_addresses(wheel):
    info = f"agentsd-{agentsd.__version__}.dist-info/METADATA"
    metadata = message_from_string(zipfile.ZipFile(wheel).read(info).decode())
    assert metadata["Version"] == agentsd.__version__ and metadata["License-Expression"] == "MIT"
    assert "Typing :: Typed" in metadata.get_all("Classifier") and len(metadata.get_all("Project-URL")) >= 2
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_installed_wheel_runs_the_command_of_the_readme(wheel, tmp_path):
    """With the demo model of the wheel, in an empty folder; smaller and in fewer steps."""
    place, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel, cwd=folder)
    block = re.search(r"```bash\n(pip install -e \. .*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    command = shlex.split(block.replace("\\\n", " ").partition("&&")[2])
    assert command[:2] == ["agentsd", "generate"] and "--compare" in command
    small = ["--height", "64", "--width", "64", "--steps", "2", "--rounds", "1"]
    where = {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run(place / "bin" / "agentsd", *command[1:], *small, cwd=folder, **where)
    assert Image.open(folder / command[command.index("-o") + 1]).width >= 3 * 64
    assert run("-c", "import agentsd; print(agentsd.__file__)", cwd=folder, **where).startswith(str(place))


def test_versions_agree():
    newest = re.search(r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert newest[1] == citation["version"] == agentsd.__version__
    assert newest[2] == str(citation["date-released"])


def test_the_public_ci_runs_what_ours_does():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    (job,) = jobs.values()
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.versions }}"
    assert [row["versions"] for row in job["strategy"]["matrix"]["include"]] == ["oldest", "newest"]
    assert '"$versions" = oldest' in script
    oldest = job["strategy"]["matrix"]["include"][0]["python"]
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text("utf-8")
