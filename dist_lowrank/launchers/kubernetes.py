"""`launcher=kubernetes`: pods as nodes, by Kubeflow's TrainJob or by an Indexed Job, and who may talk to them."""

from __future__ import annotations

import shlex
from typing import Any

from dist_lowrank.config import to_dict
from dist_lowrank.config.launchers import KubernetesLauncher
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers.containers import (
    RUNS,
    WORKSPACE,
    container_command,
    container_environment,
    run_in_container,
    uses_hub,
)
from dist_lowrank.launchers.job import Job, joined, rendezvous_options
from dist_lowrank.launchers.manifests import as_json, dump

DATA = "/data"
_LABEL = "app.kubernetes.io/instance"
# What a new pod would not better.
_FINAL = (ExitCode.CONFIGURATION, ExitCode.RANKS_DIFFER, ExitCode.NOT_FINITE, ExitCode.CHECKPOINT)


def render(job: Job[KubernetesLauncher]) -> dict[str, str]:
    """`manifest.yaml`: the configuration, who may talk to the pods, and the job."""
    about = (
        f"# {job.run.rpartition('/')[2]}: kubectl apply -f this file; to start anew after the end, kubectl delete it "
        "first.\n"
        "# A pod that ends with exit code 75 is replaced and the run continues; 2, 66, 67 and 69 end the job.\n"
    )
    last = _train_job(job) if job.launcher.kind == "trainjob" else _indexed_job(job)
    return {"manifest.yaml": about + dump(_configuration(job), _network_policy(job), *last)}


def commands(job: Job[KubernetesLauncher]) -> list[list[str]]:
    """Submits it."""
    return [[*job.launcher.command, "apply", "-f", f"{joined(job.work_directory, job.folder)}/manifest.yaml"]]


def _metadata(job: Job[KubernetesLauncher]) -> dict[str, Any]:
    namespace = {} if job.launcher.namespace is None else {"namespace": job.launcher.namespace}
    return {"name": job.name, **namespace, "labels": {"app.kubernetes.io/name": "dist-lowrank", _LABEL: job.name}}


def _object(job: Job[KubernetesLauncher], version: str, kind: str, **content: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": _metadata(job), **content}


def _configuration(job: Job[KubernetesLauncher]) -> dict[str, Any]:
    """Takes run.json to the volume, so that who launches need not see it."""
    return _object(job, "v1", "ConfigMap", data={"run.json": as_json({"config": to_dict(job.config)})})


def _network_policy(job: Job[KubernetesLauncher]) -> dict[str, Any]:
    """The rendezvous and the collectives have no password: only pods of the run may talk to each other."""
    pods = {"matchLabels": {_LABEL: job.name}}
    names = {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}
    hub = [{"ports": [{"protocol": "TCP", "port": 443}]}] if uses_hub(job.config) else []
    spec = {
        "podSelector": pods,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": pods}]}],
        "egress": [{"to": [{"podSelector": pods}]}, names, *hub],
    }
    return _object(job, "networking.k8s.io/v1", "NetworkPolicy", spec=spec)


def _indexed_job(job: Job[KubernetesLauncher]) -> list[dict[str, Any]]:
    launcher = job.launcher
    service = {
        "clusterIP": "None",  # names for the pods, no balancing
        "publishNotReadyAddresses": True,
        "selector": {_LABEL: job.name},
        "ports": [{"name": "rendezvous", "port": launcher.port}],
    }
    spec = {
        "completionMode": "Indexed",
        "completions": launcher.nodes,
        "parallelism": launcher.nodes,
        **_job(job, _rendezvous(job, f"{job.name}-0.{job.name}")),
    }
    spec["template"]["spec"]["subdomain"] = job.name
    return [_object(job, "v1", "Service", spec=service), _object(job, "batch/v1", "Job", spec=spec)]


def _train_job(job: Job[KubernetesLauncher]) -> list[dict[str, Any]]:
    """A runtime of the run's own, because a TrainJob cannot say what a container needs, and the TrainJob."""
    launcher = job.launcher
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": _job(job, _rendezvous(job, f"{job.name}-node-0-0.{job.name}")),
        },
    }
    runtime = {
        "mlPolicy": {"numNodes": launcher.nodes, "torch": {}},
        "template": {"spec": {"network": {"publishNotReadyAddresses": True}, "replicatedJobs": [node]}},
    }
    train = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
        "trainer": {"numNodes": launcher.nodes, "numProcPerNode": launcher.nproc_per_node},
    }
    version = "trainer.kubeflow.org/v1alpha1"
    return [_object(job, version, "TrainingRuntime", spec=runtime), _object(job, version, "TrainJob", spec=train)]


