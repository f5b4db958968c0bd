{{- define "edge-node.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 52 characters: the StatefulSet adds "-0" and a revision hash, the headless Service "-headless". */}}
{{- define "edge-node.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "edge-node.selectorLabels" -}}
app.kubernetes.io/name: {{ include "edge-node.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "edge-node.labels" -}}
{{ include "edge-node.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: lorikeet
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "edge-node.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "edge-node.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "edge-node.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* One variable per setting: settings.<group>.<name> -> EDGE_<GROUP>__<NAME>; lists and maps as JSON, null left out. */}}
{{- define "edge-node.settings" -}}
{{- range $group, $fields := . -}}
{{- if kindIs "map" $fields -}}
{{- range $name, $value := $fields -}}
{{- if not (kindIs "invalid" $value) }}
- name: EDGE_{{ upper $group }}__{{ upper $name }}
  value: {{ include "edge-node.value" $value }}
{{- end -}}
{{- end -}}
{{- else if not (kindIs "invalid" $fields) }}
- name: EDGE_{{ upper $group }}
  value: {{ include "edge-node.value" $fields }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* toJson, not toString: a large number must not become 1.7e+10. */}}
{{- define "edge-node.value" -}}
{{- if kindIs "string" . -}}{{ . | quote }}{{- else -}}{{ toJson . | quote }}{{- end -}}
{{- end -}}

{{- define "edge-node.probeTiming" -}}
periodSeconds: {{ .periodSeconds }}
timeoutSeconds: {{ .timeoutSeconds }}
failureThreshold: {{ .failureThreshold }}
{{- end -}}
