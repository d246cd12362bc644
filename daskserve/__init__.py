"""Serve Python functions, classes and ASGI apps over HTTP from a Dask cluster."""

from daskserve.api import (
    ServeInstance,
    connect,
    get_deployment,
    history,
    list_deployments,
    shutdown,
    start,
    status,
)
from daskserve.apps import delete, get_app_handle, get_deployment_handle, run
from daskserve.batching import batch
from daskserve.composition import Application
from daskserve.deployment import Deployment, deployment
from daskserve.exceptions import ServeError
from daskserve.handle import DeploymentHandle, DeploymentResponse
from daskserve.ingress import ingress
from daskserve.multiplex import multiplexed
from daskserve.preload import dask_setup
from daskserve.replica.client import get_client
from daskserve.replica.context import (
    get_multiplexed_model_id,
    get_replica_context,
)
from daskserve.response_stream import DeploymentResponseGenerator
from daskserve.tunnel import Tunnel, tunnel

__all__ = [
    "Application",
    "Deployment",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "ServeError",
    "ServeInstance",
    "Tunnel",
    "batch",
    "connect",
    "dask_setup",
    "delete",
    "deployment",
    "get_app_handle",
    "get_client",
    "get_deployment",
    "get_deployment_handle",
    "get_multiplexed_model_id",
    "get_replica_context",
    "history",
    "ingress",
    "list_deployments",
    "multiplexed",
    "run",
    "shutdown",
    "start",
    "status",
    "tunnel",
]
