"""What becomes of requests while workers, versions and clusters come and go.

``python -m tests.chaos SCENARIO [--seed N] [--seconds S] [--location L] [--logs FILE]``

Real processes, on loopback or on hosts of their own: a cluster, one deployment on it,
and clients in another process, which ask steadily. Something is done to the cluster;
then the fate of every request is counted, and judged by what was done and by what
replicas have noted in files, which survive them. What the contract does not allow is
shown, and the command ends with 1. ``--list`` says what there is; the defaults are what
is promised.
"""
