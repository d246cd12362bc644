"""Options and settings: checked when made, frozen afterwards. Any process.

In come what users pass and, where they pass nothing, `dask.config`, which no other
module reads. Out come plain values: seconds as float, sizes in bytes. Importing
registers the defaults of ``daskserve.yaml`` with `dask.config` and does nothing else.
"""

from __future__ import annotations

import difflib
import math
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from enum import Enum
from ipaddress import ip_address, ip_network
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    field_validator,
    model_validator,
)
from starlette.middleware import Middleware

_DEFAULTS = yaml.safe_load(Path(__file__).with_name("daskserve.yaml").read_text())
dask.config.update_defaults(_DEFAULTS)

_MAX_NAME_LENGTH = 200
#: A number and a unit. Dask alone takes ".5s" for 1.5 seconds and "MB" for 1 MB.
_QUANTITY = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)? *[A-Za-z]*", re.I)


class Default(Enum):
    """Type of `DEFAULT`: an option not given, where None has a meaning of its own."""

    DEFAULT = "DEFAULT"

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT = Default.DEFAULT


def duration(value: object) -> float:
    """Return a time in seconds.

    Parameters
    ----------
    value
        Seconds as a number, a `datetime.timedelta`, or a string as Dask takes it, such
        as ``"500ms"`` or ``"2 minutes"``; zero or more.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ValueError
        If `value` is negative, not finite, a bool or no time at all.

    Examples
    --------
    >>> duration("500ms")
    0.5
    """
    try:
        seconds = _seconds(value)
    except (KeyError, OverflowError):  # no such unit; a float cannot hold it
        seconds = math.nan
    # Threads and sockets refuse to wait for longer than TIMEOUT_MAX (292 years).
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{value!r} is not a duration: give seconds, 0 or more, or a string such "
            "as '500ms' or '2 minutes'"
        )
    return seconds


def _seconds(value: object) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if _is_number(value):
        return float(value)
    if isinstance(value, str) and _QUANTITY.fullmatch(value.strip()):
        return float(parse_timedelta("0" + value.strip()))
    return math.nan


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _positive(value: float) -> float:
    if value > 0:
        return value
    raise ValueError(f"{value!r} is not allowed: give more than 0")


def _byte_count(value: object) -> int:
    try:
        if _is_whole(value) and value >= 0:
            return int(value)
        if isinstance(value, str) and _QUANTITY.fullmatch(value.strip()):
            return parse_bytes(value.strip())
    except (ValueError, OverflowError):  # no such unit; a float cannot hold it
        pass
    raise ValueError(
        f"{value!r} is not a size: give a number of bytes, 0 or more, or a string such "
        "as '4 GiB'"
    )


def _moment(value: object) -> float:
    if _is_number(value):
        return float(value)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)  # its error says what is wrong
    if isinstance(value, datetime):
        return value.timestamp()
    raise ValueError(
        f"{value!r} is not a moment: give seconds since 1970, or a date and time such "
        "as '2026-11-24T18:00:00+01:00'"
    )


def _whole_number(minimum: int, maximum: int | None = None) -> PlainValidator:
    allowed = f"of {minimum} or more" if maximum is None else f"{minimum}-{maximum}"

    def check(value: object) -> int:
        if _is_whole(value) and minimum <= value <= (maximum or value):
            return int(value)
        raise ValueError(f"{value!r} is not allowed: give a whole number {allowed}")

    return PlainValidator(check)


def _above_zero() -> PlainValidator:
    def check(value: object) -> float:
        if _is_number(value) and 0 < value < math.inf:
            return float(value)
        raise ValueError(f"{value!r} is not allowed: give a number above 0")

    return PlainValidator(check)


def _policy(value: object) -> str:
    if callable(value):
        module, name = (
            getattr(value, "__module__", ""),
            getattr(value, "__qualname__", ""),
        )
        path = f"{module}:{name}"
        if path.startswith("__main__:"):
            raise ValueError(
                f"{value!r} is defined in a script or notebook, from where the "
                "scheduler cannot import it: put it into a module that is installed "
                "there"
            )
    else:
        path = value if isinstance(value, str) else ""
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", path):
        return path
    raise ValueError(
        f"{value!r} is not a policy: give 'module:function', or a function of a module"
    )


def _where(allowed: Callable[[Any], object], rule: str) -> PlainValidator:
    def check(value: Any) -> Any:
        if allowed(value):
            return value
        raise ValueError(f"{value!r} is not allowed: {rule}")

    return PlainValidator(check)


