"""Accounting for the test cluster: a database in memory and slurmdbd on top. The one account in it is `root`."""

import os
from pathlib import Path

from slurm_config import STATE

SOCKET = "/run/mysqld/mysqld.sock"
TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")


def start(spawn, call, wait_for, listens) -> None:
    """Brings up mariadbd and slurmdbd and registers the cluster; returns when accounting answers."""
    data = STATE / "database"
    data.mkdir()
    os.mkdir("/run/mysqld")
    # Few and small buffers: a handful of jobs, gone in minutes, and a loss of power is not our concern.
    options = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=4M"]
    options += ["--innodb-buffer-pool-size=16M", "--key-buffer-size=1M", "--innodb-flush-log-at-trx-commit=0"]
    names = TABLES if TABLES.exists() else TABLES.with_name("mariadb_system_tables.sql")
    script = STATE / "database.sql"
    script.write_text(
        # The server alone brings no installer; these statements are what the installer would feed it.
        "create database mysql;\nuse mysql;\nset @auth_root_socket=NULL, @skip_auth_anonymous=1;\n"
        + names.read_text()
        + names.with_name(names.stem + "_data.sql").read_text()
    )
    call("sh", "-c", f'exec mariadbd "$@" --bootstrap <{script}', "sh", *options)
    spawn("mariadbd", "mariadbd", *options, f"--socket={SOCKET}", "--skip-networking", "--skip-name-resolve")
    wait_for("mariadbd", lambda: os.path.exists(SOCKET))
    spawn("slurmdbd", "slurmdbd", "-D")
    wait_for("slurmdbd", lambda: listens(6819))
    call("sacctmgr", "--immediate", "add", "cluster", "test")
