"""cluster/*.yaml against the schemas of KubeRay's CRDs, Ray's autoscaler and Kubernetes.

The check is strict: a field that the schema does not know is an error, since the API server would silently drop a
misspelled one.
"""

import copy
import gzip
import json
import re
import shlex
import sys
from importlib import metadata, util
from pathlib import Path

import jsonschema
import pytest
import yaml

import ltx_ray
from tests.support.kubernetes_schemas import strict

ROOT = Path(__file__).resolve().parents[3]
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}


def documents(name):
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


def only(name, kind):
    (found,) = [d for d in documents(name) if d["kind"] == kind]
    return found


def validator(kind):
    path = ROOT / f"tests/data/kuberay/{KINDS[kind]}.schema.json.gz"
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    # The CRD leaves `metadata` to the API server.
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
            "generateName": {"type": "string", "pattern": "^[a-z0-9][-a-z0-9]*-$"},
        },
        "oneOf": [{"required": ["name"]}, {"required": ["generateName"]}],
        "additionalProperties": False,
    }
    return jsonschema.Draft7Validator(schema)


def errors(document):
    return [f"{e.json_path}: {e.message}" for e in validator(document["kind"]).iter_errors(document)]


def cluster_spec(document):
    spec = document["spec"]
    job = spec["jobTemplate"] if document["kind"] == "RayCronJob" else spec
    return spec if document["kind"] == "RayCluster" else job["rayClusterSpec"]


def schedule_module():
    spec = util.spec_from_file_location("schedule", ROOT / "jobs/schedule.py")
    module = util.module_from_spec(spec)
    sys.modules.setdefault("schedule", module)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


KUBERNETES = ("raycluster.yaml", "rayjob.yaml", "cronjob.yaml", "raycronjob.yaml")
RAY_DOCUMENTS = [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob"), ("raycronjob.yaml", "RayCronJob")]


@pytest.mark.parametrize(("name", "kind"), RAY_DOCUMENTS)
def test_kuberay_accepts_it(name, kind):
    document = only(name, kind)
    assert document["apiVersion"] == "ray.io/v1"
    assert errors(document) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "rayVersion"), 2.6),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 3),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "3"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"), 3),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), None),
        (("spec", "headGroupSpec", "template", "spec", "volumes", 0, "persistentVolumeClaim"), {}),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "cpu"),
            "lots",
        ),
        (("specs",), {}),
    ],
)
def test_the_validator_rejects_mistakes(path, value):
    document = copy.deepcopy(only("raycluster.yaml", "RayCluster"))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert errors(document), f"{path} = {value!r} passed"


def test_the_schemas_are_whole():
    # An empty schema would accept everything, so look for fields deep inside each.
    for kind in KINDS:
        text = json.dumps(validator(kind).schema)
        assert '"terminationGracePeriodSeconds"' in text and '"enableInTreeAutoscaling"' in text
        assert text.count('"additionalProperties": false') > 100


@pytest.mark.parametrize(("name", "kind"), RAY_DOCUMENTS)
def test_what_the_operator_checks_beyond_the_schema(name, kind):
    spec = cluster_spec(only(name, kind))
    # As in KubeRay's ValidateRayClusterSpec; the restartPolicy is required by autoscaler v2.
    assert spec["enableInTreeAutoscaling"]
    pods = [spec["headGroupSpec"]["template"]["spec"]]
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pods.append(group["template"]["spec"])
    for pod in pods:
        assert pod.get("restartPolicy", "Never") == "Never"
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
    worker = pods[1]
    (container,) = worker["containers"]
    # The driver writes rows, and the ranks of decode clips. The secret is the one of the pod that writes the manifest.
    (cron,) = documents("cronjob.yaml")
    schedule = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert [c["envFrom"] for pod in pods for c in pod["containers"]] == [schedule["envFrom"]] * 2
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert 0 < float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < worker["terminationGracePeriodSeconds"]
    # Kernels in the cache are loaded as code, so no two pods share it.
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == environment["LTX_RAY_CACHE"]]
    assert [v["emptyDir"] for v in worker["volumes"] if v["name"] == mount["name"]] == [{}]


