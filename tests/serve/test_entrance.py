"""Where a server listens and who comes in: what cannot be is one line that says what to do, before a model is loaded."""
import shutil
import socket
import subprocess

import pytest

from policy.serve.entrance import Entrance, tls_context
from tests.serve.far import certificate


@pytest.mark.parametrize("port", [-1, 65536, 99999, "8765", 1.5, None, True])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ValueError, match=f"port={port} must be a whole number from 0 to 65535"):
        Entrance(port=port)


def test_a_port_in_use_is_told_and_free_ones_are_free():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken: choose another with port=…, or 0"):
            Entrance(port=port).check_free()
    Entrance(port=port).check_free()
    for host in ("127.0.0.1", "localhost"):
        Entrance(host).check_free()


@pytest.mark.parametrize("host, words", [("nowhere.invalid", "no name or address that this computer knows"), ("a" * 300, "no name or address"),
                                         ("192.0.2.1", "is not an address of this computer")])
def test_a_host_that_is_not_here_is_told(host, words):
    with pytest.raises(OSError, match=words) as e:
        Entrance(host, token="x" * 16, insecure=True).check_free()
    assert f"host={host}" in str(e.value) and "127.0.0.1" in str(e.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_files_of_tls_are_named_with_what_is_wrong_with_them(tmp_path):
    (tmp_path / "other").mkdir()
    (cert, key), (_, foreign) = certificate(tmp_path), certificate(tmp_path / "other")
    assert tls_context(cert, key) and Entrance(tls=(cert, key)).tls
    damaged, garbage, locked = (str(tmp_path / name) for name in ("damaged.pem", "garbage", "locked.pem"))
    lines = (tmp_path / "cert.pem").read_text().splitlines()
    (tmp_path / "damaged.pem").write_text("\n".join([lines[0], lines[1][:20], *lines[3:]]))
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    subprocess.run(["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", key, "-out", locked], check=True, capture_output=True)
    cases = [(garbage + "x", key, f"tls.cert={garbage}x is no file"), (cert, "no", "tls.key=no is no file"), (str(tmp_path), key, "is no file"),
             (garbage, key, "garbage is no PEM file of a certificate"), (cert, garbage, "garbage is no PEM file of a private key"),
             (key, cert, "key.pem is no PEM file of a certificate"), (cert, foreign, "the key is another certificate's"),
             (damaged, key, "damaged.pem and tls.key=.* cannot be used: one of them is damaged"), (cert, locked, "or the key has a password")]
    for one, other, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            tls_context(one, other)
