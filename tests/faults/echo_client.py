"""A client whose node echoes; run by tests as ``python echo_client.py JOIN KEY [else-seconds]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedtl.deployment import client
from fedtl.deployment.join import read_join
from fedtl.deployment.keys import read_private
from fedtl.errors import FedtlError
from fedtl.interrupts import Interrupts


class Echo:
    """Gives back what it is sent; ``sleep N`` takes N seconds."""

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        if content.startswith(b"sleep "):
            print("busy", flush=True)
            time.sleep(float(content[6:]))
        return kind.encode() + b" " + content + b" " + signature


def main(join: Path, key: Path) -> int:
    try:
        setting = client.Client(
            key.stem,
            read_join(join),
            read_private(key),
            key,
            key.parent,
            lambda line: print(line, flush=True),
        )
        with Interrupts() as interrupts:
            client.serve_node(setting, Echo(), interrupts)
    except FedtlError as error:
        print(error.line(), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 3:
        client.SOMEBODY_ELSE_SECONDS = float(sys.argv[3])
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
