"""Scenarios of membership: what the master decides, and why it may.

Commands:

``birth n1 expect=3``     n1 founds a cluster; nobody is online before three wait to be
``join n4``               n4 asks to be a member; ``incarnation=I``: in this life, ``port=P``: from this address
``dead n4``               the failure detector found that n4 died, and it did not answer; ``incarnation=I``
``depart n4 leaving``     n4 announces its own state
``together``              the requests of the lines below it, decided in one event
``plan``                  the master decides without a request; ``after=10``: so many seconds later
``leader n2``             n2 is elected, in the next term of the masters' group
``late n1``               an event that n1 planned before it was deposed is committed now, too late
``group``                 the members of the masters' group follow the seats, step by step; ``suspected=n3``
``view``                  the members
"""

from __future__ import annotations

from gostore.cluster import NodeState, RingCache, RingSpec, View, found
from gostore.core.address import Address
from gostore.services.cls.machine import Machine, pack
from gostore.services.cls.masters import (
    Dead,
    Depart,
    Join,
    Master,
    NodeEvent,
    Request,
    changes_of,
    next_group,
)

RINGS = {"global": RingSpec(3, 8), "masters": RingSpec(3, 8)}
EXPECT_TIMEOUT_S = 10.0
SEAT_TIMEOUT_S = 30.0


class Cluster:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.term = 0
        self.index = 0
        self.expect = 1
        self.master: Master
        self.lines: list[str] = []
        self.machine = Machine(View("test", 0, {}, RINGS, cache=RingCache()), lambda event, view: None)
        self.voters: tuple[str, ...] = ()
        self.learners: tuple[str, ...] = ()

    @property
    def view(self) -> View:
        return self.machine.view

    def lead(self, name: str, *requests: Request) -> None:
        self.term += 1
        self.master = Master(
            name,
            expect=self.expect,
            expect_timeout_s=EXPECT_TIMEOUT_S,
            masters_max=3,
            seat_timeout_s=SEAT_TIMEOUT_S,
            found=lambda view: found(view, 1),
        )
        self.plan(*requests)

    def plan(self, *requests: Request) -> None:
        """Decide on the requests, then on what follows from that."""
        plan = self.master.plan(self.view, self.term, requests, self.now_s)
        self.lines += [f"refused: {error.message}" for error in plan.refusals if error is not None]
        if plan.event is not None:
            self.commit(plan.event)
            self.plan()

    def commit(self, event: NodeEvent) -> None:
        steps, before = [], self.view
        self.index += 1
        if not self.machine.apply(self.index, pack(event)):
            self.lines.append(f"epoch {event.epoch}, by {event.master} in term {event.term}: void")
            return
        for change in changes_of(before, event):
            old, new = change.old, change.new
            seated, was = "masters" in new.rings, old is not None and "masters" in old.rings
            what = f"{new.name} {old.state if old is not None else 'new'} -> {new.state}"
            if old is not None and old.state is new.state and old.incarnation == new.incarnation:
                what = f"{new.name} is {'a master now' if seated else 'no master any more'}"
            elif seated and not was:
                what += ", a master"
            steps.append(what)
        if event.founders:
            steps.append(f"the shards are founded by {', '.join(' '.join(names) for names in event.founders)}")
        said = "; ".join(steps) or "nothing but that it leads"
        self.lines.append(f"epoch {event.epoch}, by {event.master} in term {event.term}: {said}")

    def follow_seats(self, suspected: str) -> None:
        while step := next_group(self.view, self.voters, self.learners, suspected.split(",")):
            self.voters, self.learners = step
            learning = f"; {' '.join(self.learners)} learn" if self.learners else ""
            self.lines.append(f"{' '.join(self.voters)} vote{learning}")


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
                cluster.expect = int(step.options.get("expect", 1))
                cluster.voters = (name,)
                cluster.lead(name, join(name, {}))
            case "together", []:
                words = [line.split() for line in step.input]
                cluster.plan(*(request(cluster, name, args, {}) for name, *args in words))
            case "plan", []:
                cluster.now_s += float(step.options.get("after", 0))
                cluster.plan()
            case "leader", [name]:
                cluster.lead(name)
            case "late", [name]:
                cluster.commit(NodeEvent(view.epoch, view.digest - 1, cluster.term - 1, name))
            case "group", []:
                cluster.follow_seats(step.options.get("suspected", ""))
            case "view", []:
                cluster.lines.append(f"epoch {view.epoch}, master {view.master} in term {view.term}")
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
