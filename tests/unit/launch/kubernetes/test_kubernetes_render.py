"""Kubernetes manifests: what is committed is what is rendered, and the API's schemas and our rules take it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pod_rules  # noqa: F401  adds its rules
import pytest
import yaml
from manifest_rules import Manifest, container, job, only, problems, variables
from omegaconf import OmegaConf
from paths import ROOT

from trainer.config.load import merge_job, to_job, to_text
from trainer.errors import JobError
from trainer.launch.kubernetes.manifests import make_manifests, object_name, render_manifests
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.platform import Plan
from trainer.launch.submit import render_job
from trainer.run.folder import RunFolder

EXAMPLES = sorted((ROOT / "k8s/examples").glob("*.yaml"))
VERSIONS = ("1.29", "1.33", "1.36")


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def make_plan(*overrides: str, run: str = "digits-ID", **site: Any) -> Plan:
    config = merge_job(ROOT / "jobs/digits.yaml", ["nodes=2", "devices_per_node=1", *overrides])
    return Plan(to_job(config), to_text(config), RunFolder(Path("/somewhere", run)), KubernetesSite(**site))


def load(text: str) -> list[Manifest]:
    return list(yaml.safe_load_all(text))


def example(name: str) -> list[Manifest]:
    return load((ROOT / f"k8s/examples/{name}.yaml").read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_what_its_first_line_prints(path: Path) -> None:
    first, _, rest = path.read_text().partition("\n")
    muster, verb, job_file, *words = shlex.split(first.removeprefix("# "))
    assert (muster, verb) == ("muster", "render")
    site = Path(words[words.index("--site") + 1]) if "--site" in words else None
    overrides = [word for word in words if "=" in word]
    rendered = render_job(job_file, overrides, "kubernetes", site) + "\n"
    assert rendered == rest, f"stale: {first.removeprefix('# ')}, below its own first line, makes it anew"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_schemas_take_an_example(path: Path, version: str) -> None:
    for document in load(path.read_text()):
        if document["kind"] != "JobSet":
            kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_take_every_site_key() -> None:
    site = KubernetesSite(
        namespace="team", image_pull_secrets=["registry"], command=["python", "-m", "muster", "agent"],
        gpu="nvidia.com/gpu", resources={"rdma/hca": "1"}, claim="runs", claim_size="1Ti", claim_storage_class="nfs",
        mounts=["data:/data:ro"],
        node_selector={"pool": "gpu"}, tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        spread="topology.kubernetes.io/zone", spread_policy="DoNotSchedule", priority_class="high", queue="team",
        runtime_class="nvidia", annotations={"sidecar.istio.io/inject": "false"}, env={"A": "1"}, secrets=["tracker"],
        fabric="efa", egress=[{"ports": [{"port": 443, "protocol": "TCP"}]}],
    )  # fmt: skip
    documents = make_manifests(Plan(make_plan().job, make_plan().job_text, RunFolder(Path("digits-ID")), site))
    for document in documents:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
        assert document["metadata"]["namespace"] == "team"
    assert problems(documents) == []


def test_the_schemas_refuse_a_misspelt_field() -> None:
    """The check above bites."""
    document = only(example("digits"), "Job")
    document["spec"]["template"]["spec"]["subDomain"] = "digits"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.36", strict=True)


def test_the_templates_are_manifests_with_known_keys() -> None:
    """Each template is a YAML document of a kind that kubectl knows, and nothing but YAML."""
    kinds = {path.stem: yaml.safe_load(path.read_text())["kind"] for path in (ROOT / "k8s").glob("*.yaml")
             if path.stem not in ("site",)}  # fmt: skip
    assert kinds == {
        "claim": "PersistentVolumeClaim", "configmap": "ConfigMap", "job": "Job", "jobset": "JobSet",
        "kustomization": "Kustomization", "networkpolicy": "NetworkPolicy", "pod": "PodTemplate", "service": "Service",
    }  # fmt: skip


def test_the_published_models_of_jobset_know_every_field() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    document = only(example("jobset"), "JobSet")
    assert models.JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
    document["spec"]["failurePolicy"]["maxRestart"] = 3  # the models drop what they do not know, so the test bites
    assert models.JobsetV1alpha2JobSet.from_dict(document).to_dict() != document


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_means_what_it_should(path: Path) -> None:
    assert problems(load(path.read_text())) == []


def test_the_job_of_the_pods_is_the_job() -> None:
    plan = make_plan("train.lr=0.5", "seed=7")
    documents = load(render_manifests(make_manifests(plan)))
    config = only(documents, "ConfigMap")["data"]["job.yaml"]
    assert (job(documents)["train"]["lr"], job(documents)["seed"], job(documents)["nodes"]) == (0.5, 7, 2)
    path = ROOT / "jobs/digits.yaml"
    assert yaml.safe_load(config).keys() == asdict(to_job(merge_job(path))).keys()


@pytest.mark.parametrize("text", [r"${oc.env:SECRET}", r"a\${b}", r"a\\${c}", "$", "${", "x: [1", "é\n  - 'q\""])
def test_values_of_the_job_arrive_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all: an interpolation is left to the pod, so that no secret of this machine is written down."""
    monkeypatch.setenv("SECRET", "hush")
    config = merge_job(ROOT / "jobs/digits.yaml")
    config.script_args = [text if text.startswith("${oc") else text.replace("${", r"\${")]
    rendered = render_manifests(make_manifests(replace(make_plan(), job_text=to_text(config))))
    assert "hush" not in rendered
    sent = OmegaConf.create(only(load(rendered), "ConfigMap")["data"]["job.yaml"])
    assert OmegaConf.to_container(sent)["script_args"] == OmegaConf.to_container(config)["script_args"]


