{{/* Bytes of a quantity such as 2Gi. */}}
{{- define "lorapool.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 -}}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[A-Za-z]+$" .) | default 1 | int64) -}}
{{- end -}}

{{/* GPUs that a pod of a profile gets; empty if claims decide it. */}}
{{- define "lorapool.profileGPUs" -}}
{{- $resources := default dict .resources -}}
{{- if not $resources.claims -}}
{{- $count := 0 -}}
{{- range $name, $amount := merge (deepCopy (default dict $resources.limits)) (deepCopy (default dict $resources.requests)) -}}
{{- if or (hasSuffix "/gpu" $name) (contains "/mig-" $name) -}}{{- $count = add $count (int (toString $amount)) -}}{{- end -}}
{{- end -}}
{{- $count -}}
{{- end -}}
{{- end -}}

{{/* Refuses what the pods of several nodes cannot share. Call with (list name profile). */}}
{{- define "lorapool.checkNodes" -}}
{{- $name := printf "runtimeProfiles.%s: " (index . 0) -}}{{- $profile := index . 1 -}}
{{- $shared := default dict $profile.adapterCache -}}{{- $pvc := default dict $shared.pvc -}}
{{- if eq (int (default 1 $profile.nodes)) 1 -}}
{{- if $shared -}}
{{- fail (print $name "adapterCache is only used with several nodes: remove it.") -}}
{{- end -}}
{{- else if not (or $shared.hostPath (has "ReadWriteMany" (default list $pvc.accessModes))) -}}
{{- fail (print $name "with " $profile.nodes " nodes, adapterCache must be a volume that all of them mount at the same time: set adapterCache.pvc with accessModes [ReadWriteMany], or adapterCache.hostPath on a shared file system.") -}}
{{- else if and $pvc (not (regexMatch "^[0-9]{1,15}(Ki|Mi|Gi|Ti|k|M|G|T)?$" (dig "resources" "requests" "storage" "" $pvc | toString))) -}}
{{- fail (print $name "adapterCache.pvc has no resources.requests.storage in whole bytes, such as 200Gi: set it.") -}}
{{- else if and (dig "cache" "pvc" false $profile) (not (has "ReadWriteMany" (default list $profile.cache.pvc.accessModes))) -}}
{{- fail (print $name "with several nodes, cache.pvc needs accessModes [ReadWriteMany]: set it, or use another cache.") -}}
{{- end -}}
{{- end -}}

{{/* Refuses what contradicts itself in a profile, as the operator does (profile_checks.py). Call with (list name profile). */}}
{{- define "lorapool.checkProfile" -}}
{{- $name := printf "runtimeProfiles.%s: " (index . 0) -}}{{- $profile := index . 1 -}}
{{- $tensor := int (default 1 $profile.tensorParallel) -}}{{- $pipeline := int (default 1 $profile.pipelineParallel) -}}
{{- $wanted := int (mul $tensor $pipeline) -}}{{- $nodes := int (default 1 $profile.nodes) -}}
{{- if ne (default "torch" $profile.engine) "vllm" -}}
{{- if gt (int (mul $wanted $nodes)) 1 -}}
{{- fail (print $name "tensorParallel, pipelineParallel and nodes need the engine vllm, since the engine torch uses one GPU: set engine to vllm, or all three to 1.") -}}
{{- end -}}
{{- else if lt (int (default 1800 $profile.startupTimeoutSeconds)) 1800 -}}
{{- fail (print $name "startupTimeoutSeconds " $profile.startupTimeoutSeconds " is too short for the engine vllm, which compiles kernels and captures graphs at its start: set it to 1800 or more, or remove it.") -}}
{{- end -}}
{{- $asked := include "lorapool.profileGPUs" $profile -}}
{{- if gt $nodes 1 -}}
{{- if or (ne $pipeline $nodes) (and $asked (ne (int $asked) $tensor)) -}}
{{- fail (print $name "with " $nodes " nodes, pipelineParallel is the number of nodes and tensorParallel that of GPUs in resources.limits, but they are " $pipeline " and " $tensor " for " (default "claims" $asked) ": make them equal.") -}}
{{- end -}}
{{- else if and $asked (ne (int $asked) $wanted) (not (and (eq (int $asked) 0) (eq $wanted 1))) -}}
{{- fail (print $name "tensorParallel " $tensor " times pipelineParallel " $pipeline " is " $wanted " GPUs, but resources.limits has " $asked ": make them equal.") -}}
{{- end -}}
{{- $shm := default "" $profile.shmSizeLimit -}}
{{- if and (gt (int (div $wanted $nodes)) 1) (or (not $shm) (lt (include "lorapool.bytes" $shm | int64) (include "lorapool.bytes" "1Gi" | int64))) -}}
{{- fail (print $name "shmSizeLimit is " (default "absent" $shm) ", but several GPUs exchange data in /dev/shm: set it to 1Gi or more.") -}}
{{- end -}}
{{- include "lorapool.checkNodes" . -}}
{{- end -}}
