"""The Kubernetes platform: the manifests of `k8s/`, applied and followed by kubectl."""

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.job import RANKED
from trainer.config.load import read_sections
from trainer.errors import STOPPED, JobError, MaybeAccepted
from trainer.launch.far_folder import FarFolder
from trainer.launch.kubernetes.code import Code, pack_code, travels
from trainer.launch.kubernetes.files import bring_code, reach, running_pods
from trainer.launch.kubernetes.kubectl import KINDS, Kubectl, Refused, Unanswered
from trainer.launch.kubernetes.manifests import (
    INSTANCE,
    archive_on_claim,
    make_manifests,
    render_manifests,
    secret_object,
)
from trainer.launch.kubernetes.pod_logs import (
    COPIED_UNTIL,
    copy_logs,
    copy_rank_log,
    last_word,
    progress,
    what_agents_wait_for,
)
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.kubernetes.state import Pod, missing_nodes, newest_pods, read_pod, read_status
from trainer.launch.platform import JobStatus, Phase, Plan, Platform
from trainer.launch.pushed import note_other_inputs, pushed
from trainer.launch.snapshot import take_snapshot
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines, size
from trainer.wiring.secret import read_secret

CLAIM = "PersistentVolumeClaim"
HURRIED_S = 0.3
"""How often the cluster is asked while pods end whose Job was deleted."""
BY_TIME = "--sort-by=.metadata.creationTimestamp"
Manifests = list[dict[str, Any]]
"""What kubectl applies: the Job or JobSet comes last."""