@pytest.mark.parametrize(("name", "kind"), RAY_DOCUMENTS)
def test_a_cluster_is_guarded(name, kind):
    """A token is asked for, policies.yaml applies to every pod, and nothing but the user ends a head."""
    spec = cluster_spec(only(name, kind))
    assert spec["authOptions"] == {"mode": "token"}
    pods = {"head": spec["headGroupSpec"]["template"], "worker": spec["workerGroupSpecs"][0]["template"]}
    policy, budget = documents("policies.yaml")
    for template in pods.values():
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsUser"] != 0
    # KubeRay gives the label of the node type.
    head = pods["head"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
    assert budget["spec"]["selector"]["matchLabels"].items() <= head.items()
    assert budget["spec"]["maxUnavailable"] == 0
    terms = pods["head"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = terms["nodeSelectorTerms"]
    assert {e["operator"] for e in term["matchExpressions"]} == {"NotIn", "DoesNotExist"}
    ports = {p["containerPort"] for p in pods["head"]["spec"]["containers"][0]["ports"]}
    assert ports == {6379, 8265}, "a client's port lets whoever reaches it run code"


def test_pods_that_submit_reach_the_head():
    (policy,) = [d for d in documents("policies.yaml") if d["kind"] == "NetworkPolicy"]
    (own,) = [r["from"][0]["podSelector"]["matchLabels"] for r in policy["spec"]["ingress"] if "ports" not in r]
    (cron,) = documents("cronjob.yaml")
    submitter = only("rayjob.yaml", "RayJob")["spec"]["submitterPodTemplate"]
    for template in (submitter, cron["spec"]["jobTemplate"]["spec"]["template"]):
        assert own.items() <= template["metadata"]["labels"].items()
    environment = {
        e["name"]: e for e in cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    # The operator names the secret like the cluster.
    assert secret == {"name": only("raycluster.yaml", "RayCluster")["metadata"]["name"], "key": "auth_token"}


def test_policies_are_of_their_kinds():
    kinds = [(d["apiVersion"], d["kind"]) for d in documents("policies.yaml")]
    assert kinds == [("networking.k8s.io/v1", "NetworkPolicy"), ("policy/v1", "PodDisruptionBudget")]
    policy, budget = (d["spec"] for d in documents("policies.yaml"))
    assert set(policy) == {"podSelector", "policyTypes", "ingress"} and policy["policyTypes"] == ["Ingress"]
    assert all(set(rule) <= {"from", "ports"} for rule in policy["ingress"])
    assert set(budget) == {"maxUnavailable", "selector"}


def test_every_pod_has_the_image_of_this_version():
    text = "".join((ROOT / "cluster" / name).read_text() for name in KUBERNETES)
    images = re.findall(r"image: (\S+)", text)
    assert set(images) == {f"REGISTRY/ltx-ray:{ltx_ray.__version__}"} and len(images) == 12


@pytest.mark.parametrize(("name", "kind"), RAY_DOCUMENTS)
def test_ray_is_the_version_that_is_tested_here(name, kind):
    assert cluster_spec(only(name, kind))["rayVersion"] == metadata.version("ray")
    text = "".join((ROOT / "cluster" / f).read_text() for f in ("Dockerfile", "autoscaler-aws.yaml"))
    assert set(re.findall(r"rayproject/ray:([\d.]+)|==([\d.]+)\"", text)) == {
        (metadata.version("ray"), ""),
        ("", metadata.version("ray")),
    }


def test_rayjob_runs_the_render():
    spec = only("rayjob.yaml", "RayJob")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", "/opt/ltx-ray/jobs/render.py"]
    assert "--output" in words
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["backoffLimit"] >= 1
    assert "activeDeadlineSeconds" not in spec, "it kills a run that could drain"


def test_raycronjob_makes_the_job_of_rayjob_that_runs_the_schedule():
    job, nightly = only("rayjob.yaml", "RayJob")["spec"], only("raycronjob.yaml", "RayCronJob")["spec"]
    assert re.fullmatch(r"\d{1,2} \d{1,2} \* \* \*", nightly["schedule"]) and nightly["timeZone"] == "Etc/UTC"
    template = dict(nightly["jobTemplate"])
    python, script, *argv = shlex.split(template.pop("entrypoint"))
    assert (python, script) == ("python", "/opt/ltx-ray/jobs/schedule.py")
    assert template == {name: value for name, value in job.items() if name != "entrypoint"}
    args = schedule_module().parser().parse_args(argv)
    assert args.wait and args.on_stop == "drain" and args.date is None and args.out_dir is None
    assert args.address == "http://127.0.0.1:8265" and args.recipe.startswith("/data/")


def test_cronjob_is_a_cronjob():
    (job,) = documents("cronjob.yaml")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    spec = job["spec"]
    assert set(spec) <= {
        *("schedule", "timeZone", "startingDeadlineSeconds", "concurrencyPolicy", "suspend", "jobTemplate"),
        *("successfulJobsHistoryLimit", "failedJobsHistoryLimit"),
    }
    assert re.fullmatch(r"\d{1,2} \d{1,2} \* \* \*", spec["schedule"])
    assert spec["concurrencyPolicy"] == "Forbid"
    work = spec["jobTemplate"]["spec"]
    assert set(work) <= {"activeDeadlineSeconds", "backoffLimit", "podFailurePolicy", "template"}
    minute, hour = map(int, spec["schedule"].split()[:2])
    assert hour * 3600 + minute * 60 + work["activeDeadlineSeconds"] < 86400, "a retry could have another date"
    pod = work["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    (container,) = pod["containers"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_cronjob_pod_is_one():
    """CronJob has no CRD, but its pod template is of the kind that KubeRay's schema describes in full."""
    (job,) = documents("cronjob.yaml")
    document = copy.deepcopy(only("raycluster.yaml", "RayCluster"))
    document["spec"]["headGroupSpec"]["template"] = job["spec"]["jobTemplate"]["spec"]["template"]
    assert errors(document) == []


def head_environment():
    head = only("raycluster.yaml", "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    return head["containers"][0]["env"]


def test_cronjob_command_is_one_of_schedule():
    (job,) = documents("cronjob.yaml")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    python, script, *argv = container["command"]
    assert (python, script) == ("python", "/opt/ltx-ray/jobs/schedule.py")
    args = schedule_module().parser().parse_args(argv)
    assert args.wait and not args.dry_run and args.date is None and args.out_dir is None
    # Its end at the deadline leaves no render behind that holds the cards, and there is time for the drain.
    (grace,) = [e for e in head_environment() if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert args.on_stop == "drain" and pod["terminationGracePeriodSeconds"] > float(grace["value"]) + 30
    assert container["envFrom"] == [{"secretRef": {"name": "ltx-ray-store", "optional": True}}]
    cluster = only("raycluster.yaml", "RayCluster")
    assert args.address == f"http://{cluster['metadata']['name']}-head-svc:8265"
    # This pod and the head must see an output below /data under the same path.
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    shared = {"data": {"claimName": "ltx-ray-data"}}
    for volumes, mounts in (
        (pod["volumes"], container["volumeMounts"]),
        (head["volumes"], head["containers"][0]["volumeMounts"]),
    ):
        claims = {v["name"]: v["persistentVolumeClaim"] for v in volumes if "persistentVolumeClaim" in v}
        assert claims == shared
        assert {"name": "data", "mountPath": "/data"} in mounts


def ray_autoscaler_schema():
    (path,) = [p for p in metadata.files("ray") if str(p) == "ray/autoscaler/ray-schema.json"]
    return json.loads(path.read_text())


def test_ray_autoscaler_accepts_the_aws_file():
    (config,) = documents("autoscaler-aws.yaml")
    check = jsonschema.Draft7Validator(ray_autoscaler_schema())
    assert [e.message for e in check.iter_errors(config)] == []
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    worker = types["gpu"]
    assert (worker["min_workers"], worker["max_workers"]) == (1, config["max_workers"])
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    bad = {**config, "idle_timeout_minuts": 3}
    assert not check.is_valid(bad)


def test_the_machines_of_the_aws_file_ask_for_the_token_that_they_get():
    (config,) = documents("autoscaler-aws.yaml")
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        (start,) = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start.partition("ray start")[0].split()


def test_every_file_is_checked_here():
    checked = {*KUBERNETES, "autoscaler-aws.yaml", "policies.yaml"}
    checked |= {"alerts.yaml", "podmonitor.yaml"}  # test_metrics_files.py
    assert {p.name for p in (ROOT / "cluster").glob("*.y*ml")} == checked
