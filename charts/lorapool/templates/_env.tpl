{{/* Settings and credentials of artifact sources, the same for the operator, which inspects sources, and the runtimes,
     which fetch them. A key that the Secret lacks is omitted. */}}
{{- define "lorapool.env.artifacts" -}}
{{- $artifacts := .Values.artifacts -}}
{{- $env := list -}}
{{- with $artifacts.insecureRegistries -}}
{{- $env = append $env (dict "name" "LORAPOOL_OCI_INSECURE_HOSTS" "value" (join "," .)) -}}
{{- end -}}
{{- with $artifacts.privateHosts -}}
{{- $env = append $env (dict "name" "LORAPOOL_SOURCE_PRIVATE_HOSTS" "value" (join "," .)) -}}
{{- end -}}
{{- $maxBytes := toString (int64 $artifacts.maxBaseBytes) -}}
{{- $env = append $env (dict "name" "LORAPOOL_BASE_MAX_BYTES" "value" $maxBytes) -}}
{{- $timeout := toString (int64 $artifacts.baseFetchTimeoutSeconds) -}}
{{- $env = append $env (dict "name" "LORAPOOL_BASE_FETCH_TIMEOUT_S" "value" $timeout) -}}
{{- if $artifacts.caBundle.configMap -}}
{{- range $name := list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" -}}
{{- $env = append $env (dict "name" $name "value" "/etc/lorapool/ca/ca.crt") -}}
{{- end -}}
{{- end -}}
{{- $env = concat $env $artifacts.env -}}
{{- with $artifacts.credentials.existingSecret -}}
{{- $secret := . -}}
{{- range $key := $artifacts.credentials.keys -}}
{{- $ref := dict "name" $secret "key" $key "optional" true -}}
{{- $env = append $env (dict "name" $key "valueFrom" (dict "secretKeyRef" $ref)) -}}
{{- end -}}
{{- $env = append $env (dict "name" "LORAPOOL_CREDENTIALS_DIR" "value" "/etc/lorapool/credentials") -}}
{{- end -}}
{{- toJson $env -}}
{{- end -}}

{{/* Files that the values name, mounted into a pod. Call with (list $ withCaBundle); a JSON object of volumes, mounts and
     the metrics' variables without their prefix. */}}
{{- define "lorapool.files" -}}
{{- $root := index . 0 -}}{{- $bundle := $root.Values.artifacts.caBundle -}}{{- $metrics := $root.Values.metrics -}}
{{- $volumes := list -}}{{- $mounts := list -}}{{- $env := dict -}}
{{- if index . 1 -}}
{{- with $root.Values.artifacts.credentials.existingSecret -}}
{{- $items := list -}}
{{- range $key := $root.Values.artifacts.credentials.keys -}}{{- $items = append $items (dict "key" $key "path" $key) -}}{{- end -}}
{{- $secret := dict "secretName" . "optional" true "defaultMode" 288 "items" $items -}}
{{- $volumes = append $volumes (dict "name" "credentials" "secret" $secret) -}}
{{- $mounts = append $mounts (dict "name" "credentials" "mountPath" "/etc/lorapool/credentials" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- if and (index . 1) $bundle.configMap -}}
{{- $item := dict "key" $bundle.key "path" "ca.crt" -}}
{{- $volumes = append $volumes (dict "name" "ca-bundle" "configMap" (dict "name" $bundle.configMap "items" (list $item))) -}}
{{- $mounts = append $mounts (dict "name" "ca-bundle" "mountPath" "/etc/lorapool/ca" "readOnly" true) -}}
{{- end -}}
{{- with $metrics.tls.secret -}}
{{- $volumes = append $volumes (dict "name" "metrics-tls" "secret" (dict "secretName" . "defaultMode" 288)) -}}
{{- $mounts = append $mounts (dict "name" "metrics-tls" "mountPath" "/etc/lorapool/metrics-tls" "readOnly" true) -}}
{{- $_ := set $env "METRICS_TLS_DIR" "/etc/lorapool/metrics-tls" -}}
{{- end -}}
{{- with $metrics.token.secret -}}
{{- $item := dict "key" $metrics.token.key "path" "token" -}}
{{- $volumes = append $volumes (dict "name" "metrics-token" "secret" (dict "secretName" . "defaultMode" 288 "items" (list $item))) -}}
{{- $mounts = append $mounts (dict "name" "metrics-token" "mountPath" "/etc/lorapool/metrics-token" "readOnly" true) -}}
{{- $_ := set $env "METRICS_TOKEN_FILE" "/etc/lorapool/metrics-token/token" -}}
{{- end -}}
{{- dict "volumes" $volumes "mounts" $mounts "env" $env | toJson -}}
{{- end -}}

{{/* How long a gateway that stops waits for requests in flight. The operator gives a profile without a value 900 s. */}}
{{- define "lorapool.drainSeconds" -}}
{{- $longest := 0 -}}
{{- range $profile := .Values.runtimeProfiles -}}
{{- $longest = max $longest (dig "terminationGracePeriodSeconds" 900 $profile) -}}
{{- end -}}
{{- .Values.gateway.drainSeconds | default $longest | int64 -}}
{{- end -}}

{{- define "lorapool.env.gateway" -}}
{{- $gateway := .Values.gateway -}}
- name: LORAPOOL_GATEWAY_NAMESPACES
  value: {{ include "lorapool.watchNamespaces" . | fromJsonArray | join "," | default "*" | quote }}
- name: LORAPOOL_GATEWAY_KEYS_NAMESPACE
  value: {{ include "lorapool.keysNamespace" . }}
- name: LORAPOOL_GATEWAY_KEYS_MAX_AGE_S
  value: {{ .Values.apiKeys.maxAgeSeconds | int64 | quote }}
- name: LORAPOOL_GATEWAY_KEYS_WHEN_STALE
  value: {{ .Values.apiKeys.whenStale }}
- name: LORAPOOL_GATEWAY_MASTER_TOKEN_FILE
  value: /etc/lorapool/master/token
- name: LORAPOOL_GATEWAY_INTERNAL_CA_FILE
  value: /etc/lorapool/internal-ca/ca.crt
- name: LORAPOOL_GATEWAY_LOG_LEVEL
  value: {{ $gateway.logLevel }}
- name: LORAPOOL_GATEWAY_MAX_BODY_BYTES
  value: {{ $gateway.maxBodyBytes | int64 | quote }}
- name: LORAPOOL_GATEWAY_MAX_REQUESTS
  value: {{ $gateway.maxRequests | int64 | quote }}
- name: LORAPOOL_GATEWAY_MAX_HELD_BODY_BYTES
  value: {{ $gateway.maxHeldBodyBytes | int64 | quote }}
- name: LORAPOOL_GATEWAY_MAX_HELD_BODY_BYTES_PER_KEY
  value: {{ $gateway.maxHeldBodyBytesPerKey | int64 | quote }}
- name: LORAPOOL_GATEWAY_MAX_CONNECTIONS
  value: {{ $gateway.maxConnections | int64 | quote }}
- name: LORAPOOL_GATEWAY_MAX_CONNECTIONS_PER_ADDRESS
  value: {{ $gateway.maxConnectionsPerAddress | int64 | quote }}
- name: LORAPOOL_GATEWAY_CORS_ORIGINS
  value: {{ join "," $gateway.corsOrigins | quote }}
- name: LORAPOOL_GATEWAY_REQUEST_TIMEOUT_S
  value: {{ $gateway.requestTimeoutSeconds | int64 | quote }}
- name: LORAPOOL_GATEWAY_DEADLINE_S
  value: {{ $gateway.deadlineSeconds | int64 | quote }}
- name: LORAPOOL_GATEWAY_SHUTDOWN_DELAY_S
  value: {{ $gateway.shutdownDelaySeconds | int64 | quote }}
- name: LORAPOOL_GATEWAY_DRAIN_TIMEOUT_S
  value: {{ include "lorapool.drainSeconds" . | quote }}
- name: LORAPOOL_GATEWAY_MAX_TRACKED_ADAPTERS
  value: {{ .Values.metrics.maxTrackedAdapters | int64 | quote }}
{{- if .Values.store.enabled }}
- name: LORAPOOL_GATEWAY_STORE_URL
  value: {{ include "lorapool.componentURL" (list . "store") }}
- name: LORAPOOL_GATEWAY_STORE_TOKEN_FILE
  value: /etc/lorapool/store/token
- name: LORAPOOL_GATEWAY_TUNING_UNFINISHED_JOBS
  value: {{ .Values.tuning.quotas.unfinishedJobs | int64 | quote }}
{{- end }}
- name: LORAPOOL_GATEWAY_QUOTA_FILE
  value: /etc/lorapool/quotas/quotas.json
{{- if .Values.ledger.enabled }}
- name: LORAPOOL_GATEWAY_LEDGER_URL
  value: {{ include "lorapool.componentURL" (list . "ledger") }}
- name: LORAPOOL_GATEWAY_LEDGER_TOKEN_FILE
  value: /etc/lorapool/ledger/token
- name: LORAPOOL_GATEWAY_JOURNAL_DIR
  value: /var/lib/lorapool/journal
{{- end }}
{{- range $name, $value := (include "lorapool.files" (list . false) | fromJson).env }}
- name: LORAPOOL_GATEWAY_{{ $name }}
  value: {{ $value }}
{{- end }}
{{- end -}}

{{- define "lorapool.env.ledger" -}}
{{- $ledger := .Values.ledger -}}
- name: LORAPOOL_LEDGER_DATABASE_URL
  {{- if $ledger.database.existingSecret }}
  valueFrom:
    secretKeyRef: {name: {{ $ledger.database.existingSecret }}, key: {{ $ledger.database.key }}}
  {{- else }}
  value: sqlite:////data/ledger.db
  {{- end }}
- name: LORAPOOL_LEDGER_NAMESPACES
  value: {{ include "lorapool.watchNamespaces" . | fromJsonArray | join "," | default "*" | quote }}
- name: LORAPOOL_LEDGER_KEYS_NAMESPACE
  value: {{ include "lorapool.keysNamespace" . }}
- name: LORAPOOL_LEDGER_TOKEN_FILE
  value: /etc/lorapool/ledger/token
- name: LORAPOOL_LEDGER_MASTER_TOKEN_FILE
  value: /etc/lorapool/master/token
- name: LORAPOOL_LEDGER_INTERNAL_CA_FILE
  value: /etc/lorapool/internal-ca/ca.crt
{{- if .Values.internalTLS.enabled }}
- name: LORAPOOL_LEDGER_TLS_DIR
  value: /etc/lorapool/tls
{{- end }}
{{- if .Values.tuning.enabled }}
- name: LORAPOOL_LEDGER_TUNING
  value: "true"
{{- end }}
- name: LORAPOOL_LEDGER_CLOSE_AFTER_DAYS
  value: {{ $ledger.closeAfterDays | int64 | quote }}
- name: LORAPOOL_LEDGER_LOG_LEVEL
  value: {{ $ledger.logLevel }}
{{- range $name, $value := (include "lorapool.files" (list . false) | fromJson).env }}
- name: LORAPOOL_LEDGER_{{ $name }}
  value: {{ $value }}
{{- end }}
{{- end -}}

{{- define "lorapool.env.operator" -}}
{{- $operator := .Values.operator -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: /tmp/hf
- name: LORAPOOL_OPERATOR_NAMESPACES
  value: {{ include "lorapool.watchNamespaces" . | fromJsonArray | join "," | default "*" | quote }}
- name: LORAPOOL_OPERATOR_OWN_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: LORAPOOL_OPERATOR_IDENTITY
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: LORAPOOL_OPERATOR_LEASE_NAME
  value: {{ include "lorapool.leaseName" . }}
- name: LORAPOOL_OPERATOR_RUNTIME_IMAGE
  value: {{ include "lorapool.image" (list . .Values.image.runtime) | quote }}
- name: LORAPOOL_OPERATOR_RUNTIME_IMAGE_PULL_POLICY
  value: {{ .Values.image.runtime.pullPolicy }}
- name: LORAPOOL_OPERATOR_RUNTIME_VLLM_IMAGE
  value: {{ include "lorapool.image" (list . .Values.image.runtimeVllm) | quote }}
- name: LORAPOOL_OPERATOR_RUNTIME_VLLM_IMAGE_PULL_POLICY
  value: {{ .Values.image.runtimeVllm.pullPolicy }}
- name: LORAPOOL_OPERATOR_PROFILES_FILE
  value: /etc/lorapool/profiles/profiles.yaml
- name: LORAPOOL_OPERATOR_SOURCE_POLICY_FILE
  value: /etc/lorapool/profiles/source-policy.yaml
- name: LORAPOOL_OPERATOR_NAMESPACE_CREDENTIALS
  value: {{ .Values.artifacts.namespaceCredentials | quote }}
- name: LORAPOOL_OPERATOR_MASTER_TOKEN_FILE
  value: /etc/lorapool/master/token
- name: LORAPOOL_OPERATOR_INTERNAL_CA_DIR
  value: /etc/lorapool/internal-ca
- name: LORAPOOL_OPERATOR_INTERNAL_TLS
  value: {{ .Values.internalTLS.enabled | quote }}
- name: LORAPOOL_OPERATOR_LOG_LEVEL
  value: {{ $operator.logLevel }}
- name: LORAPOOL_OPERATOR_LOG_FORMAT
  value: {{ $operator.logFormat }}
- name: LORAPOOL_OPERATOR_MAX_CONCURRENT_ROLLOUTS
  value: {{ $operator.rollout.maxConcurrentBases | int64 | quote }}
{{- if .Values.tuning.enabled }}
- name: LORAPOOL_OPERATOR_TUNING
  value: "true"
- name: LORAPOOL_OPERATOR_TUNING_ACTIVE_JOBS
  value: {{ .Values.tuning.quotas.activeJobs | int64 | quote }}
- name: LORAPOOL_OPERATOR_TUNING_UNFINISHED_JOBS
  value: {{ .Values.tuning.quotas.unfinishedJobs | int64 | quote }}
- name: LORAPOOL_OPERATOR_TUNING_MONTH_TOKENS
  value: {{ .Values.tuning.quotas.tokensPerMonth | int64 | quote }}
- name: LORAPOOL_OPERATOR_TUNING_PRIORITY_CLASS
  value: {{ include "lorapool.tuningPriorityClass" . | quote }}
{{- end }}
- name: LORAPOOL_OPERATOR_RESYNC_S
  value: {{ $operator.resyncSeconds | int64 | quote }}
- name: LORAPOOL_OPERATOR_INSPECTION_CONCURRENCY
  value: {{ $operator.inspectionConcurrency | int64 | quote }}
- name: LORAPOOL_OPERATOR_USAGE_INTERVAL_S
  value: {{ $operator.usageIntervalSeconds | int64 | quote }}
- name: LORAPOOL_OPERATOR_MAX_TRACKED_ADAPTERS
  value: {{ .Values.metrics.maxTrackedAdapters | int64 | quote }}
{{- if .Values.store.enabled }}
- name: LORAPOOL_OPERATOR_STORE_URL
  value: {{ include "lorapool.componentURL" (list . "store") }}
- name: LORAPOOL_OPERATOR_STORE_TOKEN_FILE
  value: /etc/lorapool/store/token
{{- if .Values.internalTLS.enabled }}
- name: LORAPOOL_OPERATOR_STORE_TLS_SECRET
  value: {{ include "lorapool.tlsSecret" (list . "store") }}
{{- end }}
{{- end }}
{{- if .Values.ledger.enabled }}
- name: LORAPOOL_OPERATOR_RUNTIME_USAGE
  value: "true"
{{- if .Values.internalTLS.enabled }}
- name: LORAPOOL_OPERATOR_LEDGER_TLS_SECRET
  value: {{ include "lorapool.tlsSecret" (list . "ledger") }}
{{- end }}
{{- end }}
{{- range $name, $value := (include "lorapool.files" (list . true) | fromJson).env }}
- name: LORAPOOL_OPERATOR_{{ $name }}
  value: {{ $value }}
{{- end }}
{{- range include "lorapool.env.artifacts" . | fromJsonArray }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end -}}
