"""Build wheel and sdist, install them outside the clone on every Python that is at hand, and run the demo there.

python scripts/check_dist.py [DIRECTORY]   # DIRECTORY gets the wheel and the sdist; default: dist
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13")


def run(*line: object, cwd: Path) -> str:
    """Run a command; its output, or an end with what it said."""
    done = subprocess.run([*map(str, line)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, line))}\n{done.stdout}{done.stderr}")
    return done.stdout


def interpreters() -> dict[str, str]:
    """The Pythons at hand, by version: this one, those on the path, and those of pyenv."""
    found = {"{}.{}".format(*sys.version_info[:2]): sys.executable}
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        places = [shutil.which(f"python{version}"), *map(str, sorted(kept.glob(f"{version}.*/bin/python")))]
        for place in filter(None, places):
            asked = [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            said = subprocess.run(asked, capture_output=True, text=True, check=False)
            if said.returncode == 0 and said.stdout.strip() == version:
                found.setdefault(version, place)
    return {version: found[version] for version in VERSIONS if version in found}


def check(package: Path, python: str, version: str, folder: Path) -> None:
    """Install a package, and do with it what the README says, in a directory that has nothing of the clone."""
    folder.mkdir()
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "venv", "--quiet", "--python", python, folder / "venv", cwd=folder)
    there = folder / "venv" / "bin"
    run(*uv, "pip", "install", "--quiet", "--python", there / "python", package, cwd=folder)
    assert run(there / "tokenmill", "--version", cwd=folder).split()[-1] == version
    run(there / "tokenmill", "demo", "demo", cwd=folder)
    run(there / "tokenmill", "consolidate", "demo/tokens", cwd=folder)
    run(there / "tokenmill", "verify", "demo/tokens", cwd=folder)


def main() -> None:
    """Build, and check each package on each Python."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", out, REPOSITORY, cwd=REPOSITORY)
    (version,) = re.findall(r'^__version__ = "(.*)"$', (REPOSITORY / "src/tokenmill/__init__.py").read_text(), re.M)
    packages = sorted(out.iterdir())
    assert [package.name for package in packages] == [
        f"tokenmill-{version}-py3-none-any.whl",
        f"tokenmill-{version}.tar.gz",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for python_version, python in interpreters().items():
            for package in packages if python_version == VERSIONS[0] else packages[:1]:
                check(package, python, version, Path(scratch, f"{python_version}-{package.suffix}"))
                print(f"Python {python_version}: {package.name}: the demo runs and verifies")


if __name__ == "__main__":
    main()