@pytest.mark.parametrize(
    "value", ["1", "1e3", "0x1F", "on", "true", "null", "~", "1:30", "", "a: b", "- a", "#", "4Gi"]
)
def test_variables_are_strings_for_every_yaml_reader(value: str) -> None:
    text = render_manifests(make_manifests(make_plan(env={"OWN": value})))
    assert variables(load(text))["OWN"] == value
    (line,) = [line for at, line in enumerate(text.splitlines()) if text.splitlines()[at - 1].endswith("name: OWN")]
    # kubectl's reader takes 1e3 for a number and on for a boolean; Python's does not agree about all of them.
    assert line.split("value: ")[1].startswith('"') or value == "4Gi"


@pytest.mark.parametrize(
    ("run", "nodes", "expected"),
    [
        ("digits-ID", 2, "digits"),
        ("digits-1121-111127-8153", 2, "digits-1121-111127-8153"),
        ("My_Job.v2-1121", 2, "my-job-v2-1121"),
        ("7b-model", 2, "m-7b-model"),
        ("--x--", 2, "x"),
    ],
)
def test_objects_are_named_after_the_run(run: str, nodes: int, expected: str) -> None:
    assert object_name(make_plan(f"nodes={nodes}", run=run)) == expected


@pytest.mark.parametrize("kind", ["job", "jobset"])
@pytest.mark.parametrize("length", [30, 45, 50, 63, 90])
def test_long_names_are_cut_and_stay_different(kind: str, length: int) -> None:
    names = set()
    for last in "ab":
        documents = make_manifests(make_plan(run="n" * length + last, kind=kind))
        assert problems(documents) == []
        assert variables(documents)["MUSTER_RUN"] == "/runs/" + "n" * length + last
        names.add(only(documents, "Job", "JobSet")["metadata"]["name"])
    assert len(names) == 2


def test_a_thousand_nodes_fit() -> None:
    documents = make_manifests(make_plan("nodes=1000", "train.batch_size=1000", run="n" * 60))
    assert problems(documents) == []
    assert len(variables(documents)["MUSTER_HOSTNAMES"].split(",")) == 1000


def test_gpus_are_asked_for_by_the_sites_name() -> None:
    wanted = container(make_manifests(make_plan("devices_per_node=4", "device=cuda", gpu="amd.com/gpu")))["resources"]
    assert wanted["limits"]["amd.com/gpu"] == "4"
    without = container(make_manifests(make_plan("device=cpu", gpu="amd.com/gpu")))["resources"]
    assert "amd.com/gpu" not in without["limits"]


@pytest.mark.parametrize(
    ("overrides", "site", "words"),
    [
        (["device=cuda"], {}, ["device='cuda'", "no GPU resource", "nvidia.com/gpu"]),
        (["data.workers=20"], {"shm": "1Gi"}, ["shm='1Gi'", "1280Mi", "Raise shm"]),
    ],
)
def test_a_job_that_the_pods_cannot_hold_is_refused(
    overrides: list[str], site: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(JobError) as caught:
        make_manifests(make_plan(*overrides, **site))
    for word in words:
        assert word in str(caught.value)


def test_a_template_that_names_what_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "k8s").glob("*.yaml"):
        (tmp_path / "k8s").mkdir(exist_ok=True)
        (tmp_path / "k8s" / path.name).write_text(path.read_text().replace("${job.nodes}", "${job.nodse}"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=r"k8s/\w+\.yaml='.*job\.nodse"):
        make_manifests(make_plan())


def test_a_task_may_be_in_the_image_alone() -> None:
    """The pods refuse what is not there either; a package that is here is checked here."""
    text = render_job("jobs/digits.yaml", ["task=only.in_the_image:Task", "task_args={}"], "kubernetes", None)
    assert job(load(text))["task"] == "only.in_the_image:Task"
    for task, platform in (("trainer.tasks.digitz:Digits", "kubernetes"), ("only.in_the_image:Task", "local")):
        with pytest.raises(JobError, match="no module"):
            render_job("jobs/digits.yaml", [f"task={task}"], platform, None)
