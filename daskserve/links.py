"""URLs that a notebook shows as links which the user's browser can follow: pure.

A browser does not run where the kernel does. As with the link to Dask's dashboard, the
way is a template of `dask.config`; under JupyterHub it is found without.
"""

from __future__ import annotations

import html
import ipaddress
import os
from urllib.parse import SplitResult, urlsplit

import dask.config

#: With jupyter-server-proxy, which reaches the loopback of the machine that it runs on.
HUB = "{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}"


class URL(str):
    """A URL, which a notebook shows as a link."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return link(self, self)


def link(url: str, text: str) -> str:
    """Return HTML: `text` that leads to `url`, by the way that the configuration says.

    Raises
    ------
    ValueError
        ``daskserve.link`` has names that are neither variables of the environment
        nor ``scheme``, ``host`` or ``port``.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):  # a Unix socket
        return html.escape(text)
    template = dask.config.get("daskserve.link", None) or _default(parts)
    if template is not None:
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        known = {"scheme": parts.scheme, "host": host, "port": parts.port}
        try:
            start = template.format(**{**os.environ, **known})
        except (LookupError, ValueError, AttributeError, TypeError) as err:
            raise ValueError(
                f"daskserve.link: {template!r} cannot be filled in ({err!r}): it "
                "may have {scheme}, {host}, {port} and variables of the environment"
            ) from err
        query = f"?{parts.query}" if parts.query else ""
        url = f"{start.rstrip('/')}{parts.path or '/'}{query}"
    return f'<a href="{html.escape(url)}" target="_blank">{html.escape(text)}</a>'


def _default(parts: SplitResult) -> str | None:
    if "JUPYTERHUB_SERVICE_PREFIX" not in os.environ or parts.scheme != "http":
        return None
    host = parts.hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return HUB if here else None
