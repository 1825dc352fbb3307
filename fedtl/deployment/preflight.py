"""``fedtl client check``: everything a client needs, looked at before anything leaves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.data.table_files import SUFFIXES
from fedtl.deployment.certificates import WARNING_DAYS, days_left, fingerprint
from fedtl.deployment.consent import Consent
from fedtl.deployment.federation import own_facts
from fedtl.deployment.join import JoinFile, read_join
from fedtl.deployment.keys import public_of, read_private
from fedtl.deployment.knock import (
    check_approved,
    check_clock,
    check_versions,
    connect,
    knock,
    resolve,
    shake_hands,
)
from fedtl.deployment.private_data import first_look
from fedtl.doctor import Finding, writable
from fedtl.errors import EnvironmentFault, FedtlError
from fedtl.transfer.features import FeatureStore

_T = TypeVar("_T")


@dataclass
class Preflight:
    """What was looked at, in order; what could not be because of an earlier problem is not there.

    Attributes:
        classes: examples by class, where the data could be read.
    """

    findings: list[Finding] = field(default_factory=list)
    errors: list[FedtlError] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)

    def look(self, what: str, call: Callable[[], _T], show: Callable[[_T], str]) -> _T | None:
        """Note how a call ends; its result, None where it raised."""
        try:
            found = call()
        except FedtlError as error:
            self.errors.append(error)
            detail = type(error)(
                error.what, where=error.where, got=error.got, allowed=error.allowed
            ).line()
            self.findings.append(Finding(what, False, detail, error.do or ""))
            return None
        self.findings.append(Finding(what, True, show(found)))
        return found

    def verdict(self) -> FedtlError | None:
        """One error for everything that is not well, of the gravest kind; None where all is."""
        if not self.errors:
            return None
        gravest = max(self.errors, key=lambda error: error.exit_code)
        broken = [finding.what for finding in self.findings if not finding.ok]
        return type(gravest)(f"not ready: {', '.join(broken)}", do="See the lines above")


def examine_client(
    join_path: Path,
    key_path: Path,
    data: Path,
    *,
    insecure_permissions: bool = False,
    consent: Consent | None = None,
) -> Preflight:
    """Look at everything that a client needs. No image and no label is sent anywhere.

    Args:
        key_path: of the private key; its stem is the client's name.
        data: folder or zip, .npz, .csv or .parquet.
        consent: what of it may be read; default whatever a scenario names.
    """
    flight = Preflight()
    join = flight.look("join file", lambda: read_join(join_path), _shown_join)
    key = flight.look(
        "key",
        lambda: read_private(key_path, insecure_permissions=insecure_permissions),
        lambda found: f"{key_path.name}, {public_of(found).fingerprint}",
    )
    if join is not None:
        _server(flight, join, key, key_path.stem)
    own = consent or Consent()
    seen = flight.look("data", lambda: first_look(data, own), lambda seen: seen[0])
    flight.classes = {} if seen is None else seen[1]
    if seen is not None and (own != Consent() or data.suffix.lower() in SUFFIXES):
        flight.look("consent", lambda: own.check(data), str)
    flight.findings.append(disk := writable("disk", FeatureStore().root))
    if not disk.ok:
        flight.errors.append(EnvironmentFault(disk.detail))
    return flight


def _server(
    flight: Preflight, join: JoinFile, key: ec.EllipticCurvePrivateKey | None, name: str
) -> None:
    """The way to the server, one step after the other."""
    if flight.look("name", lambda: resolve(join), str) is None:
        return
    if flight.look("connection", lambda: _connected(join), str):
        trusted = flight.look("certificate", lambda: _certificate(join), _shown_certificate)
        if trusted is None or key is None:
            return
        hello = flight.look("server", lambda: knock(join, key), lambda _: "answers")
        if hello is None:
            return
        flight.look("clock", lambda: check_clock(hello), str)
        flight.look("versions", lambda: check_versions(join, hello.facts, own_facts()), str)
        shown = public_of(key).fingerprint
        if hello.reason != "clock":  # told above
            flight.look("approval", lambda: check_approved(hello, name, shown), str)


def _connected(join: JoinFile) -> str:
    connect(join).close()
    return join.address


def _certificate(join: JoinFile) -> x509.Certificate:
    secure, certificate = shake_hands(join)
    secure.close()
    return certificate


def _shown_join(join: JoinFile) -> str:
    return f"{join.address}, authority {fingerprint(join.certificate())}"


def _shown_certificate(certificate: x509.Certificate) -> str:
    left = days_left(certificate)
    text = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"
    if left > WARNING_DAYS:
        return text
    return f"{text}: only {left:.0f} days; ask the server's people to renew it"
