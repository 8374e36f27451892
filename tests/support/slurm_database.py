"""Accounting for the test cluster: a database in memory and slurmdbd on top. Its one account is `root`."""

import os
from collections.abc import Callable
from pathlib import Path

from slurm_config import STATE
from slurm_programs import call, listens, wait_for

SOCKET = "/run/mysqld/mysqld.sock"
TABLES = Path("/usr/share/mysql")


def start(spawn: Callable[..., object]) -> None:
    """Brings up mariadbd and slurmdbd and registers the cluster; returns when accounting answers."""
    data = STATE / "database"
    data.mkdir()
    os.mkdir("/run/mysqld")
    # Few and small buffers: a handful of jobs, gone in minutes, and a loss of power is not our concern.
    options = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=4M"]
    options += ["--innodb-buffer-pool-size=16M", "--key-buffer-size=1M", "--innodb-flush-log-at-trx-commit=0"]
    script = STATE / "database.sql"
    script.write_text(installer_script())
    call("sh", "-c", f'exec mariadbd "$@" --bootstrap <{script}', "sh", *options)
    spawn("mariadbd", "mariadbd", *options, f"--socket={SOCKET}", "--skip-networking", "--skip-name-resolve")
    wait_for("mariadbd", lambda: os.path.exists(SOCKET))
    spawn("slurmdbd", "slurmdbd", "-D")
    wait_for("slurmdbd", lambda: listens(6819))
    call("sacctmgr", "--immediate", "add", "cluster", "test")


def installer_script() -> str:
    """What mariadb-install-db would run. The server's package alone has the statements, not the program."""
    name = "mysql_system_tables"
    if not (TABLES / f"{name}.sql").exists():
        name = "mariadb_system_tables"  # since MariaDB 11
    head = "create database mysql;\nuse mysql;\nset @auth_root_socket=NULL, @skip_auth_anonymous=1;\n"
    return head + (TABLES / f"{name}.sql").read_text() + (TABLES / f"{name}_data.sql").read_text()
