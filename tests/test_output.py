"""The command's output: readers that go away, terminals of few characters, errors of files in one line."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probsym_fast import cli
from probsym_fast._output import patient_output


def closed_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(open(write, "wb"), encoding="utf-8")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_is_no_error(monkeypatch, capfd, name):
    stream = closed_pipe()
    monkeypatch.setattr(sys, name, stream)
    with patient_output():
        for _ in range(3):
            print("x" * 100_000, file=getattr(sys, name), flush=True)
        getattr(sys, name).writelines(["y", "z"])
    assert getattr(sys, name) is stream
    stream.close()  # as Python does at its end


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with patient_output():
        print("0.1 ± 0.2 …")
    assert out.buffer.getvalue() == b"0.1 \\xb1 0.2 \\u2026\n"


def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with patient_output():
        print("nowhere")


@pytest.mark.slow
def test_a_poor_terminal_and_a_closed_pipe(tmp_path):
    """A run's whole command: UTF-8 files in a POSIX locale, "±" in its report, and nobody who reads that."""
    own = tmp_path / "größe.yaml"
    own.write_bytes("# größe\nextends: nbody/demo\nname: größe\n".encode())
    code = r"""
import sys
from probsym_fast import _output, cli
print("first", flush=True)
sys.stdin.read()
status = cli.main(["fit", "-c", sys.argv[1], "--keys"])
with _output.patient_output():
    print("0.1 \u00b1 0.2", file=sys.stderr)
    print("0.1 \u00b1 0.2")
sys.exit(status)
"""
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, str(own)], env=env, **pipes) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"0.1 \\xb1 0.2\n"
    assert process.returncode == 0


def refused(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("probsym: error: ") and error.count("\n") == 1
    return error.removeprefix("probsym: error: ").rstrip("\n")


FIT = ["fit", "-c", "nbody/gnn_O3_ps", "--folder"]


def test_errors_of_files_are_one_line(tmp_path, capsys, monkeypatch):
    long, loop, file = str(tmp_path / ("x" * 300)), tmp_path / "loop", tmp_path / "file"
    loop.symlink_to(loop)
    file.touch()
    assert refused(capsys, *FIT, long) == f"{long}: File name too long"
    assert refused(capsys, *FIT, str(file / "run")) == f"{file}/run: Not a directory"
    assert refused(capsys, *FIT, str(loop / "run")).startswith(str(loop))
    assert refused(capsys, "fit", "-c", long).endswith("File name too long")
    assert refused(capsys, "fit", "-c", str(tmp_path)).startswith("config: must be a file or one of")
    monkeypatch.setenv("PROBSYM_CACHE", str(file))
    assert refused(capsys, "data", "get", "graph8c") in (f"{file}/graph8c: Not a directory", f"{file}: File exists")
    assert sorted(tmp_path.iterdir()) == [file, loop]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(30, "Read-only file system", "/mnt/x"), "/mnt/x: Read-only file system"),
        (OSError(28, "No space left on device", b"/mnt/x"), "/mnt/x: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("of our\nown"), "of our own"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_errors_in_a_command(capsys, monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    assert refused(capsys, "info") == line


def test_errors_of_the_system_that_name_no_file_stay(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "_info", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["info"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert refused(capsys, "data", "list") == "No space left on device"


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF])
def test_a_terminal_that_is_gone_is_no_error(monkeypatch, number):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stderr", Gone())
    with patient_output():
        print("x", file=sys.stderr)
