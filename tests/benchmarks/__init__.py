"""How fast daskserve is beside the same app on plain uvicorn.

README
------
``python -m tests.benchmarks [--rows REGEX] [--seconds S] [--rounds N] [--json FILE]``

Real processes on loopback. Each row loads plain uvicorn (one process, httptools,
uvloop, no access log) and daskserve in turn, A B A B, with `wrk` where it is installed
and the client of `load` otherwise. A ratio is taken of each pair, and the table shows
medians: ``req/s`` above 1 and ``p50`` below 1 are where daskserve is ahead. The JSON
file has all raw figures. Servers that wait for their turn stay up.

A row is called ``app/variant/c=N``. Variants: ``head-far`` (HeadOnly, replica in
another worker), ``head-near`` (in the proxy's worker), ``every-1`` and ``every-2``
(EveryNode on one and two workers, a replica in each).
"""
