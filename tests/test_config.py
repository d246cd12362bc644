import math
import pickle
import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import dask.config
import numpy as np
import pytest
import yaml
from pydantic import SecretStr, ValidationError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from daskserve.config import (
    DEFAULT,
    AutoscalingConfig,
    DeploymentOptions,
    HTTPOptions,
    Settings,
    duration,
)
from tests.utils import ROOT, run_script

SSL = {"ssl_certfile": "/cert.pem", "ssl_keyfile": "/key.pem"}


def options(**given: Any) -> DeploymentOptions:
    return DeploymentOptions(**{"name": "Counter", **given})


# Times, sizes


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (2, 2),
        (0.25, 0.25),
        (1e-7, 1e-7),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (timedelta(minutes=1), 60),
        ("500ms", 0.5),
        ("500 ms", 0.5),
        ("  1s ", 1),
        ("2 minutes", 120),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1e3 ms", 1),
        ("1e3", 1000),
        ("7", 7),
    ],
)
def test_duration(value: object, seconds: float) -> None:
    result = duration(value)
    assert result == seconds
    assert type(result) is float


BAD_DURATIONS: list[object] = [
    -1,
    -0.5,
    math.nan,
    math.inf,
    10**400,
    True,
    None,
    [],
    Decimal(1),
    timedelta(seconds=-1),
    "",
    " ",
    "-1s",
    "+1s",
    "soon",
    "ms",
    ".",
    "1 fortnight",
    "1s 2s",
    "1_0s",
    "nan",
    "inf",
    "1e999s",
]


@pytest.mark.parametrize("value", BAD_DURATIONS)
def test_duration_refuses(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{value!r} is not a duration")):
        duration(value)


@pytest.mark.parametrize(
    ("model", "name", "optional", "zero"),
    [
        (HTTPOptions, "request_timeout_s", True, False),
        (HTTPOptions, "keep_alive_timeout_s", False, True),
        (options, "health_check_period_s", False, False),
        (options, "health_check_timeout_s", False, False),
        (options, "abandoned_call_timeout_s", True, False),
        (options, "graceful_shutdown_timeout_s", False, True),
        (options, "graceful_shutdown_wait_loop_s", False, True),
        (options, "request_timeout_s", True, False),
        (options, "deploy_timeout_s", False, False),
    ],
)
def test_options_that_are_times(
    model: Any, name: str, optional: bool, zero: bool
) -> None:
    assert getattr(model(**{name: "500ms"}), name) == 0.5
    for value, allowed in ((None, optional), (0, zero)):
        if allowed:
            assert getattr(model(**{name: value}), name) == value
        else:
            with pytest.raises(ValidationError, match=rf"{name}\n.*\b{value}\b"):
                model(**{name: value})
    for bad in (-1, math.nan, True, "soon"):
        with pytest.raises(ValidationError, match=rf"{name}\n.*{bad!r} is not a dura"):
            model(**{name: bad})


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, None),
        (0, 0),
        (10, 10),
        (np.int64(10), 10),
        ("4 GiB", 4 * 2**30),
        ("1kB", 1000),
        ("10", 10),
        (".5 KiB", 512),
    ],
)
def test_max_request_body_bytes(value: Any, count: int | None) -> None:
    result = HTTPOptions(max_request_body_bytes=value).max_request_body_bytes
    assert result == count
    assert type(result) in (int, type(None))


@pytest.mark.parametrize(
    "value", [-1, 1.5, True, "", "MB", "-1 MB", "5 foos", "nan", "1e999", "1 MB x", []]
)
def test_max_request_body_bytes_refuses(value: Any) -> None:
    with pytest.raises(
        ValidationError,
        match=rf"max_request_body_bytes\n.*{re.escape(repr(value))} is not a size",
    ):
        HTTPOptions(max_request_body_bytes=value)


# HTTPOptions


