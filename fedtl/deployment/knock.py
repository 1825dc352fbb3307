"""One look at the server's door, step by step, so that each thing that can be wrong is named.

A knock resolves the name, connects, shakes hands under TLS with the join file's authority alone and
asks whether a key is approved. It sends the key's public half and a signed time, nothing else, and
changes nothing at the server.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.deployment.certificates import days_left, fingerprint, names_of
from fedtl.deployment.join import JoinFile
from fedtl.deployment.keys import public_of
from fedtl.deployment.terms import refuse_other_version
from fedtl.errors import EnvironmentFault, FedtlError, SecurityRefusal, printable

HELLO = "/fedtl/hello"
TIMEOUT_SECONDS = 10.0
CLOCK_SECONDS = 60.0
"""By which clocks may differ; Flower refuses signatures that are 5 s early or 5 min late."""

_EXPIRED, _NOT_YET, _HOST, _ADDRESS = 10, 9, 62, 64  # OpenSSL's verification codes


@dataclass(frozen=True)
class Hello:
    """What the server says.

    Attributes:
        reason: why the key is not let in; "" where it is.
        online: a node with this key is connected already.
        node: Flower's id of the node with this key, 0 where unknown.
        facts: the server's versions and protocol.
        clock_seconds: by which the server's clock is ahead of ours.
    """

    reason: str
    online: bool
    node: int
    facts: Mapping[str, Any]
    clock_seconds: float


def resolve(join: JoinFile) -> str:
    """The server's IP addresses. Raises EnvironmentFault where its name is not known."""
    try:
        found = socket.getaddrinfo(join.host, join.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EnvironmentFault(
            "this name cannot be resolved",
            where=join.host,
            got=getattr(error, "strerror", None) or str(error),
            do="Ask your network's people, or for a join file with an IP address",
        ) from error
    return ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(join: JoinFile, timeout: float = TIMEOUT_SECONDS) -> socket.socket:
    """A TCP connection to the server. Raises EnvironmentFault where nobody listens."""
    try:
        return socket.create_connection((join.host, join.port), timeout)
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        raise EnvironmentFault(
            "nobody listens there" if refused else "the server cannot be reached",
            where=join.address,
            got=None if refused else error.strerror or str(error),
            do="Ask whether 'fedtl server run' is running and the firewall lets this port through",
        ) from error


def shake_hands(
    join: JoinFile, timeout: float = TIMEOUT_SECONDS
) -> tuple[ssl.SSLSocket, x509.Certificate]:
    """A TLS connection to the server and its certificate.

    Raises:
        EnvironmentFault: nobody listens, or not under TLS.
        SecurityRefusal: the certificate has expired, is another authority's, or for other names.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # believes no authority by itself
    context.load_verify_locations(cadata=join.authority.decode("ascii"))
    plain = connect(join, timeout)
    try:
        secure = context.wrap_socket(plain, server_hostname=join.host)
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise _distrust(join, error, timeout) from error
    except (OSError, ValueError) as error:
        plain.close()
        raise _no_tls(join, error) from error
    der = secure.getpeercert(binary_form=True)
    assert der is not None
    return secure, x509.load_der_x509_certificate(der)


def knock(
    join: JoinFile, key: ec.EllipticCurvePrivateKey, timeout: float = TIMEOUT_SECONDS
) -> Hello:
    """Ask the server whether this key is approved.

    Raises:
        EnvironmentFault: the server cannot be reached, is starting, or is no server of fedtl.
        SecurityRefusal: its certificate is not to be trusted.
    """
    secure, _ = shake_hands(join, timeout)
    with closing(HTTPConnection(join.host, join.port)) as connection:
        connection.sock = secure
        stamp = datetime.now(UTC).isoformat()
        signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {
            "flwr-public-key": base64.b64encode(public_of(key).pem).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }
        try:
            connection.request("GET", HELLO, headers=headers)
            response = connection.getresponse()
            content = json.loads(response.read(2**16))
            date = parsedate_to_datetime(response.headers["date"])
        except (OSError, HTTPException, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _stranger(join) from error
    if response.status == 503:
        raise EnvironmentFault("the server is starting", where=join.address, do="Try again")
    if response.status not in (200, 401) or not isinstance(content, dict):
        raise _stranger(join)
    node = content.get("node", 0)
    # The header has whole seconds, so its half second is the best guess.
    ahead = (date - datetime.fromisoformat(stamp)).total_seconds() + 0.5
    return Hello(
        printable(str(content.get("reason", "")))[:100],
        content.get("online") is True,
        node if type(node) is int else 0,
        content,
        ahead,
    )


def check_clock(hello: Hello) -> str:
    """The difference of the clocks. Raises EnvironmentFault where it is too large."""
    ahead = hello.clock_seconds
    if abs(ahead) > CLOCK_SECONDS:
        raise EnvironmentFault(
            f"the clock differs by {abs(ahead):.0f} s from the server's",
            got="it is slow" if ahead > 0 else "it is fast",
            allowed=f"{CLOCK_SECONDS:.0f} s",
            do="Sync this machine with NTP",
        )
    return f"differs by {abs(ahead):.0f} s"


def check_versions(join: JoinFile, facts: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Both sides' versions. Raises EnvironmentFault where they cannot work together."""
    refuse_other_version(facts, f"the server {join.address}", "this client")
    if facts.get("protocol") != own["protocol"]:
        raise EnvironmentFault(
            "server and client speak different protocols",
            where=join.address,
            got=f"protocol {printable(str(facts.get('protocol')))[:20]}",
            allowed=own["protocol"],
            do=f"Type 'pip install --upgrade fedtl' at the older one; here is {own['fedtl']}",
        )
    return f"server fedtl {printable(str(facts['fedtl']))}, here {own['fedtl']}"


def check_approved(hello: Hello, name: str, key: str) -> str:
    """That the key is let in.

    Args:
        key: its fingerprint.

    Raises:
        SecurityRefusal: it is not; says what to type at the server.
    """
    if hello.reason == "clock":
        check_clock(hello)
    if hello.reason:
        known = hello.reason == "key"
        raise SecurityRefusal(
            "the server does not know this key" if known else "the server refuses this key",
            got=key if known else f"{key}: {hello.reason}",
            do=f"Send {name}.pub to whoever runs the server: 'fedtl server approve {name}.pub'",
        )
    return f"{key} is approved"


def _distrust(join: JoinFile, error: ssl.SSLCertVerificationError, timeout: float) -> FedtlError:
    """Why the server's certificate is not believed, with what it says itself."""
    shown = _certificate(join, timeout)
    if error.verify_code in (_EXPIRED, _NOT_YET) and shown is not None:
        late = error.verify_code == _EXPIRED
        when = shown.not_valid_after_utc if late else shown.not_valid_before_utc
        return SecurityRefusal(
            f"the server's certificate {'expired on' if late else 'is valid only from'} "
            f"{when:%Y-%m-%d}",
            where=join.address,
            got=f"{abs(days_left(shown)):.0f} days ago" if late else None,
            do="Whoever runs the server types 'fedtl server init --renew'"
            if late
            else "Sync this machine's clock with NTP",
        )
    if error.verify_code in (_HOST, _ADDRESS) and shown is not None:
        return SecurityRefusal(
            "the server's certificate is for other names",
            where=join.address,
            got=", ".join(map(printable, names_of(shown))) or "no name",
            allowed=join.host,
            do=f"Whoever runs the server types 'fedtl server init --renew --name {join.host}'",
        )
    issuer = "unknown" if shown is None else printable(shown.issuer.rfc4514_string())
    return SecurityRefusal(
        "the server's certificate is not signed by the authority of this join file",
        where=join.address,
        got=f"signed by {issuer}",
        allowed=f"{join.certificate().subject.rfc4514_string()} "
        f"({fingerprint(join.certificate())})",
        do="Get the federation's current join.toml; if it is current, somebody stands in between",
    )


def _certificate(join: JoinFile, timeout: float) -> x509.Certificate | None:
    """What the server shows, believed or not: only to name what is wrong with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with connect(join, timeout) as plain, context.wrap_socket(plain) as secure:
            der = secure.getpeercert(binary_form=True)
        return None if der is None else x509.load_der_x509_certificate(der)
    except (OSError, ValueError, FedtlError):
        return None


def _no_tls(join: JoinFile, error: Exception) -> FedtlError:
    reason = getattr(error, "reason", None) or str(error)
    plain = "WRONG_VERSION_NUMBER" in str(reason) or "RECORD_LAYER" in str(reason)
    return EnvironmentFault(
        "what listens there does not speak TLS" if plain else "the TLS handshake failed",
        where=join.address,
        got=printable(str(reason))[:100],
        do="A federation's server always speaks TLS: check address and port, and whether a proxy "
        "stands in between",
    )


def _stranger(join: JoinFile) -> FedtlError:
    return EnvironmentFault(
        "this server does not answer as one of fedtl does",
        where=join.address,
        do="Check the address and port in the join file",
    )