class Kubernetes(Platform[KubernetesSite, Manifests]):
    name, folder, site_type = "kubernetes", "k8s", KubernetesSite
    ids = {"kind": "|".join([*KINDS, *KINDS.values()]), "name": "[a-z0-9]([-a-z0-9.]*[a-z0-9])?"}  # noqa: RUF012
    poll_s = 2.0
    copies_logs = speaks = True
    runs_code_of_here = False  # alone: a module may be in the image
    code: Code | None = None
    """What goes with the run that was built last."""

    def take_code(self, plan: Plan[KubernetesSite]) -> None:
        run, sweep = plan.run, read_json(plan.run.part_of)
        if travels(plan.site, run) and sweep and not run.code.exists():  # all runs of a sweep have the same code
            folder = RunFolder(Path(sweep["sweep"]))
            take_snapshot(Path.cwd(), folder, plan.job)
            run.code.symlink_to(Path("..", folder.name, "code"))
        elif travels(plan.site, run):
            take_snapshot(Path.cwd(), run, plan.job)

    def build(self, plan: Plan[KubernetesSite]) -> Manifests:
        self.code = pack_code(plan)
        note_other_inputs(plan.site.image)
        site = replace(plan.site, image=pushed(plan.site.image))
        return make_manifests(replace(plan, site=site), self.code)

    def render(self, request: Manifests) -> str:
        return render_manifests(request)

    def submit(self, plan: Plan[KubernetesSite], request: Manifests, follow: bool) -> dict[str, Any]:
        """Apply the manifests, the Job last. Raises JobError: no kubectl, no cluster, or the API server refused."""
        site, name = plan.site, request[-1]["metadata"]["name"]
        handle = {
            "context": site.context, "namespace": site.namespace, "kind": KINDS[site.kind], "name": name,
            "log_begin": size(plan.run.node_log(0)),
        }  # fmt: skip
        kubectl = Kubectl(handle)
        for stale in (plan.run.exit, plan.run.logs / COPIED_UNTIL):
            stale.unlink(missing_ok=True)
        if plan.run.handle.exists():  # the run is continued, and what is left of it is in the way
            self._delete_remains(kubectl, name)
        *others, workload = self._without_claim(kubectl, request)
        # Nothing is made of half a job: kubectl itself goes on after a refusal, and a Job would run without its policy.
        kubectl.run_or_raise("apply", "--filename=-", "--dry-run=server", text=self.render([*others, workload]) + "\n")
        # The secret is not applied, which would write it into an annotation, too, and not rendered.
        secret, made = (read_secret(plan.run.secret, {}) or b"").decode(), [secret_object(workload), *request]
        kubectl.run_or_raise("create", "--filename=-", text=json.dumps(secret_object(workload, secret)))
        try:
            kubectl.run_or_raise("apply", "--filename=-", text=self.render(others) + "\n")
            if self.code and not self.code.fits:
                bring_code(kubectl, workload, archive_on_claim(plan), self.code)
            kubectl.run_or_raise("apply", "--filename=-", text=self.render([workload]) + "\n")
        except JobError as error:
            self._take_back(kubectl, made, error)
        self._adopt(kubectl, made[:-1])
        if site.claim is None:
            note = "the site file names no claim, so this run cannot resume when its pods are replaced"
            print(f"note: {note}", file=sys.stderr)
        self.following = follow
        return handle

    def _without_claim(self, kubectl: Kubectl, request: Manifests) -> Manifests:
        """The request less a claim that is there already: its size is not ours to change."""
        claim = next((item for item in request if item["kind"] == CLAIM), None)
        if claim is None:
            return request
        name = claim["metadata"]["name"]
        try:
            there = kubectl.run("get", f"{CLAIM}/{name}", "--ignore-not-found", "--output=name")
        except Refused:  # who may make claims need not see them
            return request
        return [item for item in request if item is not claim] if there else request

    def _delete_remains(self, kubectl: Kubectl, name: str) -> None:
        """Delete what an earlier submission left. Raises JobError: it failed, or pods of it do not end."""
        try:
            remains = (kubectl.workload, f"secret/{name}")
            kubectl.run_or_raise("delete", *remains, "--ignore-not-found", "--cascade=foreground")
            kubectl.run_or_raise("delete", "configmap", f"--selector={INSTANCE}={name}", "--ignore-not-found")
        except Unanswered as error:
            problem = "pods of the earlier submission have not ended"
            remedy = (
                f"`kubectl get pods --selector={INSTANCE}={name} --output=wide` shows them. One on a node that is gone"
            )
            remedy += " for good ends when that node is deleted, or tainted node.kubernetes.io/out-of-service"
            raise JobError("kubectl", error.value, problem, remedy) from None

    def _take_back(self, kubectl: Kubectl, request: Manifests, error: JobError) -> NoReturn:
        """Remove what was made before the API server refused, the claim apart. Raises `error`; MaybeAccepted: it may
        be there all the same.
        """
        selector = f"--selector={INSTANCE}={request[-1]['metadata']['name']}"
        kinds = ",".join(dict.fromkeys(item["kind"] for item in reversed(request) if item["kind"] != CLAIM))
        try:
            kubectl.run("delete", kinds, selector, "--ignore-not-found", "--cascade=foreground", "--wait=false")
        except (JobError, Refused):
            remedy = f"{error.remedy}. `kubectl get {kubectl.workload}` says whether it was made all the same, and "
            remedy += f"`kubectl delete {kinds} {selector}` removes it"
            raise MaybeAccepted(error.key, error.value, error.problem, remedy) from None
        raise error

    def _adopt(self, kubectl: Kubectl, manifests: Manifests) -> None:
        """Let the Job own what was made for it: when it is deleted, by hand or by its TTL, only the claim remains."""
        others = [item for item in manifests if item["kind"] != CLAIM]
        try:
            [owner] = kubectl.get(kubectl.workload)
            reference = {key: owner.get(key) or owner["metadata"][key] for key in ("apiVersion", "kind", "name", "uid")}
            patch = json.dumps({"metadata": {"ownerReferences": [reference]}})
            owned = json.dumps({"apiVersion": "v1", "kind": "List", "items": others})
            kubectl.run("patch", "--filename=-", "--type=merge", f"--patch={patch}", text=owned)
        except Refused as error:
            print(f"note: the objects that were made for {kubectl.workload} will outlive it: {error}", file=sys.stderr)

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the cluster's objects, or `exit.json`, which keeps the end, because objects of ended jobs are removed."""
        ended = read_json(run.exit)
        if ended is not None and (phase := ended.get("phase") or ended.get("word")) in set(Phase):  # a word in 0.1
            reason, done = ended.get("reason", ""), ended.get("progress", {})
            return JobStatus(Phase(phase), reason, ended.get("code"), progress=done)
        try:
            status = self._ask_cluster(run, handle)
        except Refused as error:
            return JobStatus(Phase.UNKNOWN, f"kubectl failed: {error}. {error.remedy}", progress=progress(run))
        if not status.is_active and status.phase != Phase.LOST:
            write_json(run.exit, asdict(status))
        return status

    def _ask_cluster(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the cluster; what the pods print is copied to `logs/` on the way. Raises Refused: by kubectl."""
        kubectl, name = Kubectl(handle), handle["name"]
        selector = f"--selector={INSTANCE}={name}"
        objects = kubectl.get(f"{handle['kind']},pods", selector)
        pods = [read_pod(item) for item in objects if item["kind"] == "Pod"]
        owner = next((item for item in objects if item["kind"] != "Pod" and item["metadata"]["name"] == name), None)
        lines = copy_logs(kubectl, selector, run, pods) if any(pod.started for pod in pods) else []
        if self.following:
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        if owner is None:
            status = self._deleted(run, handle, pods)
        else:
            status = read_status(owner, pods, self._events(kubectl, owner, pods))
        if status.phase == Phase.RUNNING and not self.following:  # what is followed says so itself
            status = _with_words(status, run, newest_pods(pods))
        return replace(status, progress=progress(run))

    def _deleted(self, run: RunFolder, handle: dict[str, Any], pods: list[Pod]) -> JobStatus:
        """What became of a run whose Job is not there any more: by its pods, and by what their agents said last."""
        if any(pod.lives for pod in pods):
            self.poll_s = HURRIED_S  # pods without an owner vanish as soon as they have ended, with their last word
            return JobStatus(Phase.RUNNING, "its Job was deleted: its pods save and stop")
        if handle.get("cancelled"):
            return JobStatus(Phase.CANCELLED, code=STOPPED)
        word, what = last_word(run, handle.get("log_begin", 0)), f"{handle['kind']}/{handle['name']} is gone"
        if word is None:
            hint = "it was deleted by hand, or removed keep_finished_min after its end; its claim says how it ended"
            return JobStatus(Phase.LOST, f"{what}: {hint}")
        code, reason = word
        return JobStatus(Phase.STOPPED if code == STOPPED else Phase.FAILED, f"{reason} ({what})", code)

    def _events(self, kubectl: Kubectl, owner: dict[str, Any], pods: list[Pod]) -> list[dict[str, Any]]:
        """What the cluster says about the first pod that waits; or why there are none, as after an exceeded quota."""
        newest = newest_pods(pods)
        late = [pod.name for pod in newest if pod.waiting]
        if pods and not late and not missing_nodes(owner, newest):
            return []
        name = late[0] if late else owner["metadata"]["name"]
        queued = "involvedObject.kind=Workload" if owner["spec"].get("suspend") else "type=Warning"
        which = f"--field-selector={f'involvedObject.name={name}' if late else queued}"
        try:
            found = [item for item in kubectl.get("events", which, BY_TIME) if name in item["involvedObject"]["name"]]
        except (Refused, Unanswered):  # who may see pods need not see events
            return []
        return [item for item in found if late or item["involvedObject"].get("kind") != "Pod"]

    def bring_rank_log(self, run: RunFolder, handle: dict[str, Any], rank: int | None) -> None:
        """From the pod of that rank, while it runs: the run folder of the pods is not the one here."""
        if rank is None:
            return  # asking for the status brings what the nodes print
        kubectl, job = Kubectl(handle), read_sections(run.job)
        per_node = int(job.get("devices_per_node", 1)) if job.get("parallel", "auto") in ("auto", *RANKED) else 1
        for pod in running_pods(kubectl, handle["name"]):
            if pod.node == rank // per_node:
                copy_rank_log(kubectl, run, rank, pod)

    def reach(self, run: RunFolder, handle: dict[str, Any]) -> AbstractContextManager[FarFolder]:
        return reach(Kubectl(handle), run, handle["name"])

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Delete the Job: its pods get SIGTERM and their grace period to save."""
        kubectl = Kubectl(handle)
        kubectl.run_or_raise("delete", kubectl.workload, "--cascade=foreground", "--wait=false")
        handle["cancelled"], self.kept = True, None

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Suspend the Job and resume it: suspended pods do not count as failures and are replaced without delay."""
        kubectl = Kubectl(handle)
        kubectl.run_or_raise("patch", kubectl.workload, "--type=merge", '--patch={"spec":{"suspend":true}}')
        kubectl.run_or_raise("wait", kubectl.workload, "--for=condition=Suspended", "--timeout=60s")
        kubectl.run_or_raise("patch", kubectl.workload, "--type=merge", '--patch={"spec":{"suspend":false}}')


def _with_words(status: JobStatus, run: RunFolder, pods: list[Pod]) -> JobStatus:
    """The status with what the agents say: what they wait for, else how far they are."""
    if waits := what_agents_wait_for(run, pods):
        return replace(status, reason="; ".join(filter(None, (status.reason, waits))), waits=True)
    steps = [line for line in last_lines(run.node_log(0)).splitlines() if line.startswith("step ")]
    return status if status.reason else replace(status, reason=steps[-1] if steps else "")
