"""Requirements of pyproject.toml, one a line: to build, to run, and of the extras.

    python .ci/requirements.py            print them, for pip install -r
    python .ci/requirements.py --check    install nothing; say what this environment lacks

pip has no option to install only the dependencies, and installing the package would compile it in a temporary folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from typing import Any


def load_pyproject() -> dict[str, Any]:
    """pyproject.toml. Python 3.10 has no tomllib; pip and setuptools each carry a copy."""
    for name in ("tomllib", "tomli", "pip._vendor.tomli", "setuptools._vendor.tomli"):
        try:
            toml = importlib.import_module(name)
        except ImportError:
            continue
        text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        data: dict[str, Any] = toml.loads(text)
        return data
    raise SystemExit("missing: tomli, to read pyproject.toml with Python 3.10")


def name_of(requirement: str) -> str:
    """The name before extras, version and marker."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml: not a requirement: {requirement!r}")
    return match.group()


def absent(requirements: list[str]) -> str:
    """The requirements of which this environment has no version at all."""
    names = set()
    for requirement in requirements:
        name = name_of(requirement)
        # A marker may exclude the requirement; ninja may be a program instead of a package.
        if ";" in requirement or shutil.which(name):
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            names.add(name)
    return ", ".join(sorted(names))


def main() -> None:
    """Print, or with --check compare with what is installed."""
    pyproject = load_pyproject()
    project = pyproject["project"]
    needed = [*pyproject["build-system"]["requires"], *project.get("dependencies", [])]
    extras = project["optional-dependencies"].values()
    # The extra dev names the others, whose requirements are all here.
    optional = [each for extra in extras for each in extra if name_of(each) != project["name"]]
    if sys.argv[1:] != ["--check"]:
        print("\n".join(dict.fromkeys(needed + optional)))
        return
    if names := absent(needed):
        raise SystemExit(f"missing: {names} (nothing is downloaded with SYSTEM_SITE=1)")
    if names := absent(optional):
        print(f"not here, and nothing is downloaded with SYSTEM_SITE=1: {names}")


if __name__ == "__main__":
    main()
