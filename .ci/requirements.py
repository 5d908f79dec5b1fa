"""Requirements of pyproject.toml, one a line: to build, to run, and of the extras named.

    python .ci/requirements.py dev            print them, for pip install -r
    python .ci/requirements.py --check dev    install nothing; say what this environment lacks

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


def distribution(requirement: str) -> str:
    """The name before extras, version and marker, normalised: Torch >= 2 is torch."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml: not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def extra(project: dict[str, Any], name: str) -> list[str]:
    """The requirements of one extra; bnext[test] in it is replaced by the requirements of that extra."""
    requirements: list[str] = []
    for requirement in project["optional-dependencies"][name]:
        if distribution(requirement) != distribution(project["name"]):
            requirements.append(requirement)
            continue
        inner = re.search(r"\[(.*?)\]", requirement)
        for part in inner.group(1).split(",") if inner else ():
            requirements += extra(project, part.strip())
    return requirements


def absent(requirements: list[str]) -> list[str]:
    """The requirements of which this environment has no version at all."""
    names = []
    for requirement in requirements:
        name = distribution(requirement)
        # A marker may exclude the requirement; ninja may be a program instead of a package.
        if ";" in requirement or shutil.which(name):
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            names.append(name)
    return sorted(set(names))


def main(arguments: list[str]) -> None:
    """Print, or with --check compare with what is installed."""
    check = "--check" in arguments
    extras = [argument for argument in arguments if argument != "--check"]
    pyproject = load_pyproject()
    project = pyproject["project"]
    needed = [*pyproject["build-system"]["requires"], *project.get("dependencies", [])]
    optional = [requirement for name in extras for requirement in extra(project, name)]
    if not check:
        print("\n".join(dict.fromkeys(needed + optional)))
        return
    if names := absent(needed):
        raise SystemExit(f"missing: {', '.join(names)} (nothing is downloaded with SYSTEM_SITE=1)")
    if names := absent(optional):
        print(f"not here, and nothing is downloaded with SYSTEM_SITE=1: {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
