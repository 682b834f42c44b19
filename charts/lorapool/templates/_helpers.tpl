{{/* Name of the chart, for labels. */}}
{{- define "lorapool.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Prefix of every object's name. 40 characters leave room for the longest suffix. */}}
{{- define "lorapool.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "lorapool.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Prefix of cluster-scoped objects: two releases in two namespaces must not share one. */}}
{{- define "lorapool.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "lorapool.fullname" .) -}}
{{- end -}}

{{/* Labels that select pods and never change. Call with (list $ "component"). */}}
{{- define "lorapool.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "lorapool.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object. Call with (list $ "component"). */}}
{{- define "lorapool.labels" -}}
{{- $root := index . 0 -}}
{{ include "lorapool.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: lorapool
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* `annotations:` with commonAnnotations and additional ones, or nothing. Call with (list $ dict). */}}
{{- define "lorapool.annotations" -}}
{{- $root := index . 0 -}}
{{- with mergeOverwrite (deepCopy $root.Values.commonAnnotations) (deepCopy (index . 1)) -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Reference of an image; a digest takes precedence over the tag. Call with (list $ $.Values.image.control). */}}
{{- define "lorapool.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- $registry := $root.Values.image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (coalesce $image.tag $root.Values.image.tag $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Name of a component's service account. Call with (list $ "gateway"). */}}
{{- define "lorapool.serviceAccountName" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
{{- $account := (index $root.Values $component).serviceAccount -}}
{{- if $account.create -}}
{{- default (printf "%s-%s" (include "lorapool.fullname" $root) $component) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end -}}

{{/* Namespaces whose objects are watched, as a JSON list; empty in cluster mode, which watches all. */}}
{{- define "lorapool.watchNamespaces" -}}
{{- if eq .Values.scope "cluster" -}}
{{- list | toJson -}}
{{- else -}}
{{- default (list .Release.Namespace) .Values.watchNamespaces | uniq | sortAlpha | toJson -}}
{{- end -}}
{{- end -}}

{{/* Names of the Secrets with namespaces' own credentials for sources, as a JSON list. */}}
{{- define "lorapool.sourceSecrets" -}}
{{- $names := list .Values.artifacts.namespaceCredentials -}}
{{- range $rules := .Values.artifacts.policy -}}
{{- $names = append $names (default "" $rules.credentialsSecret) -}}
{{- end -}}
{{- without $names "" | uniq | sortAlpha | toJson -}}
{{- end -}}

{{/* Namespace of the API key Secrets. */}}
{{- define "lorapool.keysNamespace" -}}
{{- default (printf "%s-keys" (.Release.Namespace | trunc 58)) .Values.apiKeys.namespace -}}
{{- end -}}

{{/* A component's PodDisruptionBudget. Call with (list $ "gateway"). */}}
{{- define "lorapool.podDisruptionBudget" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
{{- $budget := (index $root.Values $component).podDisruptionBudget -}}
{{- if $budget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "lorapool.fullname" $root }}-{{ $component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "lorapool.labels" . | nindent 4 }}
  {{- include "lorapool.annotations" (list $root dict) | nindent 2 }}
spec:
  maxUnavailable: {{ $budget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "lorapool.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "lorapool.runtimeTokenSecret" -}}
{{- default (printf "%s-runtime-token" (include "lorapool.fullname" .)) .Values.runtimeToken.existingSecret -}}
{{- end -}}

{{/* The volume with the master token. */}}
{{- define "lorapool.masterTokenVolume" -}}
name: runtime-token
secret:
  secretName: {{ include "lorapool.runtimeTokenSecret" . }}
  defaultMode: 0440
  items:
    - {key: {{ .Values.runtimeToken.key }}, path: token}
{{- end -}}

{{/* Secret with the authority that signs the certificates of runtimes. */}}
{{- define "lorapool.internalCASecret" -}}
{{- $suffix := ternary "internal-ca-issued" "internal-ca" (hasKey .Values.internalTLS.certManager.issuerRef "name") -}}
{{- default (printf "%s-%s" (include "lorapool.fullname" .) $suffix) .Values.internalTLS.existingSecret -}}
{{- end -}}

{{/* The volume with that Secret: what signs for the operator alone, what is trusted for both. Call with (list $ component). */}}
{{- define "lorapool.internalCAVolume" -}}
{{- $tls := (index . 0).Values.internalTLS -}}
name: internal-ca
secret:
  secretName: {{ include "lorapool.internalCASecret" (index . 0) }}
  defaultMode: 0440
  optional: {{ not $tls.enabled }}
  items:
    - {key: ca.crt, path: ca.crt}
    {{- if and $tls.enabled (eq (index . 1) "operator") }}
    - {key: tls.crt, path: tls.crt}
    - {key: tls.key, path: tls.key}
    {{- end }}
{{- end -}}

{{/* Secret with the token of the store or the ledger. Call with (list $ "store"), as all of the following. */}}
{{- define "lorapool.tokenSecret" -}}
{{- $component := index . 1 -}}
{{- default (printf "%s-%s-token" (include "lorapool.fullname" (index . 0)) $component) (index (index . 0).Values $component).token.existingSecret -}}
{{- end -}}

{{/* The volume with that token. */}}
{{- define "lorapool.tokenVolume" -}}
name: {{ index . 1 }}-token
secret:
  secretName: {{ include "lorapool.tokenSecret" . }}
  defaultMode: 0440
  items:
    - {key: {{ (index (index . 0).Values (index . 1)).token.key }}, path: token}
{{- end -}}

{{/* Secret with the component's certificate, which the operator writes. */}}
{{- define "lorapool.tlsSecret" -}}
{{- printf "%s-%s-tls" (include "lorapool.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{/* URL of the component; its certificate has a name of its own. */}}
{{- define "lorapool.componentURL" -}}
{{- $root := index . 0 -}}
{{- printf "%s://%s-%s.%s.svc:8000" (ternary "https" "http" $root.Values.internalTLS.enabled) (include "lorapool.fullname" $root) (index . 1) $root.Release.Namespace -}}
{{- end -}}

{{/* The Secret with the component's token, unless there is one: made once and kept on upgrade, since with a new one no
     token that was given out would be valid. */}}
{{- define "lorapool.componentToken" -}}
{{- $root := index . 0 -}}{{- $token := (index $root.Values (index . 1)).token -}}
{{- if not $token.existingSecret }}
{{- $old := dig "data" $token.key "" (lookup "v1" "Secret" $root.Release.Namespace (include "lorapool.tokenSecret" .) | default dict) }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ include "lorapool.tokenSecret" . }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "lorapool.labels" . | nindent 4 }}
  {{- include "lorapool.annotations" (list $root dict) | nindent 2 }}
type: Opaque
data:
  {{ $token.key }}: {{ $old | default (randBytes 32 | b64dec | printf "%x" | b64enc) | quote }}
{{- end }}
{{- end -}}

{{/* The component's claim, unless there is one. */}}
{{- define "lorapool.componentClaim" -}}
{{- $root := index . 0 -}}{{- $persistence := (index $root.Values (index . 1)).persistence -}}
{{- if and $persistence.enabled (not $persistence.existingClaim) }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "lorapool.fullname" $root }}-{{ index . 1 }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "lorapool.labels" . | nindent 4 }}
  {{- include "lorapool.annotations" (list $root (dict "helm.sh/resource-policy" "keep")) | nindent 2 }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with $persistence.storageClass }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ $persistence.size }}
{{- end }}
{{- end -}}

{{/* The volume `data` of the component. */}}
{{- define "lorapool.dataVolume" -}}
{{- $persistence := (index (index . 0).Values (index . 1)).persistence -}}
name: data
{{- if $persistence.enabled }}
persistentVolumeClaim:
  claimName: {{ $persistence.existingClaim | default (printf "%s-%s" (include "lorapool.fullname" (index . 0)) (index . 1)) }}
{{- else }}
emptyDir: {}
{{- end }}
{{- end -}}

{{/* The volume with the component's certificate: the pod waits until the operator has written it. */}}
{{- define "lorapool.tlsVolume" -}}
name: tls
secret: {secretName: {{ include "lorapool.tlsSecret" . }}, defaultMode: 0440}
{{- end -}}

{{- define "lorapool.leaseName" -}}
{{- printf "%s-operator" (include "lorapool.fullname" .) -}}
{{- end -}}

{{/* securityContext of a pod under Pod Security `restricted`. */}}
{{- define "lorapool.podSecurityContext" -}}
runAsNonRoot: true
{{- if .Values.fixedUsers }}
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* securityContext of a container under Pod Security `restricted`. */}}
{{- define "lorapool.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop:
    - ALL
{{- end -}}

{{- define "lorapool.probeScheme" -}}
{{- if .Values.metrics.tls.secret }}, scheme: HTTPS{{ end -}}
{{- end -}}

{{/* A process may take two minutes to start, on a busy node or a slow disk, before its liveness counts. */}}
{{- define "lorapool.startupProbe" -}}
httpGet: {path: /healthz, port: metrics{{ include "lorapool.probeScheme" . }}}
periodSeconds: 2
timeoutSeconds: 3
failureThreshold: 60
{{- end -}}

{{/* Pod fields that the values of every component can set. Call with (list $ $.Values.gateway). */}}
{{- define "lorapool.podScheduling" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $component.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $component.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $component.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $component.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Annotations of a component's pods. Call with (list $ $.Values.gateway). */}}
{{- define "lorapool.podAnnotations" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
{{- $annotations := dict -}}
{{- if $root.Values.metrics.scrapeAnnotations -}}
{{- $annotations = dict "prometheus.io/scrape" "true" "prometheus.io/port" "9090" "prometheus.io/path" "/metrics" -}}
{{- if $root.Values.metrics.tls.secret -}}{{- $_ := set $annotations "prometheus.io/scheme" "https" -}}{{- end -}}
{{- end -}}
{{- with mergeOverwrite $annotations (deepCopy $root.Values.commonAnnotations) (deepCopy $component.podAnnotations) -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Refuses combinations that the schema cannot express. */}}
{{- define "lorapool.validate" -}}
{{- if and (eq .Values.scope "cluster") .Values.watchNamespaces -}}
{{- fail "watchNamespaces must be empty with scope=cluster: the whole cluster is watched. Use scope=namespaced to watch a list." -}}
{{- end -}}
{{- if not .Values.apiKeys.namespace -}}
{{- range (lookup "v1" "Secret" .Release.Namespace "").items -}}
{{- if eq (dig "labels" "lorapool.dev/api-key" "" .metadata) "true" -}}
{{- fail (printf "the API key %s is in the release's namespace, where the gateway no longer looks for keys by default. Move the keys to %s (docs/how-to/upgrade.md), or set apiKeys.namespace=%s." .metadata.name (include "lorapool.keysNamespace" $) $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.internalTLS.existingSecret .Values.internalTLS.certManager.issuerRef.name -}}
{{- fail "internalTLS.existingSecret and internalTLS.certManager.issuerRef are both set: set only one of them." -}}
{{- end -}}
{{- range $prefix, $values := dict "" .Values "ledger." .Values.ledger -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail (printf "%singress.enabled needs at least one entry in %singress.hosts." $prefix $prefix) -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail (printf "%shttpRoute.enabled needs at least one entry in %shttpRoute.parentRefs (the Gateway to attach to)." $prefix $prefix) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int .Values.ledger.replicas) 1) (not .Values.ledger.database.existingSecret) -}}
{{- fail "ledger.replicas above 1 needs PostgreSQL (ledger.database.existingSecret): one process alone writes an SQLite file." -}}
{{- end -}}
{{- if not (hasKey .Values.runtimeProfiles "default") -}}
{{- fail "runtimeProfiles must keep a profile named default: BaseModels that name none use it." -}}
{{- end -}}
{{- range $name, $profile := .Values.runtimeProfiles -}}
{{- include "lorapool.checkProfile" (list $name $profile) -}}
{{- end -}}
{{- end -}}
