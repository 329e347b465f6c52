"""The RPC core: typed services, calls that run at most once, over UDP and TCP."""

from gostore.comm.directory import Resolver
from gostore.comm.endpoint import Endpoint
from gostore.comm.links import Fault, Links
from gostore.comm.service import Call, Redirect, Reply, current_call, remote, service

__all__ = [
    "Call",
    "Endpoint",
    "Fault",
    "Links",
    "Redirect",
    "Reply",
    "Resolver",
    "current_call",
    "remote",
    "service",
]
