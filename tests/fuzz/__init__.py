"""What no client should be able to break: inputs by chance, seeded and bounded.

``python -m tests.fuzz [--seed N] [--seconds S] [--only KIND ...] [--case I]``

Inputs begin as valid ones, of which something is then changed, cut, said twice or sent
slowly. `requests` and `websocket` go to the HTTP server of a real cluster, `direct` to
its replica's own port, and `state` is read as a scheduler's state file is. Each kind
says what has to hold whatever comes. Beside them ``/-/healthz`` is asked all the while,
and the memory and the open files of the process under test are watched. It ends with 1
if anything was found; what was, is printed with the command that does it again.

What many clients can do together, with inputs that are known, is in `siege`.
"""
