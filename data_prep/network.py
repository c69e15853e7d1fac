"""Whether there is a network: without one, downloads try for minutes, then fail."""

import socket
import urllib.request

HOSTS = ("storage.googleapis.com", "github.com")  # data sets come from these, mostly


def require() -> None:
    """Raise at once where there is neither a proxy nor a name server.

    Raises:
        OSError: if so.
    """
    if urllib.request.getproxies():
        return
    for host in HOSTS:
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            continue
        return
    raise OSError(f"there is no network: {' and '.join(HOSTS)} are not found")
