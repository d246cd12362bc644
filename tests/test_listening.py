"""Where HTTP servers listen, and to whom; real clusters and sockets."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import dask
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import daskserve as serve
from daskserve.config import HTTPOptions
from daskserve.exceptions import ProxyStartError, ServeConfigError
from tests.test_http import Site, _site, open_site, site, spare, start
from tests.utils import ProcessCluster, poll, run_script

__all__ = ["_site", "site", "spare", "start"]  # fixtures


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def hello() -> str:
    return "hello"


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", None),
        ("interface:lo", "127.0.0.1"),
        pytest.param(
            "::1", "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
        ),
        pytest.param(
            "[::1]", "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
        ),
    ],
)
@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_host(
    start: Callable[..., Site], host: str, bound: str | None, location: str
) -> None:
    site = start(host=host, location=location)
    for url in site.instance.http_urls:
        assert bound is None or urlsplit(url).hostname == bound
        assert httpx.get(f"{url}/-/healthz").text == "success"


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("interface:nowhere9", "'nowhere9' is not a valid network interface"),
        ("192.0.2.1", "Cannot assign requested address"),
        ("no-such-host.invalid", "192.0.2.1|not known|resolution"),
    ],
)
def test_host_that_cannot_be_bound(
    start: Callable[..., Site], spare: ProcessCluster, host: str, reason: str
) -> None:
    with pytest.raises(ProxyStartError, match=reason) as caught:
        start(host=host)
    assert host in str(caught.value)
    assert start().instance.http_urls  # nothing is left of the one that failed


@pytest.mark.parametrize("host", ["", "a b", "http://x", 3, "::1/64"])
def test_host_refuses(host: object) -> None:
    with pytest.raises(ValueError, match="interface:ib0"):
        HTTPOptions(host=host)


def test_silent_peers_are_asked(site: Site) -> None:
    """The kernel asks clients of which nothing is heard whether they are there."""
    number = urlsplit(site.url).port
    assert number is not None
    with socket.create_connection(("127.0.0.1", number)) as sock:
        sock.sendall(b"GET /-/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(100)
        # Others may have had this port, in connections that are not forgotten yet.
        ends = [f"{number:04X}", f"{sock.getsockname()[1]:04X}"]
        lines = Path("/proc/net/tcp").read_text().splitlines()
        (line,) = [
            line for line in lines if [end[-4:] for end in line.split()[1:3]] == ends
        ]
    timer, expires = line.split()[5].split(":")
    assert timer == "02"  # the keep-alive timer runs
    assert 0 < int(expires, 16) / 100 <= 61


# Unix sockets.


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_unix_socket_outlives_a_worker_that_is_killed(
    tmp_path: Path, location: str
) -> None:
    path = tmp_path / "serve.sock"

    def get(route: str) -> str:
        with httpx.HTTPTransport(uds=str(path)) as transport:
            with httpx.Client(transport=transport, base_url="http://x") as client:
                return client.get(route).text

    def answers() -> bool:
        try:
            return get("/-/healthz") == "success"
        except httpx.TransportError:
            return False

    with open_site(location=location, uds=str(path)) as site:
        (proxy,) = site.instance.status().proxies  # one for all workers of the host
        assert answers()
        pids = site.client.run(os.getpid)
        pid = pids[proxy.worker]
        (worker,) = [w for w in site.cluster.workers if pid in w.group()]
        site.cluster.kill(worker)
        poll(answers)
        (other,) = site.instance.status().proxies
        assert other.worker != proxy.worker
    assert not path.exists()


def test_unix_socket_of_somebody_else(
    start: Callable[..., Site], tmp_path: Path
) -> None:
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(ProxyStartError, match="in use already"):
            start(uds=path)
        assert os.path.exists(path)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ProxyStartError, match="in use already"):
        start(uds=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


# TLS.


def make_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def make_certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None = None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """Return a certificate for this host; it signs itself if there is no issuer."""
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    ca = issuer is None
    # Python 3.13 verifies strictly: it wants keys identified, and what a CA may do.
    own_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(
        (issuer_key or key).public_key()
    )
    usage = x509.KeyUsage(True, False, False, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([local]), critical=False)
        .add_extension(own_id, critical=False)
        .add_extension(issuer_id, critical=False)
        .add_extension(usage, critical=True)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return builder.sign(issuer_key or key, hashes.SHA256())


class Files:
    """Certificates and keys in a directory: of an authority, a server, clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        key = make_key()
        authority = make_certificate("authority", key)
        self.write("ca", authority)
        for name in ("server", "client"):
            own = make_key()
            self.write(name, make_certificate(name, own, authority, key), own)
        other = make_key()
        self.write("stranger", make_certificate("stranger", other), other)
        self.write("locked", authority, key, password=b"open-sesame")

    def write(
        self,
        name: str,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey | None = None,
        password: bytes | None = None,
    ) -> None:
        pem = serialization.Encoding.PEM
        (self.directory / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
        if key is not None:
            encryption = (
                serialization.NoEncryption()
                if password is None
                else serialization.BestAvailableEncryption(password)
            )
            data = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption)
            (self.directory / f"{name}.key").write_bytes(data)

    def __call__(self, name: str) -> str:
        return str(self.directory / name)

    def client(self, name: str | None) -> httpx.Client:
        """Return an HTTP client that trusts the authority and shows a certificate."""
        context = ssl.create_default_context(cafile=self("ca.pem"))
        if name is not None:
            context.load_cert_chain(self(f"{name}.pem"), self(f"{name}.key"))
        return httpx.Client(verify=context)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_client_certificates(start: Callable[..., Site], files: Files) -> None:
    site = start(
        ssl_certfile=files("server.pem"),
        ssl_keyfile=files("server.key"),
        ssl_ca_certs=files("ca.pem"),
    )
    url = site.at(site.deploy(hello))
    with files.client("client") as client:
        assert client.get(url).text == "hello"
    for name in (None, "stranger"):
        with files.client(name) as client, pytest.raises(httpx.TransportError):
            client.get(url)
    with files.client("client") as client:
        assert client.get(url).text == "hello"


