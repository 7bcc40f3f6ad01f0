"""Access to the server: with a key, if it has one, and not from pages of other web sites.

A web page can send requests to every server that its reader's browser reaches, one on 127.0.0.1 included. The browser
states where the page is from in ``Origin`` (Fetch standard, section 3.1). A page whose name was made to resolve to this
machine (DNS rebinding) has the same origin as the server, but its name is in ``Host``. An address cannot be rebound, so
requests to any address are answered, and those to names that are the server's own.
"""

from __future__ import annotations

import hmac
import os
import re
import socket
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from mlx_gpt.errors import UsageError
from mlx_gpt.serve.access import Access
from mlx_gpt.serve.fields import APIError, shown

KEY_VARIABLE = "MLX_GPT_API_KEY"
LOOPBACK = "localhost"
ANY = "*"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?")
ORIGIN = re.compile(r"(([a-z][a-z0-9+.-]*)://([!-.0-9:;=A-Z\[\]_a-z~]+))/?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Guard:
    """Refuses requests by ``access`` to a server that listens on ``host``. Raises ``UsageError`` for invalid flags."""

    def __init__(self, access: Access, host: str):
        self.key = _checked_key(access.api_key)
        self.origins = [_checked_origin(origin) for origin in access.cors]
        machine = socket.gethostname().lower()
        own = [LOOPBACK, host, machine, machine.partition(".")[0] + ".local"]
        self.hosts = {host_name(name) for name in own} | {_checked_host(name) for name in access.allow_host}

    def check_site(self, headers: Headers) -> None:
        """Refuse a request to another host's name, or from a web page of another host, with 403."""
        hosts = [host_name(host) for host in headers.getlist("host")]
        for name in hosts:
            if not (name and (is_address(name) or name in self.hosts)) and ANY not in self.hosts:
                message = f"the host {shown(headers['host'])} is not this server; --allow-host NAME allows another name"
                raise APIError(403, message, code="host_not_allowed")
        for origin in headers.getlist("origin"):
            found = ORIGIN.fullmatch(origin)
            if not ((found and host_name(found[3]) in hosts) or origin in self.origins or ANY in self.origins):
                message = f"pages of {shown(origin)} may not use this server; --cors ORIGIN allows an origin"
                raise APIError(403, message, code="origin_not_allowed")

    def check_key(self, scope: Scope) -> None:
        """Refuse a request without the key, if there is one, with 401."""
        if self.key is None or scope["path"] == "/health":
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode()):
            message = "the request needs this server's key, in the header Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def host_name(host: str) -> str | None:
    """Return the name in a ``Host`` header or of a flag, without port; ``localhost`` for all names of loopback."""
    found = HOST.fullmatch(host.lower())
    name = found[1].strip("[]").rstrip(".") if found else host.lower() if is_address(host) else None
    if name and (name.endswith("." + LOOPBACK) or (is_address(name) and ip_address(name).is_loopback)):
        return LOOPBACK
    return name


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _checked_key(flag: str | None) -> str | None:
    """Return the key of the flag or of the environment; no message shows it."""
    source, key = ("--api-key", flag) if flag is not None else (KEY_VARIABLE, os.environ.get(KEY_VARIABLE))
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UsageError(f"{source} must be one or more characters of ASCII, without spaces")
    return key


def _checked_origin(text: str) -> str:
    """Return an origin as browsers write it: in lower case, without a default port or a path."""
    if text in (ANY, "null"):  # null: pages of files
        return text
    if not (found := ORIGIN.fullmatch(text.lower())):
        raise UsageError(
            f"--cors must be * or an origin such as https://example.org or http://localhost:3000, not {text!r}"
        )
    return found[1].removesuffix(DEFAULT_PORTS.get(found[2], ":"))


def _checked_host(text: str) -> str:
    name = ANY if text == ANY else host_name(text)
    if name is None:
        raise UsageError(f"--allow-host must be * or a name such as gpt.example.org, not {text!r}")
    return name
