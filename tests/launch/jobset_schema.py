"""Fields, types and enums of a JobSet that the launcher uses.

They are those of the published CRDs: JobSet v1alpha2 (fields, enums and the pattern of
rule names), Job and Pod of batch/v1 and v1, Kueue's label of a queue. A field that is
not here is an error: the API server drops what it does not know, in silence.
"""

import re
from typing import Any

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
QUANTITY = re.compile(r"\d+(Mi|Gi)?")


class Enum(frozenset):
    """One of these values."""


class Map(dict):
    """A mapping with any keys; its one entry is the type of the values."""


ENVIRONMENT = {
    "name": str,
    "value": str,
    "valueFrom": {"fieldRef": {"fieldPath": str}},
}
CONTAINER = {
    "name": DNS_LABEL,
    "image": str,
    "command": [str],
    "env": [ENVIRONMENT],
    "ports": [{"containerPort": int}],
    "resources": {"limits": Map({"": int})},
    "volumeMounts": [{"name": DNS_LABEL, "mountPath": str}],
}
POD = {
    "restartPolicy": Enum({"Never", "OnFailure"}),
    "terminationGracePeriodSeconds": int,
    "nodeSelector": Map({"": LABEL_VALUE}),
    "containers": [CONTAINER],
    "tolerations": [{"key": str, "operator": Enum({"Exists", "Equal"})}],
    "volumes": [
        {
            "name": DNS_LABEL,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": Enum({"Memory", ""})},
        }
    ],
}
JOB = {
    "completionMode": Enum({"Indexed", "NonIndexed"}),
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": Enum({"FailJob", "FailIndex", "Ignore", "Count"}),
                "onExitCodes": {
                    "containerName": DNS_LABEL,
                    "operator": Enum({"In"}),
                    "values": [int],
                },
            }
        ]
    },
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": Enum({"jobset.x-k8s.io/v1alpha2"}),
    "kind": Enum({"JobSet"}),
    "metadata": {
        "name": DNS_LABEL,
        "labels": Map({"": LABEL_VALUE}),
        "annotations": Map({"": str}),
    },
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": Enum({"Recreate", "BlockingRecreate", "InPlaceRestart"}),
            "rules": [
                {
                    "name": RULE_NAME,
                    "action": Enum(
                        {
                            *("FailJobSet", "RestartJobSet", "RestartJob"),
                            "RestartJobSetAndIgnoreMaxRestarts",
                            "RestartJobAndIgnoreMaxRestarts",
                        }
                    ),
                    "onJobFailureReasons": [
                        Enum(
                            {
                                *("BackoffLimitExceeded", "DeadlineExceeded"),
                                *("FailedIndexes", "MaxFailedIndexesExceeded"),
                                "PodFailurePolicy",
                            }
                        )
                    ],
                }
            ],
        },
        "replicatedJobs": [
            {"name": DNS_LABEL, "replicas": int, "template": {"spec": JOB}}
        ],
    },
}
REQUIRED = {
    "": ("apiVersion", "kind", "metadata", "spec"),
    "spec.replicatedJobs[]": ("name", "template"),
    "spec.failurePolicy.rules[]": ("name", "action"),
}


def check(jobset: Any) -> None:
    """Check a JobSet, field by field.

    Raises:
      AssertionError: a field is unknown, missing, or has a value it cannot have.
    """
    _check(jobset, JOBSET, "")
    names = [job["name"] for job in jobset["spec"]["replicatedJobs"]]
    assert len(names) == len(set(names))
    for job in jobset["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        # podFailurePolicy needs it.
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        [container] = spec["template"]["spec"]["containers"]
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for rule in spec["podFailurePolicy"]["rules"]:
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values)) and 0 not in values
        # A pod's name ends in -JOB-INDEX-INDEX-xxxxx and is a DNS label.
        longest = f"{jobset['metadata']['name']}-{job['name']}-99-999-abcde"
        assert len(longest) <= 63, longest


def _check(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, Enum):
        assert value in schema, f"{path}={value!r}: one of {sorted(schema)}"
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str) and schema.fullmatch(value), f"{path}={value!r}"
    elif isinstance(schema, Map):
        assert isinstance(value, dict), path
        for key, inner in value.items():
            _check(inner, schema[""], f"{path}.{key}")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), f"{path}={value!r}"
        unknown = value.keys() - schema.keys()
        assert not unknown, f"{path}: {sorted(unknown)} unknown"
        missing = set(REQUIRED.get(path, ())) - value.keys()
        assert not missing, f"{path}: {sorted(missing)} missing"
        for key, inner in value.items():
            _check(inner, schema[key], f"{path}.{key}".lstrip("."))
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{path}={value!r}"
        for inner in value:
            _check(inner, schema[0], f"{path}[]")
    else:
        assert type(value) is schema, f"{path}={value!r}: {schema.__name__}"