def test_http_defaults() -> None:
    assert dict(HTTPOptions()) == {
        "host": "127.0.0.1",
        "port": 8000,
        "location": "HeadOnly",
        "root_path": "",
        "trusted_proxies": ("127.0.0.1", "::1"),
        "middlewares": (),
        "request_timeout_s": 60,
        "keep_alive_timeout_s": 90,
        "max_request_body_bytes": 4 * 2**30,
        "header_timeout_s": 30,
        "max_header_bytes": 64 * 2**10,
        "stall_timeout_s": 60,
        "max_connections": 8192,
        "debug": False,
        "allow_plain_http": False,
        "ssl_certfile": None,
        "ssl_keyfile": None,
        "ssl_keyfile_password": None,
        "ssl_ca_certs": None,
        "uds": None,
        "token": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "0.0.0.0"),
        ("host", "::1"),
        ("host", None),
        ("port", 0),
        ("port", 65535),
        ("location", "HeadOnly"),
        ("location", "EveryNode"),
        ("location", "NoServer"),
        ("location", None),
        ("root_path", ""),
        ("root_path", "/serve"),
        ("root_path", "/serve/me"),
        ("debug", True),
        ("uds", "/run/daskserve.sock"),
    ],
)
def test_http_option(name: str, value: object) -> None:
    assert getattr(HTTPOptions.from_user({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""),
        ("host", 1),
        ("host", "http://0.0.0.0"),
        ("host", "0.0.0.0 "),
        ("port", -1),
        ("port", 65536),
        ("port", "8000"),
        ("port", 80.0),
        ("port", True),
        ("port", None),
        ("location", "headonly"),
        ("location", ""),
        ("location", False),
        ("location", ["HeadOnly"]),
        ("root_path", "serve"),
        ("root_path", "/serve/"),
        ("root_path", "/"),
        ("root_path", "/a//b"),
        ("root_path", "/a b"),
        ("root_path", "/{a}"),
        ("root_path", None),
        ("debug", 1),
        ("debug", "yes"),
        ("debug", None),
        ("ssl_certfile", ""),
        ("ssl_keyfile", 1),
        ("ssl_ca_certs", b"/ca.pem"),
        ("uds", ""),
        ("uds", 5),
        ("trusted_proxies", None),
        ("trusted_proxies", "10.0.0.0/8"),
        ("middlewares", CORSMiddleware),
        ("middlewares", None),
        ("middlewares", "CORS"),
    ],
)
def test_http_option_refuses(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\n.*{re.escape(repr(value))}"):
        HTTPOptions.from_user({name: value})


def test_port_takes_any_whole_number() -> None:
    port = HTTPOptions(port=np.int64(80)).port  # type: ignore[arg-type]
    assert (port, type(port)) == (80, int)


def test_the_rule_is_in_the_message() -> None:
    with pytest.raises(ValidationError, match="'HeadOnly', 'EveryNode', 'NoServer' or"):
        HTTPOptions.from_user({"location": "Everywhere"})
    with pytest.raises(ValidationError, match="give a whole number 0-65535"):
        HTTPOptions(port=70000)


@pytest.mark.parametrize("value", [[], ["10.1.2.3", "10.0.0.0/8", "fd00::/8"]])
def test_trusted_proxies(value: list[str]) -> None:
    assert HTTPOptions.from_user({"trusted_proxies": value}).trusted_proxies == (
        *value,
    )
    with dask.config.set({"daskserve.http.trusted-proxies": value}):
        assert HTTPOptions().trusted_proxies == tuple(value)


@pytest.mark.parametrize("value", ["*", "", "nginx", "10.0.0.1/8", "10.0.0", 10, None])
def test_trusted_proxies_names_the_wrong_element(value: object) -> None:
    message = rf"trusted_proxies\n.*{re.escape(repr(value))} is not an address such as"
    with pytest.raises(ValidationError, match=message):
        HTTPOptions.from_user({"trusted_proxies": ["10.1.2.3", value]})


@pytest.mark.parametrize("kind", [list, tuple])
def test_middlewares(kind: Any) -> None:
    middleware = Middleware(CORSMiddleware, allow_origins=["*"])
    made = HTTPOptions(middlewares=kind([middleware]))
    assert made.middlewares == (middleware,)


def test_middlewares_names_the_wrong_element() -> None:
    good = Middleware(GZipMiddleware)
    with pytest.raises(ValidationError, match=r"element 1 is <class '.*CORSMiddleware"):
        HTTPOptions.from_user({"middlewares": [good, CORSMiddleware]})


@pytest.mark.parametrize("name", ["certfile", "keyfile"])
def test_ssl_certfile_and_keyfile_go_together(name: str) -> None:
    assert HTTPOptions.from_user(SSL).ssl_keyfile == "/key.pem"
    with pytest.raises(ValidationError, match=rf"ssl_{name}='x'.* must be given toget"):
        HTTPOptions.from_user({f"ssl_{name}": "x"})


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_keyfile_password"])
def test_ssl_options_need_a_certificate(name: str) -> None:
    HTTPOptions.from_user({**SSL, name: "x"})
    with pytest.raises(ValidationError, match=f"{name} needs ssl_certfile"):
        HTTPOptions.from_user({name: "x"})


def test_secrets_are_not_shown() -> None:
    made = HTTPOptions.from_user(
        {**SSL, "token": "Mellon!", "ssl_keyfile_password": SecretStr("Sesame")}
    )
    assert made.token is not None and made.ssl_keyfile_password is not None
    assert made.token.get_secret_value() == "Mellon!"
    assert made.ssl_keyfile_password.get_secret_value() == "Sesame"
    for text in (repr(made), str(made), repr(made.difference(HTTPOptions()))):
        assert "<hidden>" in text
        assert "Mellon!" not in text
        assert "Sesame" not in text


@pytest.mark.parametrize("name", ["token", "ssl_keyfile_password"])
@pytest.mark.parametrize("value", ["", 8642, b"Mellon!", SecretStr("")])
def test_secret_refuses_and_does_not_show(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\n.*not empty") as caught:
        HTTPOptions.from_user({**SSL, name: value})
    assert "8642" not in str(caught.value)
    assert "Mellon!" not in str(caught.value)


@pytest.mark.parametrize("value", ["Mellon friend", "Mellon\n", "Mellön"])
def test_token_fits_in_a_header(value: str) -> None:
    with pytest.raises(ValidationError, match="token\n.*visible ASCII") as caught:
        HTTPOptions.from_user({"token": value})
    assert "Mell" not in str(caught.value)


def test_other_errors_do_not_show_secrets() -> None:
    with pytest.raises(ValidationError) as caught:
        HTTPOptions.from_user({"token": "Mellon!", "prot": 80})
    assert "Mellon!" not in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        HTTPOptions.from_user({"token": "Mellon!", "ssl_certfile": "x"})
    assert "Mellon!" not in str(caught.value)


@pytest.mark.parametrize(("unknown", "close"), [("prot", "port"), ("Host", "host")])
def test_unknown_http_option(unknown: str, close: str) -> None:
    with pytest.raises(
        ValidationError,
        match=rf"'{unknown}' is not an option: did you mean '{close}'\? the options "
        r"are host, port, location, .*, token",
    ):
        HTTPOptions.from_user({unknown: 1})


def test_unknown_option_that_resembles_nothing() -> None:
    with pytest.raises(ValidationError, match="42 is not an option: the options are"):
        HTTPOptions.from_user({42: 1})  # type: ignore[dict-item]


def test_from_user() -> None:
    made = HTTPOptions.from_user({"port": 0})
    assert made.port == 0
    assert made.model_fields_set == {"port"}
    assert HTTPOptions.from_user(made) is made
    assert HTTPOptions.from_user(None) == HTTPOptions.from_user({}) == HTTPOptions()


@pytest.mark.parametrize("value", ["port", [("port", 80)], 80])
def test_from_user_refuses(value: Any) -> None:
    with pytest.raises(TypeError, match=f"must be a dict.* {type(value).__name__}$"):
        HTTPOptions.from_user(value)


@pytest.mark.parametrize(
    ("given", "enabled"),
    [
        ({}, True),
        ({"location": "EveryNode"}, True),
        ({"location": "NoServer"}, False),
        ({"location": None}, False),
        ({"host": None}, False),
        ({"host": None, "location": "EveryNode"}, False),
    ],
)
def test_server_enabled(given: dict[str, Any], enabled: bool) -> None:
    assert HTTPOptions.from_user(given).server_enabled is enabled


def test_difference() -> None:
    old, new = HTTPOptions(), HTTPOptions(port=9000, token=SecretStr("a"), debug=True)
    assert old.difference(new) == {
        "port": (8000, 9000),
        "debug": (False, True),
        "token": (None, "<hidden>"),
    }
    assert old.difference(HTTPOptions()) == {}
    other = HTTPOptions(port=9000, token=SecretStr("b"), debug=True)
    assert new.difference(other) == {"token": ("<hidden>", "<hidden>")}


async def pass_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)


def test_difference_of_middlewares() -> None:
    def made(*middlewares: Middleware) -> HTTPOptions:
        return HTTPOptions(middlewares=middlewares)

    gzip = made(Middleware(GZipMiddleware, 500, compresslevel=3))
    same = made(Middleware(GZipMiddleware, 500, compresslevel=3))
    assert gzip.difference(same) == {}
    both = ["GZipMiddleware"], ["GZipMiddleware"]
    for other in (
        Middleware(GZipMiddleware, 501, compresslevel=3),
        Middleware(GZipMiddleware, 500, compresslevel=4),
        Middleware(GZipMiddleware, 500),
    ):
        assert gzip.difference(made(other)) == {"middlewares": both}
    assert gzip.difference(made(Middleware(CORSMiddleware))) == {
        "middlewares": (["GZipMiddleware"], ["CORSMiddleware"])
    }
    assert gzip.difference(made()) == {"middlewares": (["GZipMiddleware"], [])}


def test_difference_takes_code_from_another_process_as_equal() -> None:
    class Local:
        def __init__(self, app: Any) -> None: ...

    first = Local
    second = type("Local", (), {"__qualname__": Local.__qualname__})
    assert second.__module__ == first.__module__ and second is not first

    def made(cls: Any) -> HTTPOptions:
        base = Middleware(BaseHTTPMiddleware, dispatch=pass_on)
        return HTTPOptions(middlewares=(Middleware(cls), base))

    assert made(first).difference(made(second)) == {}
    assert (
        pickle.loads(pickle.dumps(made(CORSMiddleware))).difference(
            made(CORSMiddleware)
        )
        == {}
    )


def test_middleware_arguments_are_not_shown() -> None:
    made = HTTPOptions(middlewares=(Middleware(GZipMiddleware, secret_key="Mellon!"),))  # type: ignore[call-arg]
    assert "Mellon!" not in repr(made)
    assert "GZipMiddleware" in repr(made)


# DeploymentOptions


def test_deployment_defaults() -> None:
    assert dict(DeploymentOptions(name="Counter")) == {
        "name": "Counter",
        "route_prefix": DEFAULT,
        "num_replicas": 1,
        "init_args": (),
        "init_kwargs": {},
        "version": None,
        "prev_version": None,
        "user_config": None,
        "max_ongoing_requests": 100,
        "max_websockets": 1000,
        "threads": 1,
        "max_queued_requests": 1000,
        "max_unavailable": None,
        "max_surge": None,
        "session_affinity": None,
        "resources": None,
        "workers": None,
        "health_check_period_s": 10,
        "health_check_timeout_s": 30,
        "abandoned_call_timeout_s": 600,
        "graceful_shutdown_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 2,
        "request_timeout_s": None,
        "deploy_timeout_s": 300,
        "autoscaling_config": None,
    }


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("name", "a", "a"),
        ("name", "é" * 200, "é" * 200),
        ("name", "<lambda>", "<lambda>"),
        ("route_prefix", None, None),
        ("route_prefix", "/", "/"),
        ("route_prefix", "/a", "/a"),
        ("route_prefix", "/a/b-c", "/a/b-c"),
        ("route_prefix", "/-/a", "/-/a"),
        ("route_prefix", DEFAULT, DEFAULT),
        ("num_replicas", 3, 3),
        ("num_replicas", np.int64(3), 3),
        ("init_args", (1, "a"), (1, "a")),
        ("init_args", [1], (1,)),
        ("init_kwargs", {"a": 1}, {"a": 1}),
        ("version", "1", "1"),
        ("version", None, None),
        ("prev_version", "", ""),
        ("user_config", {"a": [1]}, {"a": [1]}),
        ("max_ongoing_requests", 1, 1),
        ("max_ongoing_requests", None, None),
        ("max_websockets", 1, 1),
        ("threads", 8, 8),
        ("threads", np.int64(8), 8),
        ("max_queued_requests", 0, 0),
        ("max_queued_requests", None, None),
        ("max_queued_requests", -1, None),
        ("max_unavailable", None, None),
        ("max_unavailable", 0, 0),
        ("max_unavailable", np.int64(3), 3),
        ("max_unavailable", "0%", "0%"),
        ("max_unavailable", "100%", "100%"),
        ("max_surge", None, None),
        ("max_surge", 2, 2),
        ("max_surge", "25%", "25%"),
        ("session_affinity", None, None),
        (
            "session_affinity",
            {"header": "Mcp-Session-Id"},
            {"header": "mcp-session-id"},
        ),
        ("session_affinity", {"cookie": "Session"}, {"cookie": "Session"}),
        ("session_affinity", {"query": "a b/ü"}, {"query": "a b/ü"}),
        ("resources", None, None),
        ("resources", {}, {}),
        ("resources", {"GPU": 1, "MEM": 0.5}, {"GPU": 1.0, "MEM": 0.5}),
        ("workers", None, None),
        ("workers", "tcp://127.0.0.1:80", ("tcp://127.0.0.1:80",)),
        ("workers", ["a", "b"], ("a", "b")),
        ("workers", ("a", "b"), ("a", "b")),
        ("workers", {"a"}, ("a",)),
        ("autoscaling_config", None, None),
    ],
)
def test_deployment_option(name: str, value: object, result: object) -> None:
    found = getattr(options(**{name: value}), name)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("name", None),
        ("name", 1),
        ("name", "a/b"),
        ("name", "a#b"),
        ("name", "a\nb"),
        ("name", "\x00"),
        ("name", "\x7f"),
        ("name", "\ud800"),
        ("name", "a" * 201),
        ("route_prefix", ""),
        ("route_prefix", "a"),
        ("route_prefix", "/a/"),
        ("route_prefix", "//"),
        ("route_prefix", "/a//b"),
        ("route_prefix", "/{a}"),
        ("route_prefix", "/a}"),
        ("route_prefix", "/-/routes"),
        ("route_prefix", "/a b"),
        ("route_prefix", "/a\t"),
        ("route_prefix", 1),
        ("route_prefix", False),
        ("num_replicas", 0),
        ("num_replicas", -1),
        ("num_replicas", "1"),
        ("num_replicas", "auto"),
        ("num_replicas", 1.0),
        ("num_replicas", True),
        ("num_replicas", None),
        ("max_ongoing_requests", 0),
        ("max_ongoing_requests", "1"),
        ("max_websockets", 0),
        ("max_websockets", None),
        ("threads", 0),
        ("threads", -1),
        ("threads", "4"),
        ("threads", True),
        ("threads", 2.5),
        ("threads", None),
        ("max_unavailable", -1),
        ("max_unavailable", "1"),
        ("max_unavailable", "101%"),
        ("max_unavailable", "-1%"),
        ("max_unavailable", "25 %"),
        ("max_unavailable", "\u0663%"),
        ("max_unavailable", 0.5),
        ("max_unavailable", True),
        ("max_surge", -1),
        ("max_surge", "1"),
        ("max_queued_requests", -2),
        ("max_queued_requests", 1.5),
        ("max_queued_requests", True),
        ("max_queued_requests", "1"),
        ("resources", ["GPU"]),
        ("resources", "GPU=1"),
        ("workers", 1),
        ("workers", []),
        ("workers", ""),
        ("workers", ["a", 1]),
        ("workers", ["a", ""]),
        ("workers", {"a": 1}),
        ("session_affinity", "session"),
        ("session_affinity", {}),
        ("session_affinity", {"header": "a", "cookie": "b"}),
        ("session_affinity", {"path": "a"}),
        ("autoscaling_config", 1),
        ("autoscaling_config", "auto"),
    ],
)
def test_deployment_option_refuses(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\n.*{re.escape(repr(value))}"):
        options(**{name: value})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"header": "a b"}, "'a b' is not the name of a header"),
        ({"header": ""}, "'' is not the name of a header"),
        ({"cookie": "a=b"}, "'a=b' is not the name of a cookie"),
        ({"cookie": b"a"}, "b'a' is not the name of a cookie"),
        ({"query": "a\n"}, r"'a\\n' is not the name of a parameter of the query"),
        ({"query": "\ud800"}, "is not the name of a parameter of the query"),
        ({"query": "a" * 201}, "is not the name of a parameter of the query"),
        ({"header": "Cookie"}, "'Cookie' holds many cookies: give {'cookie': name}"),
        ({"headers": "a"}, "give one of {'header': name}, {'cookie': name} and"),
    ],
)
def test_session_affinity_refuses(value: object, text: str) -> None:
    with pytest.raises(ValidationError, match=f"session_affinity\n.*{text}"):
        options(session_affinity=value)


