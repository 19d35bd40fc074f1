"""A folder behind a URL, as a plain web server and as an S3 one, that can be slow, refuse, break off and be away."""
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape


class ObjectServer:
    """with ObjectServer(root) as server: server.web/…, or s3://bucket/… for root/bucket/… with server.environment.

    latency [s] before every answer.   fault(method, path): None, "cut" (half of the body, then the connection ends), "hang", or an HTTP status.
    lists: whether folders have an index page.   requests: (method, path) of all that came.
    """

    def __init__(self, root: Path, *, latency: float = 0.0, lists: bool = True, page: int = 7):
        self.root, self.latency, self.lists, self.page = root, latency, lists, page
        self.fault: Callable[[str, str], str | int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize, disable_nagle_algorithm = -1, True  # otherwise each answer waits 40 ms for an acknowledgement

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self, "GET")

            def do_HEAD(self):
                outer.answer(self, "HEAD")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.web = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"AWS_ENDPOINT_URL": self.web, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}

    def __enter__(self) -> "ObjectServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        self.requests.append((method, path))
        time.sleep(self.latency)
        fault = self.fault(method, path)
        if fault == "hang":
            time.sleep(30)
        if isinstance(fault, int):
            return self._send(handler, method, fault, b"<Error><Code>AccessDenied</Code></Error>" if fault == 403 else b"")
        if "list-type" in query and (self.root / path.strip("/")).is_dir():
            return self._send(handler, method, 200, self._listing(path.strip("/"), query))
        file = self.root / path.lstrip("/")
        if file.is_dir() and self.lists and path.endswith("/"):
            page = "".join(f'<li><a href="{quote(p.name)}{"/" * p.is_dir()}">{p.name}</a></li>' for p in sorted(file.iterdir()))
            return self._send(handler, method, 200, f"<ul><a href='../'>..</a>{page}</ul>".encode())
        if not file.is_file():
            return self._send(handler, method, 404, b"<Error><Code>NoSuchKey</Code></Error>")
        data, status, headers = file.read_bytes(), 200, {"Last-Modified": "Thu, 26 Nov 2026 10:00:00 GMT", "ETag": f'"{file.stat().st_mtime_ns}"'}
        if span := handler.headers.get("Range"):
            lo, _, hi = span.removeprefix("bytes=").partition("-")
            a, b = int(lo), min(int(hi) if hi else len(data) - 1, len(data) - 1)
            headers["Content-Range"], status = f"bytes {a}-{b}/{len(data)}", 206
            data = data[a:b + 1]
        self._send(handler, method, status, data, headers, cut=fault == "cut")

    def _send(self, handler: BaseHTTPRequestHandler, method: str, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        handler.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if method == "GET":
            handler.wfile.write(body[:len(body) // 2] if cut else body)
        handler.wfile.flush()
        if cut:
            handler.close_connection = True

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """ListObjectsV2, a few keys a page."""
        prefix, at = query.get("prefix", [""])[0], int(query.get("continuation-token", ["0"])[0])
        folder = self.root / bucket
        keys = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        found = [k for k in keys if k.startswith(prefix)]
        here, more = found[at:at + self.page], at + self.page < len(found)
        rows = "".join(f"<Contents><Key>{escape(k)}</Key><Size>{(folder / k).stat().st_size}</Size><LastModified>2026-11-26T10:00:00.000Z</LastModified>"
                       "<ETag>\"x\"</ETag><StorageClass>STANDARD</StorageClass></Contents>" for k in here)
        token = f"<NextContinuationToken>{at + self.page}</NextContinuationToken>" if more else ""
        return (f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(here)}</KeyCount>'
                f"<MaxKeys>{self.page}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{rows}{token}</ListBucketResult>").encode()
