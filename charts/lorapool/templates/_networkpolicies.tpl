{{- define "lorapool.netpol.dns" -}}
- to:
    {{- toYaml .Values.networkPolicy.dns.to | nindent 4 }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* Addresses and ports of the API server, which has no pods to select. */}}
{{- define "lorapool.netpol.apiServer" -}}
- to:
    {{- range .Values.networkPolicy.apiServer.blocks }}
    - ipBlock:
        {{- toYaml . | nindent 8 }}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.apiServer.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{/* Addresses of artifact sources, of the ledger's database or of its sinks: all except those that serve the credentials
     of nodes. Call with (list $ "sources"). */}}
{{- define "lorapool.netpol.addresses" -}}
{{- $peers := index (index . 0).Values.networkPolicy (index . 1) -}}
- to:
    {{- range $peers.blocks }}
    - ipBlock:
        {{- toYaml . | nindent 8 }}
    {{- end }}
    {{- with $peers.to }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $peers.ports }}
  ports:
    {{- range . }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- end }}
{{- end -}}

{{- define "lorapool.netpol.metrics" -}}
- from:
    {{- toYaml .Values.networkPolicy.metricsFrom | nindent 4 }}
  ports:
    - {protocol: TCP, port: 9090}
{{- end -}}

{{- define "lorapool.netpol.toRuntimes" -}}
- to:
    - podSelector:
        matchExpressions:
          - {key: lorapool.dev/base, operator: Exists}
      namespaceSelector:
        {{- if eq .Values.scope "cluster" }} {}
        {{- else }}
        matchExpressions:
          - key: kubernetes.io/metadata.name
            operator: In
            values: {{ include "lorapool.watchNamespaces" . }}
        {{- end }}
  ports:
    - {protocol: TCP, port: 8000}
{{- end -}}

{{/* To the store or the ledger, where it is enabled. Call with (list $ "store"). */}}
{{- define "lorapool.netpol.toComponent" -}}
{{- $root := index . 0 -}}
{{- if (index $root.Values (index . 1)).enabled -}}
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ $root.Release.Namespace }}
      podSelector:
        matchLabels:
          {{- include "lorapool.selectorLabels" . | nindent 10 }}
  ports:
    - {protocol: TCP, port: 8000}
{{- end -}}
{{- end -}}

{{/* Where clouds give service accounts their identities. */}}
{{- define "lorapool.netpol.cloudIdentity" -}}
- to:
    {{- range .Values.networkPolicy.cloudIdentity.blocks }}
    - ipBlock:
        {{- toYaml . | nindent 8 }}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.cloudIdentity.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{/* What a runtime pod may connect to, and what may connect to it. Call with (list $ $profile). */}}
{{- define "lorapool.netpol.runtime" -}}
{{- $root := index . 0 -}}
ingress:
  - from:
      {{- range $component := ternary (list "gateway" "operator" "ledger") (list "gateway" "operator") $root.Values.ledger.enabled }}
      - namespaceSelector:
          matchLabels:
            kubernetes.io/metadata.name: {{ $root.Release.Namespace }}
        podSelector:
          matchLabels:
            {{- include "lorapool.selectorLabels" (list $root $component) | nindent 12 }}
      {{- end }}
    ports:
      - {protocol: TCP, port: 8000}
  {{- include "lorapool.netpol.metrics" $root | nindent 2 }}
egress:
  {{- include "lorapool.netpol.dns" $root | nindent 2 }}
  {{- include "lorapool.netpol.addresses" (list $root "sources") | nindent 2 }}
  {{- include "lorapool.netpol.toComponent" (list $root "store") | nindent 2 }}
  {{- if (index . 1).cloudIdentity }}
  {{- include "lorapool.netpol.cloudIdentity" $root | nindent 2 }}
  {{- end }}
{{- end -}}
