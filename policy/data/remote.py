"""Datasets behind a URL, read only: s3://, gs://, az://, http(s):// through obstore, any other scheme through fsspec (memory://, sftp://, hf://, …).

Files are listed once when the dataset is opened, so lost ones are told from zeros as they are in a folder; a web server that cannot list is asked for each
file. Credentials are those of the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL for other
S3 servers, AWS_SKIP_SIGNATURE=true for public buckets; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME …), or of ~/.aws where boto3 is installed.
DIPOLE_REMOTE_TIMEOUT (s, 20) bounds one request; one that fails for a reason that may pass is made again, TRIES times in all.
"""
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from policy.data.places import DataError, keys_among

T = TypeVar("T")
TRIES = 5
PAUSE = 0.2  # s before the second try, twice as long before each further one
INDEX, MOST = 4096, 2**14  # bytes at a file's end that are remembered, and of how many files
OBSTORE = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https")
INSTALL = "pip install 'dipole[data]'"
KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for a server of your own, AWS_SKIP_SIGNATURE=true for a public bucket)",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"}


class Absent(Exception):
    """There is no such file."""


class Refused(Exception):
    """The server knows who asks, or that nobody is named, and says no: asking again is of no use."""


class Whole(Exception):
    """The server sends files only whole: asking again is of no use."""


class Backend(Protocol):
    def list(self) -> dict[str, int] | None:
        """{file below the URL: bytes}, {"": bytes} when the URL is a file itself; None where the server cannot list."""
        ...

    def size(self, name: str) -> int: ...

    def get(self, name: str, lo: int, hi: int) -> bytes: ...


class Remote:
    """The files below a URL (policy.data.places.Place); is_file: the URL is one itself, a .zip.   DataError says what the server said and what to do."""

    def __init__(self, url: str):
        self.url, self.scheme = url, urlsplit(url).scheme
        self._backend: Backend = self._try("", lambda: (_Obstore if self.scheme in OBSTORE else _Fsspec)(url))
        self._asked: dict[str, int] = {}
        self.ends: dict[tuple[str, int, int], bytes] = {}  # indices of shards, which are asked for again and again
        self.is_file = urlsplit(url).path.lower().endswith(".zip")
        try:
            self.sizes: dict[str, int] | None = None if self.is_file else self._try("", self._backend.list)
        except FileNotFoundError:  # no such bucket
            self.sizes = {}
        if self.sizes is not None and not self.sizes:
            raise DataError(f"{url} does not exist: nothing lies under it. Check the URL, bucket and prefix included")

    def size(self, name: str) -> int:
        if self.sizes is not None:
            return self.sizes.get(name, 0)
        if name not in self._asked:
            try:
                self._asked[name] = self._try(name, lambda: self._backend.size(name))
            except FileNotFoundError:
                self._asked[name] = 0
        return self._asked[name]

    def open(self, name: str) -> "_File":
        if not (size := self.size(name)):
            what = DataError(f"{self._of(name)} does not exist (404). Check the URL") if not name else FileNotFoundError(self._of(name))
            raise what
        return _File(self, name, size)

    def read(self, name: str, lo: int, hi: int) -> bytes:
        def get() -> bytes:
            data = self._backend.get(name, lo, hi)
            if len(data) != hi - lo:
                raise ConnectionError(f"{len(data)} of {hi - lo} bytes came")
            return data
        return self._try(name, get) if hi > lo else b""

    def data_keys(self, meta: str) -> list[str]:
        if self.sizes is not None:
            return keys_among(self.sizes, meta)
        for name in (".zmetadata", "zarr.json"):  # names only: shapes in there may be those of before the last episodes
            if size := self.size(name):
                said = json.loads(self.read(name, 0, size))
                listed = said.get("metadata") or (said.get("consolidated_metadata") or {}).get("metadata") or {}
                if keys := sorted({part[1] for path in listed if len(part := path.split("/")) > 1 and part[0] == "data" and part[1]}):
                    return keys
        page = self._try("", lambda: _page(f"{self.url}/data/")) if self.scheme.startswith("http") else ""
        if keys := [k for k in sorted(set(map(unquote, re.findall(r"""href=["'](?:\./)?([^."'/?#][^"'/?#]*)/["']""", page)))) if self.size(f"data/{k}/{meta}")]:
            return keys
        raise DataError(f"{self.url}: the server does not say what lies under data/. Serve the dataset as one .zip, from a server that lists folders, or write "
                        "its contents down once, where it lies: python -c \"import zarr; zarr.consolidate_metadata('mine.zarr')\"")

    def _of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _try(self, name: str, action: Callable[[], T]) -> T:
        """action(), again when that may help. FileNotFoundError when there is no such file."""
        for attempt in range(TRIES):
            try:
                return action()
            except Absent as e:
                raise FileNotFoundError(self._of(name)) from e
            except Refused as e:
                raise DataError(f"{self._of(name)}: {e}. " + self._who()) from e
            except Whole as e:
                raise DataError(f"{self._of(name)}: the server sends no parts of files (it ignores Range requests, as python -m http.server does), and data "
                                "is read in parts. Serve it by one that does (nginx, caddy, npx http-server, S3), or copy the dataset here first") from e
            except (OSError, TimeoutError) as e:
                if attempt == TRIES - 1:
                    server = f" (AWS_ENDPOINT_URL={end})" if self.scheme == "s3" and (end := os.environ.get("AWS_ENDPOINT_URL")) else ""
                    raise DataError(f"{self._of(name)} cannot be read, {TRIES} times: {e}. Check the URL and the network{server}; "
                                    "DIPOLE_REMOTE_TIMEOUT=60 allows a slow server more than 20 s") from e
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError

    def _who(self) -> str:
        kind = {"s3a": "s3", "gcs": "gs"}.get(self.scheme, "az" if self.scheme.startswith(("a", "az")) else self.scheme)
        return f"Credentials are taken from the environment: {KEYS[kind]}" if kind in KEYS else "Check the URL and who may read it"