@pytest.mark.parametrize("name", ["name", "num_replicas"])
def test_validation_errors_are_value_errors(name: str) -> None:
    with pytest.raises(ValueError):
        options(**{name: 0})


def test_options_that_were_pickled_when_there_were_fewer() -> None:
    made = options(num_replicas=3)
    state = made.__getstate__()
    before = {n: v for n, v in state["__dict__"].items() if n not in NEW}
    found = object.__new__(DeploymentOptions)
    found.__setstate__({**state, "__dict__": before})
    assert found == made
    assert (found.num_replicas, found.threads) == (3, 1)
    assert found.replace(threads=2).threads == 2


@pytest.mark.parametrize("surge", [0, "0%"])
@pytest.mark.parametrize("unavailable", [0, "0%"])
def test_an_update_can_begin(surge: int | str, unavailable: int | str) -> None:
    with pytest.raises(ValueError, match="let no update begin"):
        options(max_surge=surge, max_unavailable=unavailable)
    assert options(max_surge=surge).max_unavailable is None
    assert options(max_surge=surge, max_unavailable=1).max_surge == surge


#: Options that are not in the state files of the first versions.
NEW = ["threads", "abandoned_call_timeout_s", "max_websockets"]
NEW += ["max_unavailable", "max_surge"]


def test_autoscaling_config_reads_back_as_given() -> None:
    given = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": "500ms"}
    assert options(autoscaling_config=given).autoscaling_config == given


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"min_replicas": -1}, "min_replicas\n.*-1 is not allowed"),
        ({"max_replicas": 0}, "max_replicas\n.*0 is not allowed"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is more than max_rep"),
        ({"min_replicas": 2}, "min_replicas=2 is more than max_replicas=1"),
        ({"initial_replicas": 2}, "initial_replicas=2 is not between min_replicas=1"),
        ({"initial_replicas": 0}, "initial_replicas=0 is not between min_replicas=1"),
        ({"upscale_delay_s": -1}, "upscale_delay_s\n.*-1 is not a duration"),
        ({"downscale_delay_s": "-1s"}, "downscale_delay_s\n.*'-1s' is not a duration"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests\n.*0 is not allowed"),
        ({"upscaling_factor": "a"}, "upscaling_factor\n.*'a' is not allowed"),
        ({"metrics_interval_s": 0}, "metrics_interval_s\n.*0.* is not allowed"),
        ({"look_back_period_s": 0.5}, "look_back_period_s=0.5 is less than metrics_"),
        ({"max_replica": 2}, "'max_replica' is not an option: did you mean 'max_repl"),
        ({"policy": "module"}, "'module' is not a policy: give 'module:function'"),
        ({"policy": lambda context: 1}, "is not a policy: give 'module:function'"),
    ],
)
def test_autoscaling_config_refuses(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        options(autoscaling_config=config)


def test_a_policy_of_a_module_goes_by_its_name() -> None:
    assert AutoscalingConfig(policy=math.floor).policy == "math:floor"
    assert AutoscalingConfig(policy="a.b:c.d").policy == "a.b:c.d"


def test_either_fixed_or_autoscaled() -> None:
    auto = {"max_replicas": 4}
    with pytest.raises(ValidationError, match="num_replicas=2 and autoscaling_config"):
        options(num_replicas=2, autoscaling_config=auto)
    fixed = options(num_replicas=2)
    with pytest.raises(ValidationError, match="num_replicas=3 and autoscaling_config"):
        fixed.replace(num_replicas=3, autoscaling_config=auto)
    # The one that is given last holds.
    scaled = fixed.replace(autoscaling_config=auto)
    assert scaled.autoscaling_config == auto
    assert scaled.replace(version="2").autoscaling_config == auto
    again = scaled.replace(num_replicas=5)
    assert (again.num_replicas, again.autoscaling_config) == (5, None)
    assert again.replace(version="2").num_replicas == 5


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({"GPU": 0}, "0 of 'GPU'"),
        ({"GPU": -1}, "-1 of 'GPU'"),
        ({"GPU": "1"}, "'1' of 'GPU'"),
        ({"GPU": True}, "True of 'GPU'"),
        ({"GPU": math.nan}, "nan of 'GPU'"),
        ({"GPU": math.inf}, "inf of 'GPU'"),
        ({1: 1}, "1 is not the name of a resource"),
        ({"": 1}, "'' is not the name of a resource"),
    ],
)
def test_resources_refuses(resources: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=f"resources\n.*{text}"):
        options(resources=resources)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 1),
        ("version", b"1"),
        ("version", ["1"]),
        ("prev_version", 1.5),
        ("prev_version", False),
        ("init_args", 1),
        ("init_args", None),
        ("init_args", "ab"),
        ("init_args", {1: 2}),
        ("init_args", {1}),
        ("init_kwargs", None),
        ("init_kwargs", [1]),
        ("init_kwargs", (("a", 1),)),
        ("init_kwargs", {1: 2}),
    ],
)
def test_wrong_types_are_type_errors(name: str, value: object) -> None:
    pattern = rf"{name}.* must be .*{re.escape(repr(value))}"
    with pytest.raises(TypeError, match=pattern):
        options(**{name: value})
    with pytest.raises(TypeError, match=pattern):
        options().replace(**{name: value})


