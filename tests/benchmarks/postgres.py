"""A PostgreSQL server for one test, in a folder of its own and reached by a socket there."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


def pg_ctl() -> str:
    """Debian has the server's programs in a folder a version, which is not in PATH."""
    folders = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which("pg_ctl", path=os.pathsep.join(folders))
    return found or pytest.skip("there is no PostgreSQL server (Debian, Ubuntu: apt install postgresql)")


def unprivileged() -> dict[str, Any]:
    """Whom root runs the server as, which refuses to be run by root."""
    return {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database. The test is skipped where the server or the driver is missing."""
    pytest.importorskip("psycopg", reason="there is no driver for PostgreSQL (the extra test has it)")
    program, as_user = pg_ctl(), unprivileged()
    with TemporaryDirectory(prefix="postgres-") as folder:  # tmp_path lies in a folder that only root may enter
        if as_user:
            shutil.chown(folder, as_user["user"], as_user["group"])

        def control(*arguments: str) -> None:
            command = [program, "--silent", "--pgdata", f"{folder}/data", *arguments]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60, **as_user)

        control("initdb", "--options", "--auth=trust --username=study --locale=C --encoding=UTF8 --no-sync")
        control("start", "--log", f"{folder}/log", "--options", f"-k {folder} -c listen_addresses= -c fsync=off")
        try:
            yield f"postgresql+psycopg://study@/postgres?host={folder}"
        finally:
            control("stop", "--mode", "immediate")