class _File:
    def __init__(self, remote: Remote, name: str, size: int):
        self._remote, self._name, self.size = remote, name, size

    def read(self, lo: int, hi: int) -> bytes:
        hi, kept = min(hi, self.size), self._remote.ends
        if not (hi == self.size or lo == 0) or hi - lo > INDEX:
            return self._remote.read(self._name, lo, hi)
        if len(kept) > MOST:
            kept.clear()
        if (at := (self._name, lo, hi)) not in kept:
            kept[at] = self._remote.read(self._name, lo, hi)
        return kept[at]

    def close(self) -> None:
        pass


class _Obstore:
    def __init__(self, url: str):
        try:
            import obstore
            import obstore.exceptions
            from obstore.store import from_url
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(f"{url} is read by obstore: {INSTALL}", name="obstore") from e
        self._lib, self._errors = obstore, obstore.exceptions
        seconds = float(os.environ.get("DIPOLE_REMOTE_TIMEOUT", 20))
        parts = urlsplit(url)
        self._web = parts.scheme in ("http", "https")
        head, _, last = url.rpartition("/")
        self._file = last if parts.path.lower().endswith(".zip") else ""  # a store has folders below it, so a file's is the one it lies in
        plain = parts.scheme == "http" or _endpoint().startswith("http://")
        more = {"credential_provider": chain} if parts.scheme in ("s3", "s3a") and (chain := _boto3()) else {}
        self._store = from_url(head if self._file else url, retry_config={"max_retries": 0},  # Remote tries again, and bodies that break off too
                               client_options={"timeout": timedelta(seconds=seconds), "connect_timeout": timedelta(seconds=min(5.0, seconds)),
                                               "allow_http": plain}, **more)

    def list(self) -> dict[str, int] | None:
        if self._web:
            return None
        return self._said(lambda: {meta["path"]: meta["size"] for page in self._lib.list(self._store) for meta in page})

    def size(self, name: str) -> int:
        return self._said(lambda: self._lib.head(self._store, name or self._file)["size"])

    def get(self, name: str, lo: int, hi: int) -> bytes:
        return self._said(lambda: bytes(self._lib.get_range(self._store, name or self._file, start=lo, end=hi)))

    def _said(self, action: Callable[[], T]) -> T:
        """action() with obstore's errors as ours."""
        try:
            return action()
        except (self._errors.NotFoundError, FileNotFoundError) as e:
            raise Absent from e
        except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError) as e:
            code = "401" if isinstance(e, self._errors.UnauthenticatedError) else "403"
            raise Refused(f"the server refuses ({code})") from e
        except self._errors.NotSupportedError as e:
            raise Whole from e
        except (self._errors.BaseError, TimeoutError) as e:
            text = str(e)
            if status := re.search(r"status code: (40[134])", text):  # of a listing
                raise Absent if status[1] == "404" else Refused(f"the server refuses ({status[1]})") from e
            if any(sign in text for sign in ("169.254", "latest/api/token", "latest/meta-data", "metadata.google", "credentials")):
                raise Refused("no credentials were found") from e
            raise OSError(_short(text)) from e


class _Fsspec:
    def __init__(self, url: str):
        try:
            import fsspec
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(f"{url} is read by fsspec: pip install fsspec, and what it needs for {urlsplit(url).scheme}://", name="fsspec") from e
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as e:
            raise DataError(f"{url} is nothing that can be opened: {e}") from e
        self._root = root.rstrip("/")

    def list(self) -> dict[str, int] | None:
        found: dict[str, dict[str, Any]] = self._said(lambda: self._fs.find(self._root, detail=True))
        return {name.removeprefix(self._root).lstrip("/"): int(info["size"] or 0) for name, info in found.items()}

    def size(self, name: str) -> int:
        return self._said(lambda: int(self._fs.size(self._at(name))))

    def get(self, name: str, lo: int, hi: int) -> bytes:
        return self._said(lambda: self._fs.cat_file(self._at(name), start=lo, end=hi))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _said(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except FileNotFoundError as e:
            raise Absent from e
        except PermissionError as e:
            raise Refused(str(e) or "the server refuses") from e


def _endpoint() -> str:
    """AWS_ENDPOINT_URL, '' when there is none. obstore would end the process over one that is no URL."""
    text = os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        parts = urlsplit(text)
        fits = not text or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    except ValueError:
        fits = False
    if not fits:
        raise DataError(f"AWS_ENDPOINT_URL={text} is no address of a server: write http://host:port")
    return text


def _page(url: str) -> str:
    """The index of a folder, '' where the server makes none."""
    try:
        with urllib.request.urlopen(url, timeout=float(os.environ.get("DIPOLE_REMOTE_TIMEOUT", 20))) as answer:
            return answer.read().decode(errors="replace")
    except urllib.error.HTTPError as e:
        if e.code >= 500:
            raise
        return ""


def _boto3() -> Any:
    """What finds credentials in ~/.aws; None where the environment names them, or boto3 is not installed."""
    if {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"} & os.environ.keys():
        return None
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        return None
    session = Session()
    return Boto3CredentialProvider(session) if session.get_credentials() is not None else None


def _short(text: str) -> str:
    """What a Rust error says, without the layers of how it came about."""
    first = text.split("\n")[0]
    source = re.search(r"tcp connect error|dns error|timed out|Connection refused|connection closed[^\"]*", text)
    return f"{first[:200]} ({source[0]})" if source and source[0] not in first else first[:300]