def test_name_is_required() -> None:
    with pytest.raises(ValidationError, match="name\n.*required"):
        DeploymentOptions()  # type: ignore[call-arg]


def test_unknown_deployment_option() -> None:
    with pytest.raises(
        ValidationError,
        match=r"'num_replica' is not an option: did you mean 'num_replicas'\? the "
        r"options are name, route_prefix, .*, autoscaling_config",
    ):
        options(num_replica=1)


def test_max_concurrent_queries_is_an_older_name() -> None:
    assert options(max_concurrent_queries=5).max_ongoing_requests == 5
    both = options(max_concurrent_queries=5, max_ongoing_requests=5)
    assert both.max_ongoing_requests == 5
    with pytest.raises(
        ValidationError, match="max_concurrent_queries=5.*max_ongoing_requests=6"
    ):
        options(max_concurrent_queries=5, max_ongoing_requests=6)
    with pytest.raises(ValidationError, match="max_ongoing_requests\n.*0 is not allo"):
        options(max_concurrent_queries=0)


@pytest.mark.parametrize(
    ("given", "prefix"),
    [
        ({}, "/Counter"),
        ({"route_prefix": DEFAULT}, "/Counter"),
        ({"route_prefix": None}, None),
        ({"route_prefix": "/"}, "/"),
        ({"route_prefix": "/a/b"}, "/a/b"),
    ],
)
def test_effective_route_prefix(given: dict[str, Any], prefix: str | None) -> None:
    made = options(**given)
    assert made.effective_route_prefix == prefix
    assert pickle.loads(pickle.dumps(made)).effective_route_prefix == prefix
    assert made.replace(num_replicas=2).effective_route_prefix == prefix


