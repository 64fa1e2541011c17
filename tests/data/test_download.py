import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from probsym_fast.data.download import download

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT: /whole, /short (less than announced), /unsized (no length), all else 404; counts requests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers.append(self.path)
            known = self.path in ("/whole", "/short", "/unsized")
            self.send_response(200 if known else 404)
            if self.path != "/unsized":
                self.send_header("Content-Length", str(len(CONTENT) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(CONTENT[:-1000] if self.path == "/short" else CONTENT)

        def log_message(self, *arguments):
            pass

    answers = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url, server.answers = f"http://127.0.0.1:{server.server_port}", answers
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["whole", "unsized"])
def test_file_arrives_once(server, tmp_path, capsys, name):
    path = tmp_path / "folder" / "file"
    for _ in range(2):
        assert download(f"{server.url}/{name}", path, SHA256) == path
        assert path.read_bytes() == CONTENT
    assert server.answers == [f"/{name}"]
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_another_file_in_its_place_is_replaced(server, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    assert download(f"{server.url}/whole", tmp_path / "file", SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize(
    ("name", "sha256", "error", "message"),
    [
        ("whole", "0" * 64, ValueError, f"expected SHA-256 {'0' * 64} of URL, got {SHA256} (256000 bytes)"),
        ("short", SHA256, ConnectionError, "URL cannot be downloaded: expected 256000 bytes, got 255000"),
        ("none", SHA256, ConnectionError, "URL cannot be downloaded: HTTP Error 404: Not Found"),
    ],
)
def test_failures_leave_nothing_behind(server, tmp_path, before, name, sha256, error, message):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    url = f"{server.url}/{name}"
    with pytest.raises(error, match=re.escape("download: " + message.replace("URL", url))):
        download(url, path, sha256)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_no_server(tmp_path):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/file cannot be downloaded: .*refused"):
        download("http://127.0.0.1:1/file", tmp_path / "file", SHA256)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["nonsense", "unknown://host/file"])
def test_not_an_address(tmp_path, url):
    with pytest.raises(ConnectionError, match=f"{url} cannot be downloaded: .*unknown url type"):
        download(url, tmp_path / "file", SHA256)
    assert not list(tmp_path.iterdir())
