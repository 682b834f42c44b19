"""What each condition type and each reason means, and what to do about it.

The reference page of the conditions is generated from these texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lorapool_api.common import AdapterCondition, BaseCondition, FailureReason, Reason


class Explanation(NamedTuple):
    meaning: str
    remedy: str = ""
    """Empty where there is nothing to do."""


BASE_CONDITIONS: Mapping[BaseCondition, str] = {
    BaseCondition.SOURCE_RESOLVED: "The files of the base were found; the message names their digest once it is known.",
    BaseCondition.RUNTIME_AVAILABLE: "At least one replica answers requests now.",
    BaseCondition.READY: "A request would be answered: at once, or after a replica has been started for it.",
    BaseCondition.PROGRESSING: "The pods that exist and are ready are not yet as many as are wanted.",
    BaseCondition.NAME_CONFLICT: "The base does not have the model name in spec.servedName. Absent otherwise.",
    BaseCondition.RECONCILING: "Something changes, as Progressing says. Absent otherwise, as kstatus expects it.",
    BaseCondition.STALLED: "Nothing changes by itself: a person, or the next request, has to act. Absent otherwise.",
}

ADAPTER_CONDITIONS: Mapping[AdapterCondition, str] = {
    AdapterCondition.RESOLVED: "The files of the adapter were found and are known by their digest.",
    AdapterCondition.COMPATIBLE: "The adapter can be served on its base, as far as the headers of its files show.",
    AdapterCondition.LOADED: "A runtime reports, in its present process, that this digest is in a slot on its device.",
    AdapterCondition.READY: "A request would be answered. An unloaded adapter is ready too: a request loads it.",
    AdapterCondition.PROGRESSING: "A changed source is being checked or loaded while the previous files keep serving.",
    AdapterCondition.NAME_CONFLICT: "The adapter does not have the model name in spec.alias. Absent otherwise.",
    AdapterCondition.OUTDATED: "The source holds other files than those that are served. Absent otherwise.",
    AdapterCondition.RECONCILING: "The source is being checked or loaded. Absent otherwise, as kstatus expects it.",
    AdapterCondition.STALLED: "Nothing changes by itself: a person has to act. Absent otherwise.",
}

REASONS: Mapping[Reason, Explanation] = {
    Reason.RESOLVED: Explanation("The source was read."),
    Reason.COMPATIBLE: Explanation("The adapter fits its base."),
    Reason.NOT_CHECKED: Explanation(
        "The files of the adapter are valid, but it is not checked against the base yet: which modules the base has is "
        "known once a runtime has loaded it, and none has. Nothing is known to be wrong.",
        "Send a request to the adapter: it starts a replica of the base, which checks the adapter before it loads it.",
    ),
    Reason.PENDING: Explanation(
        "The source is being checked.",
        "Wait some seconds. If it stays, read the operator's log; the operator may not reach the source.",
    ),
    Reason.AWAITING_RUNTIME: Explanation(
        "Only a runtime can read this source (pvc://), and none is running.",
        "Send a request to the model: it starts a replica of the base, which then reads the source.",
    ),
    Reason.BASE_NOT_FOUND: Explanation(
        "The BaseModel in spec.baseModelRef, of the adapter's own namespace or one that listed it, does not exist.",
        "Create the BaseModel, or delete the adapter.",
    ),
    Reason.BASE_NOT_READY: Explanation(
        "The adapter's BaseModel cannot serve, for the reason in the message.",
        "Correct the BaseModel: its condition Ready says what is wrong.",
    ),
    Reason.NOT_PERMITTED: Explanation(
        "The BaseModel is in another namespace, where it does not exist or does not list the adapter's.",
        "Ask the owner of the BaseModel to add the namespace to spec.access.namespaces.",
    ),
    Reason.NAME_CONFLICT: Explanation(
        "An object that the operator has to create exists already and belongs to something else.",
        "Delete the object that the message names, or give the BaseModel another name.",
    ),
    Reason.SUSPENDED: Explanation("spec.suspend is true: requests are refused.", "Set spec.suspend to false."),
    Reason.PARKED: Explanation("The adapter is not on a device. The next request loads it."),
    Reason.PIN_REFUSED: Explanation(
        "minReplicas of the adapter is not honoured: the owner of the base bounds what may be pinned. Requests are "
        "served all the same.",
        "Lower minReplicas, or ask the owner of the BaseModel to raise spec.lora.maxPinned or set spec.access.guests.",
    ),
    Reason.LOADING: Explanation("A runtime is loading the adapter."),
    Reason.LOADED: Explanation("The adapter is on the device of at least one replica."),
    Reason.RUNTIME_RESTARTED: Explanation(
        "The runtime process that had the adapter loaded is gone. The next request loads it again.",
        "If it recurs, look for OOMKilled or failed probes in `kubectl describe pod` of the base's pods.",
    ),
    Reason.ROLLOUT_FAILED: Explanation(
        "The changed source cannot be served; the previous files keep serving.",
        "Correct spec.source: the message says what is wrong with the new files.",
    ),
    Reason.SCALED_TO_ZERO: Explanation("No replica runs. The next request starts one."),
    Reason.STARTING: Explanation(
        "Pods are being started and none serves yet, or fewer than are wanted.",
        "If it lasts, look at the pods' events and logs: image, scheduling, memory, weights.",
    ),
    Reason.AVAILABLE: Explanation("All wanted replicas serve."),
    Reason.DEGRADED: Explanation(
        "Fewer replicas serve than are wanted, a pod's process ended lately, or the pods could not be changed as the "
        "spec says now.",
        "Do what the message says, and look at the pod that it names, if it names one.",
    ),
    Reason.UNAVAILABLE: Explanation(
        "No replica serves because of the problem in the message; of an adapter: the runtime that had it loaded does "
        "not answer.",
        "Look at the pod that the message names: `kubectl describe pod` and its log.",
    ),
    Reason.READY: Explanation("At least one replica answers requests."),
    Reason.STABLE: Explanation("Nothing is changing."),
    Reason.PROFILE_NOT_PERMITTED: Explanation(
        "The profile in spec.runtimeProfile does not list the BaseModel's namespace in allowedNamespaces.",
        "Name another profile, or ask the administrator to add the namespace to allowedNamespaces of this one.",
    ),
    Reason.PAUSED: Explanation(
        "spec.paused is true: the running pods are not replaced, though their template has changed.",
        "Set spec.paused to false to replace them.",
    ),
    Reason.ROLLOUT_WAITING: Explanation(
        "Pods have to be replaced, and wait until the rollout of the bases that the message names has ended.",
        "Look at those bases if it lasts, or raise the chart's value operator.rollout.maxConcurrentBases.",
    ),
    Reason.PROFILE_NOT_FOUND: Explanation(
        "spec.runtimeProfile names no profile of the chart's value runtimeProfiles.",
        "Name an existing profile, or add this one to runtimeProfiles and upgrade the release.",
    ),
    Reason.PROFILES_UNREADABLE: Explanation(
        "The operator cannot read the changed runtime profiles. It keeps the last ones that it could read; an operator "
        "that starts now refuses to.",
        "Correct the field of the chart's value runtimeProfiles that the message names, and upgrade the release.",
    ),
    Reason.UNVERIFIED: Explanation(
        "Only a runtime can read this source (pvc://), and none is running. Nothing is known to be wrong.",
        "Send a request to the model: it starts a replica of the base, which checks the source.",
    ),
    Reason.ALIAS_TAKEN: Explanation(
        "Another model of the base's owner has this name, or claimed it first.", "Choose another alias or servedName."
    ),
    Reason.NAME_RESERVED: Explanation(
        "A name with a slash is kept for the full names of objects, namespace/name.",
        "Choose an alias or servedName without a slash.",
    ),
    Reason.SOURCE_CHANGED: Explanation(
        "The files at the source changed after they were resolved: a tag was pushed again, a folder was overwritten.",
        "Name the new revision in spec.source, set spec.source.updatePolicy to Poll, or change the annotation "
        "lorapool.dev/retry. On a volume or bucket, do so before the adapter is loaded again, or restore the files.",
    ),
    Reason.UNREADABLE: Explanation(
        "The object has a field or value that this version of the operator cannot parse. Nothing was changed.",
        "Correct the field that the message names, or upgrade the operator.",
    ),
    Reason.IMAGE_PULL_FAILED: Explanation(
        "The node cannot pull the image of the runtime.",
        "Correct image.runtime or runtimeProfiles.<name>.image, or imagePullSecrets.",
    ),
    Reason.CRASH_LOOPING: Explanation(
        "The runtime's process ends again and again; the message has its last line.",
        "Read `kubectl logs --previous` of the pod that the message names.",
    ),
    Reason.OUT_OF_MEMORY: Explanation(
        "The runtime's process was killed because it needed more memory than its limit.",
        "Raise resources.limits.memory of the runtime profile, or lower spec.lora.hostCacheBytes.",
    ),
    Reason.CONTAINER_FAILED: Explanation(
        "The kubelet cannot create the container, for example because a Secret is missing.",
        "Create what the message names, or correct the runtime profile.",
    ),
    Reason.EVICTED: Explanation(
        "The node evicted the pod: it ran short of memory or disk, or a volume exceeded its sizeLimit.",
        "Raise the limit of the volume that the message names (cacheSizeLimit, tmpSizeLimit or shmSizeLimit of the "
        "runtime profile); if it names none, raise the memory request.",
    ),
    Reason.UNSCHEDULABLE: Explanation(
        "No node fits the pod; the message says what is missing.",
        "Add nodes or free their resources, or correct resources, nodeSelector and tolerations of the profile.",
    ),
    Reason.START_TIMEOUT: Explanation(
        "No replica served within the time to schedule it and startupTimeoutSeconds of the profile.",
        "Raise startupTimeoutSeconds of the runtime profile if the message shows a download that progresses.",
    ),
    Reason.QUOTA_EXCEEDED: Explanation(
        "A ResourceQuota of the namespace refuses the Deployment or its pods. It is tried again.",
        "Raise the quota, or lower the resources of the runtime profile.",
    ),
    Reason.INVALID_PROFILE: Explanation(
        "Fields of the runtime profile contradict each other, or the API server refuses the pods that it describes, "
        "which is tried again.",
        "Correct the field of runtimeProfiles that the message names.",
    ),
    Reason.GPU_COUNT_MISMATCH: Explanation(
        "The runtime profile asks Kubernetes for another number of GPUs than its engine uses.",
        "Make the number of GPUs in resources.limits equal to tensorParallel times pipelineParallel of the profile.",
    ),
    Reason.SHARED_MEMORY_TOO_SMALL: Explanation(
        "The processes of an engine on several GPUs exchange data in /dev/shm, which is missing or too small.",
        "Raise shmSizeLimit of the runtime profile, and resources.limits.memory by as much.",
    ),
    Reason.SHARED_MEMORY_FULL: Explanation(
        "The runtime's process ended because /dev/shm was full.",
        "Raise shmSizeLimit of the runtime profile, and resources.limits.memory by as much.",
    ),
    Reason.ADAPTERS_NOT_SHARED: Explanation(
        "Each node of a group reads an adapter's files itself, and the runtime profile has no volume on which all of "
        "them find what the leader fetched.",
        "Set adapterCache of the runtime profile to a volume that several nodes mount at the same time.",
    ),
    Reason.LEADER_WORKER_SET_MISSING: Explanation(
        "The runtime profile has several nodes, for which a LeaderWorkerSet is made, and the cluster does not serve "
        "its API. It is tried again.",
        "Install LeaderWorkerSet 0.7 or later (https://lws.sigs.k8s.io/docs/installation), or use a profile with one "
        "node.",
    ),
    Reason.BASE_UNSUPPORTED: Explanation(
        "The engine of the runtime profile does not compute this base, or no adapters on it; the message says why.",
        "Name a profile with another engine in spec.runtimeProfile, or another base.",
    ),
    Reason.DEVICE_UNUSABLE: Explanation(
        "The GPU, or what is needed to use it, is missing or too old for the engine, the dtype or the quantization.",
        "Do what the message says; the profile's nodeSelector chooses the kind of GPU.",
    ),
    Reason.DEVICE_MEMORY_TOO_SMALL: Explanation(
        "The base, the slots for adapters and the KV cache do not fit in the memory of the GPUs.",
        "Lower spec.lora.slots, spec.lora.maxRank or spec.maxModelLen, or use a profile with more or larger GPUs.",
    ),
    Reason.ENGINE_REFUSED: Explanation(
        "The engine does not start with these settings, or in its installed version; the message has its words.",
        "Correct what the message names, in the BaseModel or its runtime profile.",
    ),
    Reason.GROUP_ENDED: Explanation(
        "A runtime in a group of several nodes ended, or the others no longer reach it. The group is started "
        "again as a whole.",
        "If it recurs, read `kubectl logs --previous` of the pods of the group, and check the network between the "
        "nodes.",
    ),
    Reason.WORKER_LOST: Explanation(
        "Kubernetes ends a pod of a group of several nodes, because its node is lost or drained. The group is started "
        "again as a whole.",
        "If the machine is gone and the pod stays in state Terminating, delete the Node object, or taint the node with "
        "node.kubernetes.io/out-of-service, so that Kubernetes forgets the pod.",
    ),
    Reason.APPLY_REFUSED: Explanation(
        "The API server refuses an object of the base: an admission policy, or missing rights. It is tried again.",
        "Ask the owner of the policy that the message names, or correct the operator's Role.",
    ),
    Reason.TOKEN_REFUSED: Explanation(
        "A runtime accepts none of the operator's tokens: it has not read the hashes of the present master token.",
        "Wait two minutes after a rotation. If it lasts, restart the pods: `kubectl rollout restart deployment`.",
    ),
    Reason.CERTIFICATE_REFUSED: Explanation(
        "A runtime serves with a certificate that has expired, is of another base, or is not signed by the release's "
        "authority; the message says which. No request is sent to it.",
        "Wait two minutes after a change of the authority. If it lasts, restart the pods and read the operator's log, "
        "which says what keeps it from issuing certificates.",
    ),
}

FAILURES: Mapping[FailureReason, Explanation] = {
    FailureReason.SOURCE_NOT_FOUND: Explanation(
        "The repository, tag, bucket, folder or one of its required files does not exist.",
        "Correct spec.source.uri or spec.source.revision, or upload the missing files: the source is read again after "
        "10 minutes at most, and at once when the annotation lorapool.dev/retry changes.",
    ),
    FailureReason.UNAUTHORIZED: Explanation(
        "The source refuses access.",
        "Of a guest, which uses the base of another namespace: create the Secret with its own credentials in its "
        "namespace (artifacts.namespaceCredentials). Of others: correct the Secret of the chart's value "
        "artifacts.credentials.existingSecret in the release's and the base's namespace. Or grant access at the "
        "source; no restart is needed. The source is read again at once when the operator's credentials or the "
        "annotation lorapool.dev/retry change, and every 10 minutes at least. On a volume: make the files readable "
        "(fsGroup).",
    ),
    FailureReason.INVALID_SOURCE: Explanation(
        "The address, the revision or a file in the source is of a kind that is never read.",
        "Correct spec.source as the message says.",
    ),
    FailureReason.SOURCE_NOT_PERMITTED: Explanation(
        "The object's namespace may not use this source.",
        "Use a source that it may, or ask for an entry: the owner of the BaseModel in spec.access.sources, the "
        "administrator in the chart's artifacts.policy. It is checked again at once when these change.",
    ),
    FailureReason.UNSUPPORTED_FORMAT: Explanation(
        "The files are not a LoRA adapter in safetensors, or not a model for a BaseModel: a pickle, an archive, an "
        "index of images.",
        "Save the adapter with peft's save_pretrained() and upload adapter_config.json and adapter_model.safetensors.",
    ),
    FailureReason.TOO_LARGE: Explanation(
        "The files are larger, or have more tensors, than Lorapool reads.",
        "Of an adapter: save it in bf16, train it with a smaller rank or fewer target modules, or raise "
        "LORAPOOL_MAX_ADAPTER_BYTES or, for more tensors, LORAPOOL_MAX_TENSORS in the chart's artifacts.env. Of a "
        "base: raise artifacts.maxBaseBytes.",
    ),
    FailureReason.CORRUPT_ARTIFACT: Explanation(
        "A file is damaged or does not match its listed size or hash.", "Upload the files again."
    ),
    FailureReason.DIGEST_MISMATCH: Explanation(
        "The source holds other files than the digest that is asked for.",
        "Correct spec.source.digest, or pin spec.source.revision to the files you mean. On a volume: restore the "
        "files, or change the annotation lorapool.dev/retry to serve the new ones.",
    ),
    FailureReason.INCOMPATIBLE: Explanation(
        "The adapter uses a setting or a module that is not served on this base.",
        "Train it again without what the message names.",
    ),
    FailureReason.WRONG_BASE: Explanation(
        "The shapes of the adapter's matrices do not fit the base's layers.",
        "Name the base the adapter was trained on. spec.baseModelRef is immutable: create the adapter again.",
    ),
    FailureReason.RANK_TOO_HIGH: Explanation(
        "The adapter's rank is higher than spec.lora.maxRank of its BaseModel.",
        "Train it with a smaller rank, or raise spec.lora.maxRank.",
    ),
    FailureReason.NON_FINITE_WEIGHTS: Explanation(
        "Some weights are NaN, infinite in the base's dtype, or larger than any training gives.",
        "Train the adapter again, or use a wider dtype for the base.",
    ),
    FailureReason.SOURCE_UNAVAILABLE: Explanation(
        "The source cannot be reached or answers with an error. It is tried again.",
        "If it lasts, check the address, DNS, the certificate and the network policy (networkPolicy.sources).",
    ),
    FailureReason.SOURCE_TIMEOUT: Explanation(
        "The source sent nothing for too long, or the whole took too long. It is tried again.",
        "If it lasts, check the network between the cluster and the source.",
    ),
    FailureReason.RATE_LIMITED: Explanation(
        "The source limits the rate of requests. It is tried again at the time it names.",
        "If it recurs, use credentials with a higher limit or a mirror (HF_ENDPOINT).",
    ),
    FailureReason.NO_CAPACITY: Explanation(
        "All slots of the replica are in use or pinned. It is tried again.",
        "Raise spec.lora.slots or spec.scaling.maxReplicas of the BaseModel, or lower minReplicas of other adapters.",
    ),
    FailureReason.DISK_FULL: Explanation(
        "The runtime's disk cache has no room for the adapter. It is tried again.",
        "Raise cacheSizeLimit in the runtime profile.",
    ),
    FailureReason.LOAD_FAILED: Explanation(
        "Loading the adapter failed inside the runtime. It is tried again.",
        "If it recurs, read the runtime's log and report it.",
    ),
    FailureReason.CLAIM_NOT_MOUNTED: Explanation(
        "The PersistentVolumeClaim of the source is not mounted into the base's runtimes. It is tried again.",
        "Add the claim to runtimeProfiles.<name>.volumes of the chart; it must exist in the BaseModel's namespace.",
    ),
}