@pytest.mark.parametrize("name", ["my model", "{a}"])
def test_name_that_makes_no_route(name: str) -> None:
    with pytest.raises(ValidationError, match=f"name='{name}' makes no route, give a"):
        DeploymentOptions(name=name)
    assert DeploymentOptions(name=name, route_prefix=None).name == name
    assert DeploymentOptions(name=name, route_prefix="/a").name == name


def test_replace() -> None:
    made = options(num_replicas=2, version="1", init_args=(1,))
    changed = made.replace(name="Other", version=None, max_queued_requests=-1)
    assert (changed.name, changed.effective_route_prefix) == ("Other", "/Other")
    assert (changed.num_replicas, changed.init_args) == (2, (1,))
    assert (changed.version, changed.max_queued_requests) == (None, None)
    assert (made.name, made.version, made.max_queued_requests) == ("Counter", "1", 1000)
    assert options(route_prefix="/a").replace(name="b").route_prefix == "/a"
    assert options(route_prefix="/a").replace(route_prefix=DEFAULT) == options()


def test_replace_checks_again() -> None:
    with pytest.raises(ValidationError, match="num_replicas\n.*0 is not allowed"):
        options().replace(num_replicas=0)
    with pytest.raises(ValidationError, match="'replicas' is not an option"):
        options().replace(replicas=0)
    with pytest.raises(ValidationError, match="name='my model' makes no route"):
        options().replace(name="my model")


