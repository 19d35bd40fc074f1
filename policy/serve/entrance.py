"""Where a planner server listens and who may come in, checked before a model is loaded: ValueError and OSError say what to do."""
import asyncio
import contextlib
import errno
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

TOKEN_LENGTH = 16  # characters at least
MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe())'"


class Entrance:
    """host, port: where to listen; port 0 is any free one.   token: what clients must know.   tls: files of certificate and key.   insecure: other computers
    may come without TLS, through a tunnel.   ValueError, OSError when that cannot be, or would let strangers in.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, token: str | None = None, tls: tuple[str, str] | None = None, insecure: bool = False):
        if type(port) is not int or not 0 <= port <= 65535:
            raise ValueError(f"port={port} must be a whole number from 0 to 65535; 0 is any free one")
        check_exposure(host, token, tls is not None, insecure)
        self.host, self.port, self.token = host, port, token
        self.tls = None if tls is None else tls_context(*tls)

    def check_free(self) -> None:
        """OSError when nothing can listen there: what the server would find out once its model is loaded."""
        async def bind() -> None:
            (await asyncio.get_running_loop().create_server(asyncio.Protocol, self.host, self.port, start_serving=False)).close()

        with self.told():
            asyncio.run(bind())

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What goes wrong inside, where host and port are listened on, in words: OSError."""
        host, port = self.host, self.port
        try:
            yield
        except (socket.gaierror, UnicodeError) as e:
            raise OSError(f"host={host} is no name or address that this computer knows: use 127.0.0.1, or 0.0.0.0 for all of its own") from e
        except OSError as e:
            why = {errno.EADDRINUSE: f"port {port} of {host} is taken: choose another with port=…, or 0 for any free one",
                   errno.EADDRNOTAVAIL: f"host={host} is not an address of this computer: use 127.0.0.1, or 0.0.0.0 for all of its own",
                   errno.EACCES: f"port {port} is for the system's own services: choose one from 1024 on with port=…"}.get(e.errno or 0)
            if not why:
                raise
            raise OSError(why) from e


def check_exposure(host: str, token: str | None, tls: bool, insecure: bool) -> None:
    """ValueError when other computers could reach the planner without a token, or could read along."""
    if token is not None and (len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError(f"a token has at least {TOKEN_LENGTH} ASCII characters and no spaces. Make one: {MAKE_TOKEN}")
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if near:
        return
    if token is None:
        raise ValueError(f"host={host} lets other computers in, so clients need a token: put one in DIPOLE_TOKEN or token_file=…, or use host=127.0.0.1")
    if not tls and not insecure:
        raise ValueError(f"host={host} lets other computers in, and without TLS they read along: give tls.cert=… tls.key=…; "
                         "or say insecure=true where a tunnel (ssh, WireGuard) encrypts")


def tls_context(cert: str, key: str) -> ssl.SSLContext:
    """FileNotFoundError, ValueError name the file that is missing, unreadable or no PEM."""
    for name, path, what in (("cert", cert, b"-----BEGIN CERTIFICATE-----"), ("key", key, b"PRIVATE KEY-----")):
        if not Path(path).is_file():
            raise FileNotFoundError(f"tls.{name}={path} is no file")
        if what not in Path(path).read_bytes():
            raise ValueError(f"tls.{name}={path} is no PEM file of a {'certificate' if name == 'cert' else 'private key'}: it has no line with {what.decode()}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # or OpenSSL asks in the terminal
    except (ssl.SSLError, OSError) as e:
        other = getattr(e, "reason", None) == "KEY_VALUES_MISMATCH"
        why = "the key is another certificate's" if other else "one of them is damaged, or the key has a password"
        raise ValueError(f"tls.cert={cert} and tls.key={key} cannot be used: {why} ({e})") from e
    return context