def test_key_with_a_password(start: Callable[..., Site], files: Files) -> None:
    options = {"ssl_certfile": files("locked.pem"), "ssl_keyfile": files("locked.key")}
    site = start(**options, ssl_keyfile_password="open-sesame")
    with files.client(None) as client:
        assert client.get(f"{site.url}/-/healthz").text == "success"
    site.instance.shutdown()
    with pytest.raises(ProxyStartError, match="cannot start an HTTP server") as caught:
        start(**options, ssl_keyfile_password="wrong-word")
    assert "wrong-word" not in str(caught.value)
    with pytest.raises(ProxyStartError, match=r"nowhere\.pem"):
        start(ssl_certfile=files("nowhere.pem"), ssl_keyfile=files("server.key"))


# HTTP that leaves the machine.


@pytest.mark.parametrize(
    ("options", "exposed"),
    [
        ({}, False),
        ({"host": "127.0.0.2"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "interface:lo"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "10.1.2.3"}, True),
        ({"host": "node017"}, True),
        ({"host": "interface:ib0"}, True),
        ({"host": "0.0.0.0", "uds": "/x"}, False),
        ({"host": "0.0.0.0", "location": "NoServer"}, False),
        ({"host": "0.0.0.0", "ssl_certfile": "c", "ssl_keyfile": "k"}, False),
    ],
)
def test_exposed(options: dict[str, str], exposed: bool) -> None:
    assert HTTPOptions(**options).exposed is exposed


@pytest.fixture(scope="module")
def tls_cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(1, nanny=False, protocol="tls") as cluster:
        yield cluster


def test_plain_http_beyond_the_host_of_a_cluster_with_tls(
    tls_cluster: ProcessCluster, files: Files
) -> None:
    everywhere = {"host": "0.0.0.0", "port": 0}
    with tls_cluster.client() as client:
        with pytest.raises(ServeConfigError, match="allow_plain_http=True") as caught:
            serve.start(client, http_options=everywhere)
        assert "'0.0.0.0'" in str(caught.value) and "tls://" in str(caught.value)
        with pytest.raises(serve.ServeError):  # nothing was started
            serve.connect(client)
        for more in (
            {"allow_plain_http": True},
            {"ssl_certfile": files("server.pem"), "ssl_keyfile": files("server.key")},
        ):
            with serve.start(client, http_options={**everywhere, **more}) as instance:
                url = instance.http_urls[0]
                with files.client(None) as http:
                    assert http.get(f"{url}/-/healthz").text == "success"
        with dask.config.set({"daskserve.http.allow-plain-http": True}):
            with serve.start(client, http_options=everywhere) as instance:
                assert instance.http_urls[0].startswith("http://127.0.0.1:")


def test_plain_http_on_a_cluster_with_tls_behind_a_gateway(
    tls_cluster: ProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = "gateway://gateway.example.org:8000/cluster"
    monkeypatch.setattr("daskserve.session._address", lambda client: gateway)
    with tls_cluster.client() as client:
        with pytest.raises(ServeConfigError, match=r"has TLS \(tls://"):
            serve.start(client, http_options={"host": "0.0.0.0", "port": 0})


@pytest.mark.slow
def test_tls_keeps_other_users_out() -> None:
    """What README recommends on a machine that others use too."""
    script = """if True:
        import daskserve as serve
        from distributed import Client, LocalCluster, Security

        if __name__ == "__main__":
            security = Security.temporary()
            cluster = LocalCluster(
                n_workers=1,
                protocol="tls://",
                security=security,
                dashboard_address="127.0.0.1:0",
            )
            with cluster, Client(cluster) as client:
                serve.start(http_options={"port": 0})
                serve.deployment(name="f")(lambda: "served").deploy()
                print(serve.get_deployment("f").get_handle().remote().result())
                address = cluster.scheduler_address.removeprefix("tls://")
                identity = client.sync(client.scheduler.identity, n_workers=-1)
                workers = identity["workers"]
                for where in (address, *(w.removeprefix("tls://") for w in workers)):
                    for known in (None, Security.temporary()):
                        scheme = "tls" if known else "tcp"
                        try:
                            Client(f"{scheme}://{where}", security=known, timeout=1)
                        except OSError:
                            print("kept out")
    """
    printed = run_script(script).stdout
    assert "served\n" in printed
    assert printed.count("kept out") == 4


def test_plain_http_beyond_the_host_of_a_cluster_without(
    start: Callable[..., Site],
) -> None:
    site = start(host="0.0.0.0")  # in the URL stands the worker's own address
    assert site.instance.http_urls[0].startswith("http://127.0.0.1:")
