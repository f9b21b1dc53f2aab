"""``marlin-cy serve``: a process with a socket and signals."""

import contextlib
import http.client
import json
import signal
import socket
import sys

import pytest

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from served import Process, chat_folder  # noqa: E402

from marlin_cy.cli import main  # noqa: E402
from marlin_cy.commands import serve  # noqa: E402
from marlin_cy.errors import MarlinError  # noqa: E402
from marlin_cy.serve import server  # noqa: E402

LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_text_ends_before_the_server(tmp_path, number):
    folder = chat_folder(tmp_path / "tiny-chat")
    with Process(folder, MARLIN_CY_API_KEY="secret") as process:
        connection, response = process.ask("/v1/models")
        assert response.status == 401
        connection.close()
        key = {"Authorization": "Bearer secret"}
        connection, response = process.ask("/v1/models", **key)
        assert json.loads(response.read())["data"][0]["id"] == "tiny-chat"
        connection.close()
        connection, response = process.ask("/v1/completions", LONG, **key)
        response.readline()
        process.signal(number)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        code, said = process.end()
    assert code == 0, said
    assert "Traceback" not in said
    assert "ending after 1 texts" in said


def test_a_second_interrupt_ends_at_once():
    with Process("--max-sequences", 1) as process:
        running = [process.ask("/v1/completions", LONG) for _ in range(12)]
        process.signal(signal.SIGINT)
        with pytest.raises(ConnectionRefusedError):
            while True:
                with contextlib.suppress(ConnectionResetError):  # the server closed while this connection waited
                    socket.create_connection(("127.0.0.1", process.port)).close()
        process.signal(signal.SIGINT)
        code, said = process.end()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            running[-1][1].read()
        for connection, _ in running:
            connection.close()
    assert code == 0, said
    assert "Traceback" not in said


def test_a_port_that_is_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"--port: {port} of 127.0.0.1 is in use by another program" in capsys.readouterr().err


def test_a_port_that_comes_into_use_while_the_model_loads():
    first, second = server.open_socket("127.0.0.1", 0), None
    try:
        second = server.open_socket("127.0.0.1", first.getsockname()[1])
        server.listen(second)
        with pytest.raises(MarlinError, match="in use by another program"):
            server.listen(first)
    finally:
        first.close()
        if second is not None:
            second.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "99999"], 2, "got '99999', expected a number of 0 to 65535"),
        (["--port", "-1"], 2, "got '-1', expected a number of 0 to 65535"),
        (["--max-sequences", "0"], 2, "got '0', expected a whole number of at least 1"),
        (["--max-waiting", "-1"], 2, "got '-1', expected a whole number of at least 0"),
        (["--host", "no.such.name.invalid"], 1, "--host: got 'no.such.name.invalid', expected an address of this"),
        (["--host", "192.0.2.1", "--port", "0"], 1, "--host 192.0.2.1 --port 0: Cannot assign requested address"),
        (["--api-key", ""], 1, "got an empty text, expected a key"),
        (["--port", "0", "--cache-tokens", "5"], 1, "--cache-tokens: got 5, expected at least the context of 1024"),
        (["/nonexistent", "--port", "0"], 1, "/nonexistent"),
    ],
)
def test_arguments_that_are_refused(capsys, arguments, code, message):
    try:
        assert main(["serve", *arguments]) == code
    except SystemExit as error:
        assert error.code == code
    assert message in capsys.readouterr().err


def test_without_the_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("marlin_cy.serve")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "--port", "0"]) == 1
    assert "pip install 'marlin-cy[serve]'" in capsys.readouterr().err


def test_addresses():
    with server.open_socket("127.0.0.1", 0) as bound:
        assert server.address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            bound = server.open_socket("::1", 0)
        except MarlinError as error:
            pytest.skip(f"no IPv6 here: {error}")
        with bound:
            assert server.address_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def test_a_port_as_an_argument():
    assert serve._port("0") == 0
    assert serve._port("65535") == 65535
