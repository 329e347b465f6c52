"""Scenarios of membership: what the master decides, and why it may.

Commands:

``birth n1 expect=3``     n1 founds a cluster; nobody is online before three wait to be
``join n4``               n4 asks to be a member; ``incarnation=I``: in this life, ``port=P``: from this address
``dead n4``               the failure detector and the roll call agree that n4 died; ``incarnation=I``
``depart n4 leaving``     n4 announces its own state
``together``              the requests of the lines below it, decided in one event
``plan``                  the master decides without a request; ``after=10``: so many seconds later
``quorum n1 n2``          may these go on without the others?
``master without n1``     who leads as seen by those who take n1 for dead
``rebirth n2 n3``         after a restart of the whole cluster these are back: who leads, and the first event
``view``                  the members
"""

from __future__ import annotations

from gostore.cluster import NodeState, RingCache, RingSpec, View
from gostore.core.address import Address
from gostore.services.cls.masters import (
    Dead,
    Depart,
    Join,
    Master,
    NodeEvent,
    Request,
    acting_master,
    apply,
    birth,
    changes_of,
    has_quorum,
    leader_of_rebirth,
    rebirth,
)

RINGS = {"global": RingSpec(3, 8), "masters": RingSpec(3, 8)}
EXPECT_TIMEOUT_S = 10.0


class Cluster:
    def __init__(self) -> None:
        self.view = View("test", 0, {}, RINGS, cache=RingCache())
        self.now_s = 0.0
        self.master: Master
        self.lines: list[str] = []

    def found(self, name: str, expect: int) -> None:
        self.master = Master(name, expect=expect, expect_timeout_s=EXPECT_TIMEOUT_S, masters_max=3)
        self.commit(birth(self.view, join(name, {}), None))
        self.plan()

    def plan(self, *requests: Request) -> None:
        """Decide on the requests, then on what follows from that."""
        plan = self.master.plan(self.view, requests, self.now_s)
        self.lines += [f"refused: {error.message}" for error in plan.refusals if error is not None]
        if plan.event is not None:
            self.commit(plan.event)
            self.plan()

    def commit(self, event: NodeEvent) -> None:
        steps = []
        for change in changes_of(self.view, event):
            old, new = change.old, change.new
            seated = "masters" in new.rings and (old is None or "masters" not in old.rings)
            if old is not None and old.state is new.state:
                what = f"{new.name} is a master now"
            else:
                what = f"{new.name} {old.state if old is not None else 'new'} -> {new.state}"
                what += ", a master" if seated else ""
            steps.append(what)
        self.view = apply(self.view, event)
        self.lines.append(f"epoch {event.epoch}, by {event.master}: {'; '.join(steps)}")


def join(name: str, options: dict[str, str]) -> Join:
    port = int(options.get("port", 7000 + int(name[1:])))
    return Join(
        name=name,
        address=Address("127.0.0.1", port, port),
        rest_port=0,
        incarnation=int(options.get("incarnation", 1)),
    )


def request(cluster: Cluster, name: str, args: list[str], options: dict[str, str]) -> Request:
    match name, args:
        case "join", [who]:
            return join(who, options)
        case "dead", [who]:
            return Dead(who, int(options.get("incarnation", cluster.view.members[who].incarnation)))
        case "depart", [who, state]:
            return Depart(who, cluster.view.members[who].incarnation, NodeState(state))
    raise ValueError(f"no such command: {name} {args}")


def test_masters(scenario, transcript):
    cluster = Cluster()

    def handle(step):
        view = cluster.view
        match step.name, step.args:
            case "birth", [name]:
                cluster.found(name, int(step.options.get("expect", 1)))
            case "together", []:
                words = [line.split() for line in step.input]
                cluster.plan(*(request(cluster, name, args, {}) for name, *args in words))
            case "plan", []:
                cluster.now_s += float(step.options.get("after", 0))
                cluster.plan()
            case "quorum", names:
                cluster.lines.append("yes" if has_quorum(view, names) else "no")
            case "master", ["without", *names]:
                cluster.lines.append(acting_master(view, names) or "nobody")
            case "rebirth", names:
                leader = leader_of_rebirth(view, names)
                if leader is None:
                    return "no quorum of those who were online is back: they wait"
                cluster.lines.append(f"{leader} leads")
                cluster.master = Master(leader, expect=1, expect_timeout_s=EXPECT_TIMEOUT_S, masters_max=3)
                cluster.commit(rebirth(view, join(leader, {"incarnation": "1001"})))
            case "view", []:
                cluster.lines.append(f"epoch {view.epoch}, master {view.master or 'nobody'}")
                cluster.lines += [
                    f"{name}: {member.state}, incarnation {member.incarnation}, "
                    f"{'masters and global ring' if 'masters' in member.rings else 'global ring'}"
                    for name, member in view.members.items()
                ]
            case name, args:
                cluster.plan(request(cluster, name, args, step.options))
        printed, cluster.lines = cluster.lines, []
        return "\n".join(printed) or "nothing changes"

    transcript(scenario, handle)
