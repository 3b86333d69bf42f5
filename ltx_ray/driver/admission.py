"""Which replicas may join a run: those that compute what its rows claim.

A replica shows the digests of the files that it opened, the versions of its packages, its GPU, and what it computes for
a clip of a few tokens (records.Evidence). Files have to be those of the rows. Of versions and answers, what most nodes
say is right. The first replica waits until another node or an earlier run has said the same, so that no row is made by
a node that others would outvote. Two nodes that differ wait for a third, and the odd one is refused, by name, and
excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ltx_ray.config import PoolSpec
from ltx_ray.dataset.package_versions import is_same_version, own_version
from ltx_ray.driver.ballot import EARLIER_RUNS, Ballot
from ltx_ray.driver.staffing import WRONG_NODE, Staffing
from ltx_ray.placement.numerics import numerics_json
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.protocol import ReplicaStarted
from ltx_ray.records import Evidence, canonical_json
from ltx_ray.stages import DIFFUSION_STAGES

#: Seconds for which a replica waits for others that settle whether it or another one is right.
_SETTLE_SECONDS = 300.0
#: The ballot of package versions, and what begins the names of those of kernels. Those of answers are JSON.
_VERSIONS = "versions"


class Answers(Protocol):
    """Answers of earlier runs into the same output."""

    def get(self, key: str) -> str | None: ...

    def keep(self, key: str, value: str) -> None: ...


class _NoAnswers:
    """Of an output that keeps none."""

    def get(self, key: str) -> None:
        pass

    def keep(self, key: str, value: str) -> None:
        pass


@dataclass
class _Candidate:
    """A replica that is up, with its votes by ballot. `until`: how long it may wait."""

    event: ReplicaStarted
    votes: dict[str, str]
    until: float

    @property
    def node(self) -> str:
        return self.event.ranks[0].node


@dataclass(frozen=True)
class Claims:
    """What a run says of its replicas.

    `files`: digests by name. `one_model`: whether all GPUs have to be of one. `version`: of this package, the driver's.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    one_model: bool = True
    version: str = field(default_factory=own_version)