def test_replace_knows_older_names() -> None:
    made = options(max_ongoing_requests=5).replace(max_concurrent_queries=6)
    assert made.max_ongoing_requests == 6
    with pytest.raises(ValueError, match="give one of them"):
        made.replace(max_concurrent_queries=1, max_ongoing_requests=2)


def test_options_are_frozen_and_keep_their_own_containers() -> None:
    made = options()
    with pytest.raises(ValidationError, match="frozen"):
        made.num_replicas = 2
    with pytest.raises(ValidationError, match="frozen"):
        HTTPOptions().port = 2
    args, kwargs = [1], {"a": 1}
    made = options(init_args=args, init_kwargs=kwargs)
    args.append(2)
    kwargs["b"] = 2
    assert (made.init_args, made.init_kwargs) == ((1,), {"a": 1})


def test_arguments_are_kept_as_they_are_and_not_shown() -> None:
    array = np.ones(3)
    made = options(init_args=(array,), init_kwargs={"a": array}, user_config=array)
    assert made.init_args[0] is array
    assert made.init_kwargs["a"] is array
    assert made.user_config is array
    assert "array" not in repr(made)


def test_pickle() -> None:
    made = options(init_args=(1,), user_config={"a": 1}, workers="a")
    assert pickle.loads(pickle.dumps(made)) == made
    http = HTTPOptions(token=SecretStr("a"), port=0)
    assert pickle.loads(pickle.dumps(http)) == http
    assert pickle.loads(pickle.dumps(DEFAULT)) is DEFAULT
    assert repr(DEFAULT) == "DEFAULT"
    assert pickle.loads(pickle.dumps(Settings.load())) == Settings.load()


