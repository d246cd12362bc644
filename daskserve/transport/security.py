"""The cluster's TLS, in whatever role this process has."""

from __future__ import annotations

from distributed.security import Security


def client_security(security: Security, role: str) -> Security:
    """Return a `Security` with which a client can connect in another role's process.

    A scheduler or worker that was started from the command line has the certificate of
    its own role only; it serves as a client's as well.

    Parameters
    ----------
    security
        The process's own.
    role
        ``"scheduler"`` or ``"worker"``.
    """
    tls = security.get_tls_config_for_role(role)
    own = security.get_tls_config_for_role("client")
    if own.get("cert") is not None or tls.get("cert") is None:
        return security
    return Security(
        require_encryption=security.require_encryption,
        tls_ca_file=tls["ca_file"],
        tls_client_cert=tls["cert"],
        tls_client_key=tls["key"],
        tls_ciphers=tls["ciphers"],
    )