def _job(job: Job[KubernetesLauncher], rendezvous: list[str]) -> dict[str, Any]:
    """What both kinds have: pods, and which of their ends start new ones."""
    codes = {
        "Ignore": [int(ExitCode.REQUEUE)],
        "FailJob": [int(code) for code in _FINAL],
    }
    rules: list[dict[str, Any]] = [
        {"action": action, "onExitCodes": {"containerName": "node", "operator": "In", "values": values}}
        for action, values in codes.items()
    ]
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "backoffLimit": job.launcher.max_failures,
        "podFailurePolicy": {"rules": [*rules, evicted]},
        "template": {"metadata": {"labels": {_LABEL: job.name}}, "spec": _pod(job, rendezvous)},
    }


def _pod(job: Job[KubernetesLauncher], rendezvous: list[str]) -> dict[str, Any]:
    launcher = job.launcher
    user, group = map(int, (launcher.user or "1000:1000").split(":"))
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launcher.stop_seconds + 10,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"nodeSelector": dict(launcher.node_selector)} if launcher.node_selector else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": group,
            "fsGroup": group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [_preparing_container(job)],
        "containers": [_node_container(job, rendezvous)],
        "volumes": _volumes(launcher, job.name),
    }


def _node_container(job: Job[KubernetesLauncher], rendezvous: list[str]) -> dict[str, Any]:
    launcher = job.launcher
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value.replace("$", "$$")}  # Kubernetes would expand `$(NAME)`
        for name, value in container_environment(job).items()
    ]
    variables += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": launcher.secret_name, "key": name}}}
        for name in launcher.secret_environment
    ]
    devices = {"nvidia.com/gpu": str(launcher.nproc_per_node)} if launcher.device == "cuda" else {}
    if launcher.rdma_resource is not None:
        devices[launcher.rdma_resource] = "1"
    requests = {"cpu": str(launcher.cpus or launcher.threads * launcher.nproc_per_node)}
    if launcher.memory_gib is not None:
        requests["memory"] = devices["memory"] = f"{launcher.memory_gib}Gi"
    data = [{"name": "data", "mountPath": DATA, "readOnly": True}] if launcher.data_claim else []
    return {
        "name": "node",
        "image": launcher.image,
        "workingDir": WORKSPACE,
        "args": shlex.split(" ".join(container_command(job, rendezvous))),
        "env": variables,
        "resources": {"requests": requests, **({"limits": devices} if devices else {})},
        "securityContext": _confined(launcher, lock_memory=launcher.rdma_resource is not None),
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            *data,
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _preparing_container(job: Job[KubernetesLauncher]) -> dict[str, Any]:
    """Puts the configuration into the run's folder, once: the first pod does it, the others wait for it."""
    script = f"""\
run={shlex.quote(run_in_container(job))}
attempt="$run/attempt-{job.attempt}"
if [ "$JOB_COMPLETION_INDEX" = 0 ] && [ ! -e "$attempt/run.json" ]; then
    mkdir -p "$attempt/tensorboard" "$attempt/metrics" "$run/flight_recorder"
    touch "$attempt/overrides.txt"
    cp /launch/run.json "$attempt/run.json.new"
    mv "$attempt/run.json.new" "$attempt/run.json"
fi
until [ -e "$attempt/run.json" ]; do sleep 1; done
"""
    return {
        "name": "prepare",
        "image": job.launcher.image,
        "args": ["sh", "-c", script],
        "securityContext": _confined(job.launcher, lock_memory=False),
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            {"name": "launch", "mountPath": "/launch", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _confined(launcher: KubernetesLauncher, *, lock_memory: bool) -> dict[str, Any]:
    capabilities: dict[str, Any] = {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if lock_memory else {})}
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": launcher.read_only_root,
        "capabilities": capabilities,
    }


def _volumes(launcher: KubernetesLauncher, name: str) -> list[dict[str, Any]]:
    data = {"claimName": launcher.data_claim, "readOnly": True}
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": launcher.claim}},
        *([{"name": "data", "persistentVolumeClaim": data}] if launcher.data_claim else []),
        {"name": "launch", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{launcher.shared_memory_gib}Gi"}},
        {"name": "tmp", "emptyDir": {}},
    ]


def _rendezvous(job: Job[KubernetesLauncher], first_pod: str) -> list[str]:
    return rendezvous_options(
        job,
        backend="static",
        node_rank="$(JOB_COMPLETION_INDEX)",  # Kubernetes puts the variable's value here
        address=first_pod,
        port=str(job.launcher.port),
    )