class Admission:
    """Judges the replicas that come up. `on_versions` is told what the versions of the ranks are."""

    def __init__(
        self,
        staff: Staffing,
        claims: Claims,
        answers: Answers | None,
        on_versions: Callable[[Mapping[str, str | None]], None],
    ):
        self._staff, self._claims, self._on_versions = staff, claims, on_versions
        self._answers = _NoAnswers() if answers is None else answers
        self._ballots: dict[str, Ballot] = {}
        self._waiting: dict[str, _Candidate] = {}
        #: Those that serve, by their names.
        self._joined: dict[str, _Candidate] = {}
        #: The model of GPU of the run, once it is known.
        self.model: str | None = None
        self._versions: Mapping[str, str | None] = {}
        self._kernels: dict[str, str] = {}
        self._rows_have_begun = False

    def take(self, event: ReplicaStarted, now: float) -> list[ReplicaStarted]:
        """A replica is up. Returns those that may join now, of which this may be one or not.

        Raises StartFailed when nothing else could start.
        """
        if event.ranks and event.ranks[0].node in self._staff.left_alone.wrong_nodes:
            self._staff.give_back(event.replica, WRONG_NODE)
            return []
        if (refused := self._unlike_claims(event)) is not None:
            self._staff.refuse(event, refused, now)
            return []
        if event.evidence is None:
            return [event]
        self._staff.gpu_drivers.seen(event.ranks[0].node, node_name(event.ranks), event.evidence.driver)
        spec = self._staff.pool_of(event.replica).spec
        candidate = _Candidate(event, _votes(event.evidence, spec), now + _SETTLE_SECONDS)
        for key, value in candidate.votes.items():
            self._ballot(key).cast(candidate.node, value)
        self._waiting[event.replica] = candidate
        return self.settle(now)

    def _unlike_claims(self, event: ReplicaStarted) -> str | None:
        """Why a replica cannot compute what the rows claim, whatever others say."""
        evidence = event.evidence
        version = evidence.versions.get("ltx_ray") if evidence is not None else None
        if version is not None and not is_same_version(version, self._claims.version):
            return f"its ltx-ray is {version}, and the driver's is {self._claims.version}"
        names = [evidence.device] if evidence is not None else [rank.device_name for rank in event.ranks]
        models = {name for name in names if name and not name.startswith("cpu")}
        if self._claims.one_model and models:
            model = min(models)
            if self.model not in (None, model):
                return f"its GPU is a {model}, and those of this run are {self.model}; --noise-device cpu allows both"
            self.model = model
        for name, digest in evidence.files.items() if evidence is not None else ():
            expected = self._claims.files.get(name, digest)
            if digest != expected:
                return f"its file {name} has the digest {digest}, and that of the rows is {expected}"
        return None

    def _ballot(self, key: str) -> Ballot:
        if key not in self._ballots:
            ballot = self._ballots[key] = Ballot()
            if not _of_versions(key) and (before := self._answers.get(key)) is not None:
                ballot.cast(EARLIER_RUNS, before)
        return self._ballots[key]

    def rows_begin(self, now: float) -> None:
        """All replicas have been asked for, where one of each pool was enough for the preflight clip.

        Those that made it wait until other nodes say the same, as those do that come up later.
        """
        if self._rows_have_begun:
            return
        self._rows_have_begun = True
        for name, candidate in list(self._joined.items()):
            candidate.until = now + _SETTLE_SECONDS
            if self._staff.knows(name) and self._may_be_confirmed(candidate, now):
                self._waiting[name] = self._joined.pop(name)
                self._staff.hold_back(name)

    def settle(self, now: float) -> list[ReplicaStarted]:
        """Admit and refuse those that wait, as far as their ballots are settled. Cheap when nobody waits."""
        if not self._waiting:
            return []
        admitted = []
        for name, candidate in list(self._waiting.items()):
            if not self._staff.knows(name):
                del self._waiting[name]  # It was lost meanwhile.
                continue
            if candidate.node in self._staff.left_alone.wrong_nodes:
                del self._waiting[name]
                self._staff.give_back(name, WRONG_NODE)
                continue
            verdict = self._verdict(candidate, now)
            if verdict is None:
                continue
            del self._waiting[name]
            if verdict:
                self._staff.refuse(candidate.event, verdict, now)
                continue
            self._joined[name] = candidate
            self._keep(candidate)
            admitted.append(candidate.event)
        if any(ballot.contested for ballot in self._ballots.values()):
            self._check_joined(now)
        return [event for event in admitted if self._staff.knows(event.replica)]

    def _verdict(self, candidate: _Candidate, now: float) -> str | None:
        """Why a candidate is refused, "" when it may join, None while that is not settled."""
        for key, value in candidate.votes.items():
            ballot = self._ballots[key]
            if ballot.settled is None:
                if now < candidate.until and self._may_vote(ballot, candidate):
                    # Another replica is started in its place, which may tell who is right.
                    self._staff.set_aside(candidate.event.replica)
                    return None
                self._settle_without_third(key, ballot, candidate)
            if ballot.settled != value:
                return self._difference(key, value, ballot.settled or "")
        if self._may_be_confirmed(candidate, now):
            self._staff.hold_back(candidate.event.replica)
            return None
        return ""

    def _may_be_confirmed(self, candidate: _Candidate, now: float) -> bool:
        """Whether nobody else has said what a candidate says, and replicas that are starting may."""
        ballots = {key: self._ballots[key] for key in candidate.votes}
        if any(EARLIER_RUNS in ballot.votes for ballot in ballots.values()):
            # Answers are kept by versions, so earlier runs had the same.
            ballots = {key: ballot for key, ballot in ballots.items() if not _of_versions(key)}
        alone = [ballot for ballot in ballots.values() if not ballot.confirmed]
        if now >= candidate.until or not any(self._may_vote(ballot, candidate) for ballot in alone):
            return False
        return self._staff.others_come(candidate.event.replica, self._waiting, self._rows_have_begun)

    def _may_vote(self, ballot: Ballot, candidate: _Candidate) -> bool:
        """Whether there are nodes for replicas like a candidate that have not voted yet."""
        return bool(self._staff.left_alone.usable(bool(candidate.event.ranks[0].gpus)) - ballot.nodes)

    def _settle_without_third(self, key: str, ballot: Ballot, candidate: _Candidate) -> None:
        """Nobody else can be asked. Those that serve go on; a run of one node goes on with what it has."""
        serving = [other.votes[key] for other in self._joined.values() if key in other.votes]
        value = serving[0] if serving else candidate.votes[key]
        if ballot.votes.get(EARLIER_RUNS, value) != value:
            self._staff.say(
                f"{node_name(candidate.event.ranks)}: computes otherwise than the runs before into this output, with "
                f"the same versions, and no other node can settle which is right; ltx-ray verify --sample compares"
            )
        ballot.settle_for(value)

    def _difference(self, key: str, value: str, settled: str) -> str:
        if _of_versions(key):
            return f"its package versions are {value}, and those of the other nodes {settled}"
        return f"it computes {value} for the known-answer clip, and the other nodes {settled}"

    def _check_joined(self, now: float) -> None:
        """Refuse replicas that serve, when other nodes have outvoted theirs since."""
        for name, candidate in list(self._joined.items()):
            if not self._staff.knows(name):
                del self._joined[name]
                continue
            wrong = [
                (key, value)
                for key, value in candidate.votes.items()
                if self._ballots[key].settled not in (None, value)
            ]
            if wrong:
                del self._joined[name]
                key, value = wrong[0]
                why = self._difference(key, value, self._ballots[key].settled or "")
                in_index = bool(set(DIFFUSION_STAGES) & set(self._staff.pool_of(name).spec.roles))
                where = "stage1_replica and stage2_replica of the index" if in_index else "the calls in the events"
                self._staff.exclude(candidate.event.ranks, why, now)
                self._staff.say(
                    f"clips that {node_name(candidate.event.ranks)} has made in this run are to be doubted; "
                    f"{where} name {name}"
                )

    def _keep(self, candidate: _Candidate) -> None:
        """What an admitted replica shows is what the run's rows say from now on."""
        evidence = candidate.event.evidence
        assert evidence is not None
        # Text, the DiT and decode use different kernels.
        self._kernels.update(evidence.kernels)
        versions = {**evidence.versions, **self._kernels}
        if self._versions != versions:
            self._versions = versions
            self._on_versions(versions)
        for key, value in candidate.votes.items():
            if _of_versions(key):
                continue
            if self._ballots[key].votes.get(EARLIER_RUNS, value) != value:
                self._staff.say(
                    "the nodes of this run agree, and compute otherwise than the runs before into this output, with "
                    "the same versions; ltx-ray verify --sample compares"
                )
                self._ballots[key].settle_for(value)
            self._answers.keep(key, value)


def _of_versions(ballot: str) -> bool:
    return ballot.startswith(_VERSIONS)


def _votes(evidence: Evidence, spec: PoolSpec) -> dict[str, str]:
    """What a replica says, by ballot. Answers are compared where stage, layout, numerics, versions and GPU are one."""
    versions, layout = canonical_json(dict(evidence.versions)), spec.engine.layout
    about = {
        "numerics": numerics_json(spec.engine.numerics),
        "tp": layout.tp,
        "device": evidence.device,
        "versions": versions,
        "files": dict(evidence.files),
        **({"kernels": dict(evidence.kernels)} if evidence.kernels else {}),
    }
    answers = {canonical_json({**about, "answer": name}): value for name, value in evidence.answers.items()}
    kernels = {f"{_VERSIONS} of kernels of {spec.engine.engine}": canonical_json(dict(evidence.kernels))}
    return {_VERSIONS: versions, **(kernels if evidence.kernels else {}), **answers}