# Settings and dask.config


def test_settings_defaults() -> None:
    assert dict(Settings.load()) == {
        "state": None,
        "keep_awake": True,
        "tick_s": 0.1,
        "ack_timeout_s": 5,
        "max_constructor_failures": 3,
        "max_constructor_failures_total": 20,
        "leave_timeout_s": 300,
        "spread_after_s": 30,
        "trial_s": 1,
        "ends_at": None,
        "end_margin_s": 60,
        "end_lead_s": 300,
        "signal_timeout_s": None,
        "window_bytes": 2**20,
        "direct": True,
        "proxy_buffer_bytes": 2**28,
        "connect_timeout_s": 5,
        "silence_timeout_s": 10,
    }


@pytest.mark.parametrize(
    ("key", "value", "name", "result"),
    [
        ("controller.tick", "1s", "tick_s", 1),
        ("controller.ack-timeout", 0, "ack_timeout_s", 0),
        ("controller.max-constructor-failures", 1, "max_constructor_failures", 1),
        (
            "controller.max-constructor-failures-total",
            9,
            "max_constructor_failures_total",
            9,
        ),
        ("transport.window", 1000, "window_bytes", 1000),
        ("transport.direct", False, "direct", False),
        ("transport.proxy-buffer", "1 MiB", "proxy_buffer_bytes", 2**20),
        ("transport.connect-timeout", "1 minute", "connect_timeout_s", 60),
        ("transport.silence-timeout", "3s", "silence_timeout_s", 3),
    ],
)
def test_settings(key: str, value: object, name: str, result: object) -> None:
    with dask.config.set({f"daskserve.{key}": value}):
        assert getattr(Settings.load(), name) == result
    assert getattr(Settings.load(), name) != result


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("controller.tick", 0),
        ("controller.ack-timeout", "soon"),
        ("controller.max-constructor-failures", 0),
        ("controller.max-constructor-failures-total", "20"),
        ("transport.window", 0),
        ("transport.proxy-buffer", -1),
        ("transport.connect-timeout", None),
        ("transport.silence-timeout", 0),
    ],
)
def test_settings_refuses(key: str, value: object) -> None:
    with dask.config.set({f"daskserve.{key}": value}):
        with pytest.raises(ValidationError, match=re.escape(str(value))):
            Settings.load()


