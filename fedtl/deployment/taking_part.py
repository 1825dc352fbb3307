"""``fedtl client start``: this machine's data take part, and the user sees what leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from fedtl import machine
from fedtl.build import resolve_device
from fedtl.deployment.audit import AuditLog, verify
from fedtl.deployment.certificates import fingerprint
from fedtl.deployment.client import Client, serve_node
from fedtl.deployment.consent import Consent
from fedtl.deployment.host import PrivateHost
from fedtl.deployment.join import JoinFile, read_join
from fedtl.deployment.keys import PRIVATE, check_name, public_of, read_private
from fedtl.deployment.pledge import check_demands
from fedtl.deployment.private_data import first_look
from fedtl.engines.node import MASKED, Node, Sent
from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.scenario import schema
from fedtl.terminal import shown, size

AUDIT = ".audit.jsonl"
OWN = ".personal"
"""After a client's name: the folder of what it keeps from round to round."""

LEAVES = """\
What leaves this machine, to {address} only:
  - the names of your classes and domain, how many examples there are, how many cannot be used or
    are there twice, and a keyed fingerprint of them
  - this machine's processor, free disk space and versions, and how long the features took
  - in each round what is told when this client joins, as a rule the update of the head that was
    trained here: averages over your examples, which can still tell something about them; what
    is done against that (noise, masks, or nothing) is told then, too, and less is refused
  - how often the head is right on your own test examples, class by class, and its loss; no noise
    is added to that
  - what went wrong, where something did, without names or values
No image, feature, label, file name or path leaves. Every answer is written to
{audit} before it goes; 'fedtl client audit' sums it up.
What comes in is data: no code of the server's is run here. Requests must be signed by the key in
the join file. This client trusts whoever holds that key and the authority
{authority}."""


def take_part(
    join_path: Path,
    name: str,
    data: Path,
    folder: Path,
    device: str,
    console: Any,
    interrupts: Interrupts,
    *,
    insecure_permissions: bool = False,
    demands: Sequence[str] = (),
    consent: Consent | None = None,
) -> None:
    """Answer the server's requests with the data at ``data`` until interrupted.

    Args:
        demands: without which this client takes no part, see ``pledge.DEMANDS``.
        consent: what of the data may be read; default whatever a scenario names.
        folder: holds ``<name>.key``; gets the audit log and the SuperNode's log.
        console: prints for the user.

    Raises:
        FedtlError: as reading the join file, the key and the data does, and ``serve_node``.
    """
    demands = check_demands(demands)
    join = read_join(join_path)
    key_path = folder / (check_name(name) + PRIVATE)
    key = read_private(key_path, insecure_permissions=insecure_permissions)
    device = _device(device)
    consent = consent or Consent()
    seen, _ = first_look(data, consent)
    agreed = consent.check(data)
    audit_path = folder / (name + AUDIT)

    def tell(line: str) -> None:
        console.print(shown(line), highlight=False, soft_wrap=True)

    with closing(AuditLog(audit_path, **_facts(join, name))) as log:
        tell(f"{name}  {public_of(key).fingerprint}")
        tell(seen)
        if agreed:
            tell(f"consent: {agreed}")
        authority = fingerprint(join.certificate())
        tell_all = LEAVES.format(address=join.address, audit=audit_path, authority=authority)
        for line in tell_all.splitlines():
            tell(line)
        if log.torn:
            tell("the last line of the audit log was torn by a crash; that is noted in it")

        own = folder / (name + OWN)
        with closing(
            PrivateHost(
                name,
                data,
                device=device,
                tell=tell,
                keeps=own,
                demands=demands,
                consent=consent,
            )
        ) as host:
            node = Node(
                host,
                threads=machine.allowed_cores(),
                device=device,
                public_key=join.signing_key,
                name=name,
                audit=partial(_audit, log, tell),
            )
            try:
                serve_node(Client(name, join, key, key_path, folder, tell), node, interrupts)
            finally:
                log.note("closed")
                tell(f"the audit log's last hash is {verify(audit_path).head}")


def _audit(log: AuditLog, tell: Callable[[str], None], sent: Sent) -> None:
    """An answer is in the log, and its user hears of it, before it leaves."""
    log.sent(sent)
    if sent.facts.get("ready") is False:  # how far the features are, again and again
        return
    shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in sent.shapes.items())
    where = f"round {sent.round}, {sent.kind}" if sent.round else sent.kind
    where += ", under masks" if sent.facts.get(MASKED) else ""
    tell(f"{where}: {size(sent.num_bytes)} leave{': ' if shapes else ''}{shapes}")


def _facts(join: JoinFile, name: str) -> dict[str, str]:
    authority = fingerprint(join.certificate())
    return {"client": name, "server": join.address, "authority": authority}


def _device(wanted: str) -> str:
    """ "cpu" or "cuda" for what the user typed."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError("no such device", where="--device", got=wanted, allowed="auto, cpu, cuda")
    engine = schema.Engine.model_validate({"device": wanted})
    return resolve_device(schema.Scenario(name="client", engine=engine))