def _secret(value: object) -> SecretStr:
    if isinstance(value, str):
        value = SecretStr(value)
    if isinstance(value, SecretStr) and value.get_secret_value():
        return value
    kind = "an empty one" if isinstance(value, SecretStr) else type(value).__name__
    raise ValueError(f"must be a string that is not empty (got {kind}), or None")


def _bearer(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError(
            "must have visible ASCII characters only, because it travels in a header"
        )
    return value


def _bare_host(value: str) -> str:
    return value[1:-1] if value.startswith("[") and value.endswith("]") else value


#: What a server answers itself; all else, also below ``/-/``, belongs to deployments.
OWN_PATHS = frozenset({"/-/routes", "/-/healthz"})
#: Below it, whether a deployment can take requests, by its name.
READY_PATH = "/-/ready/"


def is_own_path(path: str) -> bool:
    """Whether a server answers a path itself."""
    return path[:3] == "/-/" and (path in OWN_PATHS or path.startswith(READY_PATH))


def _path_prefix(value: object) -> str:
    """Check a path that goes in front of others: of a deployment or a whole server."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not allowed: give a string")
    for breach, rule in (
        (not value.startswith("/"), "start with '/'"),
        (value.endswith("/") and value != "/", "not end with '/'"),
        ("//" in value, "not contain '//'"),
        ("{" in value or "}" in value, "not contain '{' or '}'"),
        (re.search(r"\s", value), "not contain whitespace"),
    ):
        if breach:
            raise ValueError(f"{value!r} is not a path prefix: it must {rule}")
    return value


def _root_path(value: object) -> str:
    if value == "/":
        raise ValueError("'/' is not a root path: give '' for none")
    return "" if value == "" else _path_prefix(value)


def _networks(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{value!r} is not a list of addresses or networks such as ['10.0.0.0/8']"
        )
    for element in value:
        try:
            ip_network(element if isinstance(element, str) else "")
        except ValueError as error:
            raise ValueError(
                f"{element!r} is not an address such as '10.1.2.3', or a network such "
                f"as '10.0.0.0/8': {error}"
            ) from None
    return tuple(value)


def _middlewares(value: object) -> tuple[Middleware, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is not a list of starlette.middleware.Middleware")
    for index, element in enumerate(value):
        if not isinstance(element, Middleware):
            raise ValueError(
                f"element {index} is {element!r} and not a "
                "starlette.middleware.Middleware: write Middleware(cls, **options)"
            )
    return tuple(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a name: give a string that is not empty")
    if len(value) > _MAX_NAME_LENGTH:
        raise ValueError(
            f"{value!r} is not a name: {len(value)} characters, over {_MAX_NAME_LENGTH}"
        )
    for character in value:
        if character in "/#" or unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"{value!r} is not a name: it contains {character!r}")
    return value


def _resources(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a dict such as {{'GPU': 1}}")
    for key, amount in value.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"{key!r} is not the name of a resource")
        if not _is_number(amount) or not 0 < amount < math.inf:
            raise ValueError(f"{amount!r} of {key!r}: give a number above 0")
    return {key: float(amount) for key, amount in value.items()}


def _some_replicas(value: object) -> int | str:
    if _is_whole(value) and value >= 0:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"(100|[0-9]{1,2})%", value):
        return value
    raise ValueError(
        f"{value!r} is not allowed: give a number of replicas, 0 or more, or a part of "
        "them, from '0%' to '100%'; or None for what its documentation says"
    )


def _workers(value: object) -> tuple[str, ...]:
    addresses = (value,) if isinstance(value, str) else value
    if (
        not isinstance(addresses, (list, tuple, set, frozenset))
        or not addresses
        or not all(isinstance(address, str) and address for address in addresses)
    ):
        raise ValueError(
            f"{value!r} is not allowed: give a worker's address, name or host, or a "
            "list of some"
        )
    return tuple(addresses)


def _affinity(value: object) -> dict[str, str]:
    kinds = {
        "header": r"[!#$%&'*+.^_`|~0-9A-Za-z-]+",
        "cookie": r"[!#$%&'*+.^_`|~0-9A-Za-z-]+",
        "query": r"[^\x00-\x1f\x7f\ud800-\udfff]+",
    }
    if (
        not isinstance(value, Mapping)
        or len(value) != 1
        or not kinds.keys() >= value.keys()
    ):
        raise ValueError(
            f"{value!r} is not allowed: give one of {{'header': name}}, "
            "{'cookie': name} and {'query': name}, or None"
        )
    ((kind, name),) = value.items()
    if (
        not isinstance(name, str)
        or len(name) > _MAX_NAME_LENGTH
        or not re.fullmatch(kinds[kind], name)
    ):
        what = "parameter of the query" if kind == "query" else kind
        raise ValueError(f"{name!r} is not the name of a {what}")
    if kind == "header" and name.lower() in ("cookie", "set-cookie"):
        raise ValueError(f"{name!r} holds many cookies: give {{'cookie': name}} of one")
    return {kind: name.lower() if kind == "header" else name}


Seconds = Annotated[float, PlainValidator(duration)]
SomeReplicas = Annotated[int | str, PlainValidator(_some_replicas)]
PositiveSeconds = Annotated[Seconds, AfterValidator(_positive)]
ByteCount = Annotated[int, PlainValidator(_byte_count)]
Text = Annotated[
    str,
    _where(
        lambda value: isinstance(value, str) and value,
        "give a string, not an empty one",
    ),
]
Flag = Annotated[
    bool, _where(lambda value: isinstance(value, bool), "give True or False")
]
Secret = Annotated[SecretStr, PlainValidator(_secret)]
Count = Annotated[int, _whole_number(1)]
Host = Annotated[
    str,
    _where(
        lambda value: isinstance(value, str) and re.fullmatch(r"[^\s/]+", value),
        "give a name or address such as '0.0.0.0', an interface such as "
        "'interface:ib0', or None for no HTTP server",
    ),
]
Location = Annotated[
    Literal["HeadOnly", "EveryNode", "NoServer"],
    _where(
        lambda value: value in ("HeadOnly", "EveryNode", "NoServer"),
        "give 'HeadOnly', 'EveryNode', 'NoServer' or None",
    ),
]


def _configured(key: str) -> Any:
    """Take the default of a field from `dask.config` whenever an object is made."""
    key = f"daskserve.{key}"
    # `dask.config.set({"daskserve.http": {"port": 80}})` drops the other keys there.
    packaged = dask.config.get(key, config=_DEFAULTS)
    return Field(default_factory=lambda: dask.config.get(key, default=packaged))


class _Frozen(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        validate_default=True,
        # Our messages show values themselves, but for secrets.
        hide_input_in_errors=True,
    )


class _Options(_Frozen):
    """Base of what users pass: says which option is unknown, and what there is."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = cls._rename(data)
        names = list(cls.model_fields)
        for name in data:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(
                    f"{name!r} is not an option: {hint}the options are "
                    + ", ".join(names)
                )
        return data

    @classmethod
    def _rename(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Translate older names of options."""
        return data

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Unpickle; options that were not there yet have their defaults."""
        values = state["__dict__"]
        if not type(self).model_fields.keys() <= values.keys():
            given = {name: values[name] for name in state["__pydantic_fields_set__"]}
            values = {**dict(type(self)(**given)), **values}
        super().__setstate__({**state, "__dict__": values})


class HTTPOptions(_Options):
    """Where and how HTTP servers run: `start`'s ``http_options``.

    What is not given comes from ``daskserve.http.*`` of `dask.config`.
    `model_fields_set` has the names of what was given.

    Parameters
    ----------
    host
        Name or address to bind, such as ``"0.0.0.0"`` or ``"::1"``, or an interface,
        such as ``"interface:ib0"``; None for no server.
    port
        0 to 65535; 0 takes any free one.
    location
        ``"HeadOnly"``: one server on the scheduler's host. ``"EveryNode"``: one on
        every worker. ``"NoServer"`` or None: none.
    root_path
        What a proxy in front strips from paths; ``""`` or as in ``"/serve"``.
    trusted_proxies
        Addresses and networks of proxies in front that are believed what they say in
        ``X-Forwarded-For``, ``-Proto`` and ``-Prefix``; as in ``["10.0.0.0/8"]``. Who
        may connect to a Unix socket always is.
    middlewares
        `starlette.middleware.Middleware` around everything, outermost first. They see
        requests without `token` too, but not the bodies of these.
    request_timeout_s
        Seconds until a response must have started; None for no limit.
    keep_alive_timeout_s
        Seconds after which an idle connection is closed.
    max_request_body_bytes
        Larger bodies are refused; bytes or a string such as ``"4 GiB"``; None for no
        limit.
    header_timeout_s
        Seconds that a client may take to send a request's head.
    max_header_bytes
        Larger heads, request line included, are refused; and what stands beside a
        body, such as trailers, which are dropped, if it is more.
    stall_timeout_s
        Seconds for which a client may send nothing of the body that it announced, or
        take next to nothing of a response that waits for it, before it is cut off.
    max_connections
        Connections that one server holds at once. Beyond, those are closed that have
        been idle for longest, and where none is idle new ones get a 503.
    debug
        Whether responses to failed requests have the traceback.
    ssl_certfile, ssl_keyfile, ssl_ca_certs
        Paths of PEM files on the server's host. The first two go together.
    ssl_keyfile_password
        Password of `ssl_keyfile`; never shown.
    allow_plain_http
        Whether HTTP without TLS may leave the machine of a cluster that has TLS.
    uds
        Path of a Unix socket to bind in place of `host` and `port`.
    token
        Secret that requests must carry; never shown. None: no check.

    Raises
    ------
    pydantic.ValidationError
        A `ValueError`; if an option is unknown or its value is not allowed.

    Examples
    --------
    >>> HTTPOptions(port=0, request_timeout_s="500ms").request_timeout_s
    0.5
    """

    host: Annotated[Host, AfterValidator(_bare_host)] | None = _configured("http.host")
    port: Annotated[int, _whole_number(0, 65535)] = _configured("http.port")
    location: Location | None = _configured("http.location")
    root_path: Annotated[str, PlainValidator(_root_path)] = _configured(
        "http.root-path"
    )
    trusted_proxies: Annotated[tuple[str, ...], PlainValidator(_networks)] = (
        _configured("http.trusted-proxies")
    )
    middlewares: Annotated[tuple[Middleware, ...], PlainValidator(_middlewares)] = ()
    request_timeout_s: PositiveSeconds | None = _configured("http.request-timeout")
    keep_alive_timeout_s: Seconds = _configured("http.keep-alive-timeout")
    max_request_body_bytes: ByteCount | None = _configured(
        "http.max-request-body-bytes"
    )
    header_timeout_s: PositiveSeconds = _configured("http.header-timeout")
    max_header_bytes: Annotated[ByteCount, AfterValidator(_positive)] = _configured(
        "http.max-header-bytes"
    )
    stall_timeout_s: PositiveSeconds = _configured("http.stall-timeout")
    max_connections: Count = _configured("http.max-connections")
    debug: Flag = _configured("http.debug")
    ssl_certfile: Text | None = _configured("http.ssl-certfile")
    ssl_keyfile: Text | None = _configured("http.ssl-keyfile")
    ssl_keyfile_password: Secret | None = _configured("http.ssl-keyfile-password")
    ssl_ca_certs: Text | None = _configured("http.ssl-ca-certs")
    allow_plain_http: Flag = _configured("http.allow-plain-http")
    uds: Text | None = _configured("http.uds")
    token: Annotated[Secret, AfterValidator(_bearer)] | None = _configured("http.token")

    @model_validator(mode="after")
    def _check_ssl(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError(
                f"ssl_certfile={self.ssl_certfile!r} and "
                f"ssl_keyfile={self.ssl_keyfile!r} must be given together"
            )
        for name in ("ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ValueError(f"{name} needs ssl_certfile and ssl_keyfile")
        return self

    @classmethod
    def from_user(cls, options: Mapping[str, Any] | HTTPOptions | None) -> Self:
        """Check what a user passed.

        Parameters
        ----------
        options
            Options by name; None for none.

        Raises
        ------
        TypeError
            If `options` is not a mapping.
        pydantic.ValidationError
            A `ValueError`; if an option is unknown or its value is not allowed.
        """
        if isinstance(options, cls):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(
                f"http_options must be a dict, not of type {type(options).__name__}"
            )
        return cls.model_validate(dict(options or {}))

    @property
    def server_enabled(self) -> bool:
        """Whether there is to be any HTTP server."""
        return self.location not in (None, "NoServer") and self.host is not None

    @property
    def exposed(self) -> bool:
        """Whether HTTP leaves the machine, and is not encrypted."""
        if self.uds or self.ssl_certfile or not self.server_enabled:
            return False
        assert self.host is not None
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:  # a name or an interface
            return self.host not in ("localhost", "interface:lo")

    def difference(self, other: HTTPOptions) -> dict[str, tuple[Any, Any]]:
        """Return the options that differ, as ``{name: (own value, other's value)}``.

        Secrets are shown as ``"<hidden>"`` and middlewares by class. Middlewares are
        compared by class, args and kwargs; classes and functions count as equal if
        module and name are, as one that comes from another process is never the same
        object.
        """
        return {
            name: (_shown(getattr(self, name)), _shown(getattr(other, name)))
            for name in HTTPOptions.model_fields
            if _comparable(getattr(self, name)) != _comparable(getattr(other, name))
        }

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(name, _shown(getattr(self, name))) for name in type(self).model_fields]


def _shown(value: Any) -> Any:
    """Return what may be printed: a middleware's arguments can be secrets as well."""
    if isinstance(value, SecretStr):
        return "<hidden>"
    if isinstance(value, Middleware):
        return getattr(value.cls, "__name__", type(value.cls).__name__)
    if isinstance(value, tuple):
        return [_shown(element) for element in value]
    return value


def _comparable(value: Any) -> Any:
    if isinstance(value, Middleware):
        return [_comparable(part) for part in value]
    if isinstance(value, (list, tuple)):
        return [_comparable(element) for element in value]
    if isinstance(value, dict):
        return {key: _comparable(element) for key, element in value.items()}
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__module__, value.__qualname__
    return value


class AutoscalingConfig(_Options):
    """How a deployment's number of replicas follows its load.

    Parameters
    ----------
    min_replicas, max_replicas
        The least and the most. With 0, a deployment without requests has no replica,
        and the next request waits for one.
    initial_replicas
        How many the first ``deploy()`` starts; None for `min_replicas`, but 1 at least,
        so that it can tell whether the code starts.
    target_ongoing_requests
        How many requests each replica should have, those that wait included.
    upscale_delay_s, downscale_delay_s
        How long more, or fewer, replicas must be called for until there are.
    upscaling_factor, downscaling_factor
        Which part of the way a step goes: 0.5 adds, or removes, half of what is called
        for.
    metrics_interval_s
        Seconds between two reports of a process, and two decisions.
    look_back_period_s
        Seconds over which requests are averaged.
    policy
        ``"module:function"``, or such a function: of an ``AutoscalingContext``, returns
        the number called for. It is imported by the scheduler. None: as many as have
        `target_ongoing_requests` each.

    Raises
    ------
    pydantic.ValidationError
        A `ValueError`; if an option is unknown or its value is not allowed.

    Examples
    --------
    >>> AutoscalingConfig(min_replicas=0, max_replicas=8).first_number
    1
    """

    min_replicas: Annotated[int, _whole_number(0)] = 1
    max_replicas: Count = 1
    initial_replicas: Annotated[int, _whole_number(0)] | None = None
    target_ongoing_requests: Annotated[float, _above_zero()] = 2.0
    upscale_delay_s: Seconds = 30.0
    downscale_delay_s: Seconds = 600.0
    upscaling_factor: Annotated[float, _above_zero()] = 1.0
    downscaling_factor: Annotated[float, _above_zero()] = 1.0
    metrics_interval_s: PositiveSeconds = 1.0
    look_back_period_s: PositiveSeconds = 30.0
    policy: Annotated[str, PlainValidator(_policy)] | None = None

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        low, high, first = self.min_replicas, self.max_replicas, self.initial_replicas
        if low > high:
            raise ValueError(f"min_replicas={low} is more than max_replicas={high}")
        if first is not None and not low <= first <= high:
            raise ValueError(
                f"initial_replicas={first} is not between min_replicas={low} and "
                f"max_replicas={high}"
            )
        interval, period = self.metrics_interval_s, self.look_back_period_s
        if period < interval:
            raise ValueError(
                f"look_back_period_s={period:g} is less than "
                f"metrics_interval_s={interval:g}"
            )
        return self

    @property
    def first_number(self) -> int:
        """How many replicas there are to begin with."""
        if self.initial_replicas is not None:
            return self.initial_replicas
        return max(self.min_replicas, 1)

    def clamp(self, number: int) -> int:
        """Return the number allowed that is nearest."""
        return max(self.min_replicas, min(self.max_replicas, number))


class DeploymentOptions(_Options):
    """How a deployment runs: `deployment`'s keywords.

    What is not given comes from ``daskserve.deployment.*`` of `dask.config` if it is
    there.

    Parameters
    ----------
    name
        1 to 200 characters, without ``/``, ``#`` and control characters.
    route_prefix
        Path that HTTP requests begin with, such as ``"/counter"``; None for no HTTP;
        `DEFAULT`, if not given, for ``/{name}``.
    num_replicas
        1 or more.
    init_args, init_kwargs
        Arguments of the constructor.
    version, prev_version
        Names of this version and of the one that it is to replace.
    user_config
        What `reconfigure` gets.
    max_ongoing_requests
        Requests that a replica works on at once, 1 or more; None, for async code only,
        for no limit. ``max_concurrent_queries`` is an older name of it. WebSockets have
        a limit of their own.
    max_websockets
        WebSockets that one replica has open at once, 1 or more; beyond, handshakes are
        refused at once, with 503.
    threads
        Sync calls that run at once in a replica, 1 or more.
    max_queued_requests
        Requests that may wait, over all replicas, 0 or more; None, or -1, for no limit.
    max_unavailable
        How many replicas fewer than before may serve while others of another version
        take their places, if there is no room for one more beside them: a number, or a
        part such as ``"25%"``, rounded down, as in Kubernetes. None: 1 of two or more,
        and a single one stays until the new one runs.
    max_surge
        How many replicas more than ``num_replicas`` there may be then: a number, or a
        part such as ``"25%"``, rounded up; those that end count. None: as many as have
        room, so that all new ones start at once.
    session_affinity
        Where a request has the id of its session: ``{"header": name}``,
        ``{"cookie": name}`` or ``{"query": name}``. A session stays on its replica
        while that lives and has room. None: each request goes to any.
    resources
        Dask resources that each replica takes, such as ``{"GPU": 1}``.
    workers
        Addresses, names or hosts of workers that replicas may run on, or one such.
    health_check_period_s, health_check_timeout_s
        Seconds between checks of a replica, and until one that gives no answer is
        replaced. A check asks the replica's event loop, and ``check_health()`` if the
        class has one; a replica is replaced when that raises three times in a row. A
        worker that says nothing for both together loses its replicas.
    abandoned_call_timeout_s
        Seconds after which a replica is replaced whose sync code is still in a call for
        which nobody waits any more: it timed out, was cancelled, or its client left.
        None: never.
    graceful_shutdown_timeout_s
        Seconds that a replica's requests may take to end before it is stopped.
    graceful_shutdown_wait_loop_s
        Seconds between looks at whether they have ended.
    request_timeout_s
        Seconds until a response must have started; None for that of `HTTPOptions`.
    deploy_timeout_s
        Seconds after which `deploy` raises if replicas are not healthy.
    autoscaling_config
        Keywords of `AutoscalingConfig`, for a number of replicas that follows the load;
        then without `num_replicas`.

    Raises
    ------
    TypeError
        If `init_args`, `init_kwargs`, `version` or `prev_version` has a wrong type.
    pydantic.ValidationError
        A `ValueError`; if an option is unknown or its value is not allowed.

    Examples
    --------
    >>> DeploymentOptions(name="Counter").effective_route_prefix
    '/Counter'
    """

    name: Annotated[str, PlainValidator(_name)]
    route_prefix: str | Default | None = DEFAULT
    num_replicas: Count = _configured("deployment.num-replicas")
    init_args: tuple[Any, ...] = Field(default=(), repr=False)
    init_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    version: str | None = None
    prev_version: str | None = None
    user_config: Any = Field(default=None, repr=False)
    max_ongoing_requests: Count | None = _configured("deployment.max-ongoing-requests")
    max_websockets: Count = _configured("deployment.max-websockets")
    threads: Count = _configured("deployment.threads")
    max_queued_requests: Annotated[int, _whole_number(0)] | None = _configured(
        "deployment.max-queued-requests"
    )
    max_unavailable: SomeReplicas | None = _configured("deployment.max-unavailable")
    max_surge: SomeReplicas | None = _configured("deployment.max-surge")
    session_affinity: Annotated[dict[str, str], PlainValidator(_affinity)] | None = None
    resources: Annotated[dict[str, float], PlainValidator(_resources)] | None = None
    workers: Annotated[tuple[str, ...], PlainValidator(_workers)] | None = None
    health_check_period_s: PositiveSeconds = _configured(
        "deployment.health-check-period"
    )
    health_check_timeout_s: PositiveSeconds = _configured(
        "deployment.health-check-timeout"
    )
    abandoned_call_timeout_s: PositiveSeconds | None = _configured(
        "deployment.abandoned-call-timeout"
    )
    graceful_shutdown_timeout_s: Seconds = _configured(
        "deployment.graceful-shutdown-timeout"
    )
    graceful_shutdown_wait_loop_s: Seconds = _configured(
        "deployment.graceful-shutdown-wait-loop"
    )
    request_timeout_s: PositiveSeconds | None = _configured(
        "deployment.request-timeout"
    )
    deploy_timeout_s: PositiveSeconds = _configured("deployment.deploy-timeout")
    autoscaling_config: dict[str, Any] | None = None

    @classmethod
    def _rename(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "max_concurrent_queries" not in data:
            return data
        data = dict(data)
        older = data.pop("max_concurrent_queries")
        newer = data.setdefault("max_ongoing_requests", older)
        if newer != older:
            raise ValueError(
                f"max_concurrent_queries={older!r} is the older name of "
                f"max_ongoing_requests={newer!r}: give one of them"
            )
        return data

    @field_validator("route_prefix", mode="plain")
    @classmethod
    def _check_route_prefix(cls, value: object) -> str | Default | None:
        if value is None or isinstance(value, Default):
            return value
        if isinstance(value, str) and (is_own_path(value) or is_own_path(f"{value}/")):
            raise ValueError(f"{value!r} is answered by the server itself")
        return _path_prefix(value)

    # Pydantic lets a TypeError through as it is, and makes a ValidationError of a
    # ValueError only.

    @field_validator("init_args", mode="plain")
    @classmethod
    def _check_init_args(cls, value: object) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"init_args must be a tuple, not {value!r}")
        return tuple(value)

    @field_validator("init_kwargs", mode="plain")
    @classmethod
    def _check_init_kwargs(cls, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise TypeError(f"init_kwargs must be a dict with str keys, not {value!r}")
        return dict(value)

    @field_validator("version", "prev_version", mode="plain")
    @classmethod
    def _check_version(cls, value: object) -> str | None:
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"version and prev_version must be a str or None, not {value!r}"
            )
        return value

    @field_validator("max_queued_requests", mode="before")
    @classmethod
    def _read_no_limit(cls, value: object) -> object:
        return None if isinstance(value, Integral) and value == -1 else value

    @field_validator("autoscaling_config", mode="plain")
    @classmethod
    def _check_autoscaling(cls, value: object) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a dict such as {{'max_replicas': 8}}")
        AutoscalingConfig(**value)  # its error says what is wrong
        return dict(value)

    @model_validator(mode="after")
    def _check_one_number(self) -> Self:
        fixed = "num_replicas" in self.model_fields_set
        if fixed and self.autoscaling_config is not None:
            raise ValueError(
                f"num_replicas={self.num_replicas} and autoscaling_config: give one of "
                "them; initial_replicas is how many there are to begin with"
            )
        return self

    @model_validator(mode="after")
    def _check_update(self) -> Self:
        none = (0, "0%")
        if self.max_surge in none and self.max_unavailable in none:
            raise ValueError(
                f"max_surge={self.max_surge!r} and max_unavailable="
                f"{self.max_unavailable!r} let no update begin: one has to be more"
            )
        return self

    @model_validator(mode="after")
    def _check_default_route(self) -> Self:
        if self.route_prefix is DEFAULT:
            try:
                _path_prefix(f"/{self.name}")
            except ValueError as error:
                raise ValueError(
                    f"name={self.name!r} makes no route, give a route_prefix: {error}"
                ) from None
        return self

    @property
    def effective_route_prefix(self) -> str | None:
        """Path that HTTP requests begin with; None for no HTTP."""
        if isinstance(self.route_prefix, Default):
            return f"/{self.name}"
        return self.route_prefix

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with other values.

        A default `route_prefix` follows a new `name`. Nothing is taken from
        `dask.config` again.

        Parameters
        ----------
        **changes
            Options as in the constructor.

        Raises
        ------
        TypeError, pydantic.ValidationError
            As the constructor.
        """
        kept = dict(self)
        # Of a fixed number and autoscaling the one that is given last holds.
        if changes.get("autoscaling_config", self.autoscaling_config) is not None:
            if "num_replicas" in changes:
                kept["autoscaling_config"] = None
            else:
                del kept["num_replicas"]
        return type(self).model_validate({**kept, **self._rename(changes)})


class BatchOptions(_Options):
    """How ``@serve.batch`` gathers calls.

    Parameters
    ----------
    max_batch_size
        The most items in one batch.
    batch_wait_timeout_s
        Seconds that the first item of a batch waits for others.
    max_concurrent_batches
        How many batches run at a time.
    target_latency_s
        Seconds that one batch should take; None: `max_batch_size` is aimed for.

    Raises
    ------
    pydantic.ValidationError
        A `ValueError`; if an option is unknown or its value is not allowed.

    Examples
    --------
    >>> BatchOptions(batch_wait_timeout_s="5ms").batch_wait_timeout_s
    0.005
    """

    max_batch_size: Count = 10
    batch_wait_timeout_s: Seconds = 0.01
    max_concurrent_batches: Count = 1
    target_latency_s: PositiveSeconds | None = None

    def replace(self, **values: Any) -> Self:
        """Return others with some values changed, checked as ever."""
        return type(self)(**{**self.model_dump(), **values})


class MultiplexOptions(_Options):
    """What ``@serve.multiplexed`` keeps.

    Parameters
    ----------
    max_num_models_per_replica
        How many models a replica keeps; None for no limit.
    unload
        Called with each model that is pushed out; None for nothing.

    Raises
    ------
    pydantic.ValidationError
        A `ValueError`; if an option is unknown or its value is not allowed.
    """

    max_num_models_per_replica: Count | None = 3
    unload: Annotated[
        Any, _where(lambda v: v is None or callable(v), "give a function, or None")
    ] = None


class Settings(_Frozen):
    """What only `dask.config` sets: ``controller``, ``worker``, ``transport``.

    Parameters
    ----------
    state
        Path or fsspec URL where a scheduler with ``--preload daskserve`` keeps what is
        deployed. None: it ends with the scheduler.
    keep_awake
        Whether the scheduler's ``idle-timeout`` does not count while something is
        deployed.
    tick_s
        Seconds between two looks of the controller at what is and what should be.
    ack_timeout_s
        Seconds that the controller waits for a proxy or handle to confirm new routes.
    max_constructor_failures
        Failing constructors for each replica wanted before a deployment has failed.
    max_constructor_failures_total
        Upper limit of that for a whole deployment.
    leave_timeout_s
        Seconds that a worker which is retired waits for replicas to run elsewhere.
    spread_after_s
        Seconds after a worker has come until replicas that piled up elsewhere spread.
        None: they stay.
    trial_s
        Seconds for which the first replica of new code starts alone, in case that costs
        its worker. 0: all start at once.
    ends_at
        When a worker's job ends: seconds since 1970, or a date and time with its zone.
        None: what the batch system says, if it does.
    end_margin_s
        Seconds before that at which its replicas move, if there is a better place.
    end_lead_s
        Seconds before that at which ``adapt()`` is told to ask for another worker.
    signal_timeout_s
        Seconds that a worker goes on after SIGTERM at most. None: as long as the batch
        system that it runs in waits, or 20.
    window_bytes
        Bytes of one request or response that may be on their way unread.
    direct
        Whether replicas listen on ports of their own, for quicker connections.
    proxy_buffer_bytes
        Bytes of all responses together that one proxy may hold; beyond, windows
        shrink.
    connect_timeout_s
        Seconds for opening a connection to a replica's worker.
    silence_timeout_s
        Seconds after which the other end of a connection is given up if not even the
        kernel there answers: its host has lost its power or its network.
    """

    state: Text | None = _configured("state")
    keep_awake: Flag = _configured("keep-awake")
    tick_s: PositiveSeconds = _configured("controller.tick")
    ack_timeout_s: Seconds = _configured("controller.ack-timeout")
    max_constructor_failures: Count = _configured("controller.max-constructor-failures")
    max_constructor_failures_total: Count = _configured(
        "controller.max-constructor-failures-total"
    )
    leave_timeout_s: Seconds = _configured("controller.leave-timeout")
    spread_after_s: Seconds | None = _configured("controller.spread-after")
    trial_s: Seconds = _configured("controller.trial")
    ends_at: Annotated[float, PlainValidator(_moment)] | None = _configured(
        "worker.ends-at"
    )
    end_margin_s: Seconds = _configured("worker.end-margin")
    end_lead_s: Seconds = _configured("worker.end-lead")
    signal_timeout_s: Seconds | None = _configured("worker.signal-timeout")
    window_bytes: Annotated[ByteCount, AfterValidator(_positive)] = _configured(
        "transport.window"
    )
    direct: Flag = _configured("transport.direct")
    proxy_buffer_bytes: ByteCount = _configured("transport.proxy-buffer")
    connect_timeout_s: PositiveSeconds = _configured("transport.connect-timeout")
    silence_timeout_s: PositiveSeconds = _configured("transport.silence-timeout")

    @classmethod
    def load(cls) -> Self:
        """Return the present values of `dask.config`.

        Raises
        ------
        pydantic.ValidationError
            A `ValueError`; if one of them is not allowed.
        """
        return cls()

    def constructor_failure_limit(self, num_replicas: int) -> int:
        """Return how many constructors may fail before `num_replicas` are given up."""
        return min(
            self.max_constructor_failures * num_replicas,
            self.max_constructor_failures_total,
        )