@pytest.mark.parametrize(
    ("num_replicas", "limit"), [(1, 3), (6, 18), (7, 20), (99, 20)]
)
def test_constructor_failure_limit(num_replicas: int, limit: int) -> None:
    assert Settings.load().constructor_failure_limit(num_replicas) == limit


CONFIGURED = [
    ("http", name, HTTPOptions)
    for name in HTTPOptions.model_fields
    if name != "middlewares"
] + [
    ("deployment", name, DeploymentOptions)
    for name, field in DeploymentOptions.model_fields.items()
    if name != "init_kwargs" and field.default_factory
]


@pytest.mark.parametrize(("section", "name", "model"), CONFIGURED)
def test_defaults_come_from_dask_config(section: str, name: str, model: Any) -> None:
    key = f"daskserve.{section}.{name.removesuffix('_s').replace('_', '-')}"
    with dask.config.set({key: object()}):
        with pytest.raises(ValidationError) as caught:
            model(name="a") if section == "deployment" else model()
        assert [error["loc"] for error in caught.value.errors()] == [(name,)]


def test_packaged_keys_are_all_known() -> None:
    with open(ROOT / "daskserve/daskserve.yaml") as file:
        packaged = yaml.safe_load(file)["daskserve"]
    for section in ("http", "deployment"):
        names = {name for s, name, _ in CONFIGURED if s == section}
        keys = {name.removesuffix("_s").replace("_", "-") for name in names}
        assert set(packaged[section]) == keys
    inside = {"controller", "worker", "transport"}
    alone = {"state", "keep-awake"}
    elsewhere = {"link"}  # each time that a notebook shows one
    assert set(packaged) == {"http", "deployment", *inside, *alone, *elsewhere}
    count = sum(len(packaged[section]) for section in inside) + len(alone)
    assert count == len(Settings.model_fields)


def test_what_is_given_comes_before_dask_config() -> None:
    with dask.config.set({"daskserve.http.port": 9000, "daskserve.http.uds": "/a"}):
        assert HTTPOptions.from_user({"port": 1, "uds": None}).port == 1
        assert HTTPOptions.from_user({"port": 1, "uds": None}).uds is None
        assert HTTPOptions.from_user({}).port == 9000
        assert HTTPOptions.from_user({}).model_fields_set == set()


def test_replace_takes_nothing_from_dask_config_again() -> None:
    made = options()
    with dask.config.set({"daskserve.deployment.num-replicas": 9}):
        assert made.replace(version="1").num_replicas == 1


@pytest.mark.parametrize("section", [{"port": 9000}, {}, None])
def test_a_section_without_some_keys(section: dict[str, int] | None) -> None:
    with dask.config.set({"daskserve.http": section}):
        made = HTTPOptions()
    assert made.port == (section or {}).get("port", 8000)
    assert made.location == "HeadOnly"


def test_wrong_values_in_dask_config_are_shown() -> None:
    with dask.config.set({"daskserve.http.port": "abc"}):
        with pytest.raises(ValidationError, match="port\n.*'abc'"):
            HTTPOptions()


def test_environment_variables() -> None:
    script = (
        "from daskserve.config import *\n"
        "http, deployment = HTTPOptions(), DeploymentOptions(name='a')\n"
        "print(http.port, http.request_timeout_s, http.host, http.debug,"
        " deployment.num_replicas, Settings.load().tick_s, http.token)"
    )
    env = {
        "DASK_DASKSERVE__HTTP__PORT": "9000",
        "DASK_DASKSERVE__HTTP__REQUEST_TIMEOUT": "1 minute",
        "DASK_DASKSERVE__HTTP__HOST": "None",
        "DASK_DASKSERVE__HTTP__DEBUG": "true",
        "DASK_DASKSERVE__HTTP__TOKEN": "Mellon!",
        "DASK_DASKSERVE__DEPLOYMENT__NUM_REPLICAS": "3",
        "DASK_DASKSERVE__CONTROLLER__TICK": "50ms",
    }
    result = run_script(script, env=env)
    assert result.stdout == "9000 60.0 None True 3 0.05 **********\n"


def test_every_public_class_is_documented() -> None:
    for model in (HTTPOptions, DeploymentOptions, Settings):
        text = model.__doc__ or ""
        for name in model.model_fields:
            assert re.search(rf"\b{name}\b", text), f"{name} of {model.__name__}"
