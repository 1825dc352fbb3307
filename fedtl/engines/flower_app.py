"""The one Flower app that our nodes answer: an empty shell, for Flower runs nothing without an app.

Nothing of it is ever run: the server's side of a run is this package's own process, and so is the
client's. It is a name and a hash. Written here without Flower and without compression, its bytes
are the same on every machine, whatever its zlib.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

PROJECT = """[project]
name = "fedtl-shell"
version = "1.0.0"
description = "Marks fedtl's messages; nothing in it is run."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtl"

[tool.flwr.app.components]
serverapp = "shell:app"
clientapp = "shell:app"

[tool.flwr.app.config]
"""

MODULE = '''"""An empty shell: the work is done by fedtl's own processes; nothing of this is run."""

raise ImportError("this app is a shell; real clients are started with 'fedtl client start'")
'''


def build_app() -> bytes:
    """The app as Flower's bundle (FAB): a zip with a list of its files and their hashes."""
    files = {"pyproject.toml": PROJECT.encode(), "shell.py": MODULE.encode()}
    listed = [f"{name},{app_hash(data)},{len(data) * 8}" for name, data in files.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, data in {**files, ".info/CONTENT": "\n".join(listed).encode()}.items():
            entry = zipfile.ZipInfo(name, (2024, 10, 1, 0, 0, 0))
            entry.create_system = 3  # else it tells the system it was built on
            bundle.writestr(entry, data)
    return buffer.getvalue()


def app_hash(content: bytes) -> str:
    """SHA-256: how Flower and the join file name an app."""
    return hashlib.sha256(content).hexdigest()
