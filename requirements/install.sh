#!/usr/bin/env bash
# Makes or repairs the virtual environment; called by the Makefile, which knows when it is needed.
#   install.sh PYTHON VENV STAMP
# In: requirements/cpu.lock, pyproject.toml, TORCH_INDEX (optional). Out: VENV with everything, and STAMP, which holds
# "<seconds> <unix time>". STAMP is written last; an install that was killed before is started from nothing again,
# because pip takes a half-unpacked package for an installed one.
set -euo pipefail
python=$1 venv=$2 stamp=$3
unfinished=$venv/.installing
log=$venv/install.log
started=$(date +%s)

fail() { printf '\nInstall failed: %s\n' "$1" >&2; exit 1; }

version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
  fail "'$python' does not run. Expected Python 3.11; name it with: make PYTHON=/path/to/python3.11"
[[ $version == 3.11.* ]] ||
  fail "'$python' is Python $version; expected 3.11 (the pinned vLLM and torch wheels are for 3.11). Name one with: make PYTHON=/path/to/python3.11"

if [[ -e $unfinished ]] || { [[ -e $venv ]] && ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }; then
  echo "install: $venv is unfinished or not Python 3.11; making it again"
  rm -rf "$venv"
fi
if [[ ! -e $venv ]]; then
  echo "install: virtual environment $venv (Python $version)"
  mkdir -p "$venv" && touch "$unfinished"
  "$python" -m venv "$venv" || fail "venv could not make $venv. On Debian and Ubuntu it needs the package python3.11-venv."
fi
touch "$unfinished"

torch=$(grep '^torch==' requirements/cpu.lock)  # named first, so that a machine without it hears so at once
total=$(grep -c == requirements/cpu.lock)
echo "install: $total pinned packages, about 4 GB on disk, about 2 minutes with a near index (log: $log)"
progress='/^(Collecting|Requirement already satisfied)/ { if (++n % 30 == 0) printf "install: %d of %d resolved\n", n, total; fflush() }
  /^Installing collected packages/ { print "install: unpacking"; fflush() }'
run_pip() { "$venv/bin/python" -m pip install --no-deps --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee -a "$log"; }
: > "$log"
if ! run_pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" -r requirements/cpu.lock | awk -v total="$total" "$progress"; then
  if grep -Eq 'No matching distribution found for torch==' "$log"; then
    fail "pip found no $torch. This build is not on PyPI. Expected it in PyTorch's CPU wheel index (pytorch.org, Get Started, CPU, shows its address). Next: make TORCH_INDEX=<that address> (any index or find-links that pip is configured with also serves)."
  fi
  grep -E '^ERROR' "$log" | head -5 >&2 || tail -5 "$log" >&2
  fail "pip stopped; see $log."
fi
run_pip --no-build-isolation -e . > /dev/null || { tail -5 "$log" >&2; fail "this package could not be installed; see $log."; }

rm -f "$venv"/.installed-*
seconds=$(($(date +%s) - started))
rm -f "$unfinished"
echo "$seconds $(date +%s)" > "$stamp"
echo "install: done in $seconds s"
